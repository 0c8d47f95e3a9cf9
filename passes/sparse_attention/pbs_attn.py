"""PBS-Attn: keys sorted inside segments, so that the important ones fill few blocks (arXiv 2510.21270)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from accelpass.ir.attention import Attention, AttentionSpec
from accelpass.ir.attention.spec.block_select import Blocks, BlockSelect
from accelpass.passes.core.base import Skip
from accelpass.passes.sparse_attention.base import SparseAttention


@torch.library.custom_op("accelpass::sorted_in_segments", mutates_args=())
def sorted_in_segments(score: Tensor, size: int, count: int) -> Tensor:
    """The first ``count`` places of ``(rows, whole segments of size)``: each segment's own, by falling score; int64.

    An op of its own: Inductor (torch 2.13, CPU) splits a loop over ``count`` places into segments and forgets those after
    the last whole one, or writes past the end.
    """
    inside = score.view(len(score), -1, size).argsort(dim=-1, descending=True, stable=True)
    start = torch.arange(0, score.shape[1], size, device=score.device)
    return (inside + start.unsqueeze(-1)).view(len(score), -1)[:, :count].contiguous()


@sorted_in_segments.register_fake
def _(score: Tensor, size: int, count: int) -> Tensor:
    return score.new_empty((score.shape[0], count), dtype=torch.int64)


@dataclass(frozen=True)
class PermutedBlocks(BlockSelect):
    """The smallest set of permuted blocks whose estimated share of the softmax reaches ``threshold``."""

    part: ClassVar[str] = "pbs_attn"
    block: int
    segment: int
    threshold: float

    def blocks(self, q: Tensor, k: Tensor, spec: AttentionSpec) -> Blocks:
        order = self.order(q, k, spec)
        return Blocks.of(self.chosen(q, k, order, spec), self.block, order.int())

    def order(self, q: Tensor, k: Tensor, spec: AttentionSpec) -> Tensor:
        """The token at each place ``(batch * heads, tokens)``: in each whole segment the keys that the last block of
        queries looks at most come first; the rest at the end keeps its order."""
        tokens, width = q.shape[2:]
        device, size = q.device, self.segment
        # Of fewer tokens than a block some are taken twice; they are one segment, whose order does not matter.
        last = (torch.arange(self.block, device=device) + (tokens - self.block)).clamp_min(0)
        queries = q.index_select(2, last).reshape(-1, spec.groups * self.block, width)
        keys = k.contiguous().view(-1, tokens, width)
        logits = torch.bmm(queries, keys.transpose(1, 2)).float() * spec.scale
        token = torch.arange(tokens, device=device)
        loose = token >= tokens // size * size
        shares = logits.masked_fill(loose, -torch.inf).softmax(-1).view(-1, self.block, tokens).mean(1)
        # By the same sort: what is in no whole segment is worth less the later it comes.
        place = torch.arange(-(-tokens // size) * size, device=device)
        score = shares.masked_fill(loose, 0.0).index_select(1, place.clamp_max(tokens - 1))
        score = torch.where(place >= tokens // size * size, -place.float(), score)
        return torch.ops.accelpass.sorted_in_segments(score, size, tokens)

    def chosen(self, q: Tensor, k: Tensor, order: Tensor, spec: AttentionSpec) -> Tensor:
        """Which permuted key blocks each query block reads, ``(batch * heads, blocks, blocks)``."""
        batch, heads, tokens, width = q.shape
        count = -(-tokens // self.block)
        place = torch.arange(count * self.block, device=q.device)
        real, place = place < tokens, place.clamp_max(tokens - 1)
        block = torch.arange(count, device=q.device)
        segment = block * self.block // self.segment
        own = segment.unsqueeze(-1) == segment
        first = order.eq(0).int().argmax(-1) // self.block
        forced = own | (block == first[:, None, None])
        if self.threshold >= 1:
            return (segment.unsqueeze(-1) >= segment) | forced

        def pooled(rows: Tensor) -> Tensor:
            summed = (rows.float() * real.unsqueeze(-1)).view(-1, count, self.block, width).sum(2)
            return summed / real.view(count, self.block).sum(-1, keepdim=True)

        of = torch.arange(batch * heads, device=q.device) // spec.groups * tokens
        held = (order.index_select(1, place) + of.unsqueeze(-1)).flatten()
        queries = pooled(q.index_select(2, place).view(batch * heads, -1, width))
        keys = pooled(k.contiguous().view(-1, width).index_select(0, held).view(batch * heads, -1, width))
        logits = torch.bmm(queries, keys.transpose(1, 2)) * spec.scale
        earlier = segment.unsqueeze(-1) > segment
        # In float32, whatever the model computes in; a row of the first segment has no earlier block, and no number.
        shares = torch.nan_to_num(logits.masked_fill(earlier.logical_not(), -torch.inf).softmax(-1))
        largest, at = shares.sort(-1, descending=True)
        taken = (largest.cumsum(-1) - largest) < self.threshold
        return (torch.zeros_like(taken).scatter(-1, at, taken) & earlier) | forced


@dataclass(frozen=True)
class PBSAttn(SparseAttention):
    """Sort the keys of a prompt inside fixed segments and let each block of queries read few blocks of them.

    Wang et al., "Sparser Block-Sparse Attention via Token Permutation". Keys are sorted, for each query head, by the
    attention of the last block of queries; blocks are then chosen by the products of their means with the queries' until
    their estimated share of the softmax reaches ``threshold``. The query's own segment and the block with the first token
    are always read. Attention does not depend on the order of keys, and causality goes by the original positions, so only
    what is left out changes the result. Which blocks are read depends on the last queries, so a prompt read in two parts
    reads others. Keys are cached in their order; decoding stays dense. No calibration.

    Attributes:
        block: tokens of a block.
        segment: tokens of a segment, whole blocks; a prompt of no more is dense.
        threshold: the share of the estimated softmax that the chosen blocks reach; 1 reads all.

    Raises:
        OptionError: a number out of range, or a segment that is not whole blocks.
    """

    name: ClassVar[str] = "pbs_attn"
    summary: ClassVar[str] = "prompts read few blocks of keys, which are sorted inside segments so that few are enough"
    paper: ClassVar[str] = "PBS-Attn, arXiv 2510.21270"
    identity: ClassVar[dict[str, Any] | None] = {"threshold": 1.0}
    block: int = 128
    segment: int = 256
    threshold: float = 0.9

    def __post_init__(self) -> None:
        if self.block < 1:
            raise self.fail("block", "1 token or more; 64 or 128 suit kernels")
        if self.segment < self.block or self.segment % self.block:
            raise self.fail("segment", f"a multiple of block={self.block}")
        if not 0 < self.threshold <= 1:
            raise self.fail("threshold", "a share above 0, up to 1, which reads all")
        self.check_sites()

    def selection(self, attention: Attention, tokens: Any) -> tuple[BlockSelect, str] | Skip:
        if isinstance(tokens, int) and tokens <= self.segment:
            return Skip(f"its {tokens} tokens are no more than one segment of {self.segment}, which is read whole")
        select = PermutedBlocks(self.block, self.segment, self.threshold)
        return select, f"blocks of {self.block} sorted keys up to {self.threshold:.0%} of the estimated attention"
