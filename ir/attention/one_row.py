"""Attention of one query row a head, as loops that a compiler vectorises over channels: nothing is copied or packed.

Scores and weights are float32 ``(batch, kv_heads, groups, n)``; keys and values ``(batch, kv_heads, n, d)``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

_SIDE_BY_SIDE = 8
"""Query heads of a group with a loop of their own each, joined by the compiler to one that reads the rows once."""
_LONG, _CHUNK = 1024, 256
"""From how many rows a sum over rows is taken in chunks, and how long these are. A sum of fewer rows is quicker in one."""
_COLUMNS, _SUMS = 16, 16
"""The least columns of a sum, and how many sums one loop has at most: they stay in vector registers."""


def row_scores(q: Tensor, keys: Tensor) -> Tensor:
    """``q @ keys^T``; ``q`` is float32 ``(batch, kv_heads, groups, d)``."""
    wide = keys.float()
    return per_group(q, lambda one: (one.unsqueeze(-2) * _beside(wide, one)).sum(-1))


def powers(scores: Sequence[Tensor]) -> tuple[list[Tensor], Tensor]:
    """One softmax over several scores: ``exp(scores - max)`` in memory, and the factor ``(..., 1)`` that makes all add up to 1.

    A weighted sum of few columns is multiplied with the factor faster than its many weights are. Without any key that may be
    seen, all is zero.
    """
    top = scores[0].amax(-1, keepdim=True)
    for more in scores[1:]:
        top = torch.maximum(top, more.amax(-1, keepdim=True))
    top = top.clamp_min(torch.finfo(torch.float32).min)  # of a row without keys: -inf - -inf is not a number
    made = [fence(torch.exp(one - top)) for one in scores]
    whole = made[0].sum(-1, keepdim=True)
    for more in made[1:]:
        whole = whole + more.sum(-1, keepdim=True)
    return made, 1 / whole.clamp_min(torch.finfo(torch.float32).tiny)


def row_sum(weights: Tensor, values: Tensor) -> Tensor:
    """``weights @ values``: ``(batch, kv_heads, groups, d)``.

    A loop over rows for a few columns at a time reads memory in strides, and Inductor gives a long one to all threads, a
    barrier each. On a CPU, many rows are summed in chunks, for all columns in one loop: half of the time for 4,096 rows.
    """
    wide, n = values.float(), values.shape[-2]
    is_long = isinstance(n, int) and n >= _LONG and values.device.type == "cpu"
    if not is_long or weights.shape[2] > _SIDE_BY_SIDE:
        return per_group(weights, lambda one: (one.unsqueeze(-1) * _beside(wide, one)).sum(-2))
    count, rest = divmod(n, _CHUNK)
    whole = n - rest
    chunks = wide[..., :whole, :].unflatten(-2, (count, _CHUNK))
    sums = weights.shape[2] * values.shape[-1]
    columns = chunks.split(_COLUMNS * -(-sums // (_COLUMNS * _SUMS)), -1)

    def summed(one: Tensor) -> Tensor:
        column = one.unsqueeze(-1)
        return torch.cat([(column * part).sum(-2) for part in columns], -1)

    out = fence(each_group(weights[..., :whole].unflatten(-1, (count, _CHUNK)), summed)).sum(-2)
    return out + row_sum(weights[..., whole:], values[..., whole:, :]) if rest else out


def per_group(x: Tensor, product: Callable[[Tensor], Tensor]) -> Tensor:
    """As :func:`each_group`, or ``product`` of the whole of ``x`` where groups are large."""
    return product(x) if x.shape[2] > _SIDE_BY_SIDE else each_group(x, product)


def each_group(x: Tensor, product: Callable[[Tensor], Tensor]) -> Tensor:
    """``product`` of each query head's slice of ``x`` ``(batch, kv_heads, groups, ...)``: loops side by side."""
    return torch.stack([product(x[:, :, g]) for g in range(x.shape[2])], 2)


def _beside(rows: Tensor, like: Tensor) -> Tensor:
    """``rows`` with a dimension for the groups where ``like`` has it."""
    return rows.unsqueeze(2) if like.dim() == rows.dim() else rows


def fence(x: Tensor) -> Tensor:
    """``x`` in memory before a loop reads it many times (see :func:`accelpass.ir.graph.stored`)."""
    if x.is_contiguous() and all(isinstance(n, int) for n in x.shape):
        return torch.as_strided(x, x.shape, x.stride())
    return x
