"""Keys rounded channel by channel over blocks of tokens, values token by token, and the newest tokens of both as they are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from accelpass.ir.core.state import StateSpec
from accelpass.ir.kv.banks import EXACT, Quantized, RowFormat, buffer
from accelpass.ir.kv.rows import pack, row_bytes, to_half_precision, unpack
from accelpass.ir.kv.storage import Held, Layout, New, Query, Segment, Storage, bank


@dataclass(frozen=True)
class ChannelBlocks(Storage):
    """KIVI's cache: of ``t`` tokens before a call, keys of the first ``t // window * window`` and values of the first ``t - window``
    are rounded; the tokens of the call are as they are.

    Attributes:
        bits: of keys and values.
        block: tokens that share a step and a lowest value in each channel of a key.
        window: newest tokens, a multiple of ``block``. Keys are rounded when that many have come, values when that many came after.
        groups: groups of channels of a value's row.
    """

    part: ClassVar[str] = "channel_blocks"
    knows_held: ClassVar[bool] = True
    bits: int = 4
    block: int = 32
    window: int = 128
    groups: int = 2

    @property
    def _values(self) -> Quantized:
        return Quantized(self.bits, self.groups)

    def states(self, layout: Layout, format: RowFormat) -> list[StateSpec]:
        heads, rows = layout.kv_heads, -(-layout.capacity // self.block) * self.block
        steps = (heads, rows // self.block, layout.width)
        return [
            buffer("keys.codes", (heads, rows, row_bytes(layout.width, self.bits)), torch.uint8),
            buffer("keys.step", steps, torch.float16),
            buffer("keys.low", steps, torch.float16),
            *self._values.states("values", heads, layout.capacity, layout.value_width, layout.dtype),
            buffer("newest_keys", (heads, self.window, layout.width), layout.dtype),
            buffer("newest_values", (heads, self.window, layout.value_width), layout.dtype),
        ]

    def fill(self, held: Held, new: New, layout: Layout, format: RowFormat) -> None:
        tokens = new.k.shape[2]
        at = new.count[0] + torch.arange(tokens, device=new.count.device)
        for stored, made in zip(bank(held, "values"), self._values.encode(new.v), strict=True):
            stored.index_copy_(2, at, made)
        self._round_keys(held, new, at)
        newest = self._on_ring(new.total)
        brought = (newest >= new.count.unsqueeze(-1))[:, None, :, None]
        index = (newest - new.count.unsqueeze(-1)).clamp_min(0)[:, None, :, None]
        for name, x in (("newest_keys", new.k), ("newest_values", new.v)):
            taken = x.gather(2, index.expand(-1, x.shape[1], -1, x.shape[3]))
            held[name].copy_(torch.where(brought, taken.to(held[name].dtype), held[name]))

    def _on_ring(self, end: Tensor) -> Tensor:
        """The newest position before ``end`` that falls on each place of the ring, ``(batch, window)``; negative for none."""
        last, place = end.unsqueeze(-1) - 1, torch.arange(self.window, device=end.device)
        return last - (last - place) % self.window

    def _round_keys(self, held: Held, new: New, at: Tensor) -> None:
        """Round the blocks that new tokens fall into, also one that is not full yet: it is not read, and is rounded again."""
        begin, inside = new.count[0] // self.block * self.block, torch.arange(self.block, device=at.device)
        old = held["newest_keys"].index_select(2, (begin + inside) % self.window).float()
        if isinstance(new.k.shape[2], int) and new.k.shape[2] == 1:
            place = begin + inside
            whole = torch.where((place == at)[:, None], new.k.float(), old).unsqueeze(2)
            blocks = torch.where((place <= at)[:, None], whole, whole[:, :, :, :1])
            rows, numbers = place, begin.unsqueeze(0) // self.block
        else:
            size = held["keys.codes"].shape[2]
            whole = new.k.new_zeros((*new.k.shape[:2], size, new.k.shape[3]), dtype=torch.float32)
            whole = whole.index_copy(2, (begin + inside).clamp_max(size - 1), old).index_copy(2, at, new.k.float())
            rows = torch.arange(size, device=at.device)
            there = (rows < new.total[0]).view(-1, self.block, 1)
            whole = whole.unflatten(2, (-1, self.block))
            blocks, numbers = torch.where(there, whole, whole[:, :, :, :1]), rows[:: self.block] // self.block
        low = to_half_precision(blocks.amin(3))
        step = to_half_precision((blocks.amax(3) - low) / (2**self.bits - 1))
        codes = ((blocks - low.unsqueeze(3)) / step.clamp_min(1e-8).unsqueeze(3)).round().clamp(0, 2**self.bits - 1)
        packed = pack(codes.to(torch.uint8), self.bits).flatten(2, 3)
        for name, made, where, unit in (
            ("codes", packed, rows, 1),
            ("step", step.half(), numbers, self.block),
            ("low", low.half(), numbers, self.block),
        ):
            stored = held[f"keys.{name}"]
            touched = (where * unit >= begin).unsqueeze(-1)
            stored.index_copy_(2, where, torch.where(touched, made, stored.index_select(2, where)))

    def extend(self, held: Held, new: New, query: Query, layout: Layout, format: RowFormat) -> Tensor:
        before, heads = new.count, layout.kv_heads
        keys = self._keys(held)[:, :, : layout.capacity]
        older = (torch.arange(layout.capacity, device=before.device) < (before - self.window).unsqueeze(-1)).unsqueeze(
            1
        )
        at = self._on_ring(before).unsqueeze(1).expand(-1, heads, -1)
        # Of the newest tokens, keys are rounded as soon as a window of them is full, and values later.
        index = at.clamp_min(0).unsqueeze(-1).expand(-1, -1, -1, keys.shape[-1])
        full = (at >= (before // self.window * self.window)[:, None, None]).unsqueeze(-1)
        newest = torch.where(full, held["newest_keys"].float(), keys.gather(2, index))
        out = query.attend(
            Segment(EXACT, [keys], bank(held, "values"), None, older, value_format=self._values),
            Segment(EXACT, [newest], [held["newest_values"]], at, at >= 0),
            Segment(EXACT, [new.k], [new.v], new.positions),
        ).out
        self.fill(held, new, layout, format)
        return out

    def _keys(self, held: Held) -> Tensor:
        """Keys as they were rounded, ``(batch, kv_heads, rows, d)`` in float32."""
        codes = unpack(held["keys.codes"], self.bits).float().unflatten(2, (-1, self.block))
        step, low = (held[f"keys.{part}"].float().unsqueeze(3) for part in ("step", "low"))
        return (codes * step + low).flatten(2, 3)
