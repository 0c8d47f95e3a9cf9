"""Packed linears on CPU as ATen that Inductor vectorises.

One row: dequantize, multiply and sum in one loop over the packed bytes, which is bound by streaming them. Many rows: a
float matrix for the matrix unit, made from the packed one in front of each product, a part at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from accelpass.ir.analyses.structure.linear import rows
from accelpass.ir.core.graph import aten, shape, stored, value
from accelpass.ir.linear.formats import Int4
from accelpass.ir.linear.lower import Emit, Lowering, Nodes
from accelpass.ir.linear.spec import WeightFormat
from accelpass.ir.torch_private import cpu_multiplies_bfloat16, cpu_multiplies_int8, int8_product

GEMV_ROWS = {8: 8, 4: 4}
"""Of each number of bits: up to this many rows multiply the packed matrix as it streams by; beyond, expanding it for a matrix
product is cheaper, and earlier for 4 bits, whose unpacking is repeated for each row."""
LARGE, AT_ONCE = 8 * 2**20, 4
"""A matrix of more bytes, a head as a rule, is multiplied by one row as so many matrices in one loop: sums that wait for one another
would leave a fifth of the memory's bandwidth unused. Smaller ones gain nothing."""
PART = 8 * 2**20
"""Bytes of a large matrix that are expanded at once. Parts stay in the cache until they are multiplied, and their memory is
used again: beyond 32 MB the allocator maps new pages each time, and touching these takes longer than the product of a few rows."""


def matmul_dtype(x: torch.Tensor) -> torch.dtype:
    """What many-row products run in: bfloat16 (float32 sums) where the CPU multiplies it in hardware, else float32.

    Products of integers are not rounded to bfloat16 at the end.
    """
    if x.dtype != torch.float32:
        return x.dtype if x.is_floating_point() else torch.float32
    return torch.bfloat16 if cpu_multiplies_bfloat16() else torch.float32


class Int8Forms(Lowering):
    """Of :class:`~accelpass.ir.linear.formats.Int8`."""

    def linear(self, e: Emit, weight: WeightFormat, x: fx.Node, packed: Nodes, bias: fx.Node | None) -> fx.Node:
        q, scale = packed
        count = rows(x)
        if count and count <= GEMV_ROWS[8]:  # no rows, a batch of nothing, are a product like many
            flat = e.cast(e(aten.reshape.default, stored(x), [count, -1]), torch.float32)
            outputs, width = (int(s) for s in shape(q))
            many = AT_ONCE if count == 1 and outputs * width > LARGE and outputs % AT_ONCE == 0 else 1
            step = outputs // many
            blocks = [e(aten.slice.Tensor, q, 0, n * step, (n + 1) * step) for n in range(many)] if many > 1 else [q]
            wide = [e.cast(block, torch.float32) for block in blocks]
            parts = []
            for row in range(count):
                one = flat if count == 1 else e(aten.slice.Tensor, flat, 0, row, row + 1)
                sums = [e(aten.sum.dim_IntList, e(aten.mul.Tensor, w, one), [-1]) for w in wide]
                whole = sums[0] if many == 1 else e(aten.cat.default, sums, 0)
                parts.append(e(aten.mul.Tensor, whole, scale))
            y = parts[0] if count == 1 else e(aten.stack.default, parts, 0)
            return e.plus(y, bias)
        if not value(x).is_floating_point() and multiplies_integers():
            (y,) = e.traced("int8 product", _integers, x, q)
            return e.plus(e(aten.mul.Tensor, y, scale), bias)
        dtype = matmul_dtype(value(x))
        wide_x = e.cast(x, dtype)

        def product(packed: Sequence[Any]) -> fx.Node:
            # Integers up to 127 are exact in bfloat16; the scale is applied to the product, in float32.
            q, scale = packed
            y = e.cast(e(aten.linear.default, wide_x, e.cast(q, dtype)), torch.float32)
            return e(aten.mul.Tensor, y, scale)

        return e.plus(in_parts(e, [q, scale], int(shape(q)[1]) * dtype.itemsize, product), bias)

    def embedding(self, e: Emit, weight: WeightFormat, indices: fx.Node, packed: Nodes, dtype: torch.dtype) -> fx.Node:
        q, scale = packed
        rows = e.cast(e(aten.embedding.default, q, indices), torch.float32)
        scales = e(aten.unsqueeze.default, e(aten.index.Tensor, scale, [indices]), -1)
        return e.cast(e(aten.mul.Tensor, rows, scales), dtype)

    def matrix(self, e: Emit, weight: WeightFormat, packed: Nodes, dtype: torch.dtype) -> fx.Node:
        q, scale = packed
        wide = e.cast(q, torch.float32)
        return e.cast(e(aten.mul.Tensor, wide, e(aten.unsqueeze.default, scale, -1)), dtype)


def multiplies_integers() -> bool:
    """Whether this CPU adds products of eight bits exactly: without VNNI oneDNN adds two of them in sixteen, which overflow.

    Elsewhere codes are multiplied as floats, as those of a weight are.
    """
    return cpu_multiplies_int8()


def _integers(codes: Tensor, q: Tensor) -> list[Tensor]:
    """Summed as int32, by the CPU's instructions for eight bits where it has them."""
    flat = codes.reshape(-1, q.shape[1])
    # Of one channel torch 2.13 gives numbers that are in no memory of ours.
    sums = flat.int() * q.t().int() if q.shape[1] == 1 else int8_product(flat, q.t())
    return [sums.float().reshape(*codes.shape[:-1], q.shape[0])]


