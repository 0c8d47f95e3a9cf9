"""MoA's influence profile: how much the loss changes, to first order, if an entry of attention is masked (arXiv 2406.14909)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from accelpass.ir.attention.spec.block_select import not_a_prompt
from accelpass.ir.attention.spec.spec import AttentionSpec
from accelpass.passes.sparse_attention.spans import Rule, span_blocks

EPS = 1e-6
_SCRATCH = 1 << 24
"""Numbers in one piece of attention probabilities that the backward makes anew."""


class Influence(torch.autograd.Function):
    """Causal attention whose backward also adds up ``|E|`` by blocks, without an N x N matrix.

    ``E = -A (G - rowsum(G A)) / (1 - A + eps)`` with ``G = dL/dA``; the first row, which sees one key, has ``E = -G A``.
    ``G = dO V^T``, and ``rowsum(G A) = rowsum(dO O)``, so that rows of A are made a few at a time from queries and keys.
    """

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, always: Tensor, scale: float, block: int, into: Tensor
    ) -> Tensor:
        """
        Args:
            q: ``(batch, heads, n, d)``; k, v: ``(batch, kv_heads, n, d)``.
            always: any tensor that wants a gradient: the first attention's operands may not, and its backward is wanted.
            into: ``(heads, blocks, blocks)``, to which the sums of ``|E|`` over blocks and sequences are added.
        """
        out = dense(q, k, v, scale)
        ctx.save_for_backward(q, k, v, out)
        ctx.scale, ctx.block, ctx.into = scale, block, into
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out = ctx.saved_tensors
        (upper,) = gradients
        groups, block = q.shape[1] // k.shape[1], ctx.block
        keys, values = (t.repeat_interleave(groups, 1) for t in (k, v))
        mean = (upper * out).sum(-1, keepdim=True)
        d_q, d_k, d_v = torch.empty_like(q), torch.zeros_like(keys), torch.zeros_like(values)
        batch, heads, n, _ = q.shape
        exact = torch.promote_types(q.dtype, torch.float32)
        step = max(1, _SCRATCH // (batch * heads * n * block)) * block
        for low in range(0, n, step):
            high = min(low + step, n)
            rows, before = slice(low, high), slice(0, high)
            a = (q[:, :, rows] @ keys[:, :, before].mT).to(exact) * ctx.scale
            later = torch.arange(high, device=q.device) > torch.arange(low, high, device=q.device).unsqueeze(-1)
            a = a.masked_fill(later, float("-inf")).softmax(-1)
            g = (upper[:, :, rows] @ values[:, :, before].mT).to(a.dtype)
            scores = a * (g - mean[:, :, rows])
            effect = scores / (1 - a + EPS)
            if not low:
                effect[:, :, 0] = (g * a)[:, :, 0]
            ctx.into[:, low // block : -(-high // block), : -(-high // block)] += block_sums(effect.abs(), block)
            part = (scores * ctx.scale).to(q.dtype)
            d_q[:, :, rows] = part @ keys[:, :, before]
            d_k[:, :, before] += part.mT @ q[:, :, rows]
            d_v[:, :, before] += a.to(v.dtype).mT @ upper[:, :, rows]
        d_k, d_v = (t.unflatten(1, (-1, groups)).sum(2) for t in (d_k, d_v))
        return d_q, d_k, d_v, torch.zeros((), device=q.device), None, None, None


def dense(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Causal attention by torch."""
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=q.shape[1] != k.shape[1])


def block_sums(x: Tensor, block: int) -> Tensor:
    """Sums over the batch and over blocks: ``(batch, heads, rows, columns)`` to ``(heads, blocks, blocks)``."""
    whole = x.sum(0)
    padded = F.pad(whole, (0, -whole.shape[2] % block, 0, -whole.shape[1] % block))
    return padded.unflatten(1, (-1, block)).unflatten(3, (-1, block)).sum((2, 4))


@dataclass
class Profile:
    """Influence of each site at each length, summed over sequences; fill it with :meth:`attend`.

    Attributes:
        block: tokens of a block.
        influence: by length, by site: sums of ``|E|`` ``(heads, blocks, blocks)``.
    """

    block: int
    influence: dict[int, dict[str, Tensor]] = field(default_factory=dict)
    kv_heads: dict[str, int] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)

    def attend(self, spec: AttentionSpec, q: Tensor, k: Tensor, v: Tensor) -> Tensor | None:
        """Computes an attention; its backward adds to :attr:`influence`."""
        why = not_a_prompt(spec, q, k)
        if why is not None:
            self.skipped[spec.site] = why
            return None
        length = q.shape[2]
        sites = self.influence.setdefault(length, {})
        if spec.site not in sites:
            blocks = -(-length // self.block)
            sites[spec.site] = torch.zeros(q.shape[1], blocks, blocks, device=q.device)
            self.kv_heads[spec.site] = k.shape[1]
        always = torch.zeros((), device=q.device, requires_grad=True)
        made: Tensor = Influence.apply(q, k, v, always, spec.scale, self.block, sites[spec.site])
        return made

    @property
    def lengths(self) -> list[int]:
        return sorted(self.influence)

    def losses(self, site: str, length: int, rules: Sequence[Rule], sinks: int) -> Tensor:
        """What masking costs each key/value head under each rule, ``(kv_heads, rules)`` float64: the sum of ``|E|`` outside
        the mask, of the query head of a group that it is largest for (the card: the largest influence over the group)."""
        sums = self.influence[length][site].double()
        largest = sums.unflatten(0, (self.kv_heads[site], -1)).amax(1)
        heads, blocks, _ = largest.shape
        apart = torch.arange(blocks)[:, None] - torch.arange(blocks)
        outside = largest.cpu()[:, :, sinks // self.block :]
        by_distance = torch.zeros(heads, blocks, dtype=torch.float64).index_add_(
            1, apart[:, sinks // self.block :].clamp_min(0).flatten(), outside.flatten(1)
        )
        beyond = F.pad(by_distance.flip(1).cumsum(1).flip(1), (0, 1))  # of all blocks so far away, or further
        nearest = [min(max(1, span_blocks(rule, length, self.block)), blocks) for rule in rules]
        return beyond[:, nearest]
