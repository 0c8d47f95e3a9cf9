"""Storage of layers that see some of the tokens: each token's row stands at its position, and a call says which rows count."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from accelpass.ir.core.state import STATE, StateSpec
from accelpass.ir.kv.banks import RowFormat, buffer, put_rows
from accelpass.ir.kv.holdings import holding_of
from accelpass.ir.kv.storage import Held, Layout, New, Query, Segment, Storage, bank


@dataclass(frozen=True)
class RowsAtPositions(Storage):
    """A row for each position of the capacity, and one more, into which rows that stand for no token are written.

    A call may give (see :attr:`~accelpass.ir.kv.storage.New.given`) ``rows``, the positions of its tokens, int64
    ``(batch, tokens)``, the capacity for none; ``keep``, the positions that attention may read, bool ``(batch,
    capacity)``; ``advance``, how far the layer's counter goes. Without them tokens follow those that are there.

    Attributes:
        scored: write what the last query's attention gave to each position, mean over heads, into ``importance``.
    """

    part: ClassVar[str] = "rows_at_positions"
    scored: bool

    def states(self, layout: Layout, format: RowFormat) -> list[StateSpec]:
        rows = layout.capacity + 1
        states = [
            *format.states("keys", layout.kv_heads, rows, layout.width, layout.dtype),
            *format.states("values", layout.kv_heads, rows, layout.value_width, layout.dtype),
        ]
        return [*states, importance_state(layout.capacity)] if self.scored else states

    def advance(self, new: New) -> Tensor | int:
        return new.given.get("advance", new.k.shape[2])

    def fill(self, held: Held, new: New, layout: Layout, format: RowFormat) -> None:
        at = self._positions(new).unsqueeze(1).expand(-1, layout.kv_heads, -1)
        put_rows([*bank(held, "keys"), *bank(held, "values")], at, [*format.encode(new.k), *format.encode(new.v)])

    def extend(self, held: Held, new: New, query: Query, layout: Layout, format: RowFormat) -> Tensor:
        self.fill(held, new, layout, format)
        position = torch.arange(layout.capacity, device=new.count.device)
        seen = position <= self._positions(new).unsqueeze(-1)  # (batch, tokens, capacity)
        if "keep" in new.given:
            seen = seen & new.given["keep"].unsqueeze(1)
        keys, values = ([t.narrow(2, 0, layout.capacity) for t in bank(held, name)] for name in ("keys", "values"))
        valid = seen if query.one else seen.unsqueeze(1)
        done = query.attend(Segment(format, keys, values, valid=valid), want=("mass",) if query.one else ())
        if self.scored:
            mass = done.mass
            if not query.one:
                last = Segment(format, keys, values, valid=seen[:, -1:])
                mass = query.last().attend(last, want=("mass",)).mass
            held["importance"].copy_(mass[0].sum(1) / (layout.kv_heads * layout.groups))
        return done.out

    @staticmethod
    def _positions(new: New) -> Tensor:
        return new.given["rows"] if "rows" in new.given else new.positions[:, 0]


def importance_of(count: Tensor) -> Tensor:
    """What the last query's attention gave to each position, in the scored layer with this counter, ``(batch, capacity)``."""
    found: Tensor = STATE.slot(count, importance_state(holding_of(count).room)).tensor
    return found


def importance_state(capacity: int) -> StateSpec:
    """The buffer ``importance`` of a scored layer."""
    return buffer("importance", (capacity,), torch.float32)
