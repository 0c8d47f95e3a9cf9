"""How each operator carries the axes of its operands to its result: reductions, creation, views, pieces."""

from __future__ import annotations

from typing import Any

from torch import fx

from accelpass.ir.analyses.axes.axis_factors import Factors, divided, fresh, reshape, same_size
from accelpass.ir.analyses.axes.axis_flow import Dims, Flow, Piece, rule
from accelpass.ir.attention.recognition.score_steps import argument
from accelpass.ir.core.graph import known, shape, value

_REDUCTIONS = (
    "sum mean amax amin prod any all argmax argmin std var logsumexp norm linalg_vector_norm nansum median var_mean "
    "std_mean count_nonzero nanmean"
)
_END = 2**62  # ``x[a:]`` ends at the largest int64
_SOMEWHERE = None  # a start that only run time knows
# New axes by definition: their sizes depend on data, or they count bins.
_NEW = (
    "nonzero masked_select histc bincount eye tril_indices triu_indices randperm scalar_tensor unique _unique2 tensor"
)


def axis(node: fx.Node, name: str = "dim", default: Any = None, rank: int | None = None) -> int:
    """A dimension argument, counted from the front."""
    rank = len(shape(node.args[0])) if rank is None else rank
    given = argument(node, name, default)
    return int(given) % max(rank, 1)


@rule(*_REDUCTIONS.split())
def _reduction(flow: Flow, node: fx.Node) -> Any:
    before, dims = flow.of(node.args[0]), argument(node, "dim")
    listed = dims if isinstance(dims, list | tuple) else [] if dims is None else [dims]
    gone = {d % max(len(before), 1) for d in listed} or set(range(len(before)))
    keep = bool(argument(node, "keepdim", False))
    out: Dims = [() if i in gone else d for i, d in enumerate(before) if keep or i not in gone]
    held = value(node)
    return [out] * len(held) if isinstance(held, list | tuple) else out


@rule(*_NEW.split())
def _new(flow: Flow, node: fx.Node) -> Any:
    return flow.new(node)


@rule(
    "zeros",
    "ones",
    "full",
    "empty",
    "rand",
    "randn",
    "new_zeros",
    "new_ones",
    "new_full",
    "new_empty",
    "arange",
    "randint",
    "linspace",
)
def _creation(flow: Flow, node: fx.Node) -> Dims:
    given = argument(node, "size")
    listed = list(given) if isinstance(given, list | tuple) else [argument(node, "end", argument(node, "steps"))]
    if argument(node, "start") not in (None, 0) or argument(node, "step") not in (None, 1):
        listed = [None]
    return [flow.counts.get(g) or fresh(s, node.name) for g, s in zip(listed, shape(node), strict=True)]


# --- views


@rule("view", "reshape", "_unsafe_view", "_reshape_alias", "flatten", "unflatten", "view_as", "reshape_as", "ravel")
def _reshape(flow: Flow, node: fx.Node) -> Dims:
    return reshape(flow.of(node.args[0]), shape(node), node.name)


@rule("permute")
def _permute(flow: Flow, node: fx.Node) -> Dims:
    before = flow.of(node.args[0])
    return [before[d] for d in argument(node, "dims")]


@rule("transpose", "swapaxes", "swapdims", "t", "mT", "mH", "adjoint", "numpy_T", "matrix_H")
def _transpose(flow: Flow, node: fx.Node) -> Dims:
    before = list(flow.of(node.args[0]))
    if "numpy_T" in str(node.target):
        return before[::-1]
    if len(node.args) + len(node.kwargs) > 2:
        a, b = (argument(node, new, argument(node, old)) for new, old in (("dim0", "axis0"), ("dim1", "axis1")))
    else:
        a, b = -2, -1
    if len(before) > 1:
        before[a], before[b] = before[b], before[a]
    return before


@rule("movedim", "moveaxis")
def _movedim(flow: Flow, node: fx.Node) -> Dims:
    before = flow.of(node.args[0])
    pairs = [a if isinstance(a, list | tuple) else [a] for a in node.args[1:3]]
    source, target = ([int(d) % len(before) for d in p] for p in pairs)
    rest = iter(d for d in range(len(before)) if d not in source)
    return [before[source[target.index(i)] if i in target else next(rest)] for i in range(len(before))]


