"""Attention of one new token over stored rows on CUDA: the Triton kernel, a call for each segment."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from accelpass.ir.kv.banks import Floats, Quantized, RowFormat, Rows
from accelpass.ir.kv.decode.attention import PackedRows, Store, merge
from accelpass.ir.kv.storage import KERNELS, Attended, Query, Segment


def attend_with_kernel(query: Query, segments: Sequence[Segment], want: Sequence[str]) -> Attended:
    """As :meth:`accelpass.ir.kv.storage.Query.attend`, for one token."""
    from accelpass.backends.kernels.triton.kv_attention_ops import kv_decode  # asks for triton if it is missing

    several = len(segments) > 1
    asked = [*(["lse"] if several else []), *(w for w in want if w == "logits" or not several)]
    parts = []
    for segment in segments:
        # Scores are scaled where they are summed, in float32; queries keep their own dtype for the matrix unit.
        q = query.q if segment.q is None else segment.q
        q = q.squeeze(3).flatten(1, 2).to(query.dtype)
        bias, valid = query.bias(segment), segment.valid
        rows = segment.rows
        if rows is not None:
            # The kernel takes masks by slot, and those of listed rows are by row: rows that may not be seen are left out.
            rows = rows if valid is None else rows.masked_fill(valid.logical_not(), -1)
            bias, valid = (None if bias is None else _by_slot(bias, segment.rows, segment.keys[0].shape[2])), None
        elif valid is not None:
            valid = valid.expand(-1, segment.keys[0].shape[1], -1)
        keys, values = (_store(segment.format, held, query.dtype) for held in (segment.keys, segment.values))
        dtype = torch.float32 if several else query.dtype
        parts.append(
            kv_decode(q, keys, values, scale=1.0, rows=rows, valid=valid, bias=bias, want=tuple(asked), dtype=dtype)
        )
    logits = [p.logits for p in parts if p.logits is not None]
    if not several:
        (only,) = parts
        return Attended(only.out.unsqueeze(2), [only.mass] if only.mass is not None else [], logits)
    out, lse = merge([(p.out, p.lse) for p in parts if p.lse is not None])
    mass = []
    if "mass" in want:
        # A segment's own softmax is not that over all: its probabilities follow from the joint log-sum-exp.
        whole = lse.unflatten(1, (-1, query.spec.groups))[..., None, None]
        mass = [torch.exp(query.logits(s) - whole).sum((2, 3)) for s in segments]
    return Attended(out.to(query.dtype).unsqueeze(2), mass, logits)


def _store(format: RowFormat, rows: Rows, dtype: torch.dtype) -> Store:
    if isinstance(format, Quantized):
        codes, step, low = rows
        return PackedRows(codes, step, low, format.bits)
    return rows[0] if isinstance(format, Floats) else format.decode(rows, dtype)  # which the kernel cannot read itself


def _by_slot(bias: Tensor, rows: Tensor | None, slots: int) -> Tensor:
    """A bias of listed rows ``(batch, heads, n)`` where their slots are; rows of several heads are repeated for each."""
    assert rows is not None
    index = rows.clamp_min(0).repeat_interleave(bias.shape[1] // rows.shape[1], 1)
    return bias.new_zeros((*bias.shape[:2], slots)).scatter(-1, index, bias)


KERNELS["cuda"] = attend_with_kernel
