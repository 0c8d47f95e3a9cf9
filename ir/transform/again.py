"""A graph's computation once more, in the same graph, for some of its tokens: these are then a prompt of their own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.node import map_aggregate

from accelpass.ir.analyses.axes.axes import Axes, axes
from accelpass.ir.core.graph import aten, is_call, known, mutates, refresh, value
from accelpass.ir.core.program import Program
from accelpass.ir.kv.ops import KV_APPEND
from accelpass.ir.transform.prompt import NoPrompt, Prompt
from accelpass.ir.transform.resize import CannotResize, Resizer
from accelpass.ir.transform.rows import rows_of
from accelpass.ir.transform.splice import KEPT, splice, trace

_ARITHMETIC = (aten.add, aten.sub, aten.rsub, aten.mul, aten.div, aten.pow, aten.full, aten.remainder)
_COMPARED = (aten.eq, aten.ne, aten.lt, aten.le, aten.gt, aten.ge)


def again(program: Program, found: Prompt, region: Sequence[fx.Node], rows: fx.Node, positions: fx.Node) -> None:
    """Let the graph return, and store, what the model makes of the chosen tokens alone.

    What was there stays as far as the choice needs it. Sizes that the graph was captured with follow the tokens: symbolic
    ones are computed anew, numbers are known from the axis analysis.

    Args:
        region: the model's calls, in order.
        rows: of each sequence the chosen tokens, ascending, ``(batch, kept)``; positions: where each stands then, the same.

    Raises:
        NoPrompt: some operation means something else for fewer tokens; what the graph returns is as it was.
    """
    graph, count = program.graph, int(value(rows).shape[1])
    (output,) = graph.find_nodes(op="output")
    own = list(dict.fromkeys(output.all_input_nodes))
    short = {one.node: _taken(program, one, rows, positions) for one in found.inputs}
    symbolic = isinstance(found.tokens, torch.SymInt) and not known(found.tokens == found.tokens.node.hint)
    with graph.inserting_before(output):
        made = _substituted(region, short) if symbolic else _resized(program, found, region, short, count)
    output.args = fx.map_arg(output.args, lambda n: made.get(n, n) if n in own else n)
    for node in reversed(region):
        if is_call(node, KV_APPEND) or not (node.users or mutates(node)):
            graph.erase_node(node)
    program.changed()


def _taken(program: Program, one: Any, rows: fx.Node, positions: fx.Node) -> Any:
    """An input with the chosen tokens alone."""
    kept, (output,) = int(value(rows).shape[1]), program.graph.find_nodes(op="output")
    if one.role == "count":
        return kept

    def taken(given: Tensor, rows: Tensor, positions: Tensor) -> list[Tensor]:
        if one.role == "positions":
            own = given.dim() == 2 and known(given.shape[0] == rows.shape[0])
            places = positions if own else torch.arange(kept, device=rows.device).expand(*given.shape[:-1], -1)
            return [places.to(given.dtype).contiguous()]
        for dim in one.dims:
            given = rows_of(given, rows, dim)
        return [given]

    operands = [one.node, rows, positions]
    return splice(program, trace(program, taken, operands), operands, output)[0]


def _substituted(region: Sequence[fx.Node], short: Mapping[fx.Node, Any]) -> dict[fx.Node, Any]:
    """Copies of the calls that depend on ``short``; sizes that are computed from it become numbers."""
    env: dict[fx.Node, Any] = dict(short)

    def at(held: Any) -> Any:
        return env.get(held, held) if isinstance(held, fx.Node) else held

    for node in region:
        if env.keys().isdisjoint(node.all_input_nodes):
            continue
        args, kwargs = map_aggregate((node.args, node.kwargs), at)
        assert isinstance(args, tuple) and isinstance(kwargs, dict)
        mode = getattr(value(node), "fake_mode", None) or nullcontext()  # a call without tensors would make a real one
        with torch.no_grad(), mode:
            new = node.graph.call_function(node.target, args, kwargs)
            new.meta = {key: node.meta[key] for key in KEPT if key in node.meta}
            refresh(new)
        env[node] = new
        if isinstance(value(new), int | float):
            env[node] = value(new)
            node.graph.erase_node(new)
    return env


def _resized(
    program: Program, found: Prompt, region: Sequence[fx.Node], short: Mapping[fx.Node, Any], count: int
) -> dict[fx.Node, Any]:
    _refuse_numbers(region, int(found.tokens))
    known_axes: Axes = program.analysis(axes)
    first = found.rows
    dim = known_axes.of(first.node)[first.dims[0]]
    resizer = Resizer(program.graph, known_axes, dim, count, _unexpected, anew=True)
    for node, fewer in short.items():
        resizer.put(node, fewer)
    try:
        made = resizer.copy(region, region)
    except CannotResize as cause:
        raise NoPrompt(f"the first prompt is not filtered (later ones of other lengths are): {cause}") from cause
    return dict(zip(region, made, strict=True))


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
