"""Multiplicative Gaussian masks of channels, heads, layers and the stream's width: their loss, which of them are kept, and how large the model is expected to be."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

EPS = 1e-8
STEEPNESS = 10.0
"""Of the sigmoid that counts what is expected to stay."""


def log_alpha(mean: Tensor, log_variance: Tensor) -> Tensor:
    """Noise against mean of each mask, in logarithms; a unit is kept where it is below 0."""
    return log_variance - torch.log(mean.square() + EPS)


def divergence(mean: Tensor, log_variance: Tensor) -> Tensor:
    """``0.5 sum log(1 + mean^2 / variance)``, from the variational prior."""
    return 0.5 * torch.log1p(mean.square() / (log_variance.exp() + EPS)).sum()


@dataclass(eq=False)
class Masks:
    """The masks of one site.

    Attributes:
        width: how many channels of the tapped value a unit has.
        weights: of the model, for each unit that stays; 0 where other masks count them.
        multiplier: of the divergence in the loss.
        beside: other masks that the same weights go with: those of the layer, and of the stream's width.
    """

    mean: Tensor
    log_variance: Tensor
    width: int
    weights: int
    multiplier: float
    beside: tuple[Masks, ...] = ()

    @classmethod
    def fresh(cls, units: int, width: int, weights: int, multiplier: float, draw: torch.Generator) -> Masks:
        """Means near 1, and next to no noise: ``N(1, 0.01)`` and ``N(-9, 0.01)``, the second a standard deviation (inferred)."""
        mean, log_variance = (at + 0.01 * torch.randn(units, generator=draw) for at in (1.0, -9.0))
        return cls(mean.requires_grad_(), log_variance.requires_grad_(), width, weights, multiplier)

    def soft(self) -> Tensor:
        """How many units are expected to stay."""
        return torch.sigmoid(-STEEPNESS * log_alpha(self.mean, self.log_variance)).sum()

    def share(self) -> Tensor:
        """Of its units, what is expected to stay."""
        return self.soft() / len(self.mean)

    def remaining(self) -> Tensor:
        """How many weights are expected to stay."""
        return self.soft() * self.weights * math.prod(other.share() for other in self.beside)

    def vectors(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation for each channel of the tapped value."""
        each = (self.mean, torch.exp(self.log_variance / 2))
        mean, deviation = (v.repeat_interleave(self.width) for v in each)
        return mean, deviation


def masked(x: Tensor, *vectors: Tensor, widths: Sequence[int]) -> Tensor:
    """``x * (mean + noise * deviation)`` for each pair of vectors, a draw for each row and unit."""
    for mean, deviation, width in zip(vectors[::2], vectors[1::2], widths, strict=True):
        noise = torch.randn_like(x[..., ::width]).repeat_interleave(width, -1)
        x = x * (mean + noise * deviation)
    return x


def sparsity(masks: Mapping[str, Masks]) -> Tensor:
    """Share of the weights that are expected to go."""
    remaining = torch.stack([m.remaining() for m in masks.values()]).sum()
    return 1 - remaining / sum(m.weights * len(m.mean) for m in masks.values())
