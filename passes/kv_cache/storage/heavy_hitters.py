"""Slots for the newest tokens and those of the largest score, whatever a method's score is."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor

from accelpass.ir.attention.spec.spec import AttentionMass, ScoreTap
from accelpass.ir.kv.storage import New
from accelpass.passes.kv_cache.storage.slots import Amount, Slots, share


@dataclass(frozen=True)
class HeavyHitters(Slots):
    """``heavy`` and ``recent`` parts of the prompt; the score is what a token has got by a tap so far.

    Attributes:
        mean: tokens are compared by their score for each token that could attend to them.
        score: what a token gets of the attention of a call's queries. Earlier sums are multiplied by its ``decay`` for each token
            that comes.
        sinks: first tokens of the text, which never leave.
        kernel: a prompt's scores are pooled over so many neighbours (odd; 1: not at all), those of the observation window left
            out (SnapKV, arXiv 2404.14469).
        pooling: with their mean or their largest.
    """

    part: ClassVar[str] = "heavy_hitters"
    heavy: Amount
    recent: Amount
    mean: bool = field(default=False, kw_only=True)
    score: ScoreTap = field(default_factory=AttentionMass, kw_only=True)
    sinks: int = field(default=0, kw_only=True)
    kernel: int = field(default=1, kw_only=True)
    pooling: Literal["mean", "max"] = field(default="mean", kw_only=True)

    def most(self, capacity: int) -> int:
        limit, _ = self.quota(torch.tensor([capacity]))
        return min(capacity, int(limit))

    def quota(self, total: Tensor) -> tuple[Tensor, Tensor]:
        newest = share(total, self.recent).clamp_min(1)
        shares = [part for part in (self.heavy, self.recent) if isinstance(part, float)]
        if sum(shares) >= 1:
            return newest.new_full(newest.shape, 1 << 30), newest
        return share(total, self.heavy) + newest + self.sinks, newest

    def pinned(self, positions: Tensor, total: Tensor, newest: Tensor) -> Tensor:
        newest_ones = super().pinned(positions, total, newest)
        return newest_ones | (positions < self.sinks) if self.sinks else newest_ones

    @property
    def tap(self) -> ScoreTap:
        return self.score

    @property
    def wants(self) -> frozenset[str]:
        return frozenset({self.tap.key})

    def carried(self, score: Tensor, tokens: int) -> Tensor:
        decay = self.tap.decay
        return score if decay == 1 else score * decay**tokens

    def prompt_score(self, new: New) -> Tensor:
        score = new.statistics[self.tap.key]
        if self.kernel == 1:
            return score
        if self.tap.rows is not None:
            score = score.masked_fill(new.positions >= (new.total - self.tap.rows)[:, None, None], 0.0)
        return pooled(score, self.kernel, self.pooling)

    def step_score(self, score: Tensor, mass: Tensor, positions: Tensor) -> Tensor:
        return score + mass

    def rank(self, score: Tensor, positions: Tensor, total: Tensor) -> Tensor:
        return score / (total[:, None, None] - positions).clamp_min(1) if self.mean else score


def pooled(score: Tensor, kernel: int, by: Literal["mean", "max"]) -> Tensor:
    """Scores ``(..., tokens)``, none below 0, each with its neighbours in a window of ``kernel`` tokens; none is 0."""
    wide = torch.nn.functional.pad(score, (kernel // 2, kernel // 2))
    near = torch.stack([wide[..., i : i + score.shape[-1]] for i in range(kernel)])
    return near.mean(0) if by == "mean" else near.amax(0)
