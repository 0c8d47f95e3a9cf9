"""A stretch of the graph once more, for fewer rows of one axis: half of a batch, some of the tokens.

Sizes are written as numbers into views and splits. Which of them mean the axis is known from the axis analysis, never
guessed from the number; what cannot be told is refused.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from accelpass.ir.analyses.axes.axes import Axes, Axis, Dim
from accelpass.ir.attention.spec.op import is_attention, spec_of
from accelpass.ir.core.graph import aten, call, is_call, known, refresh, value
from accelpass.ir.errors import AccelpassError
from accelpass.ir.transform.splice import KEPT

_SHAPED = (aten.view, aten.reshape, aten._unsafe_view, aten.expand)
_RANDOM = (aten.empty, aten.rand, aten.randn)
_MADE = (aten.arange, aten.zeros, aten.ones, aten.full, *_RANDOM)
Take = Callable[[fx.Node, int], fx.Node]
Leaves = tuple[Axis, ...]


class CannotResize(AccelpassError):
    """Says which operation stands in the way."""


@dataclass
class _Sizes:
    """What became of each axis, or sequence of merged axes, and of positions along those that were joined from parts."""

    new: dict[Leaves, Any] = field(default_factory=dict)
    moved: dict[Leaves, dict[int, int]] = field(default_factory=dict)
    parts: dict[Leaves, list[tuple[int, bool]]] = field(default_factory=dict)
    """Of a joined axis: how long each part was, and whether it has fewer rows now."""

    def of(self, dim: Dim) -> Any:
        """The size of a dimension now.

        Raises:
            CannotResize: it holds a part of a sequence of merged axes.
        """
        key = self._key(dim)
        return dim.size if key is None else dim.size // math.prod(int(a.size) for a in key) * self.new[key]

    def changes(self, dim: Dim) -> bool:
        key = self._key(dim)
        return key is not None and not known(self.new[key] == math.prod(int(a.size) for a in key))

    def _key(self, dim: Dim) -> Leaves | None:
        """The sequence of axes in a dimension of which there are other rows now."""
        leaves = dim.leaves
        for key in self.new:
            if any(leaves[start : start + len(key)] == key for start in range(len(leaves) - len(key) + 1)):
                return key
            if len(key) > 1 and set(key) & set(leaves):
                raise CannotResize(f"it works on {dim.name} apart from the rest of the grid")
        return None


@dataclass
class Resizer:
    """Copies nodes for ``size`` rows of the dimension ``dim``.

    Attributes:
        size: a number, or a symbolic one: views then find it themselves.
        take: makes, from a value that is computed outside and has the axis in some dimension, the rows that are kept.
        anew: the rows that are kept are a sequence of their own, counted from 0: positions that the graph makes for all rows
            are made for as many as there are now, and what it cuts off the end is cut off the new end.
    """

    graph: fx.Graph
    axes: Axes
    dim: Dim
    size: Any
    take: Take
    anew: bool = False
    _sizes: _Sizes = field(default_factory=_Sizes)
    _env: dict[fx.Node, fx.Node] = field(default_factory=dict)

    def copy(self, region: Sequence[fx.Node], results: Sequence[fx.Node]) -> list[fx.Node]:
        """The results for the rows that are kept; the graph's insertion point must be set.

        Args:
            region: nodes in graph order; whatever else they read is computed outside.

        Raises:
            CannotResize: an operation means something else with fewer rows; nothing that was copied is used yet.
        """
        if not self.dim.leaves:
            raise CannotResize("the axis analysis cannot follow the dimension")
        self._sizes.new[self.dim.leaves] = self.size
        inside = set(region)
        for node in region:
            for outer in node.all_input_nodes:
                if outer not in inside and outer not in self._env:
                    self._env[outer] = self._taken(outer)
            self._env[node] = self._copied(node)
        return [self._env[n] for n in results]

    def put(self, outer: fx.Node, rows: fx.Node) -> None:
        """Let the copies read ``rows`` in the place of ``outer``."""
        self._env[outer] = rows

    def copied(self, node: fx.Node) -> fx.Node:
        """The copy of a node of the region."""
        return self._env[node]

    def _taken(self, outer: fx.Node) -> fx.Node:
        if not isinstance(value(outer), Tensor):
            return outer
        node = outer
        for index, dim in enumerate(self.axes.of(outer)):
            if not self._sizes.changes(dim):
                continue
            if dim.leaves == self.dim.leaves:
                node = self.take(node, index)
            elif dim.leaves in self._sizes.parts:
                node = self._taken_by_parts(node, index, self._sizes.parts[dim.leaves])
            else:
                raise CannotResize(f"{outer.name} has the axis merged with another ({dim.name})")
        return node

    def _taken_by_parts(self, node: fx.Node, index: int, parts: Sequence[tuple[int, bool]]) -> fx.Node:
        taken, start = [], 0
        for length, shrinks in parts:
            part = call(self.graph, node, aten.slice.Tensor, node, index, start, start + length)
            taken.append(self.take(part, index) if shrinks else part)
            start += length
        return call(self.graph, node, aten.cat.default, taken, index)

    def _copied(self, node: fx.Node) -> fx.Node:
        args = list(fx.map_arg(node.args, self._env.__getitem__))
        kwargs = dict(fx.map_arg(node.kwargs, self._env.__getitem__))
        dims = self.axes.of(node)
        if is_call(node, *_MADE):
            self._made_anew(node, args)
        if is_call(node, *_SHAPED):
            given: Any = args[1]
            if len(given) != len(dims):
                raise CannotResize(f"{node.name} ({node.target}) changes the number of dimensions")
            args[1] = [self._size_in(s, d) for s, d in zip(given, dims, strict=True)]
        elif is_call(node, aten.unflatten):
            at = args[1] % value(node.args[0]).dim()
            args[2] = [self._sizes.of(d) for d in dims[at : at + len(args[2])]]
        elif is_call(node, aten.slice):
            self._moved_slice(node, args)
        elif is_call(
            node, aten.split_with_sizes, aten.split, aten.chunk, aten.select, aten.index, aten.narrow, aten.roll
        ):
            self._moved_split(node, args)
        # A call without tensors among its operands would make a real one.
        mode = getattr(value(node), "fake_mode", None) or nullcontext()
        with torch.no_grad(), mode:
            new = self.graph.call_function(node.target, tuple(args), kwargs)
            new.meta = {k: node.meta[k] for k in KEPT if k in node.meta}
            try:
                refresh(new)
            except Exception as cause:  # whatever an operator's fake says about operands that do not fit
                raise CannotResize(f"{node.name}: {str(cause).splitlines()[0]}") from cause
        if is_attention(node) and spec_of(node).is_edited:
            raise CannotResize("another pass has edited the attention inside")
        if is_call(node, aten.cat):
            self._note_join(node)
        self._check(node, new)
        return new

    def _size_in(self, given: Any, dim: Dim) -> Any:
        """What a view is given for a dimension; a size that only run time knows is left for the view to find."""
        size = self._sizes.of(dim)
        if not self._sizes.changes(dim):
            return size if given == -1 and isinstance(size, int) else given  # one size alone may be left to be found
        return size if isinstance(size, int) else -1

    def _made_anew(self, node: fx.Node, args: list[Any]) -> None:
        changed = any(map(self._sizes.changes, self.axes.of(node)))
        counts = is_call(node, aten.arange)
        if not self.anew or is_call(node, *_RANDOM) or (counts and changed and args[:-1] not in ([], [0])):
            raise CannotResize(f"{node.name} makes a tensor of its own for all rows")
        if changed and counts:
            args[-1] = self._sizes.of(self.axes.of(node)[0])
        elif changed:
            args[0] = [self._sizes.of(d) for d in self.axes.of(node)]

    def _note_join(self, node: fx.Node) -> None:
        """A concatenation along the axis makes another axis; remember how long it is, and where its parts begin."""
        parts: Any = node.args[0]
        at = (node.args[1] if len(node.args) > 1 else 0) % value(node).dim()
        joined = self.axes.of(node)[at]
        lengths = [(int(value(p).shape[at]), int(value(self._env[p]).shape[at])) for p in parts]
        if all(old == new for old, new in lengths) or not joined.leaves:
            return
        positions, now = {0: 0}, 0
        before = 0
        for old, new in lengths:
            before, now = before + old, now + new
            positions[before] = now
        self._sizes.new[joined.leaves] = now
        self._sizes.moved[joined.leaves] = positions
        dims = [self.axes.of(p)[at] for p in parts]
        if all(d.leaves == self.dim.leaves or not self._sizes.changes(d) for d in dims):
            self._sizes.parts[joined.leaves] = [
                (old, d.leaves == self.dim.leaves) for (old, _), d in zip(lengths, dims, strict=True)
            ]

    def _position(self, node: fx.Node, dim: Dim, position: int) -> int:
        size = int(dim.size)
        if self.anew and -self._sizes.of(dim) <= position < 0:
            return self._sizes.of(dim) + position
        if self.anew and position == 1 < min(size, self._sizes.of(dim)):  # a larger one may be counted from the end
            return 1
        absolute = position + size if position < 0 else min(position, size)
        known = self._sizes.moved.get(dim.leaves, {0: 0, size: self._sizes.of(dim)})
        if absolute not in known:
            raise CannotResize(f"{node.name} cuts the axis at {position}")
        return known[absolute]

    def _moved_slice(self, node: fx.Node, args: list[Any]) -> None:
        args += [0, None, None, 1][len(args) - 1 :]
        source: Any = node.args[0]
        at = args[1] % value(source).dim()
        dim, rows = self.axes.of(source)[at], self.axes.of(node)[at]
        if not self._sizes.changes(dim):
            if self.anew and self._sizes.changes(rows) and args[2] in (None, 0) and args[4] == 1:
                args[3] = self._sizes.of(rows)  # a table of positions, cut to the rows that there are
            return
        if args[4] != 1:
            raise CannotResize(f"{node.name} takes every {args[4]}th row")
        args[2] = self._position(node, dim, args[2] or 0)
        args[3] = sys.maxsize if args[3] is None else self._position(node, dim, args[3])

    def _moved_split(self, node: fx.Node, args: list[Any]) -> None:
        source: Any = node.args[0]
        name = str(node.target).split(".")[1]
        changed = [i for i, d in enumerate(self.axes.of(source)) if self._sizes.changes(d)]
        if is_call(node, aten.select, aten.narrow):
            at = [args[1] % value(source).dim()]
        elif is_call(node, aten.index):
            at = [i for i, index in enumerate(args[1]) if index is not None]
        elif is_call(node, aten.roll):
            at = [d % value(source).dim() for d in (args[2] if len(args) > 2 else range(value(source).dim()))]
        else:
            at = [(args[2] if len(args) > 2 else node.kwargs.get("dim", 0)) % value(source).dim()]
        if not set(at) & set(changed):
            return
        dim = self.axes.of(source)[at[0]]
        if self.anew and is_call(node, aten.select) and -self._sizes.of(dim) <= args[2] < 0:
            return
        if self.anew and is_call(node, aten.index) and _counted(n for n in node.args[1] if n is not None):
            return
        if not is_call(node, aten.split_with_sizes):
            raise CannotResize(f"{node.name} ({name}) works along the axis")
        sizes, start = [], 0
        for length in args[1]:
            sizes.append(self._position(node, dim, start + length) - self._position(node, dim, start))
            start += length
        args[1] = sizes

    def _check(self, node: fx.Node, new: fx.Node) -> None:
        """The result has the shape that the axes say."""
        made = value(new)
        if not isinstance(made, Tensor):
            return
        wanted = [self._sizes.of(d) for d in self.axes.of(node)]
        if len(made.shape) != len(wanted) or not all(known(a == b) for a, b in zip(made.shape, wanted, strict=True)):
            raise CannotResize(f"{node.name} ({node.target}) gives {list(made.shape)} where {wanted} was expected")


def _counted(indices: Iterable[Any]) -> bool:
    """Whether indices are made of positions that the graph counts itself, and of nothing that it is given."""
    front, seen = list(indices), set()
    while front:
        node = front.pop()
        if node in seen:
            continue
        seen.add(node)
        if node.op != "call_function":
            return False
        front += node.all_input_nodes
    return True
