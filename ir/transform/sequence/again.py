"""A graph's computation once more, in the same graph, for some of its tokens: these are then a prompt of their own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.node import map_aggregate

from accelpass.ir.analyses.axes.axes import Axes, Dim, axes
from accelpass.ir.core.graph import aten, call, hint, is_call, is_from_run_time, known, mutates, refresh, value
from accelpass.ir.core.program import Program
from accelpass.ir.kv.ops import KV_APPEND
from accelpass.ir.torch_private import enable_python_dispatcher
from accelpass.ir.transform.resize import CannotResize, Resizer
from accelpass.ir.transform.sequence.prompt import NoPrompt, Prompt
from accelpass.ir.transform.sequence.rows import rows_of
from accelpass.ir.transform.splice import KEPT, splice, trace

_ARITHMETIC = (aten.add, aten.sub, aten.rsub, aten.mul, aten.div, aten.pow, aten.full, aten.remainder)
_COMPARED = (aten.eq, aten.ne, aten.lt, aten.le, aten.gt, aten.ge)


def again(
    program: Program,
    found: Prompt,
    region: Sequence[fx.Node],
    rows: fx.Node,
    positions: fx.Node,
    others: Mapping[fx.Node, fx.Node] = MappingProxyType({}),
) -> None:
    """Let the graph return, and store, what the model makes of the chosen tokens alone.

    What was there stays as far as the choice needs it.

    Args:
        region: the model's calls, in order.
        rows: of each sequence the chosen tokens, ascending, ``(batch, kept)``; positions: where each stands then, the same.
        others: what is read in the place of values from outside the region.

    Raises:
        NoPrompt: some operation means something else for fewer tokens; what the graph returns is as it was.
    """
    graph = program.graph
    (output,) = graph.find_nodes(op="output")
    with graph.inserting_before(output):
        count = count_of(rows)
    short = {one.node: _taken(program, one, rows, positions, count) for one in found.inputs} | dict(others)
    if not is_symbolic(found.tokens):
        _refuse_numbers(region, int(found.tokens))
    first, known_axes = found.rows, program.analysis(axes)
    dim = known_axes.of(first.node)[first.dims[0]]
    try:
        with graph.inserting_before(output):
            made = on_rows(known_axes, region, short, dim, count, anew=True)
    except CannotResize as cause:
        raise NoPrompt(f"the first prompt is not filtered (later ones of other lengths are): {cause}") from cause
    replaced(program, region, made)


def count_of(node: fx.Node, dim: int = 1) -> Any:
    """The size of a dimension: a number, or a node at the graph's insertion point that holds it."""
    size = value(node).shape[dim]
    if is_symbolic(size):
        return call(node.graph, node, aten.sym_size.int, node, dim)
    return size if isinstance(size, int) else hint(size)


def is_symbolic(size: Any) -> bool:
    """Whether a size may be another at another call."""
    return isinstance(size, torch.SymInt) and (is_from_run_time(size) or not known(size == size.node.hint))


def on_rows(
    known_axes: Axes, region: Sequence[fx.Node], rows: Mapping[fx.Node, Any], dim: Dim, count: Any, anew: bool = False
) -> dict[fx.Node, Any]:
    """Copies of calls for ``count`` rows of a dimension, at the graph's insertion point; by original.

    Sizes that the graph was captured with follow: symbolic ones are computed anew, numbers are known from the axis analysis.

    Args:
        rows: what is read in the place of values that have the dimension.
        anew: see :class:`Resizer`.

    Raises:
        CannotResize: an operation means something else for other rows.
    """
    if is_symbolic(dim.size):
        return _substituted(region, rows, dim.size, count)
    resizer = Resizer(region[0].graph, known_axes, dim, value(count), _unexpected, anew)
    for node, fewer in rows.items():
        resizer.put(node, fewer)
    return dict(zip(region, resizer.copy(region, region), strict=True))


def replaced(program: Program, region: Sequence[fx.Node], made: Mapping[fx.Node, Any]) -> None:
    """Let the graph return the copies, and erase of the originals what nothing else reads."""
    (output,) = program.graph.find_nodes(op="output")
    output.args = fx.map_arg(output.args, lambda n: made.get(n, n))
    for node in reversed(region):
        if made.get(node, node) is not node and (is_call(node, KV_APPEND) or not (node.users or mutates(node))):
            program.graph.erase_node(node)
    program.changed()


def _taken(program: Program, one: Any, rows: fx.Node, positions: fx.Node, count: Any) -> Any:
    """An input with the chosen tokens alone; ``count`` is how many."""
    (output,) = program.graph.find_nodes(op="output")
    if one.role == "count":
        return count

    def taken(given: Tensor, rows: Tensor, positions: Tensor) -> list[Tensor]:
        if one.role == "positions":
            own = given.dim() == 2 and known(given.shape[0] == rows.shape[0])
            places = positions if own else torch.arange(rows.shape[1], device=rows.device).expand(*given.shape[:-1], -1)
            return [places.to(given.dtype).contiguous()]
        for dim in one.dims:
            given = rows_of(given, rows, dim)
        return [given]

    operands = [one.node, rows, positions]
    return splice(program, trace(program, taken, operands), operands, output)[0]


def _substituted(
    region: Sequence[fx.Node], rows: Mapping[fx.Node, Any], tokens: torch.SymInt, count: Any
) -> dict[fx.Node, Any]:
    """Copies of the calls that depend on ``rows``, or on how many there are; sizes that come of a number become numbers."""
    env: dict[fx.Node, Any] = dict(rows)
    for node in _with_sizes(region):
        if isinstance(value(node), torch.SymInt) and known(value(node) == tokens):
            env[node] = count
        if node.op != "call_function" or node in env or env.keys().isdisjoint(node.all_input_nodes):
            continue
        args, kwargs = map_aggregate((node.args, node.kwargs), lambda n: env.get(n, n) if isinstance(n, fx.Node) else n)
        assert isinstance(args, tuple) and isinstance(kwargs, dict)
        mode = getattr(value(node), "fake_mode", None) or nullcontext()  # a call without tensors would make a real one
        # Composite operators (masked_scatter) compute with symbolic sizes in Python alone.
        with torch.no_grad(), mode, enable_python_dispatcher():
            new = node.graph.call_function(node.target, args, kwargs)
            new.meta = {key: node.meta[key] for key in KEPT if key in node.meta}
            refresh(new)
        env[node] = new
        if isinstance(value(new), int | float):
            env[node] = value(new)
            node.graph.erase_node(new)
    return env


def _with_sizes(region: Sequence[fx.Node]) -> list[fx.Node]:
    """The calls, and what computes the sizes that they read, in order."""
    found, front = dict.fromkeys(region), list(region)
    while front:
        for node in front.pop().all_input_nodes:
            if node not in found and isinstance(value(node), torch.SymInt | torch.SymFloat):
                found[node] = None
                front.append(node)
    return sorted(found)


def _unexpected(node: fx.Node, dim: int) -> fx.Node:
    raise CannotResize(f"{node.name} has a row for each token, and is no input of the call")


def _refuse_numbers(region: Sequence[fx.Node], tokens: int) -> None:
    """A number that the graph computes with and that equals the number of tokens may be just that."""
    for node in region:
        numbers = [
            n for n in (*node.args, *node.kwargs.values()) if isinstance(n, int | float) and not isinstance(n, bool)
        ]
        if is_call(node, *_ARITHMETIC, *_COMPARED) and tokens in numbers:
            raise NoPrompt(
                f"the first prompt is not filtered: {node.name} computes with {tokens}, which may be its length"
            )
