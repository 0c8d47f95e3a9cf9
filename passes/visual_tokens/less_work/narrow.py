"""An MLP that computes some rows with its first hidden channels alone."""

from __future__ import annotations

from torch import fx

from accelpass.ir.analyses.axes.axes import Axes, axes
from accelpass.ir.analyses.axes.flow import between
from accelpass.ir.analyses.structure.mlp import Mlp
from accelpass.ir.core.graph import aten, call, is_call, refresh, replace
from accelpass.ir.core.program import Program
from accelpass.ir.transform.resize import CannotResize
from accelpass.ir.transform.sequence.again import count_of, on_rows
from accelpass.ir.transform.sequence.rows import rows_of
from accelpass.ir.transform.splice import all_or_nothing, inserted
from accelpass.passes.visual_tokens.less_work.neighbours import joined


def why_not_narrow(mlp: Mlp) -> str | None:
    """Why an MLP cannot be computed with some of its channels, or None."""
    linears = [site for site in (mlp.gate, mlp.up, mlp.down) if site is not None]
    if mlp.fused or not all(is_call(site.node, aten.linear) and site.node.args[1] is site.weight for site in linears):
        return "its linears are not plain ones of a weight each"
    return None


def narrow(program: Program, mlp: Mlp, words: fx.Node, visual: fx.Node, parts: int) -> int:
    """Let the rows ``visual`` be computed with one of ``parts`` of the hidden channels, the first; returns how many these are.

    Args:
        words, visual: rows of the stream, ascending int64 ``(batch, rows)``, each in one of the two.

    Raises:
        CannotResize: an operation means something else for fewer rows or channels; the graph is as it was.
    """
    known_axes: Axes = program.analysis(axes)
    region, x = between(program, mlp.x, mlp.node), mlp.x
    dim, kept = known_axes.of(x)[1], mlp.down.in_features // parts
    anchor = mlp.node.next
    with all_or_nothing(program):
        made = []
        for rows in (words, visual):
            (some,) = inserted(program, anchor, lambda x, rows: [rows_of(x, rows)], x, rows)
            with program.graph.inserting_before(anchor):
                made.append(on_rows(known_axes, region, {x: some}, dim, count_of(some)))
        for site in (mlp.gate, mlp.up, mlp.down):
            if site is not None:
                _sliced(made[1][site.node], 1 if site is mlp.down else 0, kept)
        for node in (made[1][n] for n in region):
            try:
                refresh(node)
            except Exception as cause:  # whatever an operator's fake says about operands that do not fit
                raise CannotResize(f"{node.name}: {str(cause).splitlines()[0]}") from cause
    parted = [made[0][mlp.node], made[1][mlp.node], words, visual]
    (whole,) = inserted(program, anchor, lambda a, b, w, v: [joined(a, b, w, v, 1)], *parted)
    replace(mlp.node, whole)
    for node in reversed(region[:-1]):
        if not node.users:
            program.graph.erase_node(node)
    program.changed()
    return kept


def _sliced(linear: fx.Node, dim: int, kept: int) -> None:
    """Let a linear have its first ``kept`` outputs (``dim`` 0), or read its first inputs (1): views of its weight and bias."""
    graph, (x, *own) = linear.graph, linear.args
    with graph.inserting_before(linear):
        sliced = [
            call(graph, linear, aten.slice.Tensor, given, dim, 0, kept) if given is not None and dim < rank else given
            for given, rank in zip(own, (2, 1), strict=False)
        ]
    linear.args = (x, *sliced)
