"""Grids of groups that a search finds: ranges that are cut where fewer, finer steps lose less than the cut."""

from __future__ import annotations

import torch
from torch import Tensor

from accelpass.ir.linear.formats import Grouped

NORM = 2.4
"""Of an error, as the authors of GPTQ have it in their search."""
SHRINKS = tuple(1 - i / 40 for i in range(17))
"""Shares of the range that are tried, 1 to 0.6."""


def searched_grid(form: Grouped, grouped: Tensor) -> tuple[Tensor, Tensor | None]:
    """Scale and zero point ``(..., groups)`` of groups ``(..., groups, group_size)``, of those tried the ones that lose least.

    A symmetric scale is tried with both signs: the largest magnitude need not be the lowest code, and lies then half a step or more
    beyond the highest.
    """
    whole, zero = form.grid(grouped)
    best, best_zero, least = whole, zero, torch.full_like(whole, torch.inf)
    low, high = grouped.amin(-1).clamp_max(0), grouped.amax(-1).clamp_min(0)
    for share in SHRINKS:
        for sign in (1, -1) if zero is None else (1,):
            scale = form.held(whole * share * sign)
            if zero is None:
                point = None
            else:
                scale = form.held((high - low) * share / form.most)
                point = (-low * share / torch.where(scale == 0, 1.0, scale)).round()
            lost = (form.meant(form.codes(grouped, scale, point), scale, point) - grouped).abs().pow(NORM).sum(-1)
            better = lost < least
            best, least = torch.where(better, scale, best), torch.where(better, lost, least)
            if point is not None and best_zero is not None:
                best_zero = torch.where(better, point, best_zero)
    return best, best_zero
