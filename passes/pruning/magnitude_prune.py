"""Channels and heads whose weights are small are taken out (Li et al., arXiv 1608.08710)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, fx

from accelpass.ir.core.derived import Recipe
from accelpass.ir.core.program import Program
from accelpass.ir.transform.changed_axes import Carrier
from accelpass.passes.core.base import Skip
from accelpass.passes.pruning.structured import Site, StructuredPruning


@dataclass(frozen=True)
class MagnitudePrune(StructuredPruning):
    """Take out the channels of MLPs and the heads of attentions whose weights are smallest.

    After Li et al., "Pruning Filters for Efficient ConvNets", section 3.1: a filter is scored by the sum of its absolute weights.
    Here a channel's weights are its rows of the linears that make it, biases included, and its column of the one that reads it
    (inferred); a head's are those of its queries, keys, values and outputs. It needs no data, and is the baseline of its family.
    """

    name: ClassVar[str] = "magnitude_prune"
    summary: ClassVar[str] = "channels of MLPs and heads with small weights are taken out"
    paper: ClassVar[str] = "Pruning Filters for Efficient ConvNets, arXiv 1608.08710"

    def score(self, site: Site, found: Sequence[Carrier], program: Program) -> tuple[Recipe, Sequence[fx.Node]] | Skip:
        def sums(*weights: Tensor) -> tuple[Tensor]:
            of = (c.rows(w.float()).abs().sum(1) for c, w in zip(found, weights, strict=True))
            return (torch.stack([*of]).sum(0),)

        key = ("magnitude", *((c.dim, c.leaves) for c in found))
        return Recipe(key, sums), [c.weight for c in found]
