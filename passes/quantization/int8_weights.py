"""int8 weights: one symmetric scale for each output channel, activations untouched."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from accelpass.ir.linear.formats import Int8
from accelpass.ir.linear.spec import LinearSpec
from accelpass.passes.quantization.bases.weight_only import NearestWeights


@dataclass(frozen=True)
class Int8Weights(NearestWeights):
    """Store the weights of linears, tied embeddings and experts as int8 with a float32 scale for each output row."""

    name: ClassVar[str] = "int8_weights"
    summary: ClassVar[str] = "weights as int8, one scale per output channel"
    paper: ClassVar[str] = "Jacob et al. 2018, arXiv 1712.05877 (per-channel symmetric); weight-only form"

    @property
    def spec(self) -> LinearSpec:
        return LinearSpec(Int8())
