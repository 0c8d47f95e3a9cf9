"""Weights in a number format of the user's choice: int3, fp8, or fp4 in blocks as the MX and NV formats have it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from accelpass.ir.linear.floats import FP8, MXFP4, NVFP4
from accelpass.ir.linear.formats import GROUP_SIZES, Int3, Int4, Int8
from accelpass.ir.linear.spec import LinearSpec, WeightFormat
from accelpass.passes.quantization.bases.weight_only import NearestWeights

FORMATS = ("int8", "int4", "int3", "fp8", "mxfp4", "nvfp4")


def format_named(name: str, group_size: int) -> WeightFormat:
    """One of :data:`FORMATS`; ``group_size`` is that of ``int4`` and ``int3``."""
    grouped: dict[str, WeightFormat] = {"int4": Int4(group_size), "int3": Int3(group_size)}
    plain: dict[str, WeightFormat] = {"int8": Int8(), "fp8": FP8(), "mxfp4": MXFP4(), "nvfp4": NVFP4()}
    return (grouped | plain)[name]


def bits_of(form: WeightFormat, weight: Tensor) -> float:
    """Bits that a weight ``(out, in)`` takes in a format, scales counted."""
    with torch.device("meta"):
        packed = form.pack(torch.empty(weight.shape))
    return 8.0 * sum(p.numel() * p.element_size() for p in packed)


@dataclass(frozen=True)
class WeightFormatPass(NearestWeights):
    """Store the weights of linears, tied embeddings and experts in a number format, rounded to the nearest.

    It is for bytes, and for the numbers that a chip with such formats would compute with: here a weight is unpacked where it is
    multiplied, which costs time (``int8_weights`` and ``int4_weights`` have kernels that read the packed form).

    Attributes:
        format: ``int3`` (3.5 bits a weight at group_size=64), ``fp8`` (8 bits), ``mxfp4`` (4.25), ``nvfp4`` (4.5), or what
            ``int4_weights`` and ``int8_weights`` have.
        group_size: of ``int3`` and ``int4``: input channels that share a scale: 32, 64 or 128.
    """

    format: str = "mxfp4"
    group_size: int = 64

    name: ClassVar[str] = "weight_format"
    summary: ClassVar[str] = "weights as int3, fp8, mxfp4 or nvfp4"
    paper: ClassVar[str] = (
        "Rouhani et al. 2023, Microscaling Data Formats, arXiv 2310.10537 (mxfp4); Abecassis et al. 2025, arXiv 2509.25149 "
        "(nvfp4); Micikevicius et al. 2022, arXiv 2209.05433 (fp8)"
    )

    def __post_init__(self) -> None:
        if self.format not in FORMATS:
            raise self.fail("format", ", ".join(FORMATS))
        if self.group_size not in GROUP_SIZES:
            raise self.fail("group_size", "32, 64 or 128")
        super().__post_init__()

    @property
    def spec(self) -> LinearSpec:
        return LinearSpec(format_named(self.format, self.group_size))
