"""MiKV: what would be evicted is kept in very few bits (arXiv 2402.18096)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from accelpass.ir.attention.spec.spec import AttentionSpec
from accelpass.ir.core.program import Program
from accelpass.ir.core.state import StateSpec
from accelpass.ir.kv.banks import Quantized, RowFormat, buffer, put_rows
from accelpass.ir.kv.sites import KVSite
from accelpass.ir.kv.storage import Held, Layout, New, Query, Segment, bank
from accelpass.passes.core.base import Skip
from accelpass.passes.kv_cache.base import KVPass
from accelpass.passes.kv_cache.kv_quant import cannot_pack
from accelpass.passes.kv_cache.storage.heavy_hitters import HeavyHitters
from accelpass.passes.kv_cache.storage.slots import check_budget, check_recent, divided


@dataclass(frozen=True)
class Tiers(HeavyHitters):
    """Important tokens in slots as H2O chooses them; each token that leaves these has a row of few bits at its position."""

    part: ClassVar[str] = "mikv"
    bits: int

    @property
    def retained(self) -> Quantized:
        return Quantized(self.bits, 2)

    def states(self, layout: Layout, format: RowFormat) -> list[StateSpec]:
        heads, rows = layout.kv_heads, layout.capacity
        return [
            *super().states(layout, format),
            *self.retained.states("retained_keys", heads, rows, layout.width, layout.dtype),
            *self.retained.states("retained_values", heads, rows, layout.value_width, layout.dtype),
            buffer("is_retained", (heads, rows), torch.bool),
            buffer("balance", (heads, layout.width), torch.float32),
        ]

    def fill(self, held: Held, new: New, layout: Layout, format: RowFormat) -> None:
        held["balance"].copy_(balancer(new.q, new.k, new.statistics[self.tap.key]))
        super().fill(held, new, layout, format)

    def keep(
        self, held: Held, new: New, rows: list[Tensor], positions: Tensor, score: Tensor, format: RowFormat
    ) -> None:
        super().keep(held, new, rows, positions, score, format)
        kept = held["positions"]
        put_rows([held["is_retained"]], _place(kept, new), [torch.zeros_like(kept, dtype=torch.bool)])

    def dropped(self, held: Held, new: New, rows: list[Tensor], positions: Tensor, format: RowFormat) -> None:
        count = len(bank(held, "keys"))
        keys = format.decode(rows[:count], torch.float32) * held["balance"].unsqueeze(2)
        values = format.decode(rows[count:], torch.float32)
        place = _place(positions, new)
        put_rows(bank(held, "retained_keys"), place, self.retained.encode(keys))
        put_rows(bank(held, "retained_values"), place, self.retained.encode(values))
        put_rows([held["is_retained"]], place, [positions >= 0])

    def elsewhere(self, held: Held, query: Query) -> list[Segment]:
        keys, values = bank(held, "retained_keys"), bank(held, "retained_values")
        balanced = query.q / held["balance"][:, :, None, None]
        return [Segment(self.retained, keys, values, valid=held["is_retained"], q=balanced)]


def balancer(q: Tensor, k: Tensor, mass: Tensor) -> Tensor:
    """``sqrt(max |q| / max |k|)`` of each channel over the prompt, ``(batch, kv_heads, d)``.

    The largest query of all heads of a group (inferred). Padding got no attention, and is left out.
    """
    seen = (mass > 0).unsqueeze(-1)
    groups = q.shape[1] // k.shape[1]
    queries = (q.float().abs().unflatten(1, (-1, groups)).amax(2) * seen).amax(2)
    keys = (k.float().abs() * seen).amax(2)
    return (queries / keys.clamp_min(1e-6)).clamp_min(1e-6).sqrt()


def _place(positions: Tensor, new: New) -> Tensor:
    """Positions to write at: what stands for no token goes to the newest one's row, which is in a slot, so that its row of
    few bits is not in use."""
    return torch.where(positions >= 0, positions.long(), (new.total - 1)[:, None, None])


@dataclass(frozen=True)
class MiKV(KVPass):
    """Keep important tokens as they are and all others in 2, 3 or 4 bits.

    Importance is H2O's (``h2o``), its scores summed over the query heads that share a key. Retained keys are multiplied
    by a balancer for each channel, from the prompt's largest queries and keys, before they are rounded by token in two
    groups of channels; queries are divided by it. Demotion is for good. With ``kv_quant``, the important tokens are
    rounded as that pass says.

    Attributes:
        budget: share of the prompt that is important; 1 keeps everything as it is.
        recent: share of the budget for the newest tokens (inferred, as in H2O).
        bits: of the others: 2, 3 or 4.
        tokens: how many tokens of each head are important, in place of a share of the prompt.

    Raises:
        OptionError: a budget outside (0, 1], a share outside [0, 1], other bits, fewer than 2 tokens.
    """

    name: ClassVar[str] = "mikv"
    summary: ClassVar[str] = "important tokens of a KVCache as they are, all others in 2, 3 or 4 bits"
    paper: ClassVar[str] = "MiKV, arXiv 2402.18096"
    identity: ClassVar[dict[str, Any] | None] = {"budget": 1.0}
    reads: ClassVar[frozenset[str]] = frozenset({"attention.format"})
    budget: float = 0.2
    recent: float = 0.5
    bits: int = 2
    tokens: int | None = None

    def __post_init__(self) -> None:
        check_budget(self, self.budget, self.tokens)
        check_recent(self, self.recent)
        if self.bits not in (2, 3, 4):
            raise self.fail("bits", "2, 3 or 4")
        self.check_sites()

    def edited(
        self, program: Program, site: KVSite, spec: AttentionSpec, number: int
    ) -> tuple[AttentionSpec, str] | Skip:
        why = cannot_pack(site, 2)
        if why is not None:
            return Skip(why)
        store = Tiers(*divided(self.budget, self.recent, self.tokens), self.bits)
        what = f"{store.most(site.capacity)} of {site.capacity} tokens a head at most, the others in {self.bits} bits"
        return spec.edited(by=self.name, store=store), what