@rule("unsqueeze")
def _unsqueeze(flow: Flow, node: fx.Node) -> Dims:
    before = list(flow.of(node.args[0]))
    before.insert(axis(node, rank=len(before) + 1), ())
    return before


@rule("squeeze")
def _squeeze(flow: Flow, node: fx.Node) -> Dims:
    before, sizes, dims = flow.of(node.args[0]), shape(node.args[0]), argument(node, "dim")
    listed = dims if isinstance(dims, list | tuple) else range(len(before)) if dims is None else [dims]
    gone = {d % len(before) for d in listed if known(sizes[d] == 1)}
    return [d for i, d in enumerate(before) if i not in gone]


@rule("expand", "expand_as", "broadcast_to")
def _expand(flow: Flow, node: fx.Node) -> Dims:
    source, sizes = node.args[0], shape(node)
    operands: list[tuple[Dims, Any]] = [(flow.of(source), shape(source))]
    if isinstance(node.args[1], fx.Node):  # expand_as
        operands.append((flow.of(node.args[1]), shape(node.args[1])))
    elif isinstance(node.args[1], list | tuple):
        counted = [flow.counts.get(s, ()) if isinstance(s, fx.Node) else () for s in node.args[1]]
        operands.append((counted, [s if c else 1 for s, c in zip(sizes, counted, strict=True)]))
    return flow.broadcast(operands, sizes, node.name)


@rule("repeat", "tile")
def _repeat(flow: Flow, node: fx.Node) -> Dims:
    before, sizes, after = flow.of(node.args[0]), shape(node.args[0]), shape(node)
    lead = len(after) - len(before)
    out = [fresh(s, node.name) for s in after[:lead]]
    for dim, size, now in zip(before, sizes, after[lead:], strict=True):
        out.append(_times(dim, size, now, node.name, outer=True))
    return out


@rule("repeat_interleave")
def _repeat_interleave(flow: Flow, node: fx.Node) -> Dims | None:
    if not isinstance(argument(node, "repeats"), int) or argument(node, "dim") is None:
        return None
    before, dim = list(flow.of(node.args[0])), axis(node)
    before[dim] = _times(before[dim], shape(node.args[0])[dim], shape(node)[dim], node.name)
    return before


def _times(dim: Factors, size: Any, now: Any, made: str, outer: bool = False) -> Factors:
    """A dimension repeated from ``size`` to ``now`` rows, as a whole (``outer``) or row by row."""
    count = divided(now, size)
    if count is None:
        return fresh(now, made)
    new = fresh(count, made)
    return (*new, *dim) if outer else (*dim, *new)


# --- pieces


@rule("slice", "narrow")
def _slice(flow: Flow, node: fx.Node) -> Dims:
    out, sizes, dim = list(flow.of(node.args[0])), shape(node.args[0]), axis(node, default=0)
    start = value(argument(node, "start"))
    start = 0 if start is None else start
    if not known(start >= 0):
        start = sizes[dim] + start if known(start < 0) and known(sizes[dim] + start >= 0) else _SOMEWHERE
    end = value(argument(node, "end"))
    open_ended = end is None or (isinstance(end, int) and end >= _END)
    telling = start is not _SOMEWHERE and (node.args[0] not in flow.tables or (open_ended and known(start == 0)))
    step = argument(node, "step", 1)
    out[dim] = flow.piece(out[dim], start, shape(node)[dim], sizes[dim], node.name, step, telling)
    return out


@rule("split", "split_with_sizes", "chunk", "tensor_split", "unsafe_split", "unsafe_split_with_sizes", "unsafe_chunk")
def _split(flow: Flow, node: fx.Node) -> list[Dims]:
    before, dim = flow.of(node.args[0]), axis(node, default=0)
    of, start, out = shape(node.args[0])[dim], 0, []
    for part in value(node):
        dims = list(before)
        dims[dim] = flow.piece(before[dim], start, part.shape[dim], of, node.name)
        start = start + part.shape[dim]
        out.append(dims)
    return out


