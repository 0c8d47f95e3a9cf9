"""Values that hold numbers of an axis's rows, as a choice of the largest gives them, and the axes that they pick rows of."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

from torch import fx

from accelpass.ir.analyses.axes.axes import Axis, axes
from accelpass.ir.analyses.axes.flow import CASTS, VIEWS
from accelpass.ir.attention.recognition.score_steps import argument
from accelpass.ir.core.graph import aten, is_call, shape
from accelpass.ir.core.program import Program

_WITH_NUMBERS = (aten.topk, aten.sort, aten.max, aten.min)
_NUMBERS = (aten.argmax, aten.argmin, aten.argsort)
_SAME = (*CASTS, *VIEWS, aten.slice, aten.select, aten.index, aten.index_select, aten.gather, aten.repeat_interleave)


@dataclass(frozen=True, eq=False)
class RowNumbers:
    """The result of :func:`row_numbers`.

    Attributes:
        of: by value, whose rows it numbers, and what chose them.
        picks: (axis whose rows are numbered, axis that is picked from by these numbers): row i of one is row i of the other.
    """

    of: dict[fx.Node, tuple[Axis, fx.Node]]
    picks: tuple[tuple[Axis, Axis], ...]


def row_numbers(program: Program) -> RowNumbers:
    """Follow what topk, sort, argmax and the like number to where rows are picked by it; ``program.analysis(row_numbers)``."""
    found, of, picks = program.analysis(axes), dict[fx.Node, tuple[Axis, fx.Node]](), list[tuple[Axis, Axis]]()

    def axis_at(node: Any, dim: int) -> Axis | None:
        dims = found.of(node)
        leaves: tuple[Axis, ...] = [*dims][dim].leaves if -len(dims) <= dim < len(dims) else ()
        return leaves[0] if len(leaves) == 1 else None

    def picked(numbers: Any, node: Any, dim: int) -> None:
        other = axis_at(node, dim)
        if numbers in of and other is not None and other is not of[numbers][0]:
            picks.append((of[numbers][0], other))

    for node in program.graph.nodes:
        if node.op != "call_function":
            continue
        source: Any = node.args[0] if node.args else None
        if is_call(node, *_NUMBERS) or (is_call(node, operator.getitem) and is_call(source, *_WITH_NUMBERS)):
            chooser = node if is_call(node, *_NUMBERS) else source
            if chooser is not node and node.args[1] == 0:
                if is_call(source, aten.sort, aten.topk) and source.args[0] in of:
                    of[node] = of[source.args[0]]  # the numbers themselves, in order
                continue
            dim = argument(chooser, "dim", -1)
            axis = axis_at(chooser.args[0], dim) if isinstance(dim, int) else None
            if axis is not None:
                of[node] = axis, chooser
        elif is_call(node, *_SAME) and source in of:
            of[node] = of[source]
        if is_call(node, aten.index, aten.index_put):
            for at, index in enumerate(argument(node, "indices")):
                picked(index, source, at)
        elif is_call(node, aten.index_select, aten.gather, aten.scatter, aten.scatter_add):
            picked(argument(node, "index"), source, argument(node, "dim"))
        elif is_call(node, aten.embedding):
            picked(argument(node, "indices"), source, 0)
        elif is_call(node, aten.histc, aten.bincount) and _counts_all(node, of):
            picked(source, node, 0)
        elif is_call(node, aten.one_hot) and _counts_all(node, of):
            picked(source, node, len(shape(node)) - 1)
    return RowNumbers(of, tuple(dict.fromkeys(picks)))


def _counts_all(node: fx.Node, of: dict[fx.Node, tuple[Axis, fx.Node]]) -> bool:
    """Whether what counts numbers has a place for each row, and for no other."""
    source: Any = node.args[0]
    if source not in of:
        return False
    size = of[source][0].size
    if is_call(node, aten.histc):
        return [argument(node, n) for n in ("bins", "min", "max")] == [size, 0, size - 1]
    return bool(argument(node, "minlength" if is_call(node, aten.bincount) else "num_classes") == size)
