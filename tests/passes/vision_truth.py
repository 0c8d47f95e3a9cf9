"""A small vision transformer written plainly, so that what a pass makes of it can be written down beside it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Block(nn.Module):
    """Attention and MLP of timm's vision transformers: one linear for queries, keys and values."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def heads_of(self, x: Tensor) -> Tensor:
        """Queries, keys and values, ``(3, images, heads, tokens, d)``."""
        made: Tensor = self.qkv(self.norm1(x)).reshape(*x.shape[:2], 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        return made

    def attended(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        q, k, v = self.heads_of(x)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        done: Tensor = x + self.proj(out.transpose(1, 2).reshape(x.shape))
        return done

    def mlp(self, x: Tensor) -> Tensor:
        done: Tensor = x + self.down(F.gelu(self.up(self.norm2(x))))
        return done

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp(self.attended(x))


class Tower(nn.Module):
    """Patches, ``first`` tokens in front of them, positions, blocks, a head on the first token or on the mean."""

    def __init__(self, side: int = 4, first: int = 1, layers: int = 3, width: int = 16, heads: int = 2) -> None:
        super().__init__()
        self.first = first
        self.patch = nn.Conv2d(3, width, 4, 4)
        self.front = nn.Parameter(torch.randn(1, first, width))
        self.places = nn.Parameter(torch.randn(1, first + side * side, width))
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 5)

    def embedded(self, pixels: Tensor) -> Tensor:
        x = self.patch(pixels).flatten(2).transpose(1, 2)
        if self.first:
            x = torch.cat([self.front.expand(x.shape[0], -1, -1), x], 1)
        made: Tensor = x + self.places
        return made

    def read(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        done: Tensor = self.head(x[:, 0] if self.first else x.mean(1))
        return done

    def forward(self, pixels: Tensor) -> Tensor:
        x = self.embedded(pixels)
        for block in self.blocks:
            x = block(x)
        return self.read(x)


def tower(seed: int = 0, **sizes: Any) -> Tower:
    torch.manual_seed(seed)
    return Tower(**sizes).eval()


def compiled(model: nn.Module, passes: list[Any], **more: Any) -> Callable[..., Any]:
    torch._dynamo.reset()
    options = {"passes": passes, "lowering": "eager", **more}
    fast: Callable[..., Any] = torch.compile(model, backend="accelpass", options=options)
    return fast
