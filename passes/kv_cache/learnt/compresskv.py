"""CompressKV: a few retrieval heads of each layer say which tokens stay, and layers that suffer more keep more (arXiv 2508.02401)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from accelpass.ir.attention.spec.spec import Places, ScoreTap
from accelpass.ir.core.graph import value
from accelpass.ir.core.program import Program
from accelpass.ir.errors import OptionError, PlanError
from accelpass.ir.kv.sites import KVSite, kv_sites
from accelpass.ir.kv.storage import New
from accelpass.passes.core.base import CalibratedOnLoss, Skip, Study
from accelpass.passes.kv_cache.budget import Evicting
from accelpass.passes.kv_cache.learnt.retrieval import OBSERVED, Kept, errors, rankings
from accelpass.passes.kv_cache.storage.heavy_hitters import HeavyHitters
from accelpass.passes.kv_cache.storage.slots import Amount

LEAST, MOST, SHARES = 32, 3, 1000
"""Tokens of the least layer; times the mean of the largest; and what a share of the prompt is counted in."""


@dataclass(frozen=True)
class HeadsMass(ScoreTap):
    """The probability that each key got from some query heads, summed over queries, in the key/value heads that these read."""

    part: ClassVar[str] = "heads_mass"
    heads: tuple[int, ...]

    def __call__(self, scores: Tensor, at: Places) -> Tensor:
        kv_heads, groups = scores.shape[1:3]
        sums = []
        for h in range(kv_heads):
            mine = [n - (at.head + h) * groups for n in self.heads if 0 <= n - (at.head + h) * groups < groups]
            each = [torch.nan_to_num(scores[:, h, g].softmax(-1)).sum(1) for g in mine]
            sums.append(torch.stack(each).sum(0) if each else torch.zeros_like(scores[:, h, 0, 0]))
        return torch.stack(sums, 1)


@dataclass(frozen=True)
class OneChoice(HeavyHitters):
    """All key/value heads keep the same tokens: a token's score is the sum of what it got in all of them."""

    part: ClassVar[str] = "one_choice"

    def prompt_score(self, new: New) -> Tensor:
        return super().prompt_score(new).sum(1, keepdim=True).expand(-1, new.k.shape[1], -1)

    def step_score(self, score: Tensor, mass: Tensor, positions: Tensor) -> Tensor:
        return score + mass.sum(1, keepdim=True)


