"""The axis analysis: what each dimension of each value is, and which values share it.

Axes are found by following operators (``axis_rules.py``, ``axis_indexing.py``, ``axis_products.py``) and named by what some of them mean
(``axis_names.py``), never by size.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

# Importing the rules registers them.
from accelpass.ir.analyses.axes import (
    axis_indexing,  # noqa: F401
    axis_products,  # noqa: F401
    axis_rules,  # noqa: F401
)
from accelpass.ir.analyses.axes.axis_factors import Factor, Factors, leaves, unify
from accelpass.ir.analyses.axes.axis_flow import Flow
from accelpass.ir.analyses.axes.axis_names import Naming, named
from accelpass.ir.core.graph import mutates, root, value
from accelpass.ir.core.program import Program

NAMES = ("batch", "token", "head", "channel", "expert", "vocabulary", "frame", "height", "width")
_NONE = Naming(frozenset())


@dataclass(frozen=True, eq=False)
class Axis:
    """One axis; two dimensions that have the same one shrink together.

    Attributes:
        name: one of NAMES; None if nothing in the graph gives it a meaning, or if two operators disagree.
        names: ``name``, and ``token`` for frames, height and width that attention runs over.
        size: may be symbolic.
        made: the first node that has it.
    """

    name: str | None
    names: frozenset[str]
    size: Any
    made: str

    def __repr__(self) -> str:
        return f"{self.name or '?'}[{self.size}] of {self.made}"


@dataclass(frozen=True)
class Dim:
    """One dimension of a value: the axes merged in it, outermost first; none if its size is 1 and stays so."""

    leaves: tuple[Axis, ...]
    size: Any

    @property
    def name(self) -> str:
        """``token``, ``head*channel``; ``?`` for an axis without a name and ``1`` for a dimension without axes."""
        return "*".join(axis.name or "?" for axis in self.leaves) or "1"

    def is_(self, name: str) -> bool:
        """Every axis in it has this name."""
        return bool(self.leaves) and all(name in axis.names for axis in self.leaves)

    def has(self, what: str | Axis) -> bool:
        """An axis in it has this name, or is this axis."""
        return any(axis is what or what in axis.names for axis in self.leaves)


@dataclass(frozen=True)
class Part:
    """``part`` is rows ``start`` to ``start + size`` of ``whole``, every ``step``-th: of a slice, a split, a cat, a pad."""

    whole: tuple[Axis, ...]
    part: tuple[Axis, ...]
    start: Any
    size: Any
    step: int


@dataclass(frozen=True)
class Conflict:
    """An axis that operators name differently, and one site for each name."""

    axis: Axis
    sites: tuple[tuple[str, fx.Node], ...]


@dataclass(frozen=True, eq=False)
class Axes:
    """The result of :func:`axes`.

    Attributes:
        dims: the dimensions of every tensor.
        parts: axes that are rows of other axes.
        conflicts: axes that have no name because they have two.
        unknown_ops: operators without a rule, and how often each occurs. What they return has axes of its own.
    """

    dims: dict[fx.Node, tuple[Dim, ...]]
    parts: tuple[Part, ...]
    conflicts: tuple[Conflict, ...]
    unknown_ops: dict[str, int]

    def of(self, node: fx.Node) -> tuple[Dim, ...]:
        """One entry per dimension; nothing for what is not one tensor."""
        return self.dims.get(node, ())

    @staticmethod
    def same(a: Dim, b: Dim) -> bool:
        """The dimensions consist of the same axes in the same order; two of size 1 without any are not the same."""
        return bool(a.leaves) and a.leaves == b.leaves

    def carriers(self, axis: Axis) -> list[tuple[fx.Node, int]]:
        """Every value that has the axis, alone or merged with others, and in which dimension; in graph order."""
        return [(node, i) for node, dims in self.dims.items() for i, dim in enumerate(dims) if dim.has(axis)]

    def named(self, name: str) -> list[Axis]:
        """The axes of that name, those in most values first."""
        return [axis for axis, _ in self._counts().most_common() if name in axis.names]

    def table(self, rows: int = 20) -> str:
        """The axes that most values have: name, size, number of values, the first of them."""
        lines = [f"{'axis':<12}{'size':>10}{'values':>8}  first in"]
        counts = self._counts().most_common()
        for axis, count in counts[:rows]:
            lines.append(f"{axis.name or '?':<12}{axis.size!s:>10}{count:>8}  {axis.made}")
        if len(counts) > rows:
            lines.append(f"... and {len(counts) - rows} more")
        lines += [
            f"conflict: {c.axis.made}: {', '.join(f'{n} by {s.name}' for n, s in c.sites)}" for c in self.conflicts
        ]
        lines += [f"no rule: {name} ({count})" for name, count in self.unknown_ops.items()]
        return "\n".join(lines)

    __str__ = table

    def _counts(self) -> Counter[Axis]:
        return Counter(axis for dims in self.dims.values() for dim in dims for axis in dict.fromkeys(dim.leaves))


def axes(program: Program) -> Axes:
    """Name every dimension of every value; use it as ``program.analysis(axes)``.

    Names come from attention operands, convolutions, embeddings, linears, norms, expert stacks and routers. Inferred
    rather than certain: ``vocabulary`` (see ``axis_names``) and, for attention without a dimension of heads, ``batch``.
    """
    flow = Flow()
    written = {root(n) for node in program.graph.nodes for n in mutates(node)}
    for node in program.graph.nodes:
        if node.op == "call_function":
            flow.walk(node)
        elif node.op in ("placeholder", "get_attr") and isinstance(value(node), Tensor):
            constant = program.tensors.is_constant(node) or node.op == "get_attr"
            if constant and node not in written:
                flow.tables.add(node)
                flow.dims[node] = flow.new(node)
            else:  # a batch of one is a batch; a weight's dimension of size 1 is there to be broadcast
                flow.dims[node] = [(Factor(s, node.name),) for s in value(node).shape]
    _close(flow)
    names = named(program, flow)
    made: dict[Factor, Axis] = {}

    def shown(dim: Factors) -> tuple[Axis, ...]:
        for leaf in leaves(dim):
            if leaf not in made:
                naming = names.get(leaf, _NONE)
                made[leaf] = Axis(naming.name, frozenset() if naming.conflict else naming.names, leaf.size, leaf.made)
        return tuple(made[leaf] for leaf in leaves(dim))

    dims = {
        node: tuple(Dim(shown(d), s) for d, s in zip(found, value(node).shape, strict=True))
        for node, found in flow.dims.items()
        if isinstance(value(node), Tensor)
    }
    parts = tuple(Part(shown(p.whole), shown(p.part), p.start, p.size, p.step) for p in flow.pieces)
    conflicts = tuple(Conflict(made[f], n.sites) for f, n in names.items() if n.conflict and f in made)
    return Axes(dims, parts, conflicts, {op: len(nodes) for op, nodes in flow.unknown.items()})


def _close(flow: Flow) -> None:
    """The same rows of one axis are one axis, and so are axes put together from the same parts."""
    changed = True
    while changed:
        changed = False
        same: list[tuple[Any, Factors]] = [
            ((leaves(p.whole), _plain(p.start), _plain(p.size), p.step), p.part) for p in flow.pieces if p.telling
        ]
        for whole, parts in flow.joins:
            sequence = tuple((leaves(part), _plain(size)) for part, size in parts)
            if any(part for part, _ in sequence):
                same.append((sequence, whole))
        first: dict[Any, Factors] = {}
        for key, found in same:
            other = first.setdefault(key, found)
            if found and other and leaves(other) != leaves(found):
                unify(other, found)
                changed |= leaves(other) == leaves(found)


def _plain(size: Any) -> Any:
    """A size that can be looked up: equal expressions are equal sizes."""
    return size.node.expr if isinstance(size, torch.SymInt) else size
