"""Every normalisation: the operators that torch has for it, and the ways in which models write it by hand."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any as Anything

import torch
from torch import fx

from accelpass.ir.analyses.axes.flow import CASTS, VIEWS, bare, constant, fixed
from accelpass.ir.attention.recognition.score_steps import argument
from accelpass.ir.core.graph import aten, is_call, module_path, value
from accelpass.ir.core.patterns import Any, Capture, Const, Match, Maybe, OneOf, Op, match
from accelpass.ir.core.program import Program


@dataclass(frozen=True)
class Norm:
    """``node = normalised(x) * (weight_offset + weight) + bias``.

    Attributes:
        node: what the rest of the model reads, after weight, bias and the cast back.
        x: what is normalised.
        weight, bias: the model's own tensors; None without.
        eps: added to the variance (or mean square); None if it is not a number.
        kind: ``layer_norm``, ``rms_norm``, ``group_norm``, ``batch_norm`` or ``instance_norm``.
        path: the module.
        weight_offset: 1 where the model multiplies by ``1 + weight`` (Gemma).
        scale, shift: a modulation ``node * (1 + scale) + shift`` computed from a condition follows (adaLN); else None.
    """

    node: fx.Node
    x: fx.Node
    weight: fx.Node | None
    bias: fx.Node | None
    eps: float | None
    kind: str
    path: str
    weight_offset: float = 0.0
    scale: fx.Node | None = None
    shift: fx.Node | None = None

    @property
    def modulated(self) -> bool:
        return self.scale is not None


_NATIVE = {
    aten.layer_norm: "layer_norm",
    aten.native_layer_norm: "layer_norm",
    aten.rms_norm: "rms_norm",
    aten._fused_rms_norm: "rms_norm",
    aten.group_norm: "group_norm",
    aten.native_group_norm: "group_norm",
    aten.batch_norm: "batch_norm",
    aten.instance_norm: "instance_norm",
}

_x = Any("x", fx.Node)
_square = OneOf(Op(aten.pow, _x, Const(2)), Op(aten.square, _x), Op(aten.mul, _x, _x))
_statistic = OneOf(
    Op(aten.mean, Maybe(CASTS, _square), Capture("dims", Any("dims", (list, tuple, int)))),
    Op(aten.var, _x, Capture("dims", Any("dims", (list, tuple, int)))),
)
_guarded = OneOf(Op((aten.add, aten.add_), Maybe(CASTS, _statistic), Any("eps"), commutes=True), _statistic)
_root = OneOf(
    Op(aten.rsqrt, Maybe(CASTS, _guarded)),
    Op(aten.pow, Maybe(CASTS, _guarded), Const(-0.5)),
    Op(aten.sqrt, Maybe(CASTS, _guarded)),
)
_centred = Op(aten.sub, _x, Maybe((*CASTS, *VIEWS), Op(aten.mean, _x)))


def norms(program: Program) -> list[Norm]:
    """All normalisations of activations in graph order."""
    found = []
    for node in program.graph.nodes:
        if node.op != "call_function":
            continue
        norm = _native(program, node) or _by_hand(program, node)
        if norm is not None:
            found.append(norm)
    return found


def _native(program: Program, node: fx.Node) -> Norm | None:
    kind = next((name for packet, name in _NATIVE.items() if is_call(node, packet)), None)
    if kind is None or not isinstance(node.args[0], fx.Node):
        return None
    x = node.args[0]
    if fixed(program, x) or (kind == "batch_norm" and argument(node, "training")):
        return None  # a standardised weight, or statistics of this batch
    out = node
    if isinstance(value(node), tuple | list):
        firsts = [u for u in node.users if u.args[1] == 0]
        if not firsts:
            return None
        out = firsts[0]
    eps = argument(node, "eps")
    if eps is None:
        eps = torch.finfo(value(x).dtype).eps
    weight, bias = (constant(program, argument(node, name)) for name in ("weight", "bias"))
    return _with_modulation(program, Norm(out, x, weight, bias, _number(eps), kind, module_path(node)))


def _by_hand(program: Program, node: fx.Node) -> Norm | None:
    """The norm whose reciprocal root (or root to divide by) is ``node``."""
    if not is_call(node, aten.rsqrt, aten.pow, aten.sqrt):
        return None
    found = match(_root, node)
    if not isinstance(found, Match):
        return None
    for factor in (node, *(u for u in node.users if is_call(u, *CASTS, *VIEWS))):
        for product in factor.users:
            x, kind = _normalised(product, factor, found["x"], is_call(node, aten.sqrt))
            if x is not None and not fixed(program, x):
                eps = found.captures.get("eps", 0.0)
                out, weight, bias, offset = _affine(program, product)
                norm = Norm(out, x, weight, bias, _number(eps), kind, module_path(node), offset)
                return _with_modulation(program, norm)
    return None


def _normalised(product: fx.Node, factor: fx.Node, squared: fx.Node, divides: bool) -> tuple[fx.Node | None, str]:
    """(x, kind) if ``product`` is x, or x less its mean, times the factor whose statistic squares ``squared``."""
    if divides:
        top = product.args[0] if is_call(product, aten.div) and product.args[1] is factor else None
    elif is_call(product, aten.mul, aten.mul_):
        a, b = product.args[:2]
        top = a if b is factor else b
    else:
        top = None
    if not isinstance(top, fx.Node):
        return None, ""
    middle, squared_middle = _centre(bare(top)), _centre(bare(squared))
    if middle is not None:
        # The variance is taken of the same difference, or of x itself by aten.var.
        if middle is squared_middle or middle is bare(squared):
            return middle, "layer_norm"
        return None, ""
    return (bare(top), "rms_norm") if bare(top) is bare(squared) and squared_middle is None else (None, "")


def _centre(node: fx.Node) -> fx.Node | None:
    found = match(_centred, node)
    return bare(found["x"]) if isinstance(found, Match) else None


def _affine(program: Program, node: fx.Node) -> tuple[fx.Node, fx.Node | None, fx.Node | None, float]:
    """(last node, weight, bias, weight offset) after the normalised value; views count only before a weight."""
    out, weight, bias, offset = node, None, None, 0.0
    while len(node.users) == 1:
        (user,) = node.users
        if is_call(user, *VIEWS) and weight is None:
            node = user
            continue
        if is_call(user, *CASTS) and user.args[0] is node:
            if out is node:
                out = user
            node = user
            continue
        others = [a for a in user.args[:2] if a is not node]
        if len(others) != 1 or not isinstance(others[0], fx.Node):
            break
        if weight is None and bias is None and is_call(user, aten.mul, aten.mul_):
            weight, offset = _weight(program, others[0])
            if weight is None:
                break
        elif bias is None and is_call(user, aten.add, aten.add_):
            bias = constant(program, others[0])
            if bias is None:
                break
        else:
            break
        node = out = user
    return out, weight, bias, offset


def _weight(program: Program, node: fx.Node) -> tuple[fx.Node | None, float]:
    """The weight behind ``weight`` or ``1 + weight``, which has more than one element."""
    found, offset = constant(program, node), 0.0
    if found is None:
        plus = match(Op(aten.add, Any("weight", fx.Node), Any("offset", (int, float)), commutes=True), bare(node))
        if not isinstance(plus, Match):
            return None, 0.0
        found, offset = constant(program, plus["weight"]), float(plus["offset"])
    if found is None or value(found).numel() < 2:
        return None, 0.0
    return found, offset


def _with_modulation(program: Program, norm: Norm) -> Norm:
    """The norm with the scale and shift that follow it, if these depend on the model's inputs."""
    scale_of = Op(aten.mul, Maybe(CASTS, Const(norm.node)), Maybe((*CASTS, *VIEWS), _one_plus), commutes=True)
    for user in _users(norm.node):
        found = match(scale_of, user)
        if not isinstance(found, Match) or fixed(program, found["scale"]):
            continue
        for after in _users(user):
            if is_call(after, aten.add) and len(after.args) > 1:
                a, b = after.args[:2]
                shift = b if isinstance(a, fx.Node) and bare(a) is user else a
                if isinstance(shift, fx.Node):
                    return Norm(**{**vars(norm), "scale": found["scale"], "shift": shift})
    return norm


_one_plus = Op(aten.add, Any("scale", fx.Node), Const(1), commutes=True)


def _users(node: fx.Node) -> list[fx.Node]:
    """Users, and the users of casts."""
    found = []
    for user in node.users:
        found += list(user.users) if is_call(user, *CASTS) else [user]
    return found


def _number(found: Anything) -> float | None:
    if isinstance(found, int | float) and math.isfinite(found):
        return float(found)
    return None