class Int4Forms(Lowering):
    """Of :class:`~accelpass.ir.linear.formats.Int4`."""

    def linear(self, e: Emit, weight: WeightFormat, x: fx.Node, packed: Nodes, bias: fx.Node | None) -> fx.Node:
        assert isinstance(weight, Int4)
        q, scale, zero, group = packed[0], packed[1], _zero(packed), weight.group_size
        count = rows(x)
        if count and count <= GEMV_ROWS[4]:  # no rows, a batch of nothing, are a product like many
            (out, groups), half = (int(s) for s in shape(scale)), group // 2
            packed = e(aten.reshape.default, q, [out, groups, half])
            low = e(aten.bitwise_and.Scalar, packed, 15)
            scales = e(aten.unsqueeze.default, scale, -1)
            # A byte is low + 16 high, so low x1 + high x2 = byte (x2 / 16) + low (x1 - x2 / 16): no shift. What depends on x
            # alone is computed once and not for each output.
            flat = e.cast(e(aten.reshape.default, stored(x), [count, groups, 2, half]), torch.float32)
            byte, nibble = e.cast(packed, torch.float32), e.cast(low, torch.float32)
            parts = []
            for row in range(count):
                one = e(aten.select.int, flat, 0, row)
                first, second = (e(aten.select.int, one, 1, i) for i in (0, 1))
                x_high = e(aten.mul.Scalar, second, 1 / 16)
                x_low = e(aten.sub.Tensor, first, x_high)
                both = e(aten.add.Tensor, first, second)
                if zero is None:
                    offset = stored(e(aten.mul.Scalar, both, 8.0))
                else:
                    offset = e(aten.mul.Tensor, e(aten.unsqueeze.default, zero, -1), stored(both))
                products = e(aten.mul.Tensor, byte, stored(x_high))
                products = e(aten.add.Tensor, products, e(aten.mul.Tensor, nibble, stored(x_low)))
                products = e(aten.mul.Tensor, e(aten.sub.Tensor, products, offset), scales)
                parts.append(e(aten.sum.dim_IntList, products, [1, 2]))
            y = parts[0] if count == 1 else e(aten.stack.default, parts, 0)
            return e.plus(y, bias)
        dtype = matmul_dtype(value(x))
        wide_x = e.cast(x, dtype)

        def product(packed: Sequence[Any]) -> fx.Node:
            weight = unpacked(e, packed[0], packed[1], packed[2], group, dtype)
            return e.cast(e(aten.linear.default, wide_x, weight), torch.float32)

        return e.plus(in_parts(e, [q, scale, zero], int(shape(q)[1]) * 2 * dtype.itemsize, product), bias)

    def embedding(self, e: Emit, weight: WeightFormat, indices: fx.Node, packed: Nodes, dtype: torch.dtype) -> fx.Node:
        return self.matrix(e, weight, [e(aten.index.Tensor, p, [indices]) for p in packed], dtype)

    def matrix(self, e: Emit, weight: WeightFormat, packed: Nodes, dtype: torch.dtype) -> fx.Node:
        assert isinstance(weight, Int4)
        return unpacked(e, packed[0], packed[1], _zero(packed), weight.group_size, dtype)


def _zero(packed: Nodes) -> fx.Node | None:
    return packed[2] if len(packed) > 2 else None


def in_parts(e: Emit, packed: Sequence[Any], row_bytes: int, product: Callable[[Sequence[Any]], fx.Node]) -> fx.Node:
    """``product(packed)``, taken of :data:`PART` bytes of expanded rows at a time where the whole is larger than two of them.

    Args:
        packed: nodes with a row for each output, or None.
        row_bytes: of a row that is expanded.
        product: has the outputs as its last dimension.
    """
    outputs = int(shape(packed[0])[0])
    if outputs * row_bytes <= 2 * PART:
        return product(packed)
    count = -(-outputs * row_bytes // PART)
    step = -(-outputs // (64 * count)) * 64
    parts = []
    for start in range(0, outputs, step):
        end = min(start + step, outputs)
        parts.append(product([p if p is None else e(aten.slice.Tensor, p, 0, start, end) for p in packed]))
    return e(aten.cat.default, parts, -1)


def unpacked(e: Emit, q: fx.Node, scale: fx.Node, zero: fx.Node | None, group: int, dtype: torch.dtype) -> fx.Node:
    """The matrix, or rows of it, as floats.

    The bytes of a group hold its first half low and its second half high, so the halves are joined and not woven. They
    are floats before that: Inductor leaves a concatenation of bytes to a library call.
    """
    packed = e(aten.unflatten.int, q, -1, [int(shape(scale)[-1]), group // 2])
    scales = e(aten.unsqueeze.default, scale, -1)
    halves = []
    for nibble in (e(aten.bitwise_and.Scalar, packed, 15), e(aten.__rshift__.Scalar, packed, 4)):
        wide = e.cast(nibble, torch.float32)
        if zero is None:
            centred = e(aten.sub.Scalar, wide, 8.0)
        else:
            centred = e(aten.sub.Tensor, wide, e(aten.unsqueeze.default, zero, -1))
        halves.append(stored(e.cast(e(aten.mul.Tensor, centred, scales), dtype)))
    return e(aten.flatten.using_ints, e(aten.cat.default, halves, -1), -2, -1)
