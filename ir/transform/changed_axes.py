"""Which axes change with the rows of one: what is put together from it, or cut from what is; and who has them."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx

from accelpass.ir.analyses.axes.axes import Axes, Axis, Dim, axes
from accelpass.ir.analyses.axes.row_numbers import row_numbers
from accelpass.ir.core.graph import known, value
from accelpass.ir.core.program import Program
from accelpass.ir.errors import AccelpassError
from accelpass.ir.transform.kept import CHOSEN, PIECES, Leaf, Leaves, before_of, by_rows, kept_of


class CannotShrink(AccelpassError):
    """Says which node stands in the way."""


class ChangedAxes:
    """What ``count`` rows of an axis make of every other axis.

    Raises:
        CannotShrink: an axis holds the chosen one in a way that cannot be told.
    """

    def __init__(self, program: Program, axis: Axis, count: int) -> None:
        size = axis.size
        if not isinstance(size, int):
            raise CannotShrink(f"the axis has a size that only run time knows ({size})")
        if not 0 < count <= size:
            raise CannotShrink(f"{count} of {size} rows cannot be kept")
        self.axes: Axes = program.analysis(axes)
        self.numbers = program.analysis(row_numbers)
        self.leaf: dict[Axis, Leaf] = dict.fromkeys(self._alike(axis), (CHOSEN, size, count))
        self._spread()

    def _alike(self, axis: Axis) -> list[Axis]:
        """The axis, and those that rows are picked of by the numbers of its rows."""
        found = [axis]
        for one in found:
            for pair in self.numbers.picks:
                found += [other for other in pair if one in pair and other not in found]
        odd = [other for other in found if not known(other.size == axis.size)]
        if odd:
            raise CannotShrink(f"numbers of {axis.size} rows pick among {odd[0].size} of {odd[0].made}")
        return found

    def renumbered(self, node: fx.Node) -> fx.Node | None:
        """What chose the numbers that a value holds, if they are of rows that are taken out."""
        axis, chooser = self.numbers.of.get(node, (None, None))
        return chooser if axis in self.leaf else None

    def _spread(self) -> None:
        """What is put together from the axis, or is cut from what is, changes too."""
        grown = True
        while grown:
            grown = False
            for part in self.axes.parts:
                grown |= self._joined(part)
        for part in self.axes.parts:
            cut = [a for a in part.whole if a in self.leaf and a not in part.part]
            if cut and not self._is_piece(part):
                raise CannotShrink(f"{part.part[0].made if part.part else 'a slice'} is some rows of the axis")

    def _joined(self, part: Any) -> bool:
        changed = [a for a in part.part if a in self.leaf]
        if not changed or all(a in part.whole for a in changed):
            return False
        if len(part.whole) != 1 or not isinstance(part.start, int) or not isinstance(part.whole[0].size, int):
            raise CannotShrink(
                f"{part.whole[0].made if part.whole else 'a value'} holds the axis among others, in pieces"
            )
        (whole,) = part.whole
        piece = (part.start, part.step, self.leaves(part.part))
        old: Any = self.leaf.get(whole, (PIECES, whole.size, ()))
        if old[0] != PIECES:
            raise CannotShrink(f"{whole.made} is cut into pieces along the axis")
        if piece in old[2]:
            return False
        self.leaf[whole] = (PIECES, whole.size, tuple(sorted((*old[2], piece), key=lambda p: p[0])))
        return True

    def _is_piece(self, part: Any) -> bool:
        """Whether rows of a changed axis are one of its pieces, or beside all of them."""
        if len(part.whole) != 1 or not isinstance(part.start, int) or not isinstance(part.size, int):
            return False
        leaf: Any = self.leaf[part.whole[0]]
        if leaf[0] != PIECES:
            return False
        mine = set(range(part.start, part.start + part.size * part.step, part.step))
        for start, step, leaves in leaf[2]:
            if (start, step, leaves) == (part.start, part.step, self.leaves(part.part)):
                return True
            count = before_of(leaves)
            if mine.intersection(range(start, start + count * step, step)):
                return False
        return True

    def leaves(self, found: Sequence[Axis]) -> Leaves:
        return tuple(self.leaf.get(a, a.size) for a in found)

    def of(self, node: fx.Node) -> dict[int, Leaves]:
        """The dimensions of a node that change, by number."""
        found = enumerate(self.axes.of(node))
        return {at: self.leaves(dim.leaves) for at, dim in found if any(a in self.leaf for a in dim.leaves)}

    def size(self, dim: Dim) -> Any:
        """The size of a dimension afterwards."""
        size = dim.size
        for leaf in (self.leaf[a] for a in dim.leaves if a in self.leaf):
            size = size // leaf[1] * kept_of(leaf)  # type: ignore[index]
        return size


@dataclass(frozen=True, eq=False)
class Carrier:
    """A weight that has an axis in dimension ``dim``; ``leaves`` says how the axis lies in it."""

    weight: fx.Node
    dim: int
    leaves: Leaves

    def rows(self, tensor: Tensor) -> Tensor:
        """``(size of the axis, n)``: what the weight's tensor holds for each row of the axis."""
        return by_rows(self.leaves, tensor, self.dim)


def carriers(program: Program, axis: Axis, region: Collection[fx.Node] | None = None) -> list[Carrier]:
    """The weights that have an axis, in graph order; a weight that has it in two dimensions is listed for each.

    Args:
        region: those that these nodes read alone.

    Raises:
        CannotShrink: how many rows there are, only run time knows.
    """
    changed = ChangedAxes(program, axis, 1)
    inside = None if region is None else frozenset(region)
    return [
        Carrier(node, at, leaves)
        for node in program.graph.nodes
        if program.tensors.is_constant(node) and (inside is None or not inside.isdisjoint(node.users))
        for at, leaves in changed.of(node).items()
    ]


def followers(program: Program, axis: Axis, starts: Sequence[fx.Node]) -> set[fx.Node]:
    """``starts``, what is computed from these and has an axis, and what reads that: a region to shrink.

    Views and casts of weights that these nodes alone read are among them.
    """
    changed = ChangedAxes(program, axis, 1)
    found, front = set(starts), list(starts)
    while front:
        node = front.pop()
        # A tuple has no dimensions of its own; its items have.
        if changed.of(node) or not isinstance(value(node), Tensor):
            new = [user for user in node.users if user not in found and user.op == "call_function"]
            found.update(new)
            front += new
    return with_weights(program, found)


def with_weights(program: Program, nodes: Collection[fx.Node]) -> set[fx.Node]:
    """These nodes, and the views and casts of weights that they alone read."""
    found = set(nodes)
    front = list(found)
    while front:
        for node in front.pop().all_input_nodes:
            made = node.op == "call_function" and all(map(program.tensors.is_constant, node.all_input_nodes))
            if made and node not in found and found.issuperset(node.users):
                found.add(node)
                front.append(node)
    return found
