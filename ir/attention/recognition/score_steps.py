"""Reads one operation on scores or probabilities as a :class:`Step`, whatever way a model wrote it."""

from __future__ import annotations

import operator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from accelpass.ir.attention.recognition.contraction import same_sizes
from accelpass.ir.core.graph import is_call, known, value

aten = torch.ops.aten

_VIEWS = (
    aten.view,
    aten.reshape,
    aten._unsafe_view,
    aten.flatten,
    aten.unflatten,
    aten.unsqueeze,
    aten.squeeze,
    aten.view_as,
    aten.reshape_as,
)
_SAME = (aten.clone, aten.contiguous, aten.detach, aten.alias, aten.lift_fresh_copy, aten.dropout, aten.dropout_)
_CASTS = (aten.to, aten._to_copy, aten.type_as)
_EXPANDS = (aten.expand, aten.expand_as)
_END = 2**62  # ``x[a:]`` ends at the largest int64.


@dataclass(frozen=True)
class Raw:
    """A step whose extras are still nodes.

    Attributes:
        source: the score that the operation reads; the walk goes on there.
        kind: a step's kind, or ``same`` (nothing changes), ``view`` or ``permute``.
        nodes: region nodes besides the operation itself.
    """

    source: fx.Node
    kind: str
    extra: fx.Node | None = None
    other: fx.Node | None = None
    value: Any = None
    nodes: tuple[fx.Node, ...] = field(default=())


def number(found: Any) -> float | None:
    """A Python number, or None; booleans and symbolic sizes are not constants of a model."""
    return float(found) if isinstance(found, int | float) and not isinstance(found, bool) else None


def argument(node: fx.Node, name: str, default: Any = None) -> Any:
    """An argument by its schema name, wherever it was given."""
    if name in node.kwargs:
        return node.kwargs[name]
    for index, declared in enumerate(node.target._schema.arguments):
        if declared.name == name:
            if index < len(node.args):
                return node.args[index]
            return declared.default_value if declared.has_default_value() else default
    return default


def is_whole_slice(node: fx.Node) -> bool:
    """``x[:]`` along one dimension, which exported programs are full of."""
    if not is_call(node, aten.slice):
        return False
    start, end, step = (argument(node, n) for n in ("start", "end", "step"))
    source = value(node.args[0])
    if not known(start in (None, 0)) or step != 1:
        return False
    return end is None or (isinstance(end, int) and end >= _END) or same_sizes(source.shape, value(node).shape)


def last_axis(node: fx.Node, dim: Any) -> bool:
    """Whether ``dim`` (an int, or a list of one) is the last dimension of a node."""
    if isinstance(dim, list | tuple):
        if len(dim) != 1:
            return False
        (dim,) = dim
    return isinstance(dim, int) and dim in (-1, value(node).dim() - 1)


def permutation_of(node: Any) -> tuple[int, ...] | None:
    """``p`` with ``node = source.permute(p)``."""
    if is_call(node, aten.permute):
        dims = node.args[1]
        return tuple(d % len(dims) for d in dims)
    if is_call(node, aten.transpose, aten.t, aten.mT, aten.swapaxes, aten.movedim, aten.numpy_T):
        rank = value(node).dim()
        order = list(range(rank))
        if is_call(node, aten.transpose, aten.swapaxes):
            a, b = (d % rank for d in node.args[1:3])
        elif is_call(node, aten.t) and rank == 2:
            a, b = 0, 1
        elif is_call(node, aten.mT):
            a, b = rank - 2, rank - 1
        else:
            return None
        order[a], order[b] = order[b], order[a]
        return tuple(order)
    return None


