"""The formats of weights as functions of plain tensors, for tests that compare with them."""

from __future__ import annotations

import torch
from torch import Tensor

from accelpass.ir.linear.formats import Int4, Int8

pack_int8 = Int8().pack


def pack_int4(w: Tensor, group_size: int, symmetric: bool) -> tuple[Tensor, ...]:
    return Int4(group_size, symmetric).pack(w)


def dequantize_int8(q: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    return Int8().unpack((q, scale), dtype)


def dequantize_int4(q: Tensor, scale: Tensor, zero: Tensor | None, group_size: int, dtype: torch.dtype) -> Tensor:
    packed = (q, scale) if zero is None else (q, scale, zero)
    return Int4(group_size, zero is None).unpack(packed, dtype)
