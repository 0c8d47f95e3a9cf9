"""What becomes of each operator's arguments where rows of an axis are taken out, and which operators refuse that.

An operator may be here if it does the same with each row of the axis, or sums over it. What is not here is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import fx

from accelpass.ir.analyses.axes.axes import Axes, Dim
from accelpass.ir.analyses.axes.axis_flow import elementwise, rule_of
from accelpass.ir.attention.spec.op import spec_of
from accelpass.ir.core.graph import known, shape, value
from accelpass.ir.transform.changed_axes import CannotShrink
from accelpass.ir.transform.kept import Leaves, before_of, interleaved, moved, now_of


@dataclass(frozen=True)
class Scaled:
    """A symbolic size that holds the axis: ``size // old * new``."""

    size: fx.Node
    old: int
    new: int
    value: Any


@dataclass(frozen=True)
class Renumbered:
    """Numbers of rows as a caller gives them, which name the rows that are left where the graph is changed."""

    given: fx.Node

    @property
    def value(self) -> Any:
        return value(self.given)


class Shrinking(Protocol):
    """What the rules ask of a surgery."""

    axes: Axes
    contest: bool

    def renumbered(self, node: fx.Node) -> bool:
        """Whether a value holds numbers of rows that were chosen among those that are left."""

    def numbered(self, node: fx.Node) -> Renumbered | None:
        """Numbers of rows that come from outside; None where these may not name rows."""

    def changed(self, node: fx.Node) -> dict[int, Leaves]:
        """The dimensions of a node that change."""

    def size(self, dim: Dim) -> Any:
        """The size of a dimension afterwards."""

    def now(self, given: Any) -> Any:
        """The fake value of a node afterwards, or what is given."""


