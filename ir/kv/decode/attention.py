"""What decode attention over stored rows takes and gives: packed stores, its results, and how partial results add up."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

WANT = ("lse", "logits", "mass")


class PackedRows(NamedTuple):
    """Keys or values as ``accelpass.ir.kv.rows.quantize_rows`` stores them.

    ``codes`` uint8 ``(B, Hkv, N, D * bits / 8)``, ``step`` and ``low`` float16 ``(B, Hkv, N, D / group)``.
    """

    codes: Tensor
    step: Tensor
    low: Tensor
    bits: int

    @property
    def width(self) -> int:
        """Channels D of one row."""
        return self.codes.shape[-1] * 8 // self.bits

    @property
    def group(self) -> int:
        """Channels that share a step."""
        return self.width // self.step.shape[-1]


Store = Tensor | PackedRows


class Decoded(NamedTuple):
    """Results of one query token per sequence; those that were not asked for are None. R is N where no rows are listed.

    ``out`` ``(B, H, Dv)``; ``lse`` float32 ``(B, H)``, the natural log of the sum of exp(logit), -inf where there is no
    key; ``logits`` float32 ``(B, Hkv, R)``, scaled and biased, summed over the query heads of a key head, -inf where
    there is no key; ``mass`` float32 ``(B, Hkv, R)``, softmax probabilities summed the same way.
    """

    out: Tensor
    lse: Tensor | None = None
    logits: Tensor | None = None
    mass: Tensor | None = None


def check_want(want: Sequence[str]) -> None:
    """Raises ValueError for a result that there is not."""
    for name in want:
        if name not in WANT:
            raise ValueError(f"kv_decode: want={name!r} is not a result; use {', '.join(map(repr, WANT))}")


def merge(parts: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Attention over several stores at once, from the attention over each.

    Args:
        parts: ``out (..., Dv)`` and its ``lse (...)`` per store. A part with ``lse = -inf`` has no key and no weight.
            Ask for ``out`` in float32, or each part is rounded once before it is added.

    Returns:
        ``out`` in the first part's dtype and ``lse`` float32, as one call over all keys would give them.
    """
    lses = torch.stack([lse.float() for _, lse in parts])
    top = lses.amax(0)
    # Where no part has a key, every weight is exp(-inf - 0) = 0 rather than exp(-inf + inf) = nan.
    weights = (lses - top.masked_fill(top == -torch.inf, 0.0)).exp()
    total = weights.sum(0)
    weights = weights / total.masked_fill(total == 0, 1.0)
    out = torch.stack([part.float() for part, _ in parts]).mul(weights.unsqueeze(-1)).sum(0)
    return out.to(parts[0][0].dtype), lses.logsumexp(0)
