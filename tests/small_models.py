"""Models small enough to compile in a test, with what real ones have: tied weights, shared inputs, norms, biases."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Mlp(nn.Module):
    """Two linears that read one input, a bias, a residual."""

    def __init__(self, width: int = 64, hidden: int = 96):
        super().__init__()
        self.gate_proj = nn.Linear(width, hidden, bias=False)
        self.up_proj = nn.Linear(width, hidden, bias=False)
        self.down_proj = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class TinyLm(nn.Module):
    """Embedding tied to the output head around two MLPs."""

    def __init__(self, vocabulary: int = 128, width: int = 64):
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.layers = nn.ModuleList([Mlp(width) for _ in range(2)])
        self.norm = nn.LayerNorm(width)
        self.lm_head = nn.Linear(width, vocabulary, bias=False)
        self.lm_head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        return self.lm_head(self.norm(x))


def tiny_lm(seed: int = 0) -> TinyLm:
    torch.manual_seed(seed)
    return TinyLm().eval()


def relative_error(got: Tensor, want: Tensor) -> float:
    """Largest difference over the largest wanted magnitude."""
    return float((got.float() - want.float()).abs().max() / want.float().abs().max())
