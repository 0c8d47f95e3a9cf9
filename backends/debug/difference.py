"""How far one result is from another: the figure that debug mode and ``accelpass.bisect`` show."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def relative_difference(dense: Tensor, other: Tensor) -> float:
    """Largest ``|dense - other|`` over the largest finite ``|dense|``; 0 for equal tensors.

    Infinite where one of the two has NaN or an infinity that the other has not, or where shapes differ. What is no float
    is equal (0) or not (infinite).
    """
    if dense.shape != other.shape:
        return math.inf
    if dense.numel() == 0:
        return 0.0
    if dense.is_complex() or other.is_complex():
        dense, other = (torch.view_as_real(t.to(torch.complex128)) for t in (dense, other))
    if not dense.is_floating_point() or not other.is_floating_point():
        return 0.0 if torch.equal(dense, other) else math.inf
    a, b = dense.double(), other.to(dense.device).double()
    finite = torch.isfinite(a)
    if not torch.equal(finite, torch.isfinite(b)):
        return math.inf
    # NaN and infinities of the model itself (a masked row) are equal where both have them.
    odd = ~finite
    if not torch.equal(a[odd].nan_to_num(0.0), b[odd].nan_to_num(0.0)):
        return math.inf
    if not bool(finite.any()):
        return 0.0
    largest = a[finite].abs().max().clamp_min(torch.finfo(torch.float32).tiny)
    return float((a[finite] - b[finite]).abs().max() / largest)


def largest_difference(dense: Sequence[Tensor], other: Sequence[Tensor]) -> float:
    """The largest over pairs of tensors; infinite if there are not as many."""
    if len(dense) != len(other):
        return math.inf
    return max((relative_difference(a, b) for a, b in zip(dense, other, strict=True)), default=0.0)


def shown(difference: float | None) -> str:
    """As a person reads it."""
    if difference is None:
        return "not measured"
    if math.isinf(difference):
        return "inf (NaN, an infinity, or another shape)"
    return "0" if difference == 0 else f"{difference:.2e}"
