"""Matrix products in one form: two operands and an output, each dimension named by a label."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from accelpass.ir.core.graph import is_call, known, value

aten = torch.ops.aten
_MATMULS = (aten.matmul, aten.bmm)
_EINSUM_TENSORS = 2


@dataclass(frozen=True)
class Product:
    """``out = alpha * sum(lhs * rhs) + beta * bias`` over the labels that ``out`` lacks."""

    node: fx.Node
    lhs: fx.Node
    rhs: fx.Node
    lhs_labels: tuple[str, ...]
    rhs_labels: tuple[str, ...]
    out_labels: tuple[str, ...]
    bias: fx.Node | None = None
    alpha: float = 1.0
    beta: float = 1.0

    def side(self, operand: fx.Node) -> str | None:
        """Which operand a node is."""
        if operand is self.lhs and operand is self.rhs:
            return None
        return "lhs" if operand is self.lhs else "rhs" if operand is self.rhs else None

    @property
    def summed(self) -> set[str]:
        return (set(self.lhs_labels) & set(self.rhs_labels)) - set(self.out_labels)


def product(node: object) -> Product | None:
    """The node as a product of two tensors, or None."""
    if not isinstance(node, fx.Node) or node.op != "call_function":
        return None
    if is_call(node, *_MATMULS):
        return _matmul(node, node.args[0], node.args[1])
    if is_call(node, aten.baddbmm, aten.baddbmm_):
        scalars = {"beta": 1, "alpha": 1, **node.kwargs}
        if not all(isinstance(s, int | float) for s in scalars.values()) or is_call(node, aten.baddbmm_):
            return None
        made = _matmul(node, node.args[1], node.args[2])
        bias = node.args[0] if scalars["beta"] != 0 else None
        if made is None:
            return None
        return Product(**{**vars(made), "bias": bias, "alpha": float(scalars["alpha"]), "beta": float(scalars["beta"])})
    if is_call(node, aten.einsum):
        return _einsum(node)
    return None


def _matmul(node: fx.Node, lhs: Any, rhs: Any) -> Product | None:
    a, b, out = value(lhs), value(rhs), value(node)
    if not all(isinstance(t, Tensor) and t.dim() >= 2 for t in (a, b, out)):
        return None
    batch = tuple(f"b{i}" for i in range(out.dim() - 2))
    taken = [batch[len(batch) - (t.dim() - 2) :] for t in (a, b)]
    return Product(node, lhs, rhs, (*taken[0], "m", "k"), (*taken[1], "k", "n"), (*batch, "m", "n"))


def _einsum(node: fx.Node) -> Product | None:
    equation, operands = node.args[0], node.args[1]
    if not isinstance(equation, str) or not isinstance(operands, list | tuple) or len(operands) != _EINSUM_TENSORS:
        return None
    equation = equation.replace(" ", "")
    if "->" not in equation:
        return None
    left, out = equation.split("->")
    terms = left.split(",")
    if len(terms) != _EINSUM_TENSORS:
        return None
    lhs, rhs = operands
    if not (isinstance(lhs, fx.Node) and isinstance(rhs, fx.Node)):
        return None
    dots = 0
    if "..." in equation:
        spare = [value(o).dim() - len(t.replace("...", "")) for t, o in zip(terms, operands, strict=True) if "..." in t]
        if len(set(spare)) != 1:
            return None
        dots = spare[0]
    labels = []
    for term in (*terms, out):
        head, _, tail = term.partition("...")
        middle = [f"b{i}" for i in range(dots)] if "..." in term else []
        labels.append((*head, *middle, *tail))
    if any(len(set(found)) != len(found) for found in labels):
        return None
    return Product(node, lhs, rhs, labels[0], labels[1], labels[2])


def permutation(labels: tuple[str, ...], wanted: tuple[str, ...]) -> tuple[int, ...] | None:
    """How to permute a tensor with ``labels`` into the order ``wanted``; None if it has other labels."""
    if set(labels) != set(wanted):
        return None
    return tuple(labels.index(w) for w in wanted)


def same_sizes(a: tuple[Any, ...], b: tuple[Any, ...]) -> bool:
    """Equal for all values of the symbolic sizes."""
    return len(a) == len(b) and all(known(x == y) for x, y in zip(a, b, strict=True))