def readings(node: fx.Node) -> list[Raw]:
    """Every way to read ``node`` as one step on a score; the likeliest first, none if it is no such step."""
    if node.op != "call_function" or not isinstance(value(node), Tensor):
        return []
    first = node.args[0] if node.args else None
    if is_call(node, *_SAME) and isinstance(first, fx.Node):
        return [Raw(first, "same")]
    if is_call(node, aten.slice) and isinstance(first, fx.Node):
        return [Raw(first, "same")] if is_whole_slice(node) else _drop(node)
    if is_call(node, *_CASTS) and isinstance(first, fx.Node):
        dtype = value(node).dtype
        if value(first).dtype == dtype:
            return [Raw(first, "same")]
        return [Raw(first, "cast", value=str(dtype).removeprefix("torch."))] if dtype.is_floating_point else []
    if is_call(node, *_VIEWS) and isinstance(first, fx.Node):
        return _view(node, first)
    if is_call(node, *_EXPANDS) and isinstance(first, fx.Node):
        return [Raw(first, "same")] if same_sizes(value(first).shape, value(node).shape) else []
    if (order := permutation_of(node)) is not None and isinstance(first, fx.Node):
        return [Raw(first, "permute", value=order)]
    return _arithmetic(node) or _masks(node) or _unary(node) or _sink(node)


def _is_score(node: fx.Node, candidate: Any) -> bool:
    """Only a tensor as large as the result can be the score; what is smaller is broadcast onto it."""
    return (
        isinstance(candidate, fx.Node)
        and isinstance(value(candidate), Tensor)
        and value(candidate).dtype.is_floating_point
        and same_sizes(value(candidate).shape, value(node).shape)
    )


def _tensor(candidate: Any) -> bool:
    return isinstance(candidate, fx.Node) and isinstance(value(candidate), Tensor)


def _arithmetic(node: fx.Node) -> list[Raw]:
    if len(node.args) < 2 or not is_call(
        node,
        *(aten.add, aten.add_, aten.sub, aten.sub_, aten.mul, aten.mul_, aten.div, aten.div_, aten.rsub),
        *(aten.multiply, aten.true_divide, aten.maximum, aten.max),
    ):
        return []
    a, b = node.args[:2]
    if argument(node, "rounding_mode") is not None:
        return []
    alpha = number(argument(node, "alpha", 1))
    if alpha is None:
        return []
    found = []
    if is_call(node, aten.mul, aten.mul_, aten.multiply):
        for x, y in ((a, b), (b, a)):
            if _is_score(node, x):
                found.append(_scaled(x, "scale", "times", y, 1.0))
    elif is_call(node, aten.div, aten.div_, aten.true_divide) and _is_score(node, a):
        constant = number(b)
        found.append(Raw(a, "scale", value=1 / constant) if constant else _scaled(a, "", "over", b, 1.0))
    elif is_call(node, aten.add, aten.add_):
        if _is_score(node, a):
            found.append(_scaled(a, "offset", "add", b, alpha))
        if _is_score(node, b) and alpha == 1:
            found.append(_scaled(b, "offset", "add", a, 1.0))
    elif is_call(node, aten.sub, aten.sub_):
        if _is_score(node, a):
            largest = _row_maximum(a, b)
            found.append(Raw(a, "center", nodes=largest) if largest else _scaled(a, "offset", "add", b, -alpha))
        if _is_score(node, b) and alpha == 1 and _tensor(a):
            found.append(Raw(b, "rsub", extra=a))
    elif is_call(node, aten.maximum) or node.target is aten.max.other:
        for x, y in ((a, b), (b, a)):
            if _is_score(node, x) and _tensor(y):
                found.append(Raw(x, "maximum", extra=y))
    return [f for f in found if f is not None]


def _scaled(x: fx.Node, constant_kind: str, tensor_kind: str, operand: Any, factor: float) -> Raw | None:
    constant = number(operand)
    if constant is not None and constant_kind:
        return Raw(x, constant_kind, value=constant * factor)
    if _tensor(operand):
        return Raw(x, tensor_kind, extra=operand, value=None if factor == 1 else factor)
    return None


def _row_maximum(scores: fx.Node, candidate: Any) -> tuple[fx.Node, ...]:
    """The nodes that compute ``scores.max(-1, keepdim=True)``, if that is what ``candidate`` is."""
    nodes = [candidate] if isinstance(candidate, fx.Node) else []
    while nodes and is_call(nodes[-1], *_SAME):
        nodes.append(nodes[-1].args[0])
    if nodes and is_call(nodes[-1], operator.getitem) and nodes[-1].args[1] == 0:
        nodes.append(nodes[-1].args[0])
    if not nodes:
        return ()
    last = nodes[-1]
    if not is_call(last, aten.amax, aten.max) or last.target is aten.max.other or last.args[0] is not scores:
        return ()
    if len(last.args) < 2 or not last_axis(scores, last.args[1]) or not argument(last, "keepdim"):
        return ()
    return tuple(nodes)


