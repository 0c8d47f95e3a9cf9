"""Formats of whole rows: weights in few bits with one scale for each output, and inputs in few bits with one for each token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from accelpass.ir.core.verdict import Skip, Take, Verdict
from accelpass.ir.linear.formats import Grouped, Int2, Int3, Int4, Int6, Int8Groups
from accelpass.ir.linear.spec import ActivationFormat, Packed, WeightFormat

ROW_BITS: dict[int, type[Grouped]] = {2: Int2, 3: Int3, 4: Int4, 6: Int6, 8: Int8Groups}


@dataclass(frozen=True)
class IntRows(WeightFormat):
    """A row is one group of the format with so many bits: ``scale``, and ``zero`` where it is not symmetric, float32 (out, 1)."""

    part: ClassVar[str] = "int_rows"
    bits: int = 8
    symmetric: bool = False

    @property
    def operands(self) -> tuple[str, ...]:
        return ("q", "scale") if self.symmetric else ("q", "scale", "zero")

    def of(self, width: int) -> Grouped:
        """The same for rows of a width."""
        return ROW_BITS[self.bits](width, self.symmetric)

    def pack(self, w: Tensor) -> tuple[Tensor, ...]:
        return self.of(w.shape[-1]).pack(w)

    def unpack(self, packed: Packed, dtype: torch.dtype) -> Tensor:
        return self.of(self.width(packed)).unpack(packed, dtype)

    def width(self, packed: Packed) -> int:
        return packed[0].shape[-1] * 8 // self.bits

    def check(self, in_features: int) -> Verdict:
        if self.bits < 8 and in_features % 8:
            return Skip(f"{in_features} input channels are not a multiple of 8, which rows of {self.bits} bits need")
        return Take()


@dataclass(frozen=True)
class IntPerToken(ActivationFormat):
    """x = codes * scale, symmetric: the largest magnitude of each row is the largest code, ``2 ** (bits - 1) - 1``."""

    part: ClassVar[str] = "int_per_token"
    bits: int = 8

    def encode(self, x: Tensor, *operands: Tensor) -> tuple[Tensor, Tensor]:
        most = 2 ** (self.bits - 1) - 1
        scale = x.abs().amax(-1, keepdim=True) / most
        codes = (x / torch.where(scale == 0, 1.0, scale)).round().clamp(-most, most).nan_to_num(0.0)
        return codes.to(torch.int8), scale
