"""Formats of weights in whole numbers: int8 with a scale for each row, two to eight bits with a scale for each group."""

from __future__ import annotations

from abc import abstractmethod
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
class Grouped(WeightFormat):
    """Codes of a few bits, 0 to ``2 ** bits - 1``, and a scale for each group of ``group_size`` columns; maybe a zero point.

    ``scale`` and ``zero`` are float32 ``(out, in / group_size)``. W = (code - zero) * scale. Symmetric: no ``zero``, which is
    half the range throughout; the scale is signed so that the largest magnitude of a group is the lowest code exactly, and one
    of the other sign may be clipped. Otherwise [min(w, 0), max(w, 0)] is the whole range, with a whole zero point, so that 0.0
    stays exact.
    """

    bits: ClassVar[int]
    group_size: int = 64
    symmetric: bool = True

    @property
    def operands(self) -> tuple[str, ...]:
        return ("q", "scale") if self.symmetric else ("q", "scale", "zero")

    @property
    def most(self) -> int:
        """The largest code."""
        return 2**self.bits - 1

    @property
    def middle(self) -> int:
        """The code of 0 where there are no zero points."""
        return 2 ** (self.bits - 1)

    @abstractmethod
    def stored(self, codes: Tensor) -> Tensor:
        """Codes ``(..., groups, group_size)``, uint8, as bytes ``(..., groups, bytes)``."""

    @abstractmethod
    def read(self, stored: Tensor) -> Tensor:
        """The inverse of :meth:`stored`."""

    def pack(self, w: Tensor) -> tuple[Tensor, ...]:
        grouped = self.grouped(w)
        scale, zero = self.grid(grouped)
        return self.written(self.codes(grouped, scale, zero), scale, zero)

    def grouped(self, w: Tensor) -> Tensor:
        """W as ``(..., out, groups, group_size)`` in float32."""
        return w.float().unflatten(-1, (w.shape[-1] // self.group_size, self.group_size))

    def held(self, numbers: Tensor) -> Tensor:
        """Scales or zero points as they will be stored, in float32: codes are found for these."""
        return numbers

    def grid(self, grouped: Tensor) -> tuple[Tensor, Tensor | None]:
        """Scale and zero point ``(..., groups)`` of groups, whose extremes are the outermost codes."""
        if self.symmetric:
            extreme = grouped.gather(-1, grouped.abs().argmax(-1, keepdim=True)).squeeze(-1)
            return self.held(extreme / -self.middle), None
        low, high = grouped.amin(-1).clamp_max(0), grouped.amax(-1).clamp_min(0)
        scale = self.held((high - low) / self.most)
        return scale, (-low / torch.where(scale == 0, 1.0, scale)).round()

    def codes(self, grouped: Tensor, scale: Tensor, zero: Tensor | None) -> Tensor:
        """The nearest codes, as floats in the shape of ``grouped``."""
        steps = grouped / torch.where(scale == 0, 1.0, scale).unsqueeze(-1)
        return (steps + (self.middle if zero is None else zero.unsqueeze(-1))).round().clamp(0, self.most)

    def meant(self, codes: Tensor, scale: Tensor, zero: Tensor | None) -> Tensor:
        """The numbers that codes stand for, in their shape."""
        return (codes - (float(self.middle) if zero is None else zero.unsqueeze(-1))) * scale.unsqueeze(-1)

    def written(self, codes: Tensor, scale: Tensor, zero: Tensor | None) -> tuple[Tensor, ...]:
        """The operands, from codes ``(..., out, groups, group_size)``."""
        q = self.stored(codes.nan_to_num(0.0).to(torch.uint8)).flatten(-2)
        return (q, scale) if zero is None else (q, scale, zero)

    def unpack(self, packed: Packed, dtype: torch.dtype) -> Tensor:
        q, scale, zero = (*packed, None)[:3]
        assert q is not None and scale is not None
        groups = scale.shape[-1]
        codes = self.read(q.reshape(*q.shape[:-1], groups, self.group_size * self.bits // 8)).float()
        made = self.meant(codes, scale.float(), None if zero is None else zero.float())
        return made.reshape(*q.shape[:-1], groups * self.group_size).to(dtype)

    def width(self, packed: Packed) -> int:
        return packed[0].shape[-1] * 8 // self.bits

    def check(self, in_features: int) -> Verdict:
        return whole_groups(in_features, self.group_size)


@dataclass(frozen=True)
class Int4(Grouped):
    """``q`` uint8 (out, in / 2): byte j of a group holds its column j in the low nibble, column j + group_size / 2 in the high one.

    Symmetric codes less 8 are -8..7.
    """

    part: ClassVar[str] = "int4"
    bits: ClassVar[int] = 4

    def stored(self, codes: Tensor) -> Tensor:
        low_half, high_half = codes.chunk(2, -1)
        return low_half | (high_half << 4)

    def read(self, stored: Tensor) -> Tensor:
        return torch.cat([stored & 15, stored >> 4], -1)


@dataclass(frozen=True)
class Int4Half(Int4):
    """:class:`Int4` with scales and zero points in float16: half a bit or a bit less for each weight in groups of 32."""

    part: ClassVar[str] = "int4_half"

    def held(self, numbers: Tensor) -> Tensor:
        return numbers.half().float()

    def written(self, codes: Tensor, scale: Tensor, zero: Tensor | None) -> tuple[Tensor, ...]:
        q, *numbers = super().written(codes, scale, zero)
        return (q, *(t.half() for t in numbers))


@dataclass(frozen=True)
class BitPlanes(Grouped):
    """``q`` uint8 (out, in * bits / 8): of a group the lowest bits of all columns, then the next ones, up to the highest.

    Bit i of byte j of a plane is column 8 j + i.
    """

    def stored(self, codes: Tensor) -> Tensor:
        columns = codes.unflatten(-1, (self.group_size // 8, 8))
        places = torch.arange(8, dtype=torch.uint8, device=codes.device)
        planes = [(((columns >> bit) & 1) << places).sum(-1, dtype=torch.uint8) for bit in range(self.bits)]
        return torch.cat(planes, -1)

    def read(self, stored: Tensor) -> Tensor:
        places = 2 ** torch.arange(8, dtype=torch.int32, device=stored.device)
        bits = stored.int().unsqueeze(-1) // places % 2  # shifts of bytes have no right translation to ONNX
        first, *others = bits.flatten(-2).chunk(self.bits, -1)
        for bit, plane in enumerate(others, 1):
            first = first + 2**bit * plane
        return first


@dataclass(frozen=True)
class Int2(BitPlanes):
    """Symmetric codes less 2 are -2..1."""

    part: ClassVar[str] = "int2"
    bits: ClassVar[int] = 2


@dataclass(frozen=True)
class Int3(BitPlanes):
    """Symmetric codes less 4 are -4..3."""

    part: ClassVar[str] = "int3"
    bits: ClassVar[int] = 3


@dataclass(frozen=True)
class Int6(BitPlanes):
    """Symmetric codes less 32 are -32..31."""

    part: ClassVar[str] = "int6"
    bits: ClassVar[int] = 6


@dataclass(frozen=True)
class Int8Groups(Grouped):
    """``q`` uint8 (out, in), a byte a code, with a scale for each group; symmetric codes less 128 are -128..127.

    :class:`Int8`, with a scale for each row, is what there are kernels for.
    """

    part: ClassVar[str] = "int8_groups"
    bits: ClassVar[int] = 8

    def stored(self, codes: Tensor) -> Tensor:
        return codes

    def read(self, stored: Tensor) -> Tensor:
        return stored


def whole_groups(in_features: int, group_size: int) -> Verdict:
    """Whether a width is a number of groups."""
    if in_features % group_size:
        said = f"{in_features} input channels are not a multiple of group_size={group_size}"
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
