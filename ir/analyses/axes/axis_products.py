"""How products carry axes: contractions, convolutions, norms and attention."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import fx

from accelpass.ir.analyses.axes.axis_factors import Factors, fresh, reshape, same_size
from accelpass.ir.analyses.axes.axis_flow import Dims, Flow, is_one, rule
from accelpass.ir.attention.recognition.score_steps import argument
from accelpass.ir.attention.spec.op import ATTENTION_STATS, is_attention, spec_of
from accelpass.ir.core.graph import known, shape, value
from accelpass.ir.linear.op import is_linear, linear_spec, operands_of


@rule("linear")
def _linear(flow: Flow, node: fx.Node) -> Dims:
    if is_linear(node):
        return _packed_linear(flow, node)
    x, weight = node.args[:2]
    rows, *columns = flow.of(weight)
    flow.together(flow.of(x)[-1], columns[0])
    if isinstance(bias := argument(node, "bias"), fx.Node):
        flow.together(rows, flow.of(bias)[0])
    return [*flow.of(x)[:-1], rows]


def _packed_linear(flow: Flow, node: fx.Node) -> Dims:
    """The rows of every operand are outputs; of its columns those that are channels one for one are known."""
    x, spec = node.args[0], linear_spec(node)
    lead = 0 if spec.by is None else 1
    packed = spec.of_weight(operands_of(node))
    codes = flow.of(packed[0])
    if same_size(shape(x)[-1], shape(packed[0])[-1]):  # int4 packs two columns in a byte
        flow.together(flow.of(x)[-1], codes[-1])
    others = [flow.of(p)[lead] for p in (*packed[1:], *spec.of_activation(operands_of(node)))]
    if isinstance(node.args[2], fx.Node):
        others.append(flow.of(node.args[2])[0])
    for other in others:
        flow.together(codes[lead], other)
    if spec.low_rank:
        a, b = (flow.of(n) for n in spec.of_residual(operands_of(node)))
        for left, right in ((flow.of(x)[-1], a[1]), (a[0], b[1]), (codes[lead], b[0])):
            flow.together(left, right)
    return [*flow.of(x)[:-1], codes[lead]]


@rule("matmul", "mm", "bmm", "mv", "dot")
def _matmul(flow: Flow, node: fx.Node) -> Dims:
    return _product(flow, node, *node.args[:2])


def _product(flow: Flow, node: fx.Node, a: Any, b: Any) -> Dims:
    """Sum over a's last dimension and b's last but one; leading ones broadcast."""
    left, right = flow.of(a), flow.of(b)
    flow.together(left[-1], right[-2] if len(right) > 1 else right[0])
    tail = ([left[-2]] if len(left) > 1 else []) + ([right[-1]] if len(right) > 1 else [])
    lead = shape(node)[: len(shape(node)) - len(tail)]
    operands = [(flow.of(n)[:-2], shape(n)[:-2]) for n in (a, b)]
    return [*flow.broadcast(operands, lead, node.name), *tail]


@rule("addmm", "baddbmm")
def _addmm(flow: Flow, node: fx.Node) -> Dims:
    out = _product(flow, node, *node.args[1:3])
    bias: Any = node.args[0]
    return flow.broadcast([(out, shape(node)), (flow.of(bias), shape(bias))], shape(node), node.name)


@rule("outer", "ger")
def _outer(flow: Flow, node: fx.Node) -> Dims:
    return [flow.of(n)[0] for n in node.args[:2]]


@rule("_grouped_mm", "grouped_mm_fallback")
def _grouped_mm(flow: Flow, node: fx.Node) -> Dims:
    a, b = (flow.of(n) for n in node.args[:2])
    flow.together(a[-1], b[-2])
    groups = argument(node, "offs")
    stacks = [d[0] for d in (a, b) if len(d) == 3]
    if isinstance(groups, fx.Node):
        flow.together(*stacks, flow.of(groups)[0])
    lead = [flow.together(*stacks)] if len(shape(node)) == 3 and stacks else []
    return [*lead, a[-2], b[-1]] if len(lead) + 2 == len(shape(node)) else flow.new(node)


@rule("einsum")
def _einsum(flow: Flow, node: fx.Node) -> Dims | None:
    equation, operands = node.args[:2]
    assert isinstance(equation, str) and isinstance(operands, list | tuple)
    inputs, arrow, output = equation.replace(" ", "").partition("->")
    if "." in equation or not arrow:
        return None
    met: dict[str, list[Factors]] = {}
    for letters, operand in zip(inputs.split(","), operands, strict=True):
        for letter, dim, size in zip(letters, flow.of(operand), shape(operand), strict=True):
            met.setdefault(letter, [])
            if not is_one(size):
                met[letter].append(dim)
    joined = {letter: flow.together(*dims) for letter, dims in met.items()}
    return [joined[letter] for letter in output]


# --- windows over space


@rule("conv1d", "conv2d", "conv3d", "convolution")
def _convolution(flow: Flow, node: fx.Node) -> Dims:
    x, weight, bias = node.args[0], node.args[1], argument(node, "bias")
    rows, columns, *_ = flow.of(weight)
    before, sizes = flow.of(x), shape(x)
    at = len(before) - len(shape(weight)) + 1  # the batch may be missing
    if argument(node, "groups", 1) == 1 and not argument(node, "transposed"):
        flow.together(before[at], columns)
    elif same_size(sizes[at], argument(node, "groups", 1)) and same_size(sizes[at], shape(node)[at]):
        flow.together(before[at], rows)  # each channel on its own
    if isinstance(bias, fx.Node):
        flow.together(rows, flow.of(bias)[0])
    return [*before[:at], rows, *_windows(flow, node, at + 1)]


@rule("conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
def _convolution_transpose(flow: Flow, node: fx.Node) -> Dims:
    before = flow.of(node.args[0])
    at = len(before) - len(shape(node.args[1])) + 1
    flow.together(before[at], flow.of(node.args[1])[0])
    grouped = argument(node, "groups", 1) != 1
    rows = fresh(shape(node)[at], node.name) if grouped else flow.of(node.args[1])[1]
    return [*before[:at], rows, *_windows(flow, node, at + 1)]


def _windows(flow: Flow, node: fx.Node, at: int) -> Dims:
    """Spatial dimensions: as many positions as before are the same positions, others are a resampled axis."""
    out, sizes = [], shape(node.args[0])
    for i in range(at, len(shape(node))):
        old, new = flow.of(node.args[0])[i], shape(node)[i]
        if not same_size(sizes[i], new):
            made = fresh(new, node.name)
            flow.resampled.append((old, made))
            old = made
        out.append(old)
    return out


def _resampling(spatial: int) -> Any:
    def of(flow: Flow, node: fx.Node) -> Any:
        held = value(node)
        many = isinstance(held, list | tuple)
        if many:  # with indices
            out = [fresh(s, node.name) for s in held[0].shape]
            lead = flow.of(node.args[0])[:-spatial]
            return [[*lead, *out[-spatial:]]] * len(held)
        at = len(shape(node)) - spatial
        return [*flow.of(node.args[0])[:at], *_windows(flow, node, at)]

    return of


for _dims in (1, 2, 3):
    _names = [f"{p}_pool{_dims}d" for p in ("max", "avg", "adaptive_avg", "adaptive_max", "_adaptive_avg")]
    _names += [f"max_pool{_dims}d_with_indices"]
    _names += [f"upsample_{m}{_dims}d" for m in ("nearest", "_nearest_exact")]
    rule(*_names)(_resampling(_dims))
rule("upsample_linear1d")(_resampling(1))
rule("upsample_bilinear2d", "upsample_bicubic2d", "_upsample_bilinear2d_aa", "_upsample_bicubic2d_aa")(_resampling(2))
rule("upsample_trilinear3d")(_resampling(3))


@rule("pixel_shuffle")
def _pixel_shuffle(flow: Flow, node: fx.Node) -> Dims:
    *lead, channels, high, wide = flow.of(node.args[0])
    r: Any = node.args[1]
    c, a, b = reshape([channels], [shape(node)[-3], r, r], node.name)
    return [*lead, c, (*high, *a), (*wide, *b)]


@rule("pixel_unshuffle")
def _pixel_unshuffle(flow: Flow, node: fx.Node) -> Dims:
    *lead, channels, high, wide = flow.of(node.args[0])
    r: Any = node.args[1]
    high, a = reshape([high], [shape(node)[-2], r], node.name)
    wide, b = reshape([wide], [shape(node)[-1], r], node.name)
    return [*lead, (*channels, *a, *b), high, wide]


# --- norms


@rule("layer_norm", "rms_norm", "_fused_rms_norm", "native_layer_norm")
def _layer_norm(flow: Flow, node: fx.Node) -> Any:
    out = flow.of(node.args[0])
    for name in ("weight", "bias"):
        other = argument(node, name)
        if isinstance(other, fx.Node):
            for mine, theirs in zip(reversed(out), reversed(flow.of(other)), strict=False):
                flow.together(mine, theirs)
    return _with_statistics(flow, node, out)


@rule("group_norm", "native_group_norm", "batch_norm", "_native_batch_norm_legit_no_training", "instance_norm")
def _channel_norm(flow: Flow, node: fx.Node) -> Any:
    out = flow.of(node.args[0])
    for name in ("weight", "bias", "running_mean", "running_var"):
        other = argument(node, name)
        if isinstance(other, fx.Node):
            flow.together(out[1], flow.of(other)[0])
    return _with_statistics(flow, node, out)


def _with_statistics(flow: Flow, node: fx.Node, out: Dims) -> Any:
    return [out, *flow.new(node)[1:]] if isinstance(value(node), list | tuple) else out


# --- attention


@rule("scaled_dot_product_attention", "attention", "attention_stats")
def attention(flow: Flow, node: fx.Node) -> Any:
    """Queries meet keys over head channels, probabilities meet values over key tokens; heads may be grouped."""
    q, k, v = (flow.of(n) for n in node.args[:3])
    q_shape, k_shape = (shape(n) for n in node.args[:2])
    flow.together(q[-1], k[-1])
    flow.together(k[-2], v[-2])
    if len(q) > 2:
        flow.together(k[-3], v[-3])
        _heads(flow, q[-3], k[-3], q_shape[-3], k_shape[-3], node.name)
    operands = [(flow.of(n)[:-3], shape(n)[:-3]) for n in node.args[:3]]
    lead = flow.broadcast(operands, q_shape[:-3], node.name)
    scores, sizes = [*lead, *q[-3:-1], k[-2]], [*q_shape[:-1], k_shape[-2]]
    if is_attention(node):
        _steps(flow, node, scores, sizes)
    elif isinstance(mask := argument(node, "attn_mask"), fx.Node):
        flow.broadcast([(scores, sizes), (flow.of(mask), shape(mask))], sizes, node.name)
    out = [*lead, *q[-3:-1], v[-1]]
    if node.target is ATTENTION_STATS:
        return [out] + [out[:-1]] * (len(value(node)) - 1)
    return out


@rule("kv_read")
def _kv_read(flow: Flow, node: fx.Node) -> list[Dims]:
    """All keys and values of a layer have the new ones' sequences, heads and channels, and share their tokens."""
    k, v = (flow.of(n) for n in node.args[1:3])
    tokens = fresh(value(node)[0].shape[2], node.name)
    return [[*k[:2], tokens, k[3]], [*v[:2], tokens, v[3]]]


