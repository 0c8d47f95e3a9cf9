"""The 2:4 format: of every four weights in a row two are stored, and where they stand."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from accelpass.ir.core.verdict import Skip, Take, Verdict
from accelpass.ir.linear.spec import Packed, WeightFormat


@dataclass(frozen=True)
class TwoOfFour(WeightFormat):
    """``values`` (out, in / 2) in the weight's own dtype, ``places`` uint8 (out, in / 8): the columns of two groups of four a byte.

    Bits 0 and 1 of a byte are where the first value of its first group stands, 0 to 3; bits 6 and 7 where the second of its second
    does. Places of a group ascend. Mishra et al. 2021, Accelerating Sparse Deep Neural Networks, arXiv 2104.08378, section 3.
    """

    part: ClassVar[str] = "two_of_four"

    @property
    def operands(self) -> tuple[str, ...]:
        return ("values", "places")

    def pack(self, w: Tensor) -> tuple[Tensor, ...]:
        return self.chosen(w, w.float().abs())

    def chosen(self, w: Tensor, scores: Tensor) -> tuple[Tensor, ...]:
        """Keeps the two of each four that score highest, of equal ones the first."""
        groups, of = (t.unflatten(-1, (-1, 4)) for t in (w, scores))
        places = of.argsort(dim=-1, descending=True, stable=True)[..., :2].sort(dim=-1).values
        values = groups.gather(-1, places).flatten(-2)
        digits = places.flatten(-2).unflatten(-1, (-1, 4))
        base = torch.tensor([1, 4, 16, 64], device=w.device)
        return values.contiguous(), (digits * base).sum(-1).to(torch.uint8)

    def unpack(self, packed: Packed, dtype: torch.dtype) -> Tensor:
        values, places = packed
        base = torch.tensor([1, 4, 16, 64], device=places.device, dtype=torch.int32)
        digits = places.int().unsqueeze(-1) // base % 4  # shifts of bytes have no right translation to ONNX
        at = digits.flatten(-2).unflatten(-1, (-1, 2, 1))
        here = at == torch.arange(4, device=places.device, dtype=torch.int32)
        each = values.to(dtype).unflatten(-1, (-1, 2, 1))
        return torch.where(here, each, each.new_zeros(())).sum(-2).flatten(-2)

    def width(self, packed: Packed) -> int:
        return packed[0].shape[-1] * 2

    def check(self, in_features: int) -> Verdict:
        return Skip(f"{in_features} input channels are not a multiple of 8") if in_features % 8 else Take()
