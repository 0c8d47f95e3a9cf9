"""The semantic ops ``accelpass::linear``, ``::embedding``, ``::matrix`` and ``::rounded``: references that define what a spec means.

x stays inside each op: an unpacked weight is a function of constants alone, which compilers fold back to floats.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from accelpass.ir.core.graph import is_call
from accelpass.ir.linear.spec import LinearSpec


@torch.library.custom_op("accelpass::linear", mutates_args=())
def linear(x: Tensor, operands: Sequence[Tensor], bias: Tensor | None, spec: str) -> Tensor:
    """y (..., out) = x (..., in) W^T + bias, as ``spec`` (JSON of a :class:`LinearSpec`) says.

    y has x's dtype; it is float32 of an x that is rounded to integers already.
    """
    s, wide = LinearSpec.from_json(spec), x.float() if x.is_floating_point() else x
    packed = s.of_weight(operands)
    if s.by is not None:
        packed = s.by.select(packed, *s.of_choice(operands))
    if s.activation is None:
        y = s.weight.multiply(wide, packed)
    else:
        codes, scale = s.activation.encode(wide, *s.of_activation(operands))
        y = s.weight.multiply(codes, packed) * scale
    if s.low_rank:
        a, b = s.of_residual(operands)
        y = y + F.linear(F.linear(wide, a.float()), b.float())
    return (y if bias is None else y + bias.float()).to(_result(x))


def _result(x: Tensor) -> torch.dtype:
    return x.dtype if x.is_floating_point() else torch.float32


@linear.register_fake
def _(x: Tensor, operands: Sequence[Tensor], bias: Tensor | None, spec: str) -> Tensor:
    return x.new_empty((*x.shape[:-1], operands[0].shape[-2]), dtype=_result(x))


@torch.library.custom_op("accelpass::embedding", mutates_args=())
def embedding(indices: Tensor, operands: Sequence[Tensor], spec: str, dtype: torch.dtype) -> Tensor:
    """Rows of W in ``dtype``: (*indices.shape, in)."""
    return LinearSpec.from_json(spec).weight.unpack([o[indices] for o in operands], dtype)


@embedding.register_fake
def _(indices: Tensor, operands: Sequence[Tensor], spec: str, dtype: torch.dtype) -> Tensor:
    width = LinearSpec.from_json(spec).weight.width(operands)
    return operands[0].new_empty((*indices.shape, width), dtype=dtype)


@torch.library.custom_op("accelpass::matrix", mutates_args=())
def matrix(operands: Sequence[Tensor], spec: str, dtype: torch.dtype) -> Tensor:
    """W (..., out, in) itself, for products that are not a linear (batched and grouped experts)."""
    return LinearSpec.from_json(spec).weight.unpack(operands, dtype)


@matrix.register_fake
def _(operands: Sequence[Tensor], spec: str, dtype: torch.dtype) -> Tensor:
    width = LinearSpec.from_json(spec).weight.width(operands)
    return operands[0].new_empty((*operands[0].shape[:-1], width), dtype=dtype)


@torch.library.custom_op("accelpass::rounded", mutates_args=())
def rounded(x: Tensor, operands: Sequence[Tensor], spec: str) -> Tensor:
    """What the codes of x stand for, as the activation's format of a spec writes it, in x's dtype and shape.

    For products that are not a linear (convolutions). ``operands`` are those of the activation alone.
    """
    activation = LinearSpec.from_json(spec).activation
    assert activation is not None
    codes, scale = activation.encode(x.float(), *operands)
    return (codes * scale).to(x.dtype)


@rounded.register_fake
def _(x: Tensor, operands: Sequence[Tensor], spec: str) -> Tensor:
    return torch.empty_like(x)


LINEAR = torch.ops.accelpass.linear.default
EMBEDDING = torch.ops.accelpass.embedding.default
MATRIX = torch.ops.accelpass.matrix.default
INPUT = torch.ops.accelpass.rounded.default
_SPEC = {LINEAR: 3, EMBEDDING: 2, MATRIX: 1}
_OPERANDS = {LINEAR: 1, EMBEDDING: 1, MATRIX: 0}


def is_linear(node: object) -> bool:
    """True for a semantic linear; not for a look-up of rows, nor for a matrix."""
    return is_call(node, LINEAR)


def is_packed(node: object) -> bool:
    """True for any op that reads a packed weight."""
    return is_call(node, LINEAR, EMBEDDING, MATRIX)


def linear_spec(node: fx.Node) -> LinearSpec:
    """The spec of a node that reads a packed weight."""
    text = node.args[_SPEC[node.target]]
    assert isinstance(text, str)
    return LinearSpec.from_json(text)


def operands_of(node: fx.Node) -> list[Any]:
    """The nodes of the packed weight that a node reads, and of its residual."""
    operands = node.args[_OPERANDS[node.target]]
    assert isinstance(operands, Sequence)
    return list(operands)
