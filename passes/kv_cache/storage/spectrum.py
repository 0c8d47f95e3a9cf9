"""Keys of which channels with a wide range have two bits and the others, as a spectrum, one: the storages of VidKV."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from accelpass.ir.core.state import StateSpec
from accelpass.ir.kv.banks import EXACT, RowFormat, buffer, put_rows
from accelpass.ir.kv.storage import Held, Layout, New, Query, Segment, Storage
from accelpass.ir.torch_private import assert_async
from accelpass.passes.kv_cache.storage.token_groups import GroupCodec, Signs, Ternary, TwoBits


def spectrum(n: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """The discrete Fourier transform of ``n`` real numbers as ``n`` real ones, and its inverse: ``x @ there @ back`` is ``x``.

    Real parts of the frequencies 0 to ``n // 2``, and imaginary parts of those between: the others are these once more.
    """
    place = torch.arange(n, device=like.device)
    real, imaginary = place[: n // 2 + 1], place[1 : (n - 1) // 2 + 1]
    angle = lambda k: (place[:, None] * k % n).double() * (2 * math.pi / n)  # noqa: E731
    there = torch.cat([angle(real).cos(), -angle(imaginary).sin()], 1)
    of = torch.cat([real, imaginary])
    back = there.t() * torch.where((of == 0) | (2 * of == n), 1, 2)[:, None] / n
    return there.float(), back.float()


@dataclass(frozen=True)
class SpectrumKeys(Storage):
    """What both storages share.

    Attributes:
        bits: of a key's channel, the mean: that much above 1 is the share of channels that have two.
        value_bits: 1.58 (ternary) or 2.
        block: tokens of a group.
    """

    knows_held: ClassVar[bool] = True
    bits: float = 1.5
    value_bits: float = 1.58
    block: int = 32

    def keys(self, layout: Layout) -> tuple[GroupCodec, GroupCodec]:
        """Of channels with a wide range, and of the others' spectrum."""
        wide = int(layout.width * (self.bits - 1))
        return TwoBits(wide, self.block), Signs(layout.width - wide, self.block)

    def values(self, layout: Layout) -> GroupCodec:
        return (Ternary if self.value_bits < 2 else TwoBits)(layout.value_width, self.block)

    def key_states(self, rows: int, layout: Layout) -> list[StateSpec]:
        wide, others = self.keys(layout)
        return [
            *wide.states("wide_keys", layout.kv_heads, rows),
            *others.states("other_keys", layout.kv_heads, rows),
            buffer("order", (layout.width,), torch.int16),
            buffer("padding", (), torch.int64),
        ]

    def order(self, k: Tensor, real: Tensor, layout: Layout) -> Tensor:
        """Channels of a sequence, those with the widest range over heads and tokens first, both kinds ascending ``(batch, d)``."""
        real = real[:, None, :, None]
        high, low = (torch.where(real, k.float(), far) for far in (-torch.inf, torch.inf))
        ranges = torch.nan_to_num(high.amax((1, 2)) - low.amin((1, 2)), neginf=0.0)
        wide = torch.zeros_like(ranges).scatter(1, ranges.topk(self.keys(layout)[0].columns).indices, 1.0)
        return wide.argsort(dim=-1, descending=True, stable=True)

    def turned(self, x: Tensor, order: Tensor, layout: Layout, back: bool = False) -> Tensor:
        """Keys ``(batch, ..., d)`` in the basis that is rounded; ``back``: queries, so that products with such keys are those with
        the keys that they stand for."""
        index = order.long().view(len(order), *(1,) * (x.dim() - 2), -1)
        taken = x.float().gather(-1, index.expand(x.shape))
        wide, others = self.keys(layout)
        if not others.columns:
            return taken
        there, inverse = spectrum(others.columns, x)
        rest = torch.matmul(taken[..., wide.columns :], inverse.t() if back else there)
        return torch.cat([taken[..., : wide.columns], rest], -1)

    def encoded_keys(self, groups: Tensor, valid: Tensor | None, layout: Layout) -> dict[str, Tensor]:
        """Of turned keys, by the names of buffers."""
        made: dict[str, Tensor] = {}
        wide, others = self.keys(layout)
        parts = groups.split([wide.columns, others.columns], -1)
        for name, codec, part in zip(("wide_keys", "other_keys"), (wide, others), parts, strict=True):
            made |= {f"{name}.{n}": t for n, t in codec.encode(part, valid).items()}
        return made

    def decoded_keys(self, held: Held, layout: Layout) -> Tensor:
        """Turned keys ``(batch, kv_heads, rows, d)``."""
        named = zip(("wide_keys", "other_keys"), self.keys(layout), strict=True)
        parts = [codec.decode(held, name) for name, codec in named if codec.columns]
        return torch.cat(parts, -1) if len(parts) > 1 else parts[0]

    def note_padding(self, held: Held, new: New) -> None:
        held["padding"].copy_(new.given["padding"] if "padding" in new.given else torch.zeros_like(new.count))


