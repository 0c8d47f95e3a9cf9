"""Decode attention over stored rows in plain torch: what the kernels are held to, and what runs where there is none."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from accelpass.ir.kv.decode.attention import Decoded, PackedRows, Store, check_want
from accelpass.ir.kv.rows import dequantize_rows


def decode_reference(
    q: Tensor,
    k: Store,
    v: Store,
    *,
    scale: float,
    rows: Tensor | None = None,
    valid: Tensor | None = None,
    bias: Tensor | None = None,
    want: Sequence[str] = (),
    dtype: torch.dtype | None = None,
) -> Decoded:
    """Softmax attention of one query token per sequence. It computes in float32, or in float64 where q is float64.

    Args:
        q: ``(B, H, D)``.
        k, v: ``(B, Hkv, N, D)`` and ``(B, Hkv, N, Dv)``, or packed rows of these widths; Hkv divides H.
        rows: integers ``(B, Hkv, R)``: the slots to read. Entries outside ``0 .. N - 1`` are no key.
        valid: bool ``(B, Hkv, N)``: the slots that hold a key.
        bias: ``(B, Hb, N)``, added to scaled logits; Hb is 1, Hkv or H.
        want: results beside ``out``: "lse", "logits", "mass".
        dtype: of ``out``; None is q's.
    """
    check_want(want)
    compute = torch.float64 if q.dtype == torch.float64 else torch.float32
    keys, values = (_rows(store, compute) for store in (k, v))
    batch, heads, _ = q.shape
    kv_heads, slots = keys.shape[1:3]
    queries = q.to(compute).unflatten(1, (kv_heads, -1))
    added = torch.zeros((), dtype=compute, device=q.device).expand(batch, heads, slots)
    if bias is not None:
        added = bias.to(compute)
        if added.shape[1] != heads:
            added = added.expand(batch, kv_heads, slots).repeat_interleave(heads // kv_heads, 1)
    added = added.unflatten(1, (kv_heads, -1))
    live = torch.ones((), dtype=torch.bool, device=q.device).expand(batch, kv_heads, slots) if valid is None else valid
    if rows is not None:
        inside = (rows >= 0) & (rows < slots)
        # Entries that are no key read a row of zeros behind the last slot.
        at = rows.long().masked_fill(~inside, slots)
        keys, values = (_take(_padded(x), at) for x in (keys, values))
        added = _padded(added.transpose(2, 3)).gather(2, at.unsqueeze(-1).expand(*at.shape, added.shape[2])).mT
        live = torch.nn.functional.pad(live, (0, 1)).gather(2, at)
    # A slot without a key may hold anything, and 0 * nan is nan.
    keys, values = (x.masked_fill(~live.unsqueeze(-1), 0.0) for x in (keys, values))
    logits = queries @ keys.mT * scale + added
    logits = logits.masked_fill(~live.unsqueeze(2), -torch.inf)
    lse = logits.logsumexp(-1)
    weights = (logits - lse.masked_fill(lse == -torch.inf, 0.0).unsqueeze(-1)).exp()
    return Decoded(
        (weights @ values).flatten(1, 2).to(dtype or q.dtype),
        lse.flatten(1) if "lse" in want else None,
        logits.sum(2) if "logits" in want else None,
        weights.sum(2) if "mass" in want else None,
    )


def _rows(store: Store, dtype: torch.dtype) -> Tensor:
    if isinstance(store, PackedRows):
        return dequantize_rows(store.codes, store.step, store.low, store.bits, store.group).to(dtype)
    return store.to(dtype)


def _padded(x: Tensor) -> Tensor:
    """One more slot, of zeros."""
    return torch.nn.functional.pad(x, (0, 0, 0, 1))


def _take(x: Tensor, at: Tensor) -> Tensor:
    """Rows ``at (B, Hkv, R)`` of ``x (B, Hkv, N, D)``."""
    return x.gather(2, at.unsqueeze(-1).expand(*at.shape, x.shape[-1]))
