"""What calls on one cache keep of tokens besides keys and values, so that a dropped one can be taken up later.

Each has a row for no token after those of the capacity. All lives with the counter of the cache's first layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from accelpass.ir.core.graph import value
from accelpass.ir.core.program import Program
from accelpass.ir.core.state import STATE, StateSpec
from accelpass.ir.kv.sites import KVSite
from accelpass.ir.transform.sequence.rows import rows_of, write_rows
from accelpass.ir.transform.splice import inserted


def have_state(number: int, capacity: int) -> StateSpec:
    """Which tokens a stretch of blocks has computed."""
    return _state(f"have.{number}", capacity, (), torch.bool)


def computed(count: Tensor, number: int, capacity: int) -> Tensor:
    """The same of a cache whose first layer has this counter, ``(batch, capacity + 1)``."""
    found: Tensor = STATE.slot(count, have_state(number, capacity)).tensor
    return found


def _state(name: str, capacity: int, shape: Sequence[Any], dtype: torch.dtype) -> StateSpec:
    return StateSpec(f"pruning.{name}", (capacity + 1, *(int(n) for n in shape)), dtype, "sequence", batched=True)


@dataclass(frozen=True, eq=False)
class Memory:
    """Writes and reads of these states in one graph, ``first`` the site of its first layer."""

    program: Program
    first: KVSite

    def _node(self, spec: StateSpec) -> fx.Node:
        return self.program.tensors.state(self.first.count, spec)

    def _hidden(self, name: str, like: fx.Node) -> fx.Node:
        held = value(like)
        return self._node(_state(name, self.first.capacity, held.shape[2:], held.dtype))

    def put(self, before: fx.Node, name: str, rows: fx.Node, stream: fx.Node) -> None:
        """Keep the states ``stream`` of the tokens at ``rows``."""

        def run(held: Tensor, rows: Tensor, stream: Tensor) -> list[Tensor]:
            write_rows(held, rows, stream)
            return []

        inserted(self.program, before, run, self._hidden(name, stream), rows, stream)

    def taken(self, before: fx.Node, name: str, rows: fx.Node, like: fx.Node) -> fx.Node:
        """The states that were kept of tokens."""
        (made,) = inserted(self.program, before, lambda h, r: [rows_of(h, r)], self._hidden(name, like), rows)
        return made

    def note(self, before: fx.Node, number: int, rows: fx.Node) -> fx.Node:
        """A stretch computes these tokens; returns which ones it has computed."""
        have = self._node(have_state(number, self.first.capacity))

        def run(have: Tensor, rows: Tensor) -> list[Tensor]:
            have.scatter_(1, rows, torch.ones_like(rows, dtype=torch.bool))
            have[:, -1:] = False
            return []

        inserted(self.program, before, run, have, rows)
        return have

    def table(self, number: int, source: fx.Node, dim: int) -> fx.Node:
        """Rows of a value that is computed for each token by itself."""
        held = value(source)
        shape = [s for i, s in enumerate(held.shape) if i not in (0, dim)]
        return self._node(_state(f"table.{number}", self.first.capacity, shape, held.dtype))

    def tabulate(self, before: fx.Node, number: int, source: fx.Node, dim: int, rows: fx.Node) -> None:
        """Keep a table's rows of tokens."""

        def run(table: Tensor, made: Tensor, rows: Tensor) -> list[Tensor]:
            write_rows(table, rows, made.movedim(dim, 1).expand(table.shape[0], rows.shape[1], *table.shape[2:]))
            return []

        inserted(self.program, before, run, self.table(number, source, dim), source, rows)

    def looked_up(self, before: fx.Node, number: int, source: fx.Node, dim: int, rows: fx.Node) -> fx.Node:
        """A table's rows of tokens, as the value has them."""
        table = self.table(number, source, dim)
        (made,) = inserted(self.program, before, lambda t, r: [rows_of(t, r).movedim(1, dim).contiguous()], table, rows)
        return made
