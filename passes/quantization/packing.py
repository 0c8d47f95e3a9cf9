"""How float weights become int8 or int4. The packed forms are described in ``accelpass.ir.weight_only_ops``."""

from __future__ import annotations

import torch
from torch import Tensor

FORMAT = 1
"""Part of every recipe's key: raise it when a packed form changes."""


def pack_int8(w: Tensor) -> tuple[Tensor, Tensor]:
    """Symmetric, one scale for each output row: q int8 (..., out, in), scale float32 (..., out)."""
    w = w.float()
    scale = w.abs().amax(-1) / 127
    # A row of zeros has scale 0; dividing by 1 instead keeps its q at 0. NaN stays NaN in the scale, so that a
    # damaged weight shows in the output and never becomes a plausible number.
    q = (w / torch.where(scale == 0, 1.0, scale).unsqueeze(-1)).round().clamp(-127, 127)
    return q.nan_to_num(0.0).to(torch.int8), scale


def pack_int4(w: Tensor, group_size: int, symmetric: bool) -> tuple[Tensor, ...]:
    """Group-wise along the input: q uint8 (..., out, in / 2), scale and (if asymmetric) zero (..., out, groups).

    Symmetric uses -8..7 with the largest magnitude at -8 or +8 clipped to 7, whichever side it is on: the scale is
    signed so that the extreme value maps to -8 exactly. Asymmetric maps [min(w, 0), max(w, 0)] to 0..15 with an integer
    zero point, so that 0.0 stays exact.
    """
    w = w.float()
    grouped = w.reshape(*w.shape[:-1], w.shape[-1] // group_size, group_size)
    if symmetric:
        extreme = grouped.gather(-1, grouped.abs().argmax(-1, keepdim=True)).squeeze(-1)
        scale = extreme / -8
        zero = None
        steps = grouped / torch.where(scale == 0, 1.0, scale).unsqueeze(-1) + 8
    else:
        low, high = grouped.amin(-1).clamp_max(0), grouped.amax(-1).clamp_min(0)
        scale = (high - low) / 15
        safe = torch.where(scale == 0, 1.0, scale)
        zero = (-low / safe).round()
        steps = grouped / safe.unsqueeze(-1) + zero.unsqueeze(-1)
    nibbles = steps.round().clamp(0, 15).nan_to_num(0.0).to(torch.uint8)
    low_half, high_half = nibbles.chunk(2, -1)
    q = (low_half | (high_half << 4)).reshape(*w.shape[:-1], w.shape[-1] // 2)
    return (q, scale) if zero is None else (q, scale, zero)
