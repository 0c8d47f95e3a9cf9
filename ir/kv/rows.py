"""Rows of keys or values in few bits: asymmetric, per row and group of channels, packed without a wasted bit.

A row of ``d`` codes of 8, 4 or 2 bits takes ``d * bits / 8`` bytes: byte ``j`` of ``m`` holds the codes of channels ``j``, ``j + m``,
``j + 2m``, ... from its low bits up, so that unpacking is a shift over contiguous channels. 3 bits are a 2-bit row of the
low bits followed by a 1-bit row of the high ones.
"""

from __future__ import annotations

import torch
from torch import Tensor

BITS = (2, 3, 4, 8)
PARTS = {8: (8,), 4: (4,), 3: (2, 1), 2: (2,), 1: (1,)}


def row_bytes(width: int, bits: int) -> int:
    """Bytes of one packed row of ``width`` channels."""
    return width * bits // 8


def quantize_rows(x: Tensor, bits: int, group: int) -> tuple[Tensor, Tensor, Tensor]:
    """Round each row of ``x`` to ``2 ** bits`` steps between the smallest and largest value of each group of channels.

    Args:
        x: ``(..., d)``; ``d`` divisible by 8 and by ``group``.

    Returns:
        Packed codes ``(..., d * bits / 8)`` uint8, and step and lowest value ``(..., d / group)`` float16;
        ``x`` is about ``code * step + low``.
    """
    grouped = x.float().unflatten(-1, (-1, group))
    # Both are rounded before they are used, so that codes are the best for what is stored.
    low = to_half_precision(grouped.amin(-1))
    step = to_half_precision((grouped.amax(-1) - low) / (2**bits - 1))
    codes = ((grouped - low.unsqueeze(-1)) / step.clamp_min(1e-8).unsqueeze(-1)).round().clamp(0, 2**bits - 1)
    return pack(codes.flatten(-2).to(torch.uint8), bits), step.half(), low.half()


def to_half_precision(x: Tensor) -> Tensor:
    """``x`` (float32) rounded to float16's 11 bits (Veltkamp's splitting). A compiler that fuses drops a cast and its return.

    The bound on the product changes no number: one that contracts would round it and the differences as one, to ``x`` itself, in
    some loops and not in others, so that rows would depend on how many come in a call.
    """
    wide = (x * 8193.0).clamp(-(2.0**30), 2.0**30)
    normal = (wide - (wide - x)).clamp(-65504.0, 65504.0)
    # Below 2^-14 a float16 has steps of 2^-24, as a float32 has between 0.5 and 1.
    return torch.where(x.abs() < 2**-14, (x + 0.75) - 0.75, normal)


def dequantize_rows(packed: Tensor, step: Tensor, low: Tensor, bits: int, group: int) -> Tensor:
    """The rows ``(..., d)`` in float32."""
    codes = unpack(packed, bits).float().unflatten(-1, (-1, group))
    return (codes * step.float().unsqueeze(-1) + low.float().unsqueeze(-1)).flatten(-2)


def pack(codes: Tensor, bits: int) -> Tensor:
    """Packed rows of codes ``(..., d)`` uint8."""
    parts, shift = [], 0
    for width in PARTS[bits]:
        part = (codes >> shift) & (2**width - 1)
        pieces = part.chunk(8 // width, -1)
        byte = pieces[0]
        for i, piece in enumerate(pieces[1:], 1):
            byte = byte | (piece << (i * width))
        parts.append(byte)
        shift += width
    return parts[0] if len(parts) == 1 else torch.cat(parts, -1)


def unpack(packed: Tensor, bits: int) -> Tensor:
    """Codes ``(..., d)`` uint8 of packed rows."""
    width_all = packed.shape[-1] * 8 // bits
    codes, start, shift = None, 0, 0
    for width in PARTS[bits]:
        size = width_all * width // 8
        part = packed[..., start : start + size]
        planes = torch.cat([(part >> (i * width)) & (2**width - 1) for i in range(8 // width)], -1)
        codes = planes if codes is None else codes | (planes << shift)
        start, shift = start + size, shift + width
    assert codes is not None
    return codes
