"""MInference's vertical-slash pattern: few columns and few diagonals of the attention (arXiv 2407.02490, algorithm 2)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from accelpass.ir.attention import AttentionSpec
from accelpass.ir.attention.spec.block_select import Blocks, BlockSelect
from accelpass.passes.token_pruning.choice import ranks

_LAST = 64
"""Queries at the end of a prompt that the pattern is estimated from."""


@dataclass(frozen=True)
class VerticalSlash(BlockSelect):
    """Columns that the last queries look at, moved to the front, and diagonals, rounded up to whole blocks."""

    part: ClassVar[str] = "minference"
    block: int
    vertical: int
    slash: int
    first: int
    local: int

    def blocks(self, q: Tensor, k: Tensor, spec: AttentionSpec) -> Blocks:
        columns, diagonals = self.lines(q, k, spec)
        tokens, count = q.shape[2], -(-q.shape[2] // self.block)
        # Keys of chosen columns come first, so that few blocks hold them; the others keep their order behind.
        order = columns.long().sort(dim=-1, descending=True, stable=True).indices
        token = torch.arange(tokens, device=q.device)
        start = torch.arange(count, device=q.device).unsqueeze(-1) * self.block
        nearest = (start - token).clamp_min(
            0
        )  # the diagonals that a block of queries has at each key: nearest to farthest
        farthest = ((start + self.block).clamp_max(tokens) - token).clamp_min(0)
        nearer = torch.nn.functional.pad(diagonals.long().cumsum(-1), (1, 0))
        read = (_at(nearer, farthest) > _at(nearer, nearest)) | columns.unsqueeze(1)
        placed = read.gather(2, order.unsqueeze(1).expand(read.shape))
        padded = torch.nn.functional.pad(placed, (0, count * self.block - tokens))
        return Blocks.of(padded.view(-1, count, count, self.block).any(-1), self.block, order.int())

    def lines(self, q: Tensor, k: Tensor, spec: AttentionSpec) -> tuple[Tensor, Tensor]:
        """Which columns and which diagonals each head reads, ``(batch * heads, tokens)``; a diagonal by its distance."""
        batch, heads, tokens, width = q.shape
        device = q.device
        row = torch.arange(_LAST, device=device) + (tokens - _LAST)
        real, row = row >= 0, row.clamp_min(0)
        rows = q.index_select(2, row).reshape(batch * heads // spec.groups, spec.groups * _LAST, width)
        scores = (
            torch.bmm(rows, k.reshape(-1, tokens, width).mT).view(batch * heads, _LAST, tokens).float() * spec.scale
        )
        token = torch.arange(tokens, device=device)
        paid = scores.masked_fill(token > row.unsqueeze(-1), -torch.inf).softmax(-1) * real.unsqueeze(-1)
        away = row.unsqueeze(-1) - token  # the key that is so far before each row
        along = paid.gather(2, away.clamp_min(0).expand(paid.shape)).masked_fill(away < 0, 0.0)
        columns = paid.sum(1).masked_fill(token < self.first, torch.inf)
        diagonals = along.sum(1).masked_fill(token < self.local, torch.inf)
        return ranks(columns) < max(self.vertical, self.first), ranks(diagonals) < max(self.slash, self.local)


def _at(table: Tensor, places: Tensor) -> Tensor:
    """Entries of each row of ``(rows, n)`` at places ``(a, b)``: ``(rows, a, b)``."""
    return table.index_select(1, places.flatten()).view(-1, *places.shape)