@dataclass(frozen=True)
class SpectrumBlocks(SpectrumKeys):
    """Of ``t`` tokens before a call, the first ``t // window * window`` are rounded, the others and those of the call are as they are.

    Which channels have a wide range, a prompt says for good.

    Attributes:
        window: a multiple of ``block``; tokens are rounded when that many have come.
    """

    part: ClassVar[str] = "spectrum_blocks"
    window: int = 128

    def _rows(self, layout: Layout) -> int:
        return -(-layout.capacity // self.block) * self.block

    def _ring(self, layout: Layout) -> int:
        return min(self.window, self._rows(layout))

    def states(self, layout: Layout, format: RowFormat) -> list[StateSpec]:
        heads, ring = layout.kv_heads, self._ring(layout)
        return [
            *self.key_states(self._rows(layout), layout),
            *self.values(layout).states("values", heads, self._rows(layout)),
            buffer("newest_keys", (heads, ring, layout.width), layout.dtype),
            buffer("newest_values", (heads, ring, layout.value_width), layout.dtype),
        ]

    def fill(self, held: Held, new: New, layout: Layout, format: RowFormat) -> None:
        self.note_padding(held, new)
        real = torch.arange(new.k.shape[2], device=new.count.device) >= held["padding"].unsqueeze(-1)
        held["order"].copy_(self.order(new.k, real, layout))
        self._store(held, new, layout)

    def _store(self, held: Held, new: New, layout: Layout) -> None:
        """Round the groups that new tokens fall into, also one that is not full yet: it is not read, and is rounded again."""
        ring, tokens, device = self._ring(layout), new.k.shape[2], new.count.device
        at = new.count[0] + torch.arange(tokens, device=device)
        begin, inside = new.count[0] // self.block * self.block, torch.arange(self.block, device=device)
        one = isinstance(tokens, int) and tokens == 1
        rows = begin + inside if one else torch.arange(self._rows(layout), device=device)
        there = (rows < new.total[0]) & (rows >= held["padding"].unsqueeze(-1))
        valid = there[:, None, :, None].unflatten(2, (-1, self.block))

        def grouped(fresh: Tensor, old: Tensor) -> Tensor:
            if one:
                return torch.where((rows == at)[:, None], fresh, old).unflatten(2, (-1, self.block))
            whole = fresh.new_zeros((*fresh.shape[:2], self._rows(layout), fresh.shape[3]))
            whole = whole.index_copy(2, (begin + inside).clamp_max(whole.shape[2] - 1), old).index_copy(2, at, fresh)
            return whole.unflatten(2, (-1, self.block))

        old_k, old_v = (held[n].index_select(2, (begin + inside) % ring) for n in ("newest_keys", "newest_values"))
        order = held["order"]
        keys = grouped(self.turned(new.k, order, layout), self.turned(old_k, order, layout))
        made = self.encoded_keys(keys, valid, layout)
        coded = self.values(layout).encode(grouped(new.v.float(), old_v.float()), valid)
        made |= {f"values.{n}": t for n, t in coded.items()}
        for name, part in made.items():
            codes = name.endswith(".codes")
            where = rows if codes else rows[:: self.block] // self.block
            touched = (where * (1 if codes else self.block) >= begin).unsqueeze(-1)
            fresh = part.flatten(2, 3) if codes else part
            held[name].index_copy_(2, where, torch.where(touched, fresh, held[name].index_select(2, where)))
        newest = self._on_ring(new.total, ring)
        brought = (newest >= new.count.unsqueeze(-1))[:, None, :, None]
        index = (newest - new.count.unsqueeze(-1)).clamp_min(0)[:, None, :, None]
        for name, x in (("newest_keys", new.k), ("newest_values", new.v)):
            taken = x.gather(2, index.expand(-1, x.shape[1], -1, x.shape[3]))
            held[name].copy_(torch.where(brought, taken.to(held[name].dtype), held[name]))

    @staticmethod
    def _on_ring(end: Tensor, ring: int) -> Tensor:
        """The newest position before ``end`` that falls on each place of the ring, ``(batch, ring)``; negative for none."""
        last, place = end.unsqueeze(-1) - 1, torch.arange(ring, device=end.device)
        return last - (last - place) % ring

    def extend(self, held: Held, new: New, query: Query, layout: Layout, format: RowFormat) -> Tensor:
        ring, before = self._ring(layout), new.count
        rounded = (before // ring * ring).unsqueeze(-1)
        keys = self.decoded_keys(held, layout)[:, :, : layout.capacity]
        values = self.values(layout).decode(held, "values")[:, :, : layout.capacity]
        older = (torch.arange(layout.capacity, device=before.device) < rounded).unsqueeze(1)
        at = self._on_ring(before, ring)
        newest = at.unsqueeze(1).expand(-1, layout.kv_heads, -1)
        q = self.turned(query.q, held["order"], layout, back=True)
        out = query.attend(
            Segment(EXACT, [keys], [values], None, older, q=q),
            Segment(EXACT, [held["newest_keys"]], [held["newest_values"]], newest, (at >= rounded).unsqueeze(1)),
            Segment(EXACT, [new.k], [new.v], new.positions),
        ).out
        self._store(held, new, layout)
        return out


@dataclass(frozen=True)
class SpectrumSpan(SpectrumKeys):
    """Visual tokens that a prompt has at known places are rounded, all others are kept as they are.

    Attributes:
        start, length: of the whole groups of the span, counted from a text's first token that is no padding.
        safe: tokens of the span whose values have two bits, a multiple of ``block``: those with the largest ``New.given["salience"]``
            ``(batch, tokens)``.
    """

    part: ClassVar[str] = "spectrum_span"
    start: int = 0
    length: int = 32
    safe: int = 0

    def states(self, layout: Layout, format: RowFormat) -> list[StateSpec]:
        heads, exact = layout.kv_heads, layout.capacity - self.length
        small = torch.int16 if self.length < 2**15 else torch.int32
        return [
            *self.key_states(self.length, layout),
            *self.values(layout).states("values", heads, self.length - self.safe),
            *(self._safe(layout).states("safe_values", heads, self.safe) if self.safe else ()),
            *([buffer("value_row", (self.length,), small)] if self.safe else ()),
            buffer("exact_keys", (heads, exact, layout.width), layout.dtype),
            buffer("exact_values", (heads, exact, layout.value_width), layout.dtype),
        ]

    def _safe(self, layout: Layout) -> GroupCodec:
        return TwoBits(layout.value_width, self.block)

    def fill(self, held: Held, new: New, layout: Layout, format: RowFormat) -> None:
        self.note_padding(held, new)
        tokens, begin = new.k.shape[2], (held["padding"] + self.start).unsqueeze(-1)
        assert_async((begin + self.length <= tokens).all(), "a prompt ends before its visual span does")
        at = (begin + torch.arange(self.length, device=begin.device)).clamp_max(tokens - 1)
        k, v = (x.gather(2, at[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3])) for x in (new.k, new.v))
        held["order"].copy_(self.order(k, torch.ones_like(at, dtype=torch.bool), layout))
        groups = self.turned(k, held["order"], layout).unflatten(2, (-1, self.block))
        made, v = self.encoded_keys(groups, None, layout), v.float()
        if self.safe:
            best = new.given["salience"].gather(1, at).topk(self.safe).indices
            first = torch.zeros_like(at, dtype=torch.float32).scatter(1, best, 1.0)
            order = first.argsort(dim=-1, descending=True, stable=True)
            held["value_row"].copy_(order.argsort(-1))
            v = v.gather(2, order[:, None, :, None].expand_as(v))
            safe = self._safe(layout).encode(v[:, :, : self.safe].unflatten(2, (-1, self.block)))
            made |= {f"safe_values.{n}": t for n, t in safe.items()}
        if self.safe < self.length:
            rest = self.values(layout).encode(v[:, :, self.safe :].unflatten(2, (-1, self.block)))
            made |= {f"values.{n}": t for n, t in rest.items()}
        for name, part in made.items():
            held[name].copy_(part.flatten(2, 3) if name.endswith(".codes") else part)
        places = self._exact(held, layout)
        index = places.clamp_max(tokens - 1)[:, None, :, None]
        for name, x in (("exact_keys", new.k), ("exact_values", new.v)):
            taken = x.gather(2, index.expand(-1, x.shape[1], -1, x.shape[3]))
            there = (places < tokens)[:, None, :, None]
            held[name].copy_(torch.where(there, taken.to(held[name].dtype), held[name]))

    def _exact(self, held: Held, layout: Layout) -> Tensor:
        """Positions of the rows that are kept as they are, ``(batch, rows)``."""
        row = torch.arange(layout.capacity - self.length, device=held["padding"].device)
        return torch.where(row < (held["padding"] + self.start).unsqueeze(-1), row, row + self.length)

    def extend(self, held: Held, new: New, query: Query, layout: Layout, format: RowFormat) -> Tensor:
        heads, begin = layout.kv_heads, (held["padding"] + self.start).unsqueeze(-1)
        spanned = (begin + torch.arange(self.length, device=begin.device)).unsqueeze(1).expand(-1, heads, -1)
        exact = self._exact(held, layout).unsqueeze(1).expand(-1, heads, -1)
        parts = [self._safe(layout).decode(held, "safe_values")] if self.safe else []
        parts += [self.values(layout).decode(held, "values")] if self.safe < self.length else []
        values = torch.cat(parts, 2)
        if self.safe:
            values = values.gather(2, held["value_row"].long()[:, None, :, None].expand_as(values))
        q = self.turned(query.q, held["order"], layout, back=True)
        out = query.attend(
            Segment(EXACT, [self.decoded_keys(held, layout)], [values], spanned, q=q),
            Segment(EXACT, [held["exact_keys"]], [held["exact_values"]], exact, exact < new.count[:, None, None]),
            Segment(EXACT, [new.k], [new.v], new.positions),
        ).out
        put_rows([held["exact_keys"], held["exact_values"]], new.positions - self.length, [new.k, new.v])
        return out
