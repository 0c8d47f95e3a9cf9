"""Attention of one query row a head, as loops that a compiler vectorises over channels: nothing is copied or packed.

Scores and weights are float32 ``(batch, kv_heads, groups, n)``; keys and values ``(batch, kv_heads, n, d)``.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

_SIDE_BY_SIDE = 8
"""Query heads of a group with a loop of their own each, joined by the compiler to one that reads the rows once."""
_LONG, _CHUNK = 1024, 256
"""From how many rows a sum is taken in chunks, and how long these are; a sum of fewer rows is quicker in one."""
_COLUMNS, _SUMS = 16, 16
"""The least columns of a sum, and how many sums one loop has at most: they stay in vector registers."""


def row_scores(q: Tensor, keys: Tensor) -> Tensor:
    """``q @ keys^T``; ``q`` is float32 ``(batch, kv_heads, groups, d)``."""
    wide = keys.float()
    return per_group(q, lambda one: (one.unsqueeze(-2) * _beside(wide, one)).sum(-1))


def unnormalised_softmax(scores: Sequence[Tensor]) -> tuple[list[Tensor], Tensor]:
    """One softmax over several scores: ``exp(scores - max)`` in memory, and the factor ``(..., 1)`` that makes all add up to 1.

    A weighted sum of few columns is multiplied with the factor faster than its many weights are. Without any key that may be
    seen, all is zero.
    """
    # In memory, so that what gave a score is not repeated by each loop over it.
    scores = [materialise(one) if _is_long(one) else one for one in scores]
    top = functools.reduce(torch.maximum, (_reduced(one, torch.amax, torch.maximum) for one in scores))
    top = top.clamp_min(torch.finfo(torch.float32).min)  # of a row without keys: -inf - -inf is not a number
    made = [materialise(torch.exp(one - top)) for one in scores]
    whole = functools.reduce(torch.add, (_reduced(one, torch.sum, torch.add) for one in made))
    return made, 1 / whole.clamp_min(torch.finfo(torch.float32).tiny)


def _reduced(x: Tensor, reduce: Callable[..., Tensor], join: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """``reduce(x, -1, keepdim=True)``, in chunks where it is long: exponents and their sum in one loop are slower."""
    if not _is_long(x):
        return reduce(x, -1, keepdim=True)
    whole = x.shape[-1] // _CHUNK * _CHUNK
    chunks = materialise(reduce(x[..., :whole].unflatten(-1, (-1, _CHUNK)), -1))
    out = reduce(chunks, -1, keepdim=True)
    return out if whole == x.shape[-1] else join(out, reduce(x[..., whole:], -1, keepdim=True))


def _is_long(x: Tensor) -> bool:
    """Whether its last dimension is worth chunks."""
    return isinstance(x.shape[-1], int) and x.shape[-1] >= _LONG and x.device.type == "cpu"


def row_sum(weights: Tensor, values: Tensor) -> Tensor:
    """``weights @ values``: ``(batch, kv_heads, groups, d)``."""

    def summed(weights: Tensor, rows: Sequence[Tensor]) -> Tensor:
        wide = rows[0].float()
        if wide.dim() == 4:
            return per_group(weights, lambda one: (one.unsqueeze(-1) * _beside(wide, one)).sum(-2))
        # All columns in one loop: rows are then read as they lie in memory.
        sums = weights.shape[2] * wide.shape[-1]
        columns = wide.split(_COLUMNS * -(-sums // (_COLUMNS * _SUMS)), -1)
        return each_group(weights, lambda one: torch.cat([(one.unsqueeze(-1) * c).sum(-2) for c in columns], -1))

    return by_chunks(weights, [values], summed)


def by_chunks(weights: Tensor, rows: Sequence[Tensor], summed: Callable[[Tensor, Sequence[Tensor]], Tensor]) -> Tensor:
    """``summed(weights, rows)``, a sum over rows, taken in chunks where it is long.

    Inductor gives a long sum for a few columns to all threads, with a barrier for each; chunks are work for each thread.

    Args:
        rows: tensors ``(batch, kv_heads, n, ...)``.
        summed: of a chunk, is given weights ``(batch, kv_heads, groups, chunks, n)`` and rows ``(batch, kv_heads, chunks, n,
            ...)``; it works on the last dimensions.
    """
    if not _is_long(weights) or weights.shape[2] > _SIDE_BY_SIDE:
        return summed(weights, rows)
    n = weights.shape[-1]
    count, rest = divmod(n, _CHUNK)
    whole = n - rest
    chunks = [r[:, :, :whole].unflatten(2, (count, _CHUNK)) for r in rows]
    out = materialise(summed(weights[..., :whole].unflatten(-1, (count, _CHUNK)), chunks)).sum(-2)
    return out + summed(weights[..., whole:], [r[:, :, whole:] for r in rows]) if rest else out


def per_group(x: Tensor, product: Callable[[Tensor], Tensor]) -> Tensor:
    """As :func:`each_group`, or ``product`` of the whole of ``x`` where groups are large."""
    return product(x) if x.shape[2] > _SIDE_BY_SIDE else each_group(x, product)


def each_group(x: Tensor, product: Callable[[Tensor], Tensor]) -> Tensor:
    """``product`` of each query head's slice of ``x`` ``(batch, kv_heads, groups, ...)``: loops side by side."""
    return torch.stack([product(x[:, :, g]) for g in range(x.shape[2])], 2)


def _beside(rows: Tensor, like: Tensor) -> Tensor:
    """``rows`` with a dimension for the groups where ``like`` has it."""
    return rows.unsqueeze(2) if like.dim() == rows.dim() else rows


def materialise(x: Tensor) -> Tensor:
    """``x`` in memory before a loop reads it many times (see :func:`accelpass.ir.core.graph.stored`)."""
    if x.is_contiguous() and all(isinstance(n, int) for n in x.shape):
        return torch.as_strided(x, x.shape, x.stride())
    return x
