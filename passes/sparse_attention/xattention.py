"""XAttention: antidiagonals of the scores tell which blocks of a prompt's attention matter (arXiv 2503.16428)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from accelpass.ir.attention import Attention, AttentionSpec
from accelpass.ir.attention.spec.block_select import Blocks, BlockSelect
from accelpass.passes.core.base import Skip
from accelpass.passes.sparse_attention.base import SparseAttention


@dataclass(frozen=True)
class Antidiagonals(BlockSelect):
    """The fewest blocks whose share of a softmax over antidiagonal sums of scores reaches ``threshold``."""

    part: ClassVar[str] = "xattention"
    block: int
    stride: int
    threshold: float

    def blocks(self, q: Tensor, k: Tensor, spec: AttentionSpec) -> Blocks:
        shares = self.shares(q, k, spec)
        count = shares.shape[-1]
        at = torch.arange(count, device=q.device)
        earlier = at.unsqueeze(-1) >= at
        forced = (at.unsqueeze(-1) == at) | (at == 0)
        if self.threshold >= 1:
            return Blocks.of((earlier | forced).expand(shares.shape), self.block)
        others = shares.masked_fill(forced, 0.0)
        largest, where = others.sort(dim=-1, descending=True, stable=True)
        held = shares.sum(-1, keepdim=True) - others.sum(-1, keepdim=True)
        needed = self.threshold * shares.sum(-1, keepdim=True)
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


@dataclass(frozen=True)
class XAttention(SparseAttention):
    """Each block of queries reads the blocks of keys in which sums over antidiagonals of the scores are largest.

    Xu et al., "XAttention: Block Sparse Attention with Antidiagonal Scoring", section 2. In each tile of ``stride x stride`` scores
    one antidiagonal is summed, which every row and every column of the tile has a part in; a softmax of these sums, added up over
    blocks, estimates the attention, and the fewest blocks are read whose share reaches ``threshold``. A block's own keys and the
    first block are always read, and count (the authors' code). The estimate costs one ``stride``-th of the scores, and holds
    ``(tokens / stride) ** 2`` float32 numbers a head. Keys are cached in their order; decoding stays dense. One threshold for all
    heads: the paper's search for one a head (section 2.3) is not done.

    Attributes:
        block: tokens of a block.
        stride: tokens of a side of a tile; 8 and 16 are the paper's.
        threshold: the share of the estimated softmax that the chosen blocks reach; 1 reads all.

    Raises:
        OptionError: a number out of range, or a block that is not whole tiles.
    """

    name: ClassVar[str] = "xattention"
    summary: ClassVar[str] = "prompts read the blocks of keys in which antidiagonals of the scores are large"
    paper: ClassVar[str] = "XAttention, arXiv 2503.16428"
    identity: ClassVar[dict[str, Any] | None] = {"threshold": 1.0}
    block: int = 128
    stride: int = 8
    threshold: float = 0.9

    def __post_init__(self) -> None:
        if self.stride < 1:
            raise self.fail("stride", "1 token or more; 8 and 16 are the paper's")
        if self.block < self.stride or self.block % self.stride:
            raise self.fail("block", f"a multiple of stride={self.stride}")
        if not 0 < self.threshold <= 1:
            raise self.fail("threshold", "a share above 0, up to 1, which reads all")
        self.check_sites()

    def selection(self, attention: Attention, tokens: Any) -> tuple[BlockSelect, str] | Skip:
        if isinstance(tokens, int) and tokens <= 2 * self.block:
            return Skip(f"its {tokens} tokens are two blocks of {self.block} at most, which are always read")
        select = Antidiagonals(self.block, self.stride, self.threshold)
        return select, f"blocks of {self.block} keys up to {self.threshold:.0%} of the estimated attention"
