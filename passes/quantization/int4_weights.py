"""int4 weights: groups along the input channels, two weights a byte, activations untouched."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from accelpass.ir.derived import Recipe
from accelpass.ir.graph import call, value
from accelpass.ir.weight_only_ops import int4_embedding, int4_linear, int4_matrix
from accelpass.passes.base import Skip, Take, Verdict
from accelpass.passes.quantization.packing import FORMAT, pack_int4
from accelpass.passes.quantization.weight_only import WeightOnly

GROUP_SIZES = (32, 64, 128)


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


@dataclass(frozen=True)
class Int4Weights(WeightOnly):
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

    def recipe(self, transposed: bool) -> tuple[Recipe, tuple[str, ...]]:
        def pack(w: torch.Tensor) -> tuple[torch.Tensor, ...]:
            return pack_int4(w.transpose(-1, -2).contiguous() if transposed else w, self.group_size, self.symmetric)

        key = ("int4_weights", FORMAT, self.group_size, self.symmetric, transposed)
        return Recipe(key, pack), ("q", "scale") if self.symmetric else ("q", "scale", "zero")

    def fits(self, in_features: int) -> Verdict:
        if in_features % self.group_size:
            said = f"{in_features} input channels are not a multiple of group_size={self.group_size}"
            return Skip(f"{said}; {_fitting(in_features)}")
        return Take()

    def linear(
        self, graph: fx.Graph, like: fx.Node, x: fx.Node, packed: list[fx.Node], bias: fx.Node | None
    ) -> fx.Node:
        q, scale, zero = (*packed, None)[:3]
        return call(graph, like, int4_linear._opoverload, x, q, scale, zero, bias, self.group_size)

    def embedding(self, graph: fx.Graph, like: fx.Node, indices: fx.Node, packed: list[fx.Node]) -> fx.Node:
        q, scale, zero = (*packed, None)[:3]
        dtype = value(like).dtype
        return call(graph, like, int4_embedding._opoverload, indices, q, scale, zero, self.group_size, dtype)

    def matrix(self, graph: fx.Graph, like: fx.Node, packed: list[fx.Node], dtype: torch.dtype) -> fx.Node:
        q, scale, zero = (*packed, None)[:3]
        return call(graph, like, int4_matrix._opoverload, q, scale, zero, self.group_size, dtype)