@rule("glu")
def _glu(flow: Flow, node: fx.Node) -> Dims:
    out, dim = list(flow.of(node.args[0])), axis(node, default=-1)
    whole, half = shape(node.args[0])[dim], shape(node)[dim]
    out[dim] = flow.together(*(flow.piece(out[dim], at, half, whole, node.name) for at in (0, half)))
    return out


@rule("cat", "concat", "concatenate")
def _cat(flow: Flow, node: fx.Node) -> Dims:
    given: Any = argument(node, "tensors")
    dim = axis(node, default=0, rank=len(shape(node)))
    # An empty cache joins as a tensor of shape (0,).
    parts = [n for n in given if not (len(shape(n)) == 1 < len(shape(node))) and not known(shape(n)[dim] == 0)]
    if len(parts) == 1:
        return flow.of(parts[0])
    out = [() if i == dim else flow.together(*(flow.of(n)[i] for n in parts)) for i in range(len(shape(node)))]
    out[dim] = fresh(shape(node)[dim], node.name)
    flow.joins.append((out[dim], [(flow.of(n)[dim], shape(n)[dim]) for n in parts]))
    start: Any = 0
    for n in parts:
        flow.pieces.append(Piece(out[dim], flow.of(n)[dim], start, shape(n)[dim]))
        start = start + shape(n)[dim]
    return out


@rule("stack")
def _stack(flow: Flow, node: fx.Node) -> Dims:
    given: Any = argument(node, "tensors")
    out = [flow.together(*(flow.of(n)[i] for n in given)) for i in range(len(shape(node)) - 1)]
    dim = axis(node, default=0, rank=len(shape(node)))
    return [*out[:dim], fresh(len(given), node.name), *out[dim:]]


@rule("pad", "constant_pad_nd", "reflection_pad1d", "reflection_pad2d", "replication_pad1d", "replication_pad2d")
def _pad(flow: Flow, node: fx.Node) -> Dims:
    out, pads = list(flow.of(node.args[0])), list(argument(node, "pad") or argument(node, "padding"))
    before, after = shape(node.args[0]), shape(node)
    for i, left in enumerate(pads[::2]):
        dim, left = len(out) - 1 - i, value(left)
        if same_size(before[dim], after[dim]):
            continue
        if known(left < 0) or known(after[dim] < before[dim]):
            out[dim] = flow.piece(out[dim], -left, after[dim], before[dim], node.name)
        else:
            whole = fresh(after[dim], node.name)
            flow.pieces.append(Piece(whole, out[dim], left, before[dim]))
            out[dim] = whole
    return out


@rule("diff")
def _diff(flow: Flow, node: fx.Node) -> Dims:
    """Row i is the difference to the row before: with one more row in front there are as many rows as before."""
    out, dim = list(flow.of(node.args[0])), axis(node, default=-1)
    before, after = shape(node.args[0])[dim], shape(node)[dim]
    if not same_size(before, after):
        out[dim] = flow.piece(out[dim], before - after, after, before, node.name)
    return out


@rule("topk")
def _topk(flow: Flow, node: fx.Node) -> list[Dims]:
    out, dim = list(flow.of(node.args[0])), axis(node, default=-1)
    out[dim] = fresh(value(node)[0].shape[dim], node.name)
    return [out, out]


@rule("select")
def _select(flow: Flow, node: fx.Node) -> Dims:
    out, dim = flow.of(node.args[0]), axis(node)
    return [*out[:dim], *out[dim + 1 :]]


@rule("unbind")
def _unbind(flow: Flow, node: fx.Node) -> list[Dims]:
    out, dim = flow.of(node.args[0]), axis(node, default=0)
    return [[*out[:dim], *out[dim + 1 :]]] * len(value(node))


@rule("view_as_complex")
def _view_as_complex(flow: Flow, node: fx.Node) -> Dims:
    return flow.of(node.args[0])[:-1]


@rule("view_as_real")
def _view_as_real(flow: Flow, node: fx.Node) -> Dims:
    return [*flow.of(node.args[0]), fresh(2, node.name)]
