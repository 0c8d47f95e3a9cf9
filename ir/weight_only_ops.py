"""Semantic ops on packed weights. The eager bodies are the definition; backends lower them to fast code.

Packed forms (``out`` rows, ``in`` columns; leading dimensions, such as experts, are allowed):

* int8: ``q`` int8 (out, in) and ``scale`` float32 (out,); W = q * scale.
* int4: ``q`` uint8 (out, in / 2), groups of ``group_size`` columns; byte j of a group holds the group's column j in its
  low nibble and column j + group_size / 2 in its high one. ``scale``, ``zero`` float32 (out, in / group_size);
  W = (nibble - zero) * scale, with zero = 8 where ``zero`` is None.

x stays inside each op: a dequantized weight is a function of constants alone, which compilers fold back to floats.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def dequantize_int8(q: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """(..., out, in) in ``dtype``; the product is formed in float32."""
    return (q.float() * scale.unsqueeze(-1)).to(dtype)


def dequantize_int4(q: Tensor, scale: Tensor, zero: Tensor | None, group_size: int, dtype: torch.dtype) -> Tensor:
    """(..., out, in) in ``dtype``; the product is formed in float32."""
    groups = scale.shape[-1]
    packed = q.reshape(*q.shape[:-1], groups, group_size // 2)
    nibbles = torch.cat([packed & 15, packed >> 4], -1).float()
    offset = zero.unsqueeze(-1) if zero is not None else 8.0
    return ((nibbles - offset) * scale.unsqueeze(-1)).reshape(*q.shape[:-1], groups * group_size).to(dtype)


@torch.library.custom_op("accelpass::int8_linear", mutates_args=())
def int8_linear(x: Tensor, q: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """y (..., out) = x (..., in) W^T + bias, in x's dtype."""
    y = F.linear(x.float(), q.float()) * scale
    return (y if bias is None else y + bias.float()).to(x.dtype)


@int8_linear.register_fake
def _(x: Tensor, q: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty((*x.shape[:-1], q.shape[0]))


@torch.library.custom_op("accelpass::int8_embedding", mutates_args=())
def int8_embedding(indices: Tensor, q: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Rows of W in ``dtype``: (*indices.shape, in)."""
    return (q[indices].float() * scale[indices].unsqueeze(-1)).to(dtype)


@int8_embedding.register_fake
def _(indices: Tensor, q: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    return q.new_empty((*indices.shape, q.shape[1]), dtype=dtype)


@torch.library.custom_op("accelpass::int4_linear", mutates_args=())
def int4_linear(
    x: Tensor, q: Tensor, scale: Tensor, zero: Tensor | None, bias: Tensor | None, group_size: int
) -> Tensor:
    """y (..., out) = x (..., in) W^T + bias, in x's dtype."""
    y = F.linear(x.float(), dequantize_int4(q, scale, zero, group_size, torch.float32))
    return (y if bias is None else y + bias.float()).to(x.dtype)


@int4_linear.register_fake
def _(x: Tensor, q: Tensor, scale: Tensor, zero: Tensor | None, bias: Tensor | None, group_size: int) -> Tensor:
    return x.new_empty((*x.shape[:-1], q.shape[0]))


@torch.library.custom_op("accelpass::int4_embedding", mutates_args=())
def int4_embedding(
    indices: Tensor, q: Tensor, scale: Tensor, zero: Tensor | None, group_size: int, dtype: torch.dtype
) -> Tensor:
    """Rows of W in ``dtype``: (*indices.shape, in)."""
    return dequantize_int4(q[indices], scale[indices], None if zero is None else zero[indices], group_size, dtype)


@int4_embedding.register_fake
def _(indices: Tensor, q: Tensor, scale: Tensor, zero: Tensor | None, group_size: int, dtype: torch.dtype) -> Tensor:
    return q.new_empty((*indices.shape, 2 * q.shape[1]), dtype=dtype)


@torch.library.custom_op("accelpass::int8_matrix", mutates_args=())
def int8_matrix(q: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """W (..., out, in) itself, for products that are not a linear (batched and grouped experts)."""
    return dequantize_int8(q, scale, dtype)


@int8_matrix.register_fake
def _(q: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.empty_like(q, dtype=dtype)


@torch.library.custom_op("accelpass::int4_matrix", mutates_args=())
def int4_matrix(q: Tensor, scale: Tensor, zero: Tensor | None, group_size: int, dtype: torch.dtype) -> Tensor:
    """W (..., out, in) itself, for products that are not a linear (batched and grouped experts)."""
    return dequantize_int4(q, scale, zero, group_size, dtype)


@int4_matrix.register_fake
def _(q: Tensor, scale: Tensor, zero: Tensor | None, group_size: int, dtype: torch.dtype) -> Tensor:
    return q.new_empty((*q.shape[:-1], 2 * q.shape[-1]), dtype=dtype)
