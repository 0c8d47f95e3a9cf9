"""The small models of the zoo, for tests, and how far an output is from the wanted one."""

from __future__ import annotations

import torch
from torch import Tensor

from accelpass.models_zoo.small import Mlp, TinyLm

__all__ = ["Mlp", "TinyLm", "relative_error", "tiny_lm"]


def tiny_lm(seed: int = 0) -> TinyLm:
    """Seeds what the test draws afterwards, too."""
    torch.manual_seed(seed)
    return TinyLm().eval()


def relative_error(got: Tensor, want: Tensor) -> float:
    """Largest difference over the largest wanted magnitude."""
    return float((got.float() - want.float()).abs().max() / want.float().abs().max())
