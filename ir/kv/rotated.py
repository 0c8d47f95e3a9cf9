"""Rows that are turned before they are rounded, so that a channel with outliers is spread over all of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from accelpass.ir.core.state import StateSpec
from accelpass.ir.kv.banks import Quantized, RowFormat, Rows


@dataclass(frozen=True)
class Rotated(RowFormat):
    """Rows as :class:`Quantized` has them, of ``x H`` in place of x, where H is the Hadamard matrix over the root of its size.

    H is its own inverse, so ``(q H) (k H)^T = q k^T``: a query is turned once in place of the keys, and the sum of values is
    turned back once.
    """

    part: ClassVar[str] = "rotated"
    bits: int = 4
    groups: int = 2

    @property
    def inner(self) -> Quantized:
        return Quantized(self.bits, self.groups)

    def states(self, name: str, heads: int, rows: int, width: int, dtype: torch.dtype) -> list[StateSpec]:
        return self.inner.states(name, heads, rows, width, dtype)

    def encode(self, x: Tensor) -> list[Tensor]:
        return self.inner.encode(hadamard(x.float()))

    def decode(self, rows: Rows, dtype: torch.dtype) -> Tensor:
        return hadamard(self.inner.decode(rows, torch.float32)).to(dtype)

    def scores(self, q: Tensor, rows: Rows) -> Tensor:
        return self.inner.scores(hadamard(q), rows)

    def mixed(self, weights: Tensor, rows: Rows) -> Tensor:
        return hadamard(self.inner.mixed(weights, rows))


def hadamard(x: Tensor) -> Tensor:
    """``x H`` over the last dimension ``d``, a power of two, in ``log2 d`` rounds of sums and differences (Sylvester's order)."""
    width, half = x.shape[-1], 1
    while half < width:
        pairs = x.unflatten(-1, (width // (2 * half), 2, half))
        low, high = pairs.unbind(-2)
        x = torch.stack([low + high, low - high], -2).flatten(-3)
        half *= 2
    return x * width**-0.5
