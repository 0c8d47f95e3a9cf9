"""The formats of weights that the library has: int8 with a scale for each row, int4 with a scale for each group."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from accelpass.ir.core.verdict import Skip, Take, Verdict
from accelpass.ir.linear.spec import Packed, WeightFormat

GROUP_SIZES = (32, 64, 128)


@dataclass(frozen=True)
class Int8(WeightFormat):
    """``q`` int8 (out, in), ``scale`` float32 (out,), symmetric: W = q * scale."""

    part: ClassVar[str] = "int8"

    @property
    def operands(self) -> tuple[str, ...]:
        return ("q", "scale")

    def pack(self, w: Tensor) -> tuple[Tensor, ...]:
        w = w.float()
        scale = w.abs().amax(-1) / 127
        # A row of zeros has scale 0; dividing by 1 instead keeps its q at 0. NaN stays NaN in the scale, so that a
        # damaged weight shows in the output and never becomes a plausible number.
        q = (w / torch.where(scale == 0, 1.0, scale).unsqueeze(-1)).round().clamp(-127, 127)
        return q.nan_to_num(0.0).to(torch.int8), scale

    def unpack(self, packed: Packed, dtype: torch.dtype) -> Tensor:
        q, scale = packed
        return (q.float() * scale.unsqueeze(-1)).to(dtype)

    def width(self, packed: Packed) -> int:
        return packed[0].shape[-1]

    def multiply(self, x: Tensor, packed: Packed) -> Tensor:
        q, scale = packed
        if not x.is_floating_point():  # exact, as sums of integers are; float32 is not, from 1041 channels on
            return F.linear(x.double(), q.double()).float() * scale
        return F.linear(x.float(), q.float()) * scale


@dataclass(frozen=True)
class Int4(WeightFormat):
    """``q`` uint8 (out, in / 2), groups of ``group_size`` columns; ``scale`` float32 (out, in / group_size), ``zero`` too.

    Byte j of a group holds the group's column j in its low nibble and column j + group_size / 2 in its high one.
    W = (nibble - zero) * scale. Symmetric: no ``zero``, which is 8 throughout; nibbles less 8 are -8..7, and the scale is
    signed so that the largest magnitude of a group is -8 exactly, and one of the other sign may be clipped to 7.
    Otherwise [min(w, 0), max(w, 0)] is 0..15, with a whole zero point, so that 0.0 stays exact.
    """

    part: ClassVar[str] = "int4"
    group_size: int = 64
    symmetric: bool = True

    @property
    def operands(self) -> tuple[str, ...]:
        return ("q", "scale") if self.symmetric else ("q", "scale", "zero")

    def pack(self, w: Tensor) -> tuple[Tensor, ...]:
        grouped = self.grouped(w)
        scale, zero = self.grid(grouped)
        return self.written(self.codes(grouped, scale, zero), scale, zero)

    def grouped(self, w: Tensor) -> Tensor:
        """W as ``(..., out, groups, group_size)`` in float32."""
        return w.float().unflatten(-1, (w.shape[-1] // self.group_size, self.group_size))

    def grid(self, grouped: Tensor) -> tuple[Tensor, Tensor | None]:
        """Scale and zero point ``(..., groups)`` of groups, whose extremes are the outermost codes."""
        if self.symmetric:
            return grouped.gather(-1, grouped.abs().argmax(-1, keepdim=True)).squeeze(-1) / -8, None
        low, high = grouped.amin(-1).clamp_max(0), grouped.amax(-1).clamp_min(0)
        scale = (high - low) / 15
        return scale, (-low / torch.where(scale == 0, 1.0, scale)).round()

    def codes(self, grouped: Tensor, scale: Tensor, zero: Tensor | None) -> Tensor:
        """The nearest codes, 0 to 15, as floats in the shape of ``grouped``."""
        steps = grouped / torch.where(scale == 0, 1.0, scale).unsqueeze(-1)
        return (steps + (8 if zero is None else zero.unsqueeze(-1))).round().clamp(0, 15)

    def meant(self, codes: Tensor, scale: Tensor, zero: Tensor | None) -> Tensor:
        """The numbers that codes stand for, in their shape."""
        return (codes - (8.0 if zero is None else zero.unsqueeze(-1))) * scale.unsqueeze(-1)

    def written(self, codes: Tensor, scale: Tensor, zero: Tensor | None) -> tuple[Tensor, ...]:
        """The operands, from codes ``(..., out, groups, group_size)``."""
        low_half, high_half = codes.nan_to_num(0.0).to(torch.uint8).chunk(2, -1)
        q = (low_half | (high_half << 4)).flatten(-2)
        return (q, scale) if zero is None else (q, scale, zero)

    def unpack(self, packed: Packed, dtype: torch.dtype) -> Tensor:
        q, scale, zero = (*packed, None)[:3]
        assert q is not None and scale is not None
        groups = scale.shape[-1]
        stored = q.reshape(*q.shape[:-1], groups, self.group_size // 2)
        nibbles = torch.cat([stored & 15, stored >> 4], -1).float()
        return self.meant(nibbles, scale, zero).reshape(*q.shape[:-1], groups * self.group_size).to(dtype)

    def width(self, packed: Packed) -> int:
        return 2 * packed[0].shape[-1]

    def check(self, in_features: int) -> Verdict:
        if in_features % self.group_size:
            said = f"{in_features} input channels are not a multiple of group_size={self.group_size}"
            return Skip(f"{said}; {_fitting(in_features)}")
        return Take()


def _fitting(in_features: int) -> str:
    """Which group sizes would divide a width, of those that there are kernels for or else of all that pay."""
    fitting = [g for g in GROUP_SIZES if in_features % g == 0]
    if fitting:
        return f"group_size={fitting[-1]} would fit"
    others = [str(g) for g in range(8, GROUP_SIZES[-1] + 1, 8) if in_features % g == 0]
    known = f"groups are of {GROUP_SIZES[0]}, {GROUP_SIZES[1]} or {GROUP_SIZES[2]}"
    if not others:
        return f"{known}; int8_weights takes any width"
    named = " and ".join(filter(None, (", ".join(others[:-1]), others[-1])))
    return f"{named} {'divide' if len(others) > 1 else 'divides'} it, but {known}; int8_weights takes any width"