def _heads(flow: Flow, q: Factors, k: Factors, q_size: Any, k_size: Any, made: str) -> None:
    """Query head i reads key head i // groups."""
    if same_size(q_size, k_size):
        flow.together(q, k)
    elif not known(k_size == 1):
        outer, _ = reshape([q], [k_size, q_size // k_size], made)
        flow.together(outer, k)


def _steps(flow: Flow, node: fx.Node, scores: Dims, sizes: list[Any]) -> None:
    """What the spec's steps add to the scores, or multiply them by, has the scores' axes."""
    extras: Any = node.args[3]
    keys = scores[-1], sizes[-1]
    for step in spec_of(node).steps:
        if step.kind == "view":
            sizes = [*_resolved(step.value, sizes[:-2]), *sizes[-2:]]
            scores = reshape(scores, sizes, node.name)
        elif step.kind == "drop":
            scores, sizes = [*scores[:-1], keys[0]], [*sizes[:-1], keys[1]]
        for index in (step.extra, step.other):
            if index is None:
                continue
            extra, columns = extras[index], 1 if step.kind == "sink" else 0
            cut = len(shape(extra)) - columns
            flow.broadcast(
                [
                    (scores[: len(scores) - columns], sizes[: len(sizes) - columns]),
                    (flow.of(extra)[:cut], shape(extra)[:cut]),
                ],
                sizes[: len(sizes) - columns],
                node.name,
            )
            if columns:
                grown = sizes[-1] + shape(extra)[-1]
                scores, sizes = [*scores[:-1], fresh(grown, node.name)], [*sizes[:-1], grown]


def _resolved(wanted: Sequence[Any], sizes: Sequence[Any]) -> list[Any]:
    """Sizes of a reshape, with the one that is left open (-1) filled in."""
    rest = math.prod(s for s in wanted if s != -1)
    return [math.prod(sizes) // rest if s == -1 else s for s in wanted]
