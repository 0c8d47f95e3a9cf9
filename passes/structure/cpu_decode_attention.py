"""Attention of one new token on CPU, written as loops that the compiler joins with their neighbours."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from accelpass.ir.attention import Attention, SdpaCall, detect, sdpa_call
from accelpass.ir.graph import aten, call, stored, value
from accelpass.ir.program import Program
from accelpass.passes.base import Done, Pass, Record


@dataclass(frozen=True)
class CpuDecodeAttention(Pass):
    """One query row on CPU: product, softmax and weighted sum as vectorised loops, in float32.

    A library call packs its operands for matrix products of many rows; for a single one it takes 1.3 to 2.2 times as
    long as reading keys and values once does, at every length from 64 to 16,384 tokens (measured on an AMD EPYC with two
    cores, head dimensions 64 and 128).
    """

    name: ClassVar[str] = "cpu_decode_attention"
    phase: ClassVar[str] = "kernels"
    summary: ClassVar[str] = "attention of one new token on CPU as loops in place of a library call"
    exact: ClassVar[bool] = True
    before: ClassVar[tuple[str, ...]] = ("grouped_query",)

    def apply(self, program: Program, record: Record) -> None:
        for attention in program.analysis(detect):
            sdpa = _suitable(attention)
            if isinstance(sdpa, str):
                record.skip(attention.path, sdpa)
                continue
            with sdpa.origin.graph.inserting_before(sdpa.node):
                new = _emit(sdpa, attention.spec.groups)
            sdpa.replace(new)
            record.take(attention.path, Done(f"one row over {value(sdpa.k).shape[-2]} keys as loops"))


def _suitable(attention: Attention) -> SdpaCall | str:
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


def _emit(sdpa: SdpaCall, groups: int) -> fx.Node:
    """The output ``(batch, heads, 1, width)``. Scores are ``(batch, kv_heads, groups, keys)``."""
    graph, like = sdpa.origin.graph, sdpa.node

    def op(target: object, *args: object) -> fx.Node:
        return call(graph, like, target, *args)

    def wide(x: fx.Node) -> fx.Node:
        return x if value(x).dtype == torch.float32 else op(aten.to.dtype, x, torch.float32)

    batch, heads, _, width = value(sdpa.q).shape
    kv_heads = heads // groups
    q = stored(op(aten.mul.Scalar, wide(sdpa.q), sdpa.scale))
    q = op(aten.reshape.default, q, [batch, kv_heads, groups, 1, width])
    products = op(aten.mul.Tensor, q, op(aten.unsqueeze.default, wide(sdpa.k), 2))
    scores = op(aten.sum.dim_IntList, products, [-1])
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
    values = op(aten.unsqueeze.default, wide(sdpa.v), 2)
    out = op(aten.sum.dim_IntList, op(aten.mul.Tensor, op(aten.unsqueeze.default, weights, -1), values), [-2])
    out = op(aten.reshape.default, out, [batch, heads, 1, value(sdpa.v).shape[-1]])
    return out if value(like).dtype == torch.float32 else op(aten.to.dtype, out, value(like).dtype)