def _masks(node: fx.Node) -> list[Raw]:
    if is_call(node, aten.masked_fill, aten.masked_fill_) and _is_score(node, node.args[0]):
        x, mask, fill = node.args[:3]
        if number(fill) is not None:
            return [Raw(x, "fill", extra=mask, value=number(fill))]
        return [Raw(x, "fill", extra=mask, other=fill)] if _tensor(fill) else []
    if not is_call(node, aten.where) or len(node.args) < 3:
        return []
    mask, a, b = node.args[:3]
    found = []
    for x, y, kind in ((a, b, "keep"), (b, a, "fill")):
        if _is_score(node, x):
            if number(y) is not None:
                found.append(Raw(x, kind, extra=mask, value=number(y)))
            elif _tensor(y):
                found.append(Raw(x, kind, extra=mask, other=y))
    return found


def _unary(node: fx.Node) -> list[Raw]:
    first = node.args[0] if node.args else None
    if not _is_score(node, first):
        return []
    assert isinstance(first, fx.Node)
    if is_call(node, aten.tanh, aten.tanh_):
        return [Raw(first, "tanh")]
    if is_call(node, aten.relu, aten.relu_):
        return [Raw(first, "relu")]
    if is_call(node, aten.neg):
        return [Raw(first, "scale", value=-1.0)]
    if is_call(node, aten.nan_to_num, aten.nan_to_num_):
        return [Raw(first, "nan_to_num", value=[argument(node, n) for n in ("nan", "posinf", "neginf")])]
    if is_call(node, aten.clamp, aten.clamp_, aten.clamp_min, aten.clamp_max):
        low, high = argument(node, "min"), argument(node, "max")
        if all(limit is None or number(limit) is not None for limit in (low, high)):
            return [Raw(first, "clamp", value=[low, high])]
    return []


def _sink(node: fx.Node) -> list[Raw]:
    """``cat([scores, column], -1)``: the wider part is the score."""
    if not is_call(node, aten.cat, aten.concat, aten.concatenate) or not last_axis(node, argument(node, "dim", 0)):
        return []
    parts = node.args[0]
    if not isinstance(parts, list | tuple) or len(parts) != 2:
        return []
    found = []
    for x, y, at in ((parts[0], parts[1], None), (parts[1], parts[0], "first")):
        if _tensor(y) and isinstance(value(y).shape[-1], int) and _tensor(x):
            found.append(Raw(x, "sink", extra=y, value=at))
    return found


def _drop(node: fx.Node) -> list[Raw]:
    """Without the last or the first columns."""
    source, dim = node.args[0], argument(node, "dim", 0)
    assert isinstance(source, fx.Node)
    if not last_axis(source, dim) or argument(node, "step") != 1:
        return []
    start, end = argument(node, "start"), argument(node, "end")
    whole, kept = value(source).shape[-1], value(node).shape[-1]
    missing = whole - kept
    if start in (None, 0):
        if isinstance(end, int) and end < 0:
            missing = -end
        return [Raw(source, "drop", value=int(missing))] if isinstance(missing, int) else []
    if isinstance(start, int) and start > 0 and (end is None or (isinstance(end, int) and end >= _END)):
        return [Raw(source, "drop", value=-start)]
    return []


def _view(node: fx.Node, source: fx.Node) -> list[Raw]:
    """A view that keeps the last two dimensions and rearranges the leading ones."""
    if not isinstance(value(source), Tensor):
        return []
    old, new = value(source).shape, value(node).shape
    if same_sizes(old, new):
        return [Raw(source, "same")]
    if len(old) < 2 or len(new) < 2 or not same_sizes(old[-2:], new[-2:]):
        return []
    lead = leading(new[:-2])
    return [Raw(source, "view", value=lead)] if lead is not None else []


def leading(sizes: Any) -> list[int] | None:
    """Leading sizes as plain numbers, at most one of them -1; None if two are symbolic."""
    sizes = list(sizes)
    symbolic = [i for i, s in enumerate(sizes) if not isinstance(s, int)]
    if len(symbolic) > 1:
        return None
    if sizes:
        sizes[symbolic[0] if symbolic else 0] = -1
    return sizes