@dataclass(frozen=True)
class CompressKV(Evicting, CalibratedOnLoss):
    """When a prompt ends, keep its last tokens and those that semantic retrieval heads attend to; the answer is kept as well.

    Of the last ``window`` queries the first ``retrieval`` heads of a layer's ranking give the score, which neighbours share
    (``kernel``); heads that look at sinks and at what is near have no say. All heads of a layer keep the same tokens. A layer has ``LEAST``
    tokens and a part of the rest by the error that eviction makes in it, three times the mean at most; a budget that is a share of the
    prompt is divided in the same way, without a least part and with the window besides (inferred).

    ``accelpass.calibrate(model, batches, passes=["compresskv"])`` finds both on texts with a needle: ``labels`` for the answer
    alone, and ``needle``, True where the text has what the answer repeats (without it: the longest run of tokens that both
    have, inferred). See :mod:`.retrieval`. Scores are float32; the authors' are rounded to the model's dtype.

    Attributes:
        tokens: how many tokens of each head are kept, the mean over layers; the authors try 128 to 2048.
        recent: share of the budget for the newest tokens where that is more than ``window``.
        window: last queries of a prompt that are looked at; their tokens stay.
        retrieval: how many heads of the ranking count.
        ranking: query heads by hand, best first, in the place of a plan's; ``sites`` gives each layer its own.
        layers: the parts of layers are ``"by error"``, or ``"even"``; ``pyramid`` is another way, and takes the place of both.

    Raises:
        OptionError: a budget that the window fills, no heads, or another option out of range; there is no plan, or one of another model.
    """

    name: ClassVar[str] = "compresskv"
    summary: ClassVar[str] = "a few retrieval heads, found by calibration, say which tokens of a KVCache stay"
    paper: ClassVar[str] = "CompressKV, arXiv 2508.02401"
    identity: ClassVar[dict[str, Any] | None] = {"tokens": None, "budget": 1.0}
    store: ClassVar[type[HeavyHitters]] = OneChoice
    tokens: int | None = 1024
    recent: float = 0.0
    evicts: Literal["each token", "after the prompt"] = "after the prompt"
    window: int | None = 8
    kernel: int = 5
    retrieval: int = 4
    ranking: tuple[int, ...] = ()
    layers: Literal["by error", "even"] = "by error"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.tokens is not None and self.tokens <= self._newest:
            raise self.fail("tokens", f"more than the {self._newest} newest, which stay whatever their score")
        if self.retrieval < 1:
            raise self.fail("retrieval", "1 head or more")
        if any(head < 0 for head in self.ranking) or len(set(self.ranking)) < len(self.ranking):
            raise self.fail("ranking", "numbers of query heads, each once")

    @property
    def _newest(self) -> int:
        share = 0 if self.tokens is None else round(self.tokens * self.recent)
        return max(self.window or 1, share)

    @property
    def tap(self) -> ScoreTap:
        return HeadsMass(tuple(sorted(self.ranking[: self.retrieval])))

    def at_site(self, program: Program, site: KVSite) -> CompressKV | Skip:
        assert site.attention is not None
        heads = value(site.attention.args[0]).shape[1]
        if self.ranking:
            if max(self.ranking) >= heads:
                raise self.fail("ranking", f"query heads below {heads}, as many as {site.path} has")
            return self
        found = program.artefacts.get(artefact(site.path, "heads"))
        if found is None:
            if any(name.startswith("compresskv/") for name in program.artefacts):
                return Skip("no calibration saw its heads: the plan has no ranking for it")
            raise OptionError(
                "compresskv needs retrieval heads, and there is no plan. Calibrate once with plan = accelpass.calibrate(model, "
                "texts, passes=['compresskv']), and compile with options={'plan': plan}; or name heads with ranking=(0, 1, ...)"
            )
        if sorted(found.tolist()) != list(range(heads)):
            raise PlanError(
                f"compresskv: the plan ranks {len(found)} heads of {site.path}, and this model has {heads} there; calibrate again "
                "with this model"
            )
        return replace(self, ranking=tuple(found.tolist()))

    def amounts(self, program: Program, site: KVSite) -> tuple[Amount, Amount]:
        if self.pyramid is not None:
            heavy, _ = super().amounts(program, site)
            return heavy, self._newest
        found = {s.path: program.artefacts.get(artefact(s.path, "error")) for s in program.analysis(kv_sites)}
        error = {path: float(t) for path, t in found.items() if t is not None}
        if self.layers == "even" or site.path not in error:
            error = {site.path: 1.0}
        at = list(error).index(site.path)
        if self.tokens is None:
            mean = round(self.budget * SHARES)
            share = layer_budgets(list(error.values()), mean, 0, min(SHARES, MOST * mean))[at] / SHARES
            return float(share), self._newest
        least = min(self.tokens, max(LEAST, self._newest + 1))
        whole = layer_budgets(list(error.values()), self.tokens, least, MOST * self.tokens)[at]
        return whole - self._newest, self._newest

    def calibrate_on_loss(self, study: Study) -> dict[str, Tensor]:
        """``heads``, a ranking of each layer's query heads, and ``error``, its part of the error that eviction makes.

        Raises:
            PassError: no text has a needle that its answer repeats and the model finds; or an attention is not a plain causal one.
        """
        if self.window is not None and self.window > OBSERVED:
            raise self.fail("window", f"{OBSERVED} queries at most where it is calibrated")
        heads = rankings(study)
        few = Kept(LEAST, min(self.window or 8, LEAST - 1), self.kernel)
        lost = errors(study, few, {site: ranking[: self.retrieval] for site, ranking in heads.items()})
        made = {artefact(site, "heads"): torch.tensor(ranking) for site, ranking in heads.items()}
        return made | {artefact(site, "error"): torch.tensor(e, dtype=torch.float64) for site, e in lost.items()}


def artefact(site: str, part: str) -> str:
    """The name of what a plan has of a layer."""
    return f"compresskv/{site}/{part}"


def layer_budgets(error: Sequence[float], mean: int, least: int, most: int) -> list[int]:
    """Integers from ``least`` to ``most`` with this mean: ``least`` each, the rest by error, what rounding and bounds leave over one
    by one to the layers with the largest error (or taken from those with the smallest)."""
    whole = len(error) * mean
    total = sum(error) or 1.0
    made = [min(most, max(least, least + round(e / total * (whole - least * len(error))))) for e in error]
    order = sorted(range(len(error)), key=lambda n: -error[n])
    while (off := whole - sum(made)) != 0:
        for at in order if off > 0 else reversed(order):
            step = 1 if off > 0 else -1
            if off != 0 and least <= made[at] + step <= most:
                made[at] += step
                off -= step
    return made
