"""Rows of a sequence are taken out, or merged, between stretches of a stack; what follows along the sequence follows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx

from accelpass.ir.analyses.axes.axes import axes
from accelpass.ir.core.program import Program
from accelpass.ir.transform.sequence.again import count_of
from accelpass.ir.transform.sequence.rows import rows_of, write_rows
from accelpass.ir.transform.splice import inserted
from accelpass.ir.transform.tokens import CannotCut, Stretch, ends_with, on_fewer, take_over


@dataclass(frozen=True, eq=False)
class Rows:
    """These rows of the stream go on, the others leave it with the hidden state that they have.

    Attributes:
        chosen: positions in the stream as it is now, ascending int64 ``(batch, kept)``.
    """

    chosen: fx.Node


@dataclass(frozen=True, eq=False)
class Merge:
    """Rows go on in groups, one row for each.

    Attributes:
        stream: the merged rows, ``(batch, groups, channels)``.
        place: the group that each row of the stream as it is now went into, int64 ``(batch, tokens)``.
    """

    stream: fx.Node
    place: fx.Node


class ShrinkingSequence:
    """A stack of stretches, each on what is left of the stream of the one before.

    Masks, position tables and residuals that a stretch reads follow: each loses the same rows. What cannot follow is refused,
    with the node. Nothing that the graph returns changes before :meth:`finish`.

    Attributes:
        stream: after the stretches so far.
        attentions: of the last of them.
        rows: which of the first stretch's tokens the stream's rows are, int64 ``(batch, kept)``; None for all, and once rows
            were merged.
    """

    def __init__(self, program: Program, found: Sequence[Stretch]) -> None:
        self.program, self.found = program, found
        self.anchor = found[-1].end.next
        self.stream = found[0].end
        self.attentions = found[0].attentions
        self.rows: fx.Node | None = None
        self._axes = program.analysis(axes)
        self._merged = False
        self._back: list[tuple[Rows | Merge, fx.Node]] = []
        self._made: list[dict[fx.Node, Any]] = []

    def make(self, run: Callable[..., Sequence[Tensor]], *operands: fx.Node) -> list[fx.Node]:
        """What a plain torch function computes of nodes, behind the stretches so far."""
        return inserted(self.program, self.anchor, run, *operands)

    def go_on(self, stretch: Stretch, how: Rows | Merge) -> None:
        """Run the next stretch on what ``how`` leaves of the stream.

        Raises:
            CannotCut: it reads something that cannot be had for these rows; says what.
        """
        self._back.append((how, self.stream))
        given = {stretch.start: self._left(how)}
        if self._merged and stretch.rows:
            outer = next(iter(stretch.rows))
            raise CannotCut(f"{outer.name} has a row for each token, and rows of it cannot be merged as tokens are")
        for outer, dims in stretch.rows.items():
            assert self.rows is not None
            given[outer] = self.make(_taken(dims), outer, self.rows)[0]
        count = self._count(given[stretch.start])
        with self.program.graph.inserting_before(self.anchor):
            made = on_fewer(stretch, given, count, self._axes)
        self._made.append(made)
        self.stream, self.attentions = made[stretch.end], [made[n] for n in stretch.attentions]

    def finish(self) -> None:
        """Let the graph compute the stretches so, and what follows them read as many rows as there were."""
        whole = self.stream
        for how, stream in reversed(self._back):
            if isinstance(how, Rows):
                (whole,) = self.make(_written, stream, how.chosen, whole)
            else:
                (whole,) = self.make(lambda x, place: [rows_of(x, place)], whole, how.place)
        tail = self.found[-1].end
        for stretch, copies in zip(self.found[:0:-1], self._made[::-1], strict=True):
            if stretch is self.found[-1]:
                ends_with(self.program, tail, whole)
            take_over(self.program, stretch, copies)

    def _left(self, how: Rows | Merge) -> fx.Node:
        if isinstance(how, Merge):
            self._merged, self.rows = True, None
            return how.stream
        if self.rows is None:
            self.rows = how.chosen
        else:
            (self.rows,) = self.make(lambda rows, chosen: [rows.gather(1, chosen)], self.rows, how.chosen)
        return self.make(lambda x, chosen: [rows_of(x, chosen)], self.stream, how.chosen)[0]

    def _count(self, stream: fx.Node) -> Any:
        """How many rows there are: a number, or the node that holds it."""
        with self.program.graph.inserting_before(self.anchor):
            return count_of(stream)


def _taken(dims: Sequence[int]) -> Callable[[Tensor, Tensor], list[Tensor]]:
    def run(x: Tensor, rows: Tensor) -> list[Tensor]:
        for dim in dims:
            x = rows_of(x, rows, dim)
        return [x]

    return run


def _written(whole: Tensor, rows: Tensor, new: Tensor) -> list[Tensor]:
    whole = whole.clone()
    write_rows(whole, rows, new)
    return [whole]
