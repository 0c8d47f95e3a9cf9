"""H2O: keep the newest tokens and those that attention went to most (arXiv 2306.14048, NeurIPS 2023)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from accelpass.ir.attention.spec.spec import AttentionSpec
from accelpass.ir.core.program import Program
from accelpass.ir.kv.sites import KVSite
from accelpass.ir.kv.storage import New
from accelpass.passes.core.base import Skip
from accelpass.passes.kv_cache.base import KVPass
from accelpass.passes.kv_cache.slots import Amount, Slots, check_budget, check_recent, divided, said, share


@dataclass(frozen=True)
class HeavyHitters(Slots):
    """``heavy`` and ``recent`` parts of the prompt; the score is the attention that a token has got so far.

    Attributes:
        mean: tokens are compared by their score for each token that could attend to them.
    """

    part: ClassVar[str] = "h2o"
    heavy: Amount
    recent: Amount
    mean: bool = field(default=False, kw_only=True)

    def most(self, capacity: int) -> int:
        limit, _ = self.quota(torch.tensor([capacity]))
        return min(capacity, int(limit))

    def quota(self, total: Tensor) -> tuple[Tensor, Tensor]:
        newest = share(total, self.recent).clamp_min(1)
        if isinstance(self.heavy, float) and self.heavy + self.recent >= 1:
            return newest.new_full(newest.shape, 1 << 30), newest
        return share(total, self.heavy) + newest, newest

    @property
    def wants(self) -> frozenset[str]:
        return frozenset({self.tap.key})

    def prompt_score(self, new: New) -> Tensor:
        return new.statistics[self.tap.key]

    def step_score(self, score: Tensor, mass: Tensor, positions: Tensor) -> Tensor:
        return score + mass

    def rank(self, score: Tensor, positions: Tensor, total: Tensor) -> Tensor:
        return score / (total[:, None, None] - positions).clamp_min(1) if self.mean else score


@dataclass(frozen=True)
class H2O(KVPass):
    """Evict all but heavy hitters and recent tokens, for each key/value head on its own.

    The prompt's own attention is exact and dense; its probabilities, summed over queries, are the first scores. Each later
    token attends over what is left and itself, adds its probabilities, and one token leaves. Budgets are shares of the
    prompt's length and are fixed at its end, or ``tokens``, as the authors' code has it too: a cache, and a time for each
    token, that do not grow with the prompt. Scores of query heads that share a key are summed (inferred); each sequence
    of a batch has its own (inferred); tokens added in one piece to a cache that is not empty set the budget anew, from all
    tokens so far (inferred), and recent tokens are told by their position (inferred); at least one is kept (inferred).

    Attributes:
        budget: share of the prompt that is kept; 1 keeps everything.
        recent: share of the budget for the newest tokens, the rest is for heavy hitters; the paper gives both a tenth of
            the prompt.
        tokens: how many tokens of each head are kept, in place of a share of the prompt.
        score: heavy hitters have the largest ``"sum"`` of attention, as in the paper, which early tokens had more time to
            collect, or the largest ``"mean"`` over the tokens that could attend to them (the ranking of ZipVL, arXiv
            2410.08584).

    Raises:
        OptionError: a budget outside (0, 1], a share outside [0, 1], fewer than 2 tokens, another score.
    """

    name: ClassVar[str] = "h2o"
    summary: ClassVar[str] = "keep the newest tokens of a KVCache and those that attention went to most; evict the rest"
    paper: ClassVar[str] = "H2O, arXiv 2306.14048"
    identity: ClassVar[dict[str, Any] | None] = {"budget": 1.0}
    budget: float = 0.2
    recent: float = 0.5
    tokens: int | None = None
    score: Literal["sum", "mean"] = "sum"

    def __post_init__(self) -> None:
        check_budget(self, self.budget, self.tokens)
        check_recent(self, self.recent)
        self.check_sites()

    def edited(
        self, program: Program, site: KVSite, spec: AttentionSpec, number: int
    ) -> tuple[AttentionSpec, str] | Skip:
        store = HeavyHitters(*divided(self.budget, self.recent, self.tokens), mean=self.score == "mean")
        slots = store.most(site.capacity)
        what = f"{slots} of {site.capacity} tokens a head at most, {said(self.budget, self.tokens)}"
        return spec.edited(by=self.name, store=store), what
