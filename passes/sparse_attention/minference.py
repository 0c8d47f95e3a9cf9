"""MInference's vertical-slash pattern: a prompt's attention reads few columns and few diagonals (arXiv 2407.02490)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from accelpass.ir.attention import Attention, AttentionSpec
from accelpass.ir.attention.spec.block_select import Blocks, BlockSelect
from accelpass.passes.core.base import Skip
from accelpass.passes.sparse_attention.base import SparseAttention
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


@dataclass(frozen=True)
class MInference(SparseAttention):
    """Each head of a prompt reads the columns and the diagonals to which its last 64 queries pay most.

    Jiang et al., "MInference 1.0: Accelerating Pre-filling for Long-Context LLMs via Dynamic Sparse Attention", section 3.2 and
    algorithm 1, the vertical-slash pattern. The first columns and the nearest diagonals are always read. Keys of chosen columns
    are gathered into blocks of their own; diagonals are rounded up to whole blocks of keys, so that somewhat more is read than the
    lines hold. Causality is by token. Keys are cached in their order; decoding stays dense. All heads have one budget: the
    paper's search for a pattern and a budget for each head (section 3.1) is not done.

    Attributes:
        vertical: columns that are read; 1,000 is what the authors' code takes where no search was done.
        slash: diagonals that are read; 6,096 likewise.
        first: columns at the beginning that are always read, and count.
        local: diagonals next to the main one that are always read, and count.
        block: tokens of a block.

    Raises:
        OptionError: a number out of range.
    """

    name: ClassVar[str] = "minference"
    summary: ClassVar[str] = "prompts read the columns and diagonals of attention that the last queries look at"
    paper: ClassVar[str] = "MInference, arXiv 2407.02490"
    identity: ClassVar[dict[str, Any] | None] = {"slash": 1 << 30}
    vertical: int = 1000
    slash: int = 6096
    first: int = 30
    local: int = 100
    block: int = 64

    def __post_init__(self) -> None:
        for option, least in (("vertical", 1), ("slash", 1), ("first", 0), ("local", 1), ("block", 1)):
            if getattr(self, option) < least:
                raise self.fail(option, f"{least} or more")
        self.check_sites()

    def selection(self, attention: Attention, tokens: Any) -> tuple[BlockSelect, str] | Skip:
        most = max(self.slash, self.local), max(self.vertical, self.first)
        if isinstance(tokens, int) and tokens <= max(most):
            return Skip(
                f"its {tokens} tokens are no more than the {most[0]} diagonals or {most[1]} columns that are read"
            )
        select = VerticalSlash(self.block, self.vertical, self.slash, self.first, self.local)
        return select, f"{most[1]} columns and {most[0]} diagonals, in blocks of {self.block} keys"
