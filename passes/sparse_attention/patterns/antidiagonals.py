"""XAttention's choice: blocks in which sums over antidiagonals of the scores are largest (arXiv 2503.16428, section 2)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from accelpass.ir.attention import AttentionSpec
from accelpass.ir.attention.spec.block_select import Blocks, BlockSelect


@dataclass(frozen=True)
class Antidiagonals(BlockSelect):
    """The fewest blocks whose share of a softmax over antidiagonal sums of scores reaches ``threshold``, one or one a head."""

    part: ClassVar[str] = "xattention"
    block: int
    stride: int
    threshold: float | tuple[float, ...]

    def blocks(self, q: Tensor, k: Tensor, spec: AttentionSpec) -> Blocks:
        shares = self.shares(q, k, spec)
        count = shares.shape[-1]
        at = torch.arange(count, device=q.device)
        earlier = at.unsqueeze(-1) >= at
        forced = (at.unsqueeze(-1) == at) | (at == 0)
        each = self.threshold if isinstance(self.threshold, tuple) else (self.threshold,)
        if min(each) >= 1:
            return Blocks.of((earlier | forced).expand(shares.shape), self.block)
        if len(each) not in (1, q.shape[1]):
            raise ValueError(f"xattention: there are {len(each)} thresholds, the attention has {q.shape[1]} heads")
        threshold = torch.cat([shares.new_full((1, 1, 1), one if one < 1 else torch.inf) for one in each])
        if len(each) > 1:
            threshold = threshold.repeat(q.shape[0], 1, 1)
        others = shares.masked_fill(forced, 0.0)
        largest, where = others.sort(dim=-1, descending=True, stable=True)
        held = shares.sum(-1, keepdim=True) - others.sum(-1, keepdim=True)
        needed = threshold * shares.sum(-1, keepdim=True)
        taken = (held + largest.cumsum(-1) - largest) < needed
        return Blocks.of((torch.zeros_like(taken).scatter(-1, where, taken) & earlier) | forced, self.block)

    def shares(self, q: Tensor, k: Tensor, spec: AttentionSpec) -> Tensor:
        """What each block of queries pays each block of keys, estimated: float32 ``(batch * heads, blocks, blocks)``.

        ``stride`` queries in falling order beside ``stride`` keys in rising order are one row each; their product is the sum of an
        antidiagonal of every ``stride x stride`` tile.
        """
        batch, heads, tokens, width = q.shape
        count, groups = -(-tokens // self.block), spec.groups
        place = torch.arange(count * self.block, device=q.device)
        real, place = (place < tokens).unsqueeze(-1), place.clamp_max(tokens - 1)
        falling = (place.shape[0] // self.stride, self.stride)
        rows = (q.index_select(2, place) * real).view(batch, heads, *falling, width).flip(3)
        columns = (k.index_select(2, place) * real).reshape(batch * heads // groups, falling[0], self.stride * width)
        rows = rows.reshape(batch * heads // groups, groups * falling[0], self.stride * width)
        sums = torch.bmm(rows, columns.mT).view(batch * heads, falling[0], falling[0]).float()
        later = torch.ones_like(sums[0], dtype=torch.bool).triu(1)
        paid = (sums * (spec.scale / self.stride)).masked_fill(later, -torch.inf).softmax(-1)
        paid = paid * real.view(falling).any(1).unsqueeze(-1)
        inside = self.block // self.stride
        return paid.view(-1, count, inside, count, inside).sum((2, 4))
