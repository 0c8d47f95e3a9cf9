"""int4 weights: groups along the input channels, two weights a byte, activations untouched."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from accelpass.ir.linear.formats import GROUP_SIZES, Int4
from accelpass.ir.linear.spec import LinearSpec
from accelpass.passes.quantization.weight_only import NearestWeights


@dataclass(frozen=True)
class Int4Weights(NearestWeights):
    """Store the weights of linears, tied embeddings and experts as int4 with a float32 scale for each group.

    Attributes:
        group_size: input channels that share a scale: 32, 64 or 128.
        symmetric: no zero point; False adds an integer zero point for each group (kept as float32).
    """

    group_size: int = 64
    symmetric: bool = True

    name: ClassVar[str] = "int4_weights"
    summary: ClassVar[str] = "weights as int4 in groups, two per byte"
    paper: ClassVar[str] = "round to nearest with group scales, as the baseline of GPTQ, arXiv 2210.17323, section 5"
    reads: ClassVar[frozenset[str]] = frozenset({"linear.weight"})

    def __post_init__(self) -> None:
        if self.group_size not in GROUP_SIZES:
            raise self.fail("group_size", "32, 64 or 128")
        super().__post_init__()

    @property
    def spec(self) -> LinearSpec:
        return LinearSpec(Int4(self.group_size, self.symmetric))
