"""Attention sinks and a window of the newest tokens: StreamingLLM's cache (arXiv 2309.17453)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from accelpass.ir.attention.spec.spec import AttentionSpec
from accelpass.ir.core.program import Program
from accelpass.ir.kv.sites import KVSite
from accelpass.ir.kv.storage import New
from accelpass.passes.core.base import Skip
from accelpass.passes.kv_cache.base import KVPass
from accelpass.passes.kv_cache.storage.rotation import give_unrotated
from accelpass.passes.kv_cache.storage.slots import Amount, Slots, check_budget, share


@dataclass(frozen=True)
class SinksAndNewest(Slots):
    """The first ``sinks`` tokens, and the newest; no token has a score of its own."""

    part: ClassVar[str] = "kv_window"
    sinks: int
    budget: Amount

    def most(self, capacity: int) -> int:
        limit, _ = self.quota(torch.tensor([capacity]))
        return min(capacity, int(limit))

    def quota(self, total: Tensor) -> tuple[Tensor, Tensor]:
        limit = share(total, self.budget).clamp_min(self.sinks + 1)
        if isinstance(self.budget, float) and self.budget >= 1:
            limit = limit.new_full(limit.shape, 1 << 30)
        return limit, limit - self.sinks

    def pinned(self, positions: Tensor, total: Tensor, newest: Tensor) -> Tensor:
        return (positions < self.sinks) | super().pinned(positions, total, newest)

    def prompt_score(self, new: New) -> Tensor:
        return new.positions.float()

    def step_score(self, score: Tensor, mass: Tensor, positions: Tensor) -> Tensor:
        return positions.float()


@dataclass(frozen=True)
class KVWindow(KVPass):
    """Keep the first tokens of a KVCache and its newest; evict what lies between.

    The budget is a share of the prompt, as in ``h2o`` (inferred), or ``tokens``, a fixed number as in the paper.

    Attributes:
        budget: share of the prompt that is kept; 1 keeps everything.
        sinks: how many first tokens stay.
        tokens: how many tokens are kept, sinks included, in place of a share of the prompt.
        positions: keys have the position of the ``"text"``, that they were rotated with, or of the ``"cache"``, as in the paper
            (section 3.2): the rows that are left are numbered anew when they are read.

    Raises:
        OptionError: a budget outside (0, 1], a negative number of sinks, no more tokens than sinks.
    """

    name: ClassVar[str] = "kv_window"
    summary: ClassVar[str] = "keep the first tokens of a KVCache and the newest; evict the rest"
    paper: ClassVar[str] = "StreamingLLM, arXiv 2309.17453"
    identity: ClassVar[dict[str, Any] | None] = {"budget": 1.0}
    budget: float = 0.2
    sinks: int = 4
    tokens: int | None = None
    positions: Literal["text", "cache"] = "text"

    def __post_init__(self) -> None:
        check_budget(self, self.budget, self.tokens)
        if self.sinks < 0:
            raise self.fail("sinks", "0 or more tokens")
        if self.tokens is not None and self.tokens <= self.sinks:
            raise self.fail("tokens", f"more than the {self.sinks} sinks, so that the newest tokens have room")
        self.check_sites()

    def edited(
        self, program: Program, site: KVSite, spec: AttentionSpec, number: int
    ) -> tuple[AttentionSpec, str] | Skip:
        tables = give_unrotated(program, site) if self.positions == "cache" else None
        if isinstance(tables, str):
            return Skip(f"positions='cache': {tables}")
        store = SinksAndNewest(self.sinks, float(self.budget) if self.tokens is None else self.tokens, tables=tables)
        return spec.edited(
            by=self.name, store=store
        ), f"{store.most(site.capacity)} of {site.capacity} tokens a head at most"
