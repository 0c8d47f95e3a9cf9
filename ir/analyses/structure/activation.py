"""What a non-linear function between two linears is called, however the model spelled it."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import fx

from accelpass.ir.analyses.axes.flow import CASTS, is_part, is_pointwise
from accelpass.ir.core.graph import aten, is_call
from accelpass.ir.core.patterns import Any, Capture, Const, Match, Maybe, OneOf, Op, match

_MUL, _ADD = (aten.mul, aten.mul_), (aten.add, aten.add_)
_NUMBER = (int, float)
_x = Maybe(CASTS, Any("x", fx.Node))
_half = OneOf(Op(_MUL, _x, Const(0.5), commutes=True), Op(aten.div, _x, Const(2.0)))
_relu = Op((aten.relu, aten.relu_), Any("x", fx.Node))


def _one_plus(squashed: Op) -> Op:
    return Op(_ADD, Maybe(CASTS, squashed), Const(1.0), commutes=True)


def _gelu(squashed: Op) -> OneOf:
    """``x / 2 * (1 + squashed)``, in either association."""
    return OneOf(
        Op(_MUL, _half, _one_plus(squashed), commutes=True),
        Op(_MUL, Op(_MUL, _x, _one_plus(squashed), commutes=True), Const(0.5), commutes=True),
        Op(_MUL, _x, Op(_MUL, _one_plus(squashed), Const(0.5), commutes=True), commutes=True),
    )


_PATTERNS = {
    "relu2": OneOf(Op(aten.pow, _relu, Const(2)), Op(aten.square, _relu), Op(_MUL, _relu, _relu)),
    "gelu_tanh": _gelu(Op(aten.tanh, Capture("inner", Any("inner", fx.Node)))),
    "gelu": _gelu(Op(aten.erf, Any("inner", fx.Node))),
    "quick_gelu": Op(
        _MUL, _x, Op(aten.sigmoid, Op(_MUL, _x, Capture("slope", Any("slope", _NUMBER)), commutes=True)), commutes=True
    ),
    "silu": Op(_MUL, _x, Op(aten.sigmoid, _x), commutes=True),
}
_NAMES = {
    aten.silu: "silu",
    aten.silu_: "silu",
    aten.relu: "relu",
    aten.relu_: "relu",
    aten.relu6: "relu6",
    aten.hardtanh: "relu6",
    aten.hardswish: "hardswish",
    aten.mish: "mish",
    aten.elu: "elu",
    aten.selu: "selu",
    aten.leaky_relu: "leaky_relu",
    aten.sigmoid: "sigmoid",
    aten.tanh: "tanh",
    aten.erf: "erf",
    aten.glu: "sigmoid",
    aten.softplus: "softplus",
}
_LINEAR = (*_MUL, *_ADD, aten.sub, aten.sub_, aten.div, aten.div_, aten.neg, *CASTS)


def is_nonlinear(node: fx.Node) -> bool:
    """True for an element-wise operation that no linear layer could absorb; a product of two activations is not."""
    return is_pointwise(node) and not is_call(node, *_LINEAR)


def name(nodes: Sequence[fx.Node]) -> str | None:
    """The activation among ``nodes``, given in graph order; ``other`` for one without a name, None for none at all."""
    for node in reversed(nodes):
        for called, pattern in _PATTERNS.items():
            found = match(pattern, node)
            if isinstance(found, Match):
                return _told_apart(called, found)
    for node in reversed(nodes):
        if is_call(node, aten.gelu, aten.gelu_):
            return "gelu_tanh" if node.kwargs.get("approximate") == "tanh" else "gelu"
        packet = getattr(node.target, "overloadpacket", None)
        if packet in _NAMES:
            return _NAMES[packet]
    return "other" if any(is_nonlinear(n) and not is_part(n) for n in nodes) else None


def _told_apart(called: str, found: Match) -> str:
    if called == "quick_gelu" and not math.isclose(found["slope"], 1.702, rel_tol=1e-3):
        return "silu" if found["slope"] == 1 else "swish"
    return called
