"""Attention over parameter tokens (TokenFormer): ``f(x K^T) V`` with learned K and V, and a norm over K's rows in ``f``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import fx

from accelpass.ir.analyses.axes.flow import CASTS, bare, fixed
from accelpass.ir.analyses.structure.linear import Linear, linears
from accelpass.ir.attention.recognition.score_steps import argument
from accelpass.ir.core.graph import aten, is_call, shape
from accelpass.ir.core.program import Program

_MUL, _DIV = (aten.mul, aten.mul_), (aten.div, aten.div_)
_NORMS = (aten.linalg_vector_norm, aten.norm)
_FAR = 12


@dataclass(frozen=True)
class Pattention:
    """One of them.

    Attributes:
        path: the module.
        keys, values: the linears by K and by V.
        norm: ``l2_norm_gelu`` (``GeLU(scale a / |a|_2)``), ``gelu_l2_norm`` (``scale g / |g|_2`` of ``g = GeLU(a)``) or ``softmax``
            (``scale e / |e|_1`` of ``e = exp(a)``), as the authors' code calls them.
        before: what ``x K^T`` is multiplied with to get ``a``.
        scale: see ``norm``; in the paper the root of the number of parameter tokens, in ``softmax`` this number.
        outer: what the result of ``f`` is multiplied with.
        approximate: of GeLU.
    """

    path: str
    keys: Linear
    values: Linear
    norm: str
    before: float
    scale: float
    outer: float
    approximate: str

    @property
    def tokens(self) -> int:
        """How many parameter tokens there are."""
        return self.keys.out_features


@dataclass
class _Peeled:
    node: fx.Node
    factor: float = 1.0
    """Of what is outside of the norm."""
    inner: float = 1.0
    """Of what is inside."""
    order: float | None = None
    """Of the norm that is divided by."""


def pattentions(program: Program) -> list[Pattention]:
    """All of them in graph order."""
    sites = {site.node: site for site in program.analysis(linears)}
    found = []
    for site in sites.values():
        made = _pattention(program, site, sites) if site.bias is None else None
        if made is not None:
            found.append(made)
    return found


def _pattention(program: Program, values: Linear, sites: dict[fx.Node, Linear]) -> Pattention | None:
    last = _peeled(program, values.operand())
    act = last.node
    if not is_call(act, aten.gelu, aten.exp):
        return None
    first = _peeled(program, act.args[0])
    keys = sites.get(first.node)
    if keys is None or keys.bias is not None or len(first.node.users) > 3:
        return None
    approximate = str(argument(act, "approximate", "none")) if is_call(act, aten.gelu) else "none"
    ends = (values.path or keys.path, keys, values)
    if is_call(act, aten.exp):
        if last.order != 1 or first.order is not None:
            return None
        return Pattention(*ends, "softmax", first.factor, last.factor, 1.0, "none")
    if last.order is not None:
        if last.order != 2 or first.order is not None:
            return None
        return Pattention(*ends, "gelu_l2_norm", first.factor, last.factor, 1.0, approximate)
    if first.order != 2 or first.inner <= 0:
        return None
    return Pattention(*ends, "l2_norm_gelu", first.inner, first.factor, last.factor, approximate)


def _peeled(program: Program, node: Any) -> _Peeled:
    """What a value is, without the numbers that it is multiplied with and the norm of a row that it is divided by."""
    found = _Peeled(bare(node))
    for _ in range(_FAR):
        node = found.node
        if not is_call(node, *_MUL, *_DIV) or len(node.args) < 2:
            break
        a, b = node.args[:2]
        if isinstance(b, int | float) and b:
            factor = float(b) if is_call(node, *_MUL) else 1 / float(b)
            if found.order is None:
                found.factor *= factor
            else:
                found.inner *= factor
        elif is_call(node, *_DIV) and found.order is None and (order := _norm_of(b, a)) is not None:
            found.order = order
        elif not (is_call(node, *_MUL) and _ones(program, b)):
            break
        found.node = bare(a)
    return found


def _norm_of(node: Any, source: Any) -> float | None:
    """The order of the norm that ``node`` is of each row of ``source``."""
    node = bare(node) if isinstance(node, fx.Node) else node
    if not is_call(node, *_NORMS) or bare(node.args[0]) is not bare(source):
        return None
    dims, last = argument(node, "dim"), len(shape(source)) - 1
    dims = [dims] if isinstance(dims, int) else list(dims or ())
    if [d % (last + 1) for d in dims] != [last] or not argument(node, "keepdim"):
        return None
    order = argument(node, "ord", argument(node, "p", 2))
    return float(order) if isinstance(order, int | float) else None


def _ones(program: Program, node: Any) -> bool:
    while is_call(node, *CASTS):
        node = node.args[0]
    return is_call(node, aten.ones, aten.ones_like) and fixed(program, node)
