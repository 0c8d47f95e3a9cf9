"""Attention of one new token on CPU, written as loops that the compiler joins with their neighbours."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from accelpass.ir.attention import Attention, SdpaCall, sdpa_call
from accelpass.ir.graph import aten, call, stored, value
from accelpass.passes.base import Done
from accelpass.passes.structure.sdpa_rewrite import SdpaRewrite

_SIDE_BY_SIDE = 8  # query heads that share keys and values in one loop


@dataclass(frozen=True)
class CpuDecodeAttention(SdpaRewrite):
    """One query row on CPU: product, softmax and weighted sum as vectorised loops, in float32.

    A library call packs its operands for matrix products of many rows, and reads keys and values once for each query
    head. For a single row it takes 1.2 to 5 times as long as these loops, more the longer the cache (measured from 196 to
    16,384 tokens on an AMD EPYC with two cores; 9 query and 3 key/value heads of 64, 32 and 8 heads of 128).
    """

    name: ClassVar[str] = "cpu_decode_attention"
    summary: ClassVar[str] = "attention of one new token on CPU as loops in place of a library call"
    before: ClassVar[tuple[str, ...]] = ("grouped_query",)

    def suitable(self, attention: Attention) -> SdpaCall | str:
        sdpa = sdpa_call(attention)
        if isinstance(sdpa, str):
            return sdpa
        q, v = value(sdpa.q), value(sdpa.v)
        if q.device.type != "cpu":
            return f"queries are on {q.device.type}"
        if not isinstance(q.shape[-2], int) or q.shape[-2] != 1:
            return f"{q.shape[-2]} query rows; decoding has one"
        if not all(isinstance(n, int) for n in (*q.shape, v.shape[-3], v.shape[-1])):
            return "the number of sequences or heads is symbolic"
        if sdpa.causal:
            return "is_causal lets a single row see the first key alone, which is left as it is"
        if sdpa.mask is not None and value(sdpa.mask).dim() not in (2, 4):
            return f"a mask of {value(sdpa.mask).dim()} dimensions"
        return sdpa

    def rewrite(self, attention: Attention, sdpa: SdpaCall) -> Done:
        with sdpa.origin.graph.inserting_before(sdpa.node):
            new = _emit(sdpa, attention.spec.groups)
        sdpa.replace(new)
        return Done(f"one row over {value(sdpa.k).shape[-2]} keys as loops")


def _emit(sdpa: SdpaCall, groups: int) -> fx.Node:
    """The output ``(batch, heads, 1, width)``. Scores are ``(batch, kv_heads, groups, keys)``."""
    graph, like = sdpa.origin.graph, sdpa.node

    def op(target: object, *args: object) -> fx.Node:
        return call(graph, like, target, *args)

    def wide(x: fx.Node) -> fx.Node:
        return x if value(x).dtype == torch.float32 else op(aten.to.dtype, x, torch.float32)

    def per_group(x: fx.Node, product: Callable[[fx.Node], fx.Node]) -> fx.Node:
        """``product`` of each group's slice of ``x``: loops side by side, which read keys and values once for all."""
        if groups > _SIDE_BY_SIDE:
            return product(x)
        return op(aten.stack.default, [product(op(aten.select.int, x, 2, g)) for g in range(groups)], 2)

    def beside(x: fx.Node, like: fx.Node) -> fx.Node:
        """``x``, keys or values, with a dimension for the groups where ``like`` has it."""
        return op(aten.unsqueeze.default, x, 2) if value(like).dim() == 4 else x

    batch, heads, _, width = value(sdpa.q).shape
    kv_heads = heads // groups
    k, v = wide(sdpa.k), wide(sdpa.v)
    q = stored(op(aten.mul.Scalar, wide(sdpa.q), sdpa.scale))
    q = op(aten.reshape.default, q, [batch, kv_heads, groups, width])

    def scored(q: fx.Node) -> fx.Node:
        row = op(aten.unsqueeze.default, q, -2)
        return op(aten.sum.dim_IntList, op(aten.mul.Tensor, row, beside(k, q)), [-1])

    def summed(weights: fx.Node) -> fx.Node:
        column = op(aten.unsqueeze.default, weights, -1)
        return op(aten.sum.dim_IntList, op(aten.mul.Tensor, column, beside(v, weights)), [-2])

    scores = per_group(q, scored)
    if sdpa.mask is not None:
        mask = sdpa.mask
        if value(mask).dim() == 4:
            per_head = value(mask).shape[1] != 1
            mask = op(aten.unflatten.int, mask, 1, [kv_heads, groups] if per_head else [1, 1])
            mask = op(aten.squeeze.dim, mask, 3)
        if value(mask).dtype == torch.bool:
            scores = op(aten.masked_fill.Scalar, scores, op(aten.logical_not.default, mask), float("-inf"))
        else:
            scores = op(aten.add.Tensor, scores, wide(mask))
    weights = stored(op(aten._safe_softmax.default, scores, -1))
    out = per_group(weights, summed)
    out = op(aten.reshape.default, out, [batch, heads, 1, value(sdpa.v).shape[-1]])
    return out if value(like).dtype == torch.float32 else op(aten.to.dtype, out, value(like).dtype)
