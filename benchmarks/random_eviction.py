"""Eviction of tokens drawn by lot: what every rule has to beat, written as a third party would write a pass.

It stands on the library's public bases alone. A package would name it in the entry-point group ``accelpass.passes``; a
pass object in ``options={"passes": [RandomEviction()]}`` needs no registration.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from accelpass.ir.attention.spec.spec import AttentionSpec
from accelpass.ir.core.program import Program
from accelpass.ir.kv.sites import KVSite
from accelpass.ir.kv.storage import New
from accelpass.passes.core.base import Skip
from accelpass.passes.kv_cache.base import KVPass
from accelpass.passes.kv_cache.storage.slots import Slots, check_budget, check_recent, share

PRIME = 2**31 - 1
"""Squares of numbers below it fit into 64 bits."""


@dataclass(frozen=True)
class Lots(Slots):
    """A share ``budget`` of the prompt, ``recent`` of it for the newest; other tokens' scores are drawn for position, head
    and ``lot``."""

    part: ClassVar[str] = "random_eviction"
    budget: float
    recent: float
    lot: int

    def most(self, capacity: int) -> int:
        return max(1, int(self.budget * capacity + 1e-9))

    def quota(self, total: Tensor) -> tuple[Tensor, Tensor]:
        limit = share(total, self.budget).clamp_min(1)
        if self.budget >= 1:
            limit = torch.full_like(limit, 1 << 30)
        return limit, share(total, self.budget * self.recent)

    def prompt_score(self, new: New) -> Tensor:
        return self.drawn(new.positions)

    def step_score(self, score: Tensor, mass: Tensor, positions: Tensor) -> Tensor:
        return self.drawn(positions.long())

    def drawn(self, positions: Tensor) -> Tensor:
        """A number in [0, 1) for each ``(batch, kv_heads, tokens)``: a hash, so that it is the same at every step."""
        heads = torch.arange(positions.shape[1], device=positions.device)[:, None]
        x = ((positions + 1) * 48_271 + (heads + 1) * 69_621 + (self.lot + 1) * 7_654_321) % PRIME
        for _ in range(3):
            x = (x * x + 40_692) % PRIME
        return x.float() / PRIME


@dataclass(frozen=True)
class RandomEviction(KVPass):
    """Keep tokens of a KVCache drawn by lot, for each head on its own.

    Attributes:
        budget: share of the prompt that is kept; 1 keeps everything.
        recent: share of the budget for the newest tokens, half as in ``h2o``, so that the two differ in their score alone. At
            0, most new tokens leave as soon as they have been read.
        lots: drawings that layers use in turn. Layers with one drawing share compiled code, so more take longer to compile.

    Raises:
        OptionError: a budget outside (0, 1], a share outside [0, 1], no drawing.
    """

    name: ClassVar[str] = "random_eviction"
    summary: ClassVar[str] = "keep tokens of a KVCache drawn by lot"
    budget: float = 0.2
    recent: float = 0.5
    lots: int = 6

    def __post_init__(self) -> None:
        check_budget(self, self.budget)
        check_recent(self, self.recent)
        if self.lots < 1:
            raise self.fail("lots", "1 or more")
        self.check_sites()

    def edited(
        self, program: Program, site: KVSite, spec: AttentionSpec, number: int
    ) -> tuple[AttentionSpec, str] | Skip:
        store = Lots(self.budget, self.recent, number % self.lots)
        return spec.edited(by=self.name, store=store), f"{store.most(site.capacity)} of {site.capacity} tokens a head"
