"""AWQ: channels with large activations are multiplied before their weights are rounded, by factors that a search finds best."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from accelpass.ir.linear.formats import Grouped
from accelpass.passes.quantization.bases.calibrated import Balanced, InputMoments
from accelpass.passes.quantization.int4_weights import Int4Weights


@dataclass(frozen=True)
class AWQ(Balanced, Int4Weights):
    """Store weights as int4 after their salient input channels were scaled up, and divide the input by the same factors.

    The factors are ``mean|x|^a`` with the a of a grid over [0, 1) that changes the outputs of all linears that read the input least,
    on the data. The authors' code folds the division into the layer before and clips groups, too; here it stays at the input, where
    a compiler fuses it, and nothing is clipped.

    Attributes:
        steps: points of the grid.
        group_size, symmetric, search, scales: see ``int4_weights``; the paper has groups of 128 with a zero point.
    """

    steps: int = 20

    name: ClassVar[str] = "awq"
    summary: ClassVar[str] = "int4 weights, salient channels scaled up by a search on data"
    paper: ClassVar[str] = "Lin et al. 2024, AWQ, arXiv 2306.00978, section 3.2"

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise self.fail("steps", "1 or more")
        super().__post_init__()

    def factors(self, weights: Sequence[Tensor], moments: InputMoments) -> Tensor:
        sizes = (moments.sizes / max(1, moments.rows)).clamp_min(1e-4)
        best, least = torch.ones_like(sizes), torch.tensor(float("inf"))
        for step in range(self.steps):
            factors = sizes.pow(step / self.steps)
            factors = factors / (factors.amax() * factors.amin()).sqrt()
            lost = sum((moments.error(self._rounded(w * factors) / factors - w) for w in weights), torch.zeros(()))
            if lost < least:
                best, least = factors, lost
        return best

    def _rounded(self, w: Tensor) -> Tensor:
        form = self.spec.weight
        assert isinstance(form, Grouped)
        grouped = form.grouped(w)
        grid = self.grid(grouped)
        return form.meant(form.codes(grouped, *grid), *grid).flatten(-2)
