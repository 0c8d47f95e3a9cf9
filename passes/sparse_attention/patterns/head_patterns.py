"""A pattern for each head: the A-shape, columns and diagonals, or blocks whose means go together (arXiv 2407.02490)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from accelpass.ir.attention import AttentionSpec
from accelpass.ir.attention.spec.block_select import Blocks, BlockSelect, grid_of
from accelpass.passes.sparse_attention.patterns.vertical_slash import VerticalSlash
from accelpass.passes.token_pruning.choice import ranks

Pattern = tuple[int, int, int]
"""Which one, and its two numbers: first and nearest keys; columns and diagonals; blocks, and 0."""
A_SHAPE, LINES, BLOCKS = 0, 1, 2


@dataclass(frozen=True)
class HeadPatterns(BlockSelect):
    """Each head reads what its pattern says, rounded up to whole blocks.

    Attributes:
        block: tokens of a block.
        heads: a pattern for each query head; one for all.
        first, local: columns and diagonals that heads with such lines always read.
    """

    part: ClassVar[str] = "head_patterns"
    block: int
    heads: tuple[Pattern, ...]
    first: int
    local: int

    def blocks(self, q: Tensor, k: Tensor, spec: AttentionSpec) -> Blocks:
        """As :meth:`BlockSelect.blocks`.

        Raises:
            ValueError: there are patterns for another number of heads.
        """
        batch, many, tokens = q.shape[:3]
        if len(self.heads) not in (1, many):
            raise ValueError(f"head_patterns: there are {len(self.heads)} patterns, the attention has {many} heads")
        each = [tuple(pattern) for pattern in self.heads] * (many // len(self.heads))
        alone, count = replace(spec, groups=1), -(-tokens // self.block)
        straight = torch.arange(tokens, dtype=torch.int32, device=q.device).expand(batch, tokens)
        grids: list[Tensor] = [q] * many
        orders: list[Tensor] = [straight] * many
        for pattern in dict.fromkeys(each):
            kind, a, b = pattern
            own = [n for n in range(many) if each[n] == pattern]
            if kind == A_SHAPE:
                grid = _a_shape(a, b, count, self.block, q.device).expand(len(own), batch, count, count)
            else:
                queries = torch.stack([q[:, n] for n in own], 1)
                keys = torch.stack([k[:, n // spec.groups] for n in own], 1)
                if kind == BLOCKS:
                    grid = _alike(queries, keys, a, self.block, spec.scale)
                else:
                    listed = VerticalSlash(self.block, a, b, self.first, self.local).blocks(queries, keys, alone)
                    grid = grid_of(listed.blocks, listed.counts, count, count)
                    assert listed.order is not None
                    for n, order in zip(own, listed.order.view(batch, len(own), tokens).unbind(1), strict=True):
                        orders[n] = order
                grid = grid.view(batch, len(own), count, count).transpose(0, 1)
            for n, one in zip(own, grid.unbind(0), strict=True):
                grids[n] = one
        chosen = torch.stack(grids, 1).view(batch * many, count, count)
        return Blocks.of(chosen, self.block, torch.stack(orders, 1).view(batch * many, tokens))


def _a_shape(first: int, local: int, count: int, size: int, device: torch.device) -> Tensor:
    """Blocks that hold a first token or one of the nearest: bool ``(blocks, blocks)``."""
    at = torch.arange(count, device=device)
    nearest = (at * size - (local - 1)).clamp_min(0) // size
    grid: Tensor = ((at * size < first) | (at >= nearest.unsqueeze(-1))) & (at <= at.unsqueeze(-1))
    return grid


def _alike(q: Tensor, k: Tensor, most: int, size: int, scale: float) -> Tensor:
    """The blocks whose means of keys the mean of a block's queries pays most, and its own (inferred): ``(batch * heads, ...)``."""
    batch, heads, tokens, width = q.shape
    count = -(-tokens // size)
    place = torch.arange(count * size, device=q.device)
    real = (place < tokens).unsqueeze(-1)

    def means(x: Tensor) -> Tensor:
        rows = x.index_select(2, place.clamp_max(tokens - 1)).reshape(batch * heads, -1, width).float() * real
        return rows.view(-1, count, size, width).sum(2) / real.view(count, size).sum(-1, keepdim=True)

    at = torch.arange(count, device=q.device)
    scores = torch.bmm(means(q), means(k).mT) * scale
    earlier = at.unsqueeze(-1) >= at
    paid = scores.masked_fill(earlier.logical_not(), -torch.inf)
    return ((ranks(paid) < most) & earlier) | (at.unsqueeze(-1) == at)


def shown(heads: Sequence[Pattern]) -> str:
    """``5 heads 100 columns and 750 diagonals; 3 heads their first 30 and nearest 800 keys``."""
    said = []
    for pattern in sorted(set(heads), key=lambda p: (-heads.count(p), p)):
        kind, a, b = pattern
        number = heads.count(pattern)
        words = {A_SHAPE: f"the first {a} and nearest {b} keys", LINES: f"{a} columns and {b} diagonals"}
        said.append(f"{number} head{'s' * (number > 1)} {words.get(kind, f'{a} blocks')}")
    return "; ".join(said)
