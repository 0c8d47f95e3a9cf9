"""int8 weights and int8 activations, products in integers: each token is rounded by a scale of its own, found as it comes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from accelpass.ir.linear.formats import Int8
from accelpass.ir.linear.spec import ActivationFormat, LinearSpec
from accelpass.passes.quantization.bases.weight_only import WeightOnly


@dataclass(frozen=True)
class Int8PerToken(ActivationFormat):
    """x = codes * scale, symmetric: the largest magnitude of each row is 127."""

    part: ClassVar[str] = "int8_per_token"

    def encode(self, x: Tensor, *operands: Tensor) -> tuple[Tensor, Tensor]:
        scale = x.abs().amax(-1, keepdim=True) / 127
        # A row of zeros has scale 0, and NaN or infinity stay in the scale: the row's results show them.
        codes = (x / torch.where(scale == 0, 1.0, scale)).round().clamp(-127, 127).nan_to_num(0.0)
        return codes.to(torch.int8), scale


@dataclass(frozen=True)
class Int8Dynamic(WeightOnly):
    """Multiply int8 weights with activations rounded to int8, one scale for each output row and one for each token.

    Sums of products are exact integers, which a CPU with instructions for eight bits (AVX512-VNNI, AMX) adds several times
    faster than floats: it is for prompts and encoders, whose time is multiplication. A single token takes what int8_weights
    takes. Outlier channels of an activation make the steps of all others coarse (LLM.int8, arXiv 2208.07339, section 3): leave
    the layers that have them out with ``exclude``.
    """

    name: ClassVar[str] = "int8_dynamic"
    summary: ClassVar[str] = "int8 weights times activations rounded to int8 token by token"
    paper: ClassVar[str] = (
        "Yao et al. 2022, ZeroQuant, arXiv 2206.01861, section 4.1 (token-wise activations); "
        "Jacob et al. 2018, arXiv 1712.05877, section 2 (integer products)"
    )

    @property
    def spec(self) -> LinearSpec:
        return LinearSpec(Int8(), Int8PerToken())
