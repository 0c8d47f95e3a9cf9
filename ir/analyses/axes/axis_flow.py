"""The walk that carries axes through a graph, and where the operators' rules are found.

A rule takes the flow and the node, tells the flow which dimensions are walked together, and returns the result's
dimensions. Rules are found by the operator's schema name, so that overloads and in-place variants share one.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from accelpass.ir.analyses.axes.axis_factors import Factors, divided, fresh, leaves, same_size, unify
from accelpass.ir.core.graph import known, shape, value

Dims = list[Factors]
Rule = Callable[["Flow", fx.Node], "Dims | list[Dims] | None"]
RULES: dict[str, Rule] = {}

# Element-wise without saying so in their tags, or with more than one result.
_ELEMENTWISE = (
    "copy where complex polar square float_power true_divide relu6 selu isfinite logical_and logical_or "
    "logical_xor __and__ __or__ __xor__ lerp max min floor_divide"
)
# One result of the shape of the first operand, which no reordering along a dimension changes.
_SAME = (
    "to _to_copy type_as contiguous clone lift_fresh lift_fresh_copy detach alias dropout feature_dropout native_dropout "
    "softmax _softmax log_softmax _log_softmax _safe_softmax cumsum cumprod logcumsumexp flip roll tril triu argsort "
    "zeros_like ones_like full_like empty_like rand_like randn_like fill zero normal isin conj _conj resolve_conj real "
    "imag fft_fft fft_ifft fft_fftn fft_ifftn fft_fft2 fft_ifft2 sort cummax cummin bernoulli normalize "
    "softplus rounded"
)


@dataclass(frozen=True, eq=False)
class Piece:
    """``part`` is rows ``start`` to ``start + size`` of ``whole`` (every ``step``-th); both are dimensions' factors.

    ``telling``: the same rows of the same axis are the same axis. Not so for a table that is cut to a length at run
    time: rows and columns of a square image take equally many positions of one table.
    """

    whole: Factors
    part: Factors
    start: Any
    size: Any
    step: int = 1
    telling: bool = True


class Flow:
    """The state of the analysis while it walks the graph."""

    def __init__(self) -> None:
        self.dims: dict[fx.Node, Any] = {}
        self.tables: set[fx.Node] = set()  # what depends on no input
        self.counts: dict[fx.Node, Factors] = {}  # sizes read off a dimension: an arange over one walks that dimension
        self.pieces: list[Piece] = []
        self.joins: list[tuple[Factors, list[tuple[Factors, Any]]]] = []  # (dimension, the parts put together, sizes)
        self.resampled: list[tuple[Factors, Factors]] = []  # (spatial dimension, what a strided window made of it)
        self.unknown: dict[str, list[fx.Node]] = {}

    def of(self, node: Any) -> Dims:
        """The dimensions of a tensor."""
        found = self.dims.get(node)
        if found is None:
            found = self.dims[node] = self.new(node)
        return found

    def new(self, node: fx.Node) -> Any:
        """Fresh axes for a node's tensor or tensors."""
        held = value(node)
        if isinstance(held, list | tuple):
            return [[fresh(s, node.name) for s in t.shape] if isinstance(t, Tensor) else [] for t in held]
        return [fresh(s, node.name) for s in held.shape] if isinstance(held, Tensor) else []

    def walk(self, node: fx.Node) -> None:
        """Find the dimensions of a call's result."""
        if node.target is operator.getitem:
            whole, index = node.args
            if isinstance(value(node), Tensor) and isinstance(value(whole), list | tuple):
                self.dims[node] = self.dims[whole][index]
                self.tables.update([node] if whole in self.tables else [])
            return
        if node.target is torch.ops.aten.sym_size.int:
            self.counts[node] = self.of(node.args[0])[node.args[1]]
            return
        if node.target is operator.mul and all(a in self.counts for a in node.args):
            self.counts[node] = tuple(f for a in node.args for f in self.counts[a])
            return
        if not any(isinstance(t, Tensor) for t in _flat(value(node))):
            return
        if not any(isinstance(value(n), Tensor) and n not in self.tables for n in node.all_input_nodes):
            self.tables.add(node)
        rule = rule_of(node)
        if rule is None:
            self.unknown.setdefault(str(node.target), []).append(node)
        found = rule(self, node) if rule else None
        self.dims[node] = found if found is not None else self.new(node)

    def together(self, *dims: Factors) -> Factors:
        """These dimensions have one size and are walked together."""
        real = [d for d in dims if d]
        for other in real[1:]:
            unify(real[0], other)
        return real[0] if real else ()

    def broadcast(self, operands: Sequence[tuple[Dims, Sequence[Any]]], sizes: Sequence[Any], made: str) -> Dims:
        """Dimensions of a broadcast to ``sizes``; an operand of size 1 has no say where the result is larger."""
        out: Dims = []
        for back in range(len(sizes), 0, -1):
            size = sizes[-back]
            met = [
                d[-back] for d, s in operands if len(s) >= back and (same_size(s[-back], size) or not is_one(s[-back]))
            ]
            out.append(self.together(*met) or fresh(size, made))
        return out

    def piece(
        self, whole: Factors, start: Any, size: Any, of: Any, made: str, step: int = 1, telling: bool = True
    ) -> Factors:
        """``size`` rows of a dimension with ``of``, the first at ``start``."""
        if step == 1 and telling and same_size(size, of):
            return whole
        found = leaves(whole)
        inner = _plain(found[-1].size) if len(found) > 1 else None
        if inner and step == 1 and isinstance(start, int) and (outer := divided(of, inner)):
            first, count = divided(start, inner), divided(size, inner)
            if first is not None and count is not None:  # whole runs of the inner factor
                return (*self.piece(found[:-1], first, count, outer, made, telling=telling), found[-1])
        part = fresh(size, made)
        self.pieces.append(Piece(found, part, start, size, step, telling))
        return part


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Register the rule of operators by schema name."""

    def put(fn: Rule) -> Rule:
        for name in names:
            assert name not in RULES, name
            RULES[name] = fn
        return fn

    return put


def rule_of(node: fx.Node) -> Rule | None:
    schema = getattr(node.target, "_schema", None)
    if schema is None:
        return None
    name = schema.name.split("::")[1]
    if name.endswith("_") and not name.endswith("__"):
        name = name[:-1]
    if name in ("max", "min") and schema.overload_name not in ("other", ""):
        return RULES["sum"]
    if name == "view" and schema.overload_name == "dtype":
        return _same
    if name in RULES:
        return RULES[name]
    if name in _ELEMENTWISE.split() or torch.Tag.pointwise in getattr(node.target, "tags", ()):
        return elementwise
    return _same if name in _SAME.split() else None


def elementwise(flow: Flow, node: fx.Node) -> Any:
    """Operands broadcast together."""
    tensors = [n for n in _flat((node.args, node.kwargs)) if isinstance(n, fx.Node) and isinstance(value(n), Tensor)]
    held = value(node)
    first = held[0] if isinstance(held, list | tuple) else held
    out = flow.broadcast([(flow.of(n), shape(n)) for n in tensors], first.shape, node.name)
    return [out] * len(held) if isinstance(held, list | tuple) else out


@rule("masked_scatter")
def _masked_scatter(flow: Flow, node: fx.Node) -> Dims:
    """The source fills what the mask shows, in order: its rows are nobody's, its channels those of what it fills."""
    text, mask, source = node.args[:3]
    out = flow.broadcast([(flow.of(n), shape(n)) for n in (text, mask)], shape(node), node.name)
    filled = shape(source)
    if len(filled) > 1 and same_size(filled[-1], shape(node)[-1]):
        out[-1] = flow.together(out[-1], flow.of(source)[-1])
    return out


def _same(flow: Flow, node: fx.Node) -> Any:
    first = node.args[0] if node.args else node.kwargs["self"]
    out = flow.of(first)
    held = value(node)
    return [out] * len(held) if isinstance(held, list | tuple) else out


def _plain(size: Any) -> int | None:
    """A size that is a plain number larger than 1."""
    return size if isinstance(size, int) and size > 1 else None


def is_one(size: Any) -> bool:
    return known(size == 1)


def _flat(tree: Any) -> Iterable[Any]:
    if isinstance(tree, list | tuple):
        for item in tree:
            yield from _flat(item)
    elif isinstance(tree, dict):
        yield from _flat(list(tree.values()))
    else:
        yield tree
