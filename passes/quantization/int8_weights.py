"""int8 weights: one symmetric scale for each output channel, activations untouched."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from accelpass.ir.derived import Recipe
from accelpass.ir.graph import call, value
from accelpass.ir.weight_only_ops import int8_embedding, int8_linear, int8_matrix
from accelpass.passes.base import Take, Verdict
from accelpass.passes.quantization.packing import FORMAT, pack_int8
from accelpass.passes.quantization.weight_only import WeightOnly


@dataclass(frozen=True)
class Int8Weights(WeightOnly):
    """Store the weights of linears, tied embeddings and experts as int8 with a float32 scale for each output row."""

    name: ClassVar[str] = "int8_weights"
    summary: ClassVar[str] = "weights as int8, one scale per output channel"
    paper: ClassVar[str] = "Jacob et al. 2018, arXiv 1712.05877 (per-channel symmetric); weight-only form"

    def recipe(self, transposed: bool) -> tuple[Recipe, tuple[str, ...]]:
        pack = (lambda w: pack_int8(w.transpose(-1, -2).contiguous())) if transposed else pack_int8
        return Recipe(("int8_weights", FORMAT, transposed), pack), ("q", "scale")

    def fits(self, in_features: int) -> Verdict:
        return Take()

    def linear(
        self, graph: fx.Graph, like: fx.Node, x: fx.Node, packed: list[fx.Node], bias: fx.Node | None
    ) -> fx.Node:
        return call(graph, like, int8_linear._opoverload, x, *packed, bias)

    def embedding(self, graph: fx.Graph, like: fx.Node, indices: fx.Node, packed: list[fx.Node]) -> fx.Node:
        return call(graph, like, int8_embedding._opoverload, indices, *packed, value(like).dtype)

    def matrix(self, graph: fx.Graph, like: fx.Node, packed: list[fx.Node], dtype: torch.dtype) -> fx.Node:
        return call(graph, like, int8_matrix._opoverload, *packed, dtype)
