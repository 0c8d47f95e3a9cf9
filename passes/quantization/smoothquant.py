"""SmoothQuant: outlier channels of activations are made smaller, and the weights that read them larger, before both are int8."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from accelpass.ir.linear.formats import Int8
from accelpass.ir.linear.spec import LinearSpec
from accelpass.passes.quantization.bases.calibrated import Balanced, InputMoments
from accelpass.passes.quantization.int8_dynamic import Int8Dynamic, Int8PerToken


@dataclass(frozen=True)
class SmoothQuant(Balanced, Int8Dynamic):
    """Multiply int8 weights with int8 activations whose channels were balanced: divided by ``max|x|^strength / max|w|^(1 - strength)``.

    Activations are rounded token by token, as in the paper's setting O1; factors are applied where the input is read, so that no
    weight of another layer changes.

    Attributes:
        strength: how much of the difficulty moves into the weights, 0 to 1; 0.5 shares it evenly.
    """

    strength: float = 0.5

    name: ClassVar[str] = "smoothquant"
    summary: ClassVar[str] = "int8 weights times int8 activations, outlier channels balanced between the two"
    paper: ClassVar[str] = "Xiao et al. 2023, SmoothQuant, arXiv 2211.10438, equation 4 and section 4.2"

    def __post_init__(self) -> None:
        if not 0 <= self.strength <= 1:
            raise self.fail("strength", "0 to 1")
        super().__post_init__()

    @property
    def spec(self) -> LinearSpec:
        return LinearSpec(Int8(), Int8PerToken())

    def factors(self, weights: Sequence[Tensor], moments: InputMoments) -> Tensor:
        peaks = torch.stack([w.abs().amax(0) for w in weights]).amax(0)
        found = moments.peaks.pow(self.strength) / peaks.clamp_min(1e-5).pow(1 - self.strength)
        return torch.where(moments.peaks == 0, 1.0, found).clamp_min(1e-5)  # a channel that is never used
