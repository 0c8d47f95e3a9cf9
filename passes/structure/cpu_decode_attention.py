"""Attention of one new token on CPU, written as loops that the compiler joins with their neighbours."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from accelpass.ir.attention import Attention, SdpaCall
from accelpass.ir.attention.lowering.one_row import materialise, row_scores, row_sum, unnormalised_softmax
from accelpass.ir.core.graph import value
from accelpass.passes.core.base import Done, Skip, Take, Verdict
from accelpass.passes.core.site_pass import Edits
from accelpass.passes.structure.sdpa_rewrite import SdpaRewrite


@dataclass(frozen=True)
class CpuDecodeAttention(SdpaRewrite):
    """One query row on CPU: product, softmax and weighted sum as vectorised loops, in float32.

    A library call packs its operands for matrix products of many rows, and reads keys and values once for each query
    head. For a single row it takes 1.2 to 5 times as long as these loops, more the longer the cache (measured from 196 to
    16,384 tokens on an AMD EPYC with two cores; 9 query and 3 key/value heads of 64, 32 and 8 heads of 128; before long
    sums ran in chunks, which widens it).
    """

    name: ClassVar[str] = "cpu_decode_attention"
    summary: ClassVar[str] = "attention of one new token on CPU as loops in place of a library call"

    def suitable(self, attention: Attention, sdpa: SdpaCall) -> Verdict:
        q, v = value(sdpa.q), value(sdpa.v)
        if q.device.type != "cpu":
            return Skip(f"queries are on {q.device.type}")
        if not isinstance(q.shape[-2], int) or q.shape[-2] != 1:
            return Skip(f"{q.shape[-2]} query rows; decoding has one")
        if not all(isinstance(n, int) for n in (*q.shape, v.shape[-3], v.shape[-1])):
            return Skip("the number of sequences or heads is symbolic")
        if sdpa.causal:
            return Skip("is_causal lets a single row see the first key alone, which is left as it is")
        if sdpa.mask is not None and value(sdpa.mask).dim() not in (2, 4):
            return Skip(f"a mask of {value(sdpa.mask).dim()} dimensions")
        return Take()

    def written(self, attention: Attention, sdpa: SdpaCall, edit: Edits) -> Done:
        groups, scale = attention.spec.groups, sdpa.scale

        def run(q: Tensor, k: Tensor, v: Tensor, *mask: Tensor) -> list[Tensor]:
            return [one_row(q, k, v, mask[0] if mask else None, groups, scale)]

        operands = [sdpa.q, sdpa.k, sdpa.v, *([] if sdpa.mask is None else [sdpa.mask])]
        (new,) = edit.run((groups, scale), run, operands, sdpa.node)
        sdpa.replace(new)
        return Done(f"one row over {value(sdpa.k).shape[-2]} keys as loops")


def one_row(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, groups: int, scale: float) -> Tensor:
    """The output ``(batch, heads, 1, width)`` of ``scaled_dot_product_attention`` for queries ``(batch, heads, 1, d)``."""
    rows = materialise(q.float() * scale).squeeze(2).unflatten(1, (-1, groups))
    scores = row_scores(rows, k)
    if mask is not None:
        if mask.dim() == 4:
            mask = mask.unflatten(1, (-1, groups) if mask.shape[1] != 1 else (1, 1)).squeeze(3)
        hidden = mask.dtype == torch.bool
        scores = scores.masked_fill(mask.logical_not(), float("-inf")) if hidden else scores + mask.float()
    (weights,), share = unnormalised_softmax([scores])
    out = row_sum(weights, v) * share
    return out.flatten(1, 2).unsqueeze(2).to(q.dtype)
