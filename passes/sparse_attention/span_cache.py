"""Spans in a KVCache: each head keeps the first tokens and a ring of its newest (arXiv 2406.14909, inference)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from accelpass.ir.core.state import StateSpec
from accelpass.ir.kv.banks import EXACT, RowFormat, buffer, put_rows
from accelpass.ir.kv.storage import Held, Layout, New, Query, Segment, Storage, bank, of_heads
from accelpass.passes.sparse_attention.spans import Rule, span_blocks


@dataclass(frozen=True)
class SpanRings(Storage):
    """Slots ``min(t, sinks)`` of the first tokens, then a ring: token t is at ``sinks + (t - sinks) % (size - sinks)``.

    ``size`` is set by the length of the prompt: ``alpha + beta * (N + reserve)`` rounded up to blocks, at most the
    layer's capacity and at least two blocks. Key/value heads with one rule are a bank, whose buffer has the slots that the
    longest prompt needs. A rule with ``alpha >= 0, beta >= 1`` keeps everything, also past the reserve (inferred).

    A single token is stored first and sees what is then there, itself included. Several at once (a further turn; the paper
    has none) see all that is stored and, causally, each other; then ``size`` is set anew from all tokens so far if that
    is more, and the newest that fit stay (inferred, as in ``h2o``).

    Attributes:
        rules: of each key/value head; one for all.
        sinks, block: in tokens.
        reserve: tokens of an answer that the span of its prompt makes room for.
    """

    part: ClassVar[str] = "span_rings"
    rules: tuple[Rule, ...]
    sinks: int = 64
    block: int = 64
    reserve: int = 1024

    def banks(self, layout: Layout) -> list[tuple[Rule, list[int]]]:
        """Rules, and the key/value heads that have them."""
        rules = self.rules * layout.kv_heads if len(self.rules) == 1 else self.rules
        return [(rule, [h for h, r in enumerate(rules) if r == rule]) for rule in dict.fromkeys(rules)]

    def size(self, rule: Rule, prompt: Tensor, capacity: int) -> Tensor:
        """Slots after a prompt of so many tokens, sinks included; see the class."""
        least = max(2, -(-self.sinks // self.block) + 1)
        most = -(-capacity // self.block)
        if rule[0] >= 0 and rule[1] >= 1:
            return torch.full_like(prompt, max(most, least) * self.block)
        return span_blocks(rule, prompt + self.reserve, self.block).clamp_max(most).clamp_min(least) * self.block

    def most(self, rule: Rule, capacity: int) -> int:
        """Slots that a bank's buffer has: what a prompt as long as the capacity needs."""
        return min(capacity, int(self.size(rule, torch.tensor(capacity), capacity)))

    def states(self, layout: Layout, format: RowFormat) -> list[StateSpec]:
        made: list[StateSpec] = []
        slots = 0
        for number, (rule, heads) in enumerate(self.banks(layout)):
            rows = self.most(rule, layout.capacity)
            slots = max(slots, rows)
            made += format.states(f"keys{number}", len(heads), rows, layout.width, layout.dtype)
            made += format.states(f"values{number}", len(heads), rows, layout.value_width, layout.dtype)
        return [
            *made,
            buffer("positions", (layout.kv_heads, slots), torch.int32, -1),
            buffer("size", (len(self.banks(layout)),), torch.int64),
        ]

    def fill(self, held: Held, new: New, layout: Layout, format: RowFormat) -> None:
        self._keep(held, new, layout, format)

    def extend(self, held: Held, new: New, query: Query, layout: Layout, format: RowFormat) -> Tensor:
        if query.one:
            self._put(held, new, layout, format)
        out = []
        for number, (_, heads) in enumerate(self.banks(layout)):
            keys, values = bank(held, f"keys{number}"), bank(held, f"values{number}")
            at = of_heads(held["positions"], heads)[..., : keys[0].shape[2]].long()
            segments = [Segment(format, keys, values, at, at >= 0)]
            if not query.one:
                mine = [of_heads(t, heads) for t in (new.k, new.v, new.positions)]
                segments.append(Segment(EXACT, [mine[0]], [mine[1]], mine[2]))
            out.append(query.heads(heads).attend(*segments).out)
        if not query.one:
            self._keep(held, new, layout, format, old=True)
        return self._joined(out, layout)

    def _put(self, held: Held, new: New, layout: Layout, format: RowFormat) -> None:
        """One token into its slot of each bank."""
        slots: list[Tensor] = []
        for number, (_, heads) in enumerate(self.banks(layout)):
            slots.append(self._slot(new.count, held["size"][:, number])[0])
            for name, rows in ((f"keys{number}", new.k), (f"values{number}", new.v)):
                for stored, made in zip(bank(held, name), format.encode(of_heads(rows, heads)), strict=True):
                    stored.index_copy_(2, slots[-1].unsqueeze(0), made.to(stored.dtype))
        number_of = self._bank_of(layout)
        at = torch.stack([slots[number_of[h]] for h in range(layout.kv_heads)])
        put_rows([held["positions"]], at[None, :, None].expand(new.positions.shape), [new.positions])

    def _slot(self, position: Tensor, size: Tensor) -> Tensor:
        return torch.where(position < self.sinks, position, self.sinks + (position - self.sinks) % (size - self.sinks))

    def _keep(self, held: Held, new: New, layout: Layout, format: RowFormat, old: bool = False) -> None:
        """Set the sizes, and write to each slot the newest of its tokens; ``old``: some of them are stored already."""
        columns, sizes = held["positions"].shape[-1], []
        positions: list[Tensor] = []
        # Each sequence has seen as many tokens, so that slots are those of the first one.
        count, total = new.count[0], new.total[0]
        for number, (rule, heads) in enumerate(self.banks(layout)):
            keys, values = bank(held, f"keys{number}"), bank(held, f"values{number}")
            rows = keys[0].shape[2]
            before = held["size"][0, number]
            size = self.size(rule, total, layout.capacity)
            size = torch.maximum(size, before) if old else size
            slot = torch.arange(rows, device=count.device)
            newest = total - 1 - (total - 1 - slot) % (size - self.sinks)
            at = torch.where(slot < self.sinks, slot, torch.where(newest >= self.sinks, newest, -1))
            at = torch.where((at < total) & (slot < size), at, -1)
            index = (at - count).clamp_min(0)
            if old:
                from_old = self._slot(at.clamp_min(0), before)
                there = of_heads(held["positions"], heads[:1])[0, 0, :rows]
                is_there = there.index_select(0, from_old.clamp_max(rows - 1)) == at
                at = torch.where((at >= count) | is_there, at, -1)
                index = torch.where(at >= count, rows + index, from_old.clamp_max(rows - 1))
            for stored, given in ((keys, new.k), (values, new.v)):
                mine = of_heads(given, heads)
                made = format.encode(mine) if old else format.encode(mine.index_select(2, index))
                for place, fresh in zip(stored, made, strict=True):
                    kept = torch.cat([place, fresh.to(place.dtype)], 2).index_select(2, index) if old else fresh
                    place.copy_(kept)
            sizes.append(size)
            positions.append(torch.nn.functional.pad(at, (0, columns - rows), value=-1))
        held["size"].copy_(torch.stack(sizes).expand(held["size"].shape))
        number_of = self._bank_of(layout)
        where = torch.stack([positions[number_of[h]] for h in range(layout.kv_heads)])
        held["positions"].copy_(where.expand(held["positions"].shape))

    def _bank_of(self, layout: Layout) -> dict[int, int]:
        return {h: number for number, (_, heads) in enumerate(self.banks(layout)) for h in heads}

    def _joined(self, parts: Sequence[Tensor], layout: Layout) -> Tensor:
        """Outputs of the banks ``(batch, heads, tokens, d)`` in the order of heads."""
        if len(parts) == 1:
            return parts[0]
        split = [list(part.split(layout.groups, 1)) for part in parts]
        number_of = self._bank_of(layout)
        return torch.cat([split[number_of[h]].pop(0) for h in range(layout.kv_heads)], 1)