@dataclass
class Change:
    """A call and its arguments, which a rule changes."""

    node: fx.Node
    args: list[Any]
    kwargs: dict[str, Any]
    target: Any
    of: Shrinking

    def refuse(self, why: str) -> CannotShrink:
        return CannotShrink(f"{self.node.name} ({self.node.target}) {why}")

    def get(self, name: str, default: Any = None) -> Any:
        """An argument by its schema name."""
        if name in self.kwargs:
            return self.kwargs[name]
        at = self._at(name)
        if at is None:
            return default
        if at < len(self.args):
            return self.args[at]
        declared = self.node.target._schema.arguments[at]
        return declared.default_value if declared.has_default_value() else default

    def put(self, name: str, given: Any) -> None:
        """Set an argument, wherever it was given."""
        at = self._at(name)
        assert at is not None
        if name in self.kwargs or at > len(self.args):
            self.kwargs[name] = given
        else:
            self.args[at : at + 1] = [given]

    def _at(self, name: str) -> int | None:
        declared = self.node.target._schema.arguments
        return next((i for i, a in enumerate(declared) if a.name == name), None)

    def axis(self, name: str = "dim", default: int = 0) -> int:
        """A dimension argument of the first operand, counted from the front."""
        return int(self.get(name, default)) % max(1, len(shape(self.source)))

    @property
    def source(self) -> fx.Node:
        source = self.node.args[0]
        assert isinstance(source, fx.Node)
        return source

    def changed(self, at: int) -> Leaves | None:
        """What becomes of a dimension of the first operand; None if it stays."""
        return self.of.changed(self.source).get(at)

    def sized(self, given: Sequence[Any], dims: Sequence[Dim]) -> list[Any]:
        """Sizes of a result with these dimensions, as they are written in a call."""
        if len(given) != len(dims):
            raise self.refuse("changes the number of dimensions")
        return [self._sized(g, dim) for g, dim in zip(given, dims, strict=True)]

    def _sized(self, given: Any, dim: Dim) -> Any:
        wanted, now = self.of.size(dim), self.of.now(given)
        if known(now == -1) or known(now == wanted):
            return given
        if isinstance(given, int) and isinstance(wanted, int):
            return wanted
        if not isinstance(given, fx.Node):
            raise self.refuse(f"has a size {given} that cannot be told anew")
        old, new = (int(s) for s in _ratio(dim.size, wanted))
        return Scaled(given, old, new, now // old * new)

    def position(self, leaves: Leaves, given: Any) -> int:
        """Where a boundary along a dimension is now."""
        size = before_of(leaves)
        at = value(given)
        if not isinstance(at, int):
            raise self.refuse("cuts the axis where run time says")
        new = moved(leaves, max(0, at + size) if at < 0 else min(at, size))
        if new is None:
            raise self.refuse(f"cuts the axis at {at}")
        return new


_AS_IT_IS = (
    "to _to_copy type_as contiguous clone lift_fresh lift_fresh_copy detach alias dropout feature_dropout real imag "
    "zeros_like ones_like full_like empty_like fill zero isin permute transpose swapaxes t mT mH numpy_T movedim "
    "unsqueeze squeeze flatten ravel view_as reshape_as expand_as stack cat concat repeat repeat_interleave "
    "linear matmul mm bmm mv dot addmm baddbmm einsum outer _grouped_mm grouped_mm_fallback sym_size "
    "sum mean amax amin any all std var logsumexp norm linalg_vector_norm kv_append kv_read softplus normalize"
)
_NOT_ALONG = (
    "softmax _softmax log_softmax _log_softmax _safe_softmax cumsum cumprod logcumsumexp flip sort argsort topk "
    "argmax argmin cummax cummin select unbind index_select gather take_along_dim index_add index_copy index_fill "
    "scatter scatter_add scatter_reduce prod"
)
_CONTESTS = frozenset(["softmax", "_softmax", "topk", "sort", "argsort", "argmax", "cumsum"])
"""What compares or counts up rows, which a smaller model would do with those that it has."""
Rule = Callable[[Change], None]
_RULES: dict[str, Rule] = {}


def rule(*names: str) -> Callable[[Rule], Rule]:
    def put(fn: Rule) -> Rule:
        for name in names:
            assert name not in _RULES, name
            _RULES[name] = fn
        return fn

    return put


def rule_for(node: fx.Node) -> Rule:
    """How a call follows.

    Raises:
        CannotShrink: it is not known to.
    """
    schema = getattr(node.target, "_schema", None)
    if schema is None:
        if getattr(node.target, "__module__", "") in ("_operator", "operator"):  # an item, arithmetic on sizes
            return _as_it_is
        raise CannotShrink(f"{node.name} ({node.target}) has the axis, and no rule says what it does with fewer rows")
    name = schema.name.split("::")[1]
    name = name[:-1] if name.endswith("_") and not name.endswith("__") else name
    if name in _RULES:
        return _RULES[name]
    if rule_of(node) is elementwise:
        return _as_it_is
    raise CannotShrink(f"{node.name} ({node.target}) has the axis, and no rule says what it does with fewer rows")


@rule(*_AS_IT_IS.split())
def _as_it_is(change: Change) -> None:
    """Nothing that is written in the call depends on how many rows there are."""


@rule(*_NOT_ALONG.split())
def _not_along(change: Change) -> None:
    """Each row by itself, as long as the rows are not what the operator goes through."""
    dim = change.get("dim")
    if dim is None or (change.changed(change.axis(default=-1)) is not None and not _may_compare(change)):
        raise change.refuse("goes through the rows of the axis")


def _may_compare(change: Change) -> bool:
    name = change.node.target._schema.name.split("::")[1]
    if name in ("index_select", "gather"):
        return change.of.renumbered(change.get("index"))
    return change.of.contest and name in _CONTESTS


@rule("histc", "bincount", "one_hot")
def _counts(change: Change) -> None:
    """Of numbers of rows, a place for each row that is left."""
    if not change.of.renumbered(change.source):
        raise change.refuse("counts rows of the axis by number")
    rows = change.of.size(change.of.axes.of(change.node)[-1])
    for name, given in {"bins": rows, "max": rows - 1, "minlength": rows, "num_classes": rows}.items():
        if change.get(name) is not None:
            change.put(name, given)


@rule("glu")
def _glu(change: Change) -> None:
    leaves = change.changed(change.axis(default=-1))
    if leaves is not None and moved(leaves, before_of(leaves) // 2) != now_of(leaves) // 2:
        raise change.refuse("halves the axis")


@rule("view", "reshape", "_unsafe_view", "expand", "broadcast_to", "zeros", "ones", "full", "empty")
def _sized(change: Change) -> None:
    name = "size" if change.get("size") is not None else "shape"
    if change.node.target.overloadpacket._qualified_op_name == "aten::view" and not isinstance(
        change.get(name), list | tuple
    ):
        return  # as another dtype
    change.put(name, change.sized(change.get(name), change.of.axes.of(change.node)))


@rule("new_zeros", "new_ones", "new_full", "new_empty")
def _sized_like(change: Change) -> None:
    change.put("size", change.sized(change.get("size"), change.of.axes.of(change.node)))


@rule("unflatten")
def _unflatten(change: Change) -> None:
    at, sizes = change.axis(), change.get("sizes")
    change.put("sizes", change.sized(sizes, change.of.axes.of(change.node)[at : at + len(sizes)]))


@rule("layer_norm", "rms_norm", "_fused_rms_norm")
def _norm(change: Change) -> None:
    sizes = change.get("normalized_shape")
    change.put("normalized_shape", change.sized(sizes, change.of.axes.of(change.source)[-len(sizes) :]))


@rule("slice", "narrow")
def _slice(change: Change) -> None:
    leaves = change.changed(change.axis())
    if leaves is None:
        return
    if change.get("step", 1) != 1:
        if not interleaved(leaves) or value(change.get("start") or 0) >= change.get("step"):
            raise change.refuse("takes every so many-th row of the axis")
        return
    if "narrow" in str(change.node.target):
        start = change.position(leaves, change.get("start"))
        end = change.position(leaves, change.get("start") + change.get("length"))
        change.put("start", start)
        change.put("length", end - start)
        return
    start, end = change.get("start"), change.get("end")
    change.put("start", None if start is None else change.position(leaves, start))
    change.put("end", None if end is None else change.position(leaves, end))


@rule("split_with_sizes", "split", "chunk", "tensor_split", "unsafe_split", "unsafe_split_with_sizes", "unsafe_chunk")
def _split(change: Change) -> None:
    at = change.axis()
    leaves = change.changed(at)
    if leaves is None:
        return
    ends, sizes = 0, []
    for part in value(change.node):
        before = change.position(leaves, ends)
        ends += int(part.shape[at])
        sizes.append(change.position(leaves, ends) - before)
    change.target = torch.ops.aten.split_with_sizes.default
    change.args, change.kwargs = [change.source, sizes, at], {}


@rule("index", "index_put", "_unsafe_index", "_unsafe_index_put")
def _index(change: Change) -> None:
    for at, index in enumerate(change.get("indices")):
        if index is not None and change.changed(at) is not None and not change.of.renumbered(index):
            raise change.refuse("picks rows of the axis by number")


@rule("embedding")
def _embedding(change: Change) -> None:
    indices = change.get("indices")
    if change.changed(0) is not None and not change.of.renumbered(indices):
        told = change.of.numbered(indices)
        if told is None:
            raise change.refuse("picks rows of the axis by number")
        change.put("indices", told)


@rule("conv1d", "conv2d", "conv3d")
def _convolution(change: Change) -> None:
    if change.get("groups", 1) != 1:
        raise change.refuse("goes through the channels in groups")


@rule("attention", "attention_stats", "scaled_dot_product_attention")
def _attention(change: Change) -> None:
    if "scaled_dot" in str(change.node.target):
        return
    spec = spec_of(change.node)
    if spec.is_edited:
        raise change.refuse(f"was edited by {', '.join(dict.fromkeys(who for who, _ in spec.edits))} already")
    q, k = (change.of.now(n).shape for n in change.node.args[:2])
    if len(q) < 3:
        return
    if any(step.kind == "view" for step in spec.steps):
        raise change.refuse("rearranges its scores by head")
    if not isinstance(q[-3], int) or not isinstance(k[-3], int) or q[-3] % k[-3]:
        raise change.refuse(f"would have {q[-3]} query heads for {k[-3]} key/value heads")
    if q[-3] // k[-3] != spec.groups:
        change.args[-1] = replace(spec, groups=q[-3] // k[-3]).to_json()


@rule("_assert_tensor_metadata")
def _assertion(change: Change) -> None:
    if change.get("size") is not None or change.get("stride") is not None:
        raise change.refuse("asserts a size")


def _ratio(old: Any, new: Any) -> tuple[Any, Any]:
    """``new / old`` of two symbolic sizes as a fraction of numbers."""
    quotient = (new.node.expr / old.node.expr) if hasattr(new, "node") and hasattr(old, "node") else new / old
    return quotient.q, quotient.p
