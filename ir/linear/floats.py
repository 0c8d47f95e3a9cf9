"""Formats of weights in small floating-point numbers: fp8, and fp4 in blocks with scales of powers of two or of fp8."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

import torch
from torch import Tensor

from accelpass.ir.core.verdict import Skip, Take, Verdict
from accelpass.ir.linear.spec import Packed, WeightFormat

_FP8_MOST = 448.0
_FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""The magnitudes of E2M1, by code."""
_FP4_MOST, _FP4_EXPONENT = 6.0, 2


@dataclass(frozen=True)
class FP8(WeightFormat):
    """``q`` float8_e4m3fn (out, in), ``scale`` float32 (out,): W = q * scale, and the largest magnitude of a row is 448.

    Micikevicius et al. 2022, FP8 Formats for Deep Learning, arXiv 2209.05433, section 3.
    """

    part: ClassVar[str] = "fp8"

    @property
    def operands(self) -> tuple[str, ...]:
        return ("q", "scale")

    def pack(self, w: Tensor) -> tuple[Tensor, ...]:
        scale = w.float().abs().amax(-1) / _FP8_MOST
        q = w.float() / torch.where(scale == 0, 1.0, scale).unsqueeze(-1)  # NaN shows in the scale
        return q.nan_to_num(0.0).clamp(-_FP8_MOST, _FP8_MOST).to(torch.float8_e4m3fn), scale

    def unpack(self, packed: Packed, dtype: torch.dtype) -> Tensor:
        q, scale = packed
        return (q.float() * scale.unsqueeze(-1)).to(dtype)

    def width(self, packed: Packed) -> int:
        return packed[0].shape[-1]


@dataclass(frozen=True)
class _FP4Blocks(WeightFormat):
    """``q`` uint8 (out, in / 2): byte j holds the E2M1 codes of columns 2 j, in its low nibble, and 2 j + 1."""

    block: ClassVar[int]

    def blocks(self, w: Tensor) -> Tensor:
        """W as ``(..., out, blocks, block)`` in float32."""
        return w.float().unflatten(-1, (w.shape[-1] // self.block, self.block))

    def coded(self, blocks: Tensor, scale: Tensor) -> Tensor:
        """``q``, of blocks and what they are to be divided by ``(..., blocks)``."""
        codes = fp4_codes(blocks / torch.where(scale == 0, 1.0, scale).unsqueeze(-1)).flatten(-2)
        return codes[..., ::2] | (codes[..., 1::2] << 4)

    def meant(self, q: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
        whole = q.int()  # shifts of bytes have no right translation to ONNX
        codes = torch.stack([whole % 16, whole // 16], -1).flatten(-2)
        return (self.blocks(fp4_values(codes)) * scale.unsqueeze(-1)).flatten(-2).to(dtype)

    def width(self, packed: Packed) -> int:
        return 2 * packed[0].shape[-1]

    def check(self, in_features: int) -> Verdict:
        if in_features % self.block:
            return Skip(f"{in_features} input channels are not a multiple of the blocks of {self.block} of {self.part}")
        return Take()


@dataclass(frozen=True)
class MXFP4(_FP4Blocks):
    """Blocks of 32 fp4 numbers with one power of two, ``scale`` uint8 (out, in / 32): its exponent plus 127, 255 is NaN.

    The exponent is that of the largest magnitude less 2, fp4's own largest; what is above 6 then is 6. Rouhani et al. 2023,
    Microscaling Data Formats for Deep Learning, arXiv 2310.10537, section 3; OCP MX specification 1.0, section 6.3.
    """

    part: ClassVar[str] = "mxfp4"
    block: ClassVar[int] = 32

    @property
    def operands(self) -> tuple[str, ...]:
        return ("q", "scale")

    def pack(self, w: Tensor) -> tuple[Tensor, ...]:
        blocks = self.blocks(w)
        most = blocks.abs().amax(-1)
        exponent = torch.frexp(most).exponent - 1 - _FP4_EXPONENT  # frexp's mantissa is below 1
        biased = torch.where(most == 0, 0, exponent + 127).clamp(0, 254)
        biased = torch.where(most.isfinite(), biased, 255)
        return self.coded(blocks, _power(biased)), biased.to(torch.uint8)

    def unpack(self, packed: Packed, dtype: torch.dtype) -> Tensor:
        q, scale = packed
        return self.meant(q, _power(scale), dtype)


@dataclass(frozen=True)
class NVFP4(_FP4Blocks):
    """Blocks of 16 fp4 numbers, ``scale`` float8_e4m3fn (out, in / 16), and ``whole`` float32 (out,): W = fp4 * scale * whole.

    NVIDIA's format has one ``whole`` for a matrix; here each row has it, all the same number, so that rows can be cut and joined.
    Abecassis et al. 2025, Pretraining Large Language Models with NVFP4, arXiv 2509.25149, section 2.
    """

    part: ClassVar[str] = "nvfp4"
    block: ClassVar[int] = 16

    @property
    def operands(self) -> tuple[str, ...]:
        return ("q", "scale", "whole")

    def pack(self, w: Tensor) -> tuple[Tensor, ...]:
        blocks = self.blocks(w)
        most = blocks.abs().amax(-1)
        known = most.nan_to_num(0.0, 0.0)  # a damaged block shows in its own scale
        whole = known.amax((-2, -1)) / (_FP4_MOST * _FP8_MOST)
        per_row = whole[..., None].expand(w.shape[:-1]).contiguous()
        wanted = (known / _FP4_MOST / torch.where(per_row == 0, 1.0, per_row).unsqueeze(-1)).clamp_max(_FP8_MOST)
        scale = torch.where(most.isfinite(), wanted, torch.nan).to(torch.float8_e4m3fn)
        return self.coded(blocks, scale.float() * per_row.unsqueeze(-1)), scale, per_row

    def unpack(self, packed: Packed, dtype: torch.dtype) -> Tensor:
        q, scale, whole = packed
        return self.meant(q, scale.float() * whole.unsqueeze(-1), dtype)


def fp4_codes(x: Tensor) -> Tensor:
    """The nearest E2M1 codes, uint8: three bits of magnitude under the sign. Of two as near it is the even one; above 6 is 6."""
    middles = torch.tensor([(a + b) / 2 for a, b in pairwise(_FP4)], device=x.device)
    size = x.abs().nan_to_num(0.0)
    lower, upper = torch.bucketize(size, middles), torch.bucketize(size, middles, right=True)
    magnitude = torch.where(lower % 2 == 0, lower, upper)
    return (magnitude + 8 * (x < 0)).to(torch.uint8)


def fp4_values(codes: Tensor) -> Tensor:
    """The float32 numbers that E2M1 codes stand for."""
    table = torch.tensor([*_FP4, *(-v for v in _FP4)], device=codes.device)
    return table[codes.long()]


def _power(biased: Tensor) -> Tensor:
    """Two to the exponent that an E8M0 number holds."""
    found = torch.exp2(biased.float() - 127)
    return torch.where(biased == 255, torch.nan, found)
