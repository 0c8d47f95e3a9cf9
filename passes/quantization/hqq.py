"""HQQ: int4 weights whose zero points are found by a robust fit of the weight itself; no data are needed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from accelpass.ir.core.derived import Recipe
from accelpass.ir.linear.formats import Int4
from accelpass.ir.torch_private import FakeTensor
from accelpass.passes.core.site_pass import Edits
from accelpass.passes.quantization.bases.weight_only import SharedWeight
from accelpass.passes.quantization.int4_weights import Int4Weights

_LEAST = 5e-5
"""The smallest step of a grid: a group whose numbers are all one is written by its zero point."""


@dataclass(frozen=True)
class HQQ(Int4Weights):
    """Store weights as int4 with zero points that make most of the errors small, and let a few be large.

    Half-quadratic splitting: in turns, the error is shrunk as an lp norm with p below 1 wants it, and the zero point of each group
    is moved to what is left. Scales stay those of the range. Zero points are fractions, which ONNX has no operator for.

    Attributes:
        p: of the norm.
        penalty, growth, steps: weight of the splitting, its growth at each step, and the most steps; a step that does not help is
            the last.
        group_size, scales: see ``int4_weights``; ``symmetric`` and ``search`` are not for this method.
    """

    symmetric: bool = False
    p: float = 0.7
    penalty: float = 10.0
    growth: float = 1.01
    steps: int = 20

    name: ClassVar[str] = "hqq"
    summary: ClassVar[str] = "int4 weights, zero points by a robust fit that needs no data"
    paper: ClassVar[str] = (
        "Badri and Shaji 2023, Half-Quadratic Quantization of Large Machine Learning Models (mobiusml.github.io/hqq_blog)"
    )

    def __post_init__(self) -> None:
        if self.symmetric:
            raise self.fail("symmetric", "False: the method fits zero points")
        if self.search:
            raise self.fail("search", "False: the method has a fit of its own")
        if not 0 < self.p <= 1:
            raise self.fail("p", "a number above 0, up to 1")
        if self.steps < 1:
            raise self.fail("steps", "1 or more")
        super().__post_init__()

    def recipe(self, site: SharedWeight, edit: Edits) -> Recipe:
        plain, fit = super().recipe(site, edit), (self.p, self.penalty, self.growth, self.steps)
        return Recipe((*plain.key, "hqq", *fit), lambda w: self.pack(w.transpose(-1, -2) if site.transposed else w))

    def pack(self, w: Tensor) -> tuple[Tensor, ...]:
        """Codes, scales and zero points of W ``(..., out, in)``."""
        form = self.spec.weight
        assert isinstance(form, Int4)
        grouped = form.grouped(w)
        low, high = grouped.amin(-1), grouped.amax(-1)
        scale = form.held(((high - low) / 15).clamp_min(_LEAST))  # NaN stays
        zero = (-low / scale).round()
        best, penalty = zero, self.penalty
        least, helps = w.new_full((), torch.inf, dtype=torch.float32), w.new_full((), True, dtype=torch.bool)
        for _ in range(self.steps):
            codes = form.codes(grouped, scale, zero)
            error = grouped - form.meant(codes, scale, zero)
            lost = error.abs().mean()
            helps = helps & (lost < least)
            if not isinstance(helps, FakeTensor) and not bool(
                helps
            ):  # of a tensor without values only shapes are asked
                break
            best, least = torch.where(helps, zero, best), torch.where(helps, lost, least)
            sparse = error.sign() * (error.abs() - error.abs().pow(self.p - 1) / penalty).clamp_min(0)
            zero = (codes - (grouped - sparse) / scale.unsqueeze(-1)).mean(-1)
            penalty *= self.growth
        best = form.held(best)
        return form.written(form.codes(grouped, scale, best), scale, best)
