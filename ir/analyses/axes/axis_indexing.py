"""How look-ups, gathers and scatters carry the axes of what they read, of what they write, and of their indices."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from accelpass.ir.analyses.axes.axis_factors import fresh, same_size
from accelpass.ir.analyses.axes.axis_flow import Dims, Flow, is_one, rule
from accelpass.ir.analyses.axes.axis_rules import axis
from accelpass.ir.attention.recognition.score_steps import argument
from accelpass.ir.core.graph import aten, is_call, shape, value
from accelpass.ir.linear.op import is_packed, operands_of


@rule("embedding")
def _embedding(flow: Flow, node: fx.Node) -> Dims:
    if is_packed(node):
        columns = flow.of(operands_of(node)[0])[1]
        same = same_size(shape(node)[-1], shape(operands_of(node)[0])[1])
        return [*flow.of(node.args[0]), columns if same else fresh(shape(node)[-1], node.name)]
    return [*flow.of(node.args[1]), flow.of(node.args[0])[1]]


@rule("matrix")
def _matrix(flow: Flow, node: fx.Node) -> Dims:
    codes = operands_of(node)[0]
    dims, same = flow.of(codes), same_size(shape(node)[-1], shape(codes)[-1])
    return dims if same else [*dims[:-1], fresh(shape(node)[-1], node.name)]


@rule("index")
def _index(flow: Flow, node: fx.Node) -> Dims | None:
    found = _indexed(flow, node)
    return found if found is not None and len(found) == len(shape(node)) else None


def _indexed(flow: Flow, node: fx.Node) -> Dims | None:
    """Dimensions of ``x[indices]``."""
    source: Any = node.args[0]
    before, indices = flow.of(source), list(argument(node, "indices"))
    at = [i for i, n in enumerate(indices) if n is not None]
    if any(value(indices[i]).dtype in (torch.bool, torch.uint8) for i in at):
        return None
    shapes = [shape(indices[i]) for i in at]
    sizes = torch.broadcast_shapes(*shapes)
    for i in at:
        if (count := _walks(indices[i])) is not None and same_size(shape(count)[0], shape(source)[i]):
            flow.together(before[i], flow.of(count)[0])
    joint = flow.broadcast([(flow.of(indices[i]), s) for i, s in zip(at, shapes, strict=True)], sizes, node.name)
    kept = [d for i, d in enumerate(before) if i not in at]
    first = at[0] if at == list(range(at[0], at[-1] + 1)) else 0
    return [*kept[:first], *joint, *kept[first:]]


def _walks(index: fx.Node) -> fx.Node | None:
    """The range 0, 1, 2 ... that an index is, which visits a dimension of as many rows in order."""
    while is_call(index, aten.unsqueeze, aten.view, aten.reshape, aten.to) or (
        is_call(index, aten.add) and index.args[1] == 0
    ):
        index = index.args[0]
    ranged = is_call(index, aten.arange) and argument(index, "start") in (None, 0)
    return index if ranged and argument(index, "step") in (None, 1) else None


@rule("index_put", "_index_put_impl", "_unsafe_index_put")
def _index_put(flow: Flow, node: fx.Node) -> Dims:
    found, written = _indexed(flow, node), argument(node, "values")
    if found is not None:
        for dim, given, size in zip(
            reversed(found), reversed(flow.of(written)), reversed(shape(written)), strict=False
        ):
            if not is_one(size):
                flow.together(dim, given)
    return flow.of(node.args[0])


@rule("index_select")
def _index_select(flow: Flow, node: fx.Node) -> Dims:
    out, dim = list(flow.of(node.args[0])), axis(node)
    out[dim] = flow.together(*flow.of(argument(node, "index")))
    return out


@rule("index_copy", "index_add", "index_fill")
def _index_copy(flow: Flow, node: fx.Node) -> Dims:
    out, dim, source = flow.of(node.args[0]), axis(node), argument(node, "source")
    if isinstance(source, fx.Node) and len(flow.of(source)) == len(out):
        for i, given in enumerate(flow.of(source)):
            flow.together(given, *(flow.of(argument(node, "index")) if i == dim else [out[i]]))
    return out


@rule("gather", "take_along_dim")
def _gather(flow: Flow, node: fx.Node) -> Dims:
    picked: Any = argument(node, "index", argument(node, "indices"))
    _aligned(flow, node, picked)
    return flow.of(picked)


@rule("scatter", "scatter_add", "scatter_reduce")
def _scatter(flow: Flow, node: fx.Node) -> Dims:
    picked, source = argument(node, "index"), argument(node, "src")
    _aligned(flow, node, picked)
    if isinstance(source, fx.Node):
        for dim, given, a, b in zip(flow.of(picked), flow.of(source), shape(picked), shape(source), strict=True):
            if same_size(a, b):
                flow.together(dim, given)
    return flow.of(node.args[0])


def _aligned(flow: Flow, node: fx.Node, picked: fx.Node) -> None:
    """Position i along any other dimension of the index is position i of the source."""
    source, dim = node.args[0], axis(node)
    for i, size in enumerate(shape(picked)):
        if i != dim and same_size(size, shape(source)[i]):
            flow.together(flow.of(source)[i], flow.of(picked)[i])


@rule("one_hot")
def _one_hot(flow: Flow, node: fx.Node) -> Dims:
    return [*flow.of(node.args[0]), fresh(shape(node)[-1], node.name)]


@rule("meshgrid")
def _meshgrid(flow: Flow, node: fx.Node) -> list[Dims]:
    given: Any = node.args[0]
    dims = [d for n in given for d in flow.of(n) or [()]]
    if argument(node, "indexing") == "xy":
        dims[:2] = dims[1::-1]
    return [dims] * len(given)
