"""Which rows fill a layer's slots: the best of each head, or the best of all heads together."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

import torch
from torch import Tensor

from accelpass.ir.kv.banks import taken_rows

Kept = tuple[list[Tensor], Tensor, Tensor]
"""Rows for the banks; their positions and scores, ``(batch, kv_heads, slots)``, position -1 where a slot is empty."""


def best_of_each(
    first: Tensor, slots: int, limit: Tensor, rows: Sequence[Tensor], positions: Tensor, score: Tensor
) -> Kept:
    """The ``limit`` ``(batch,)`` best rows of each head.

    Args:
        first: what rows are compared by, ``(batch, kv_heads, rows)``; -inf for what is none, inf for what must stay.
        rows: tensors ``(batch, kv_heads, rows, ...)``.
    """
    best, in_use = _best(first, slots, limit)
    where = positions.gather(-1, best).masked_fill(in_use.logical_not(), -1)
    return taken_rows(rows, best), where, score.gather(-1, best)


def best_of_all(
    first: Tensor, slots: int, limit: Tensor, least: float, rows: Sequence[Tensor], positions: Tensor, score: Tensor
) -> Kept:
    """The best ``limit * kv_heads`` rows of all heads, of each at least ``least * limit`` (AdaKV, arXiv 2407.11550, with its
    safeguard). All heads share the slots, and a row is one head's: banks have one head, positions and scores all.
    """
    heads, tokens = first.shape[1:]
    part = Fraction(least).limit_denominator(1000)
    sure = (limit * part.numerator) // part.denominator
    place = first.argsort(dim=-1, descending=True, stable=True).argsort(-1)
    first = first.masked_fill((place < sure[:, None, None]) & (first > float("-inf")), float("inf"))
    best, in_use = _best(_joined(first), slots, limit * heads)
    mine = (best // tokens == torch.arange(heads, device=best.device)[:, None]) & in_use
    where = _joined(positions).gather(-1, best).expand(-1, heads, -1)
    scores = _joined(score).gather(-1, best).expand(-1, heads, -1)
    return taken_rows([_joined(t) for t in rows], best), where.masked_fill(mine.logical_not(), -1), scores


def _best(first: Tensor, slots: int, limit: Tensor) -> tuple[Tensor, Tensor]:
    """Indices of the best rows, and which of them count."""
    # There may be fewer rows than slots: more columns that stand for none.
    none = first.new_full((1, 1, 1), float("-inf")).expand(*first.shape[:2], slots)
    best = torch.topk(torch.cat([first, none], -1), slots, -1).indices
    in_use = (torch.arange(slots, device=best.device) < limit[:, None, None]) & (best < first.shape[-1])
    return best.clamp_max(first.shape[-1] - 1), in_use


def _joined(x: Tensor) -> Tensor:
    """All heads' rows as those of one."""
    return x.flatten(1, 2).unsqueeze(1)
