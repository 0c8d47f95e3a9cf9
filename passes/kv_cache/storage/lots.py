"""Numbers drawn by lot from integers: the same in every order of computation, on every device, and in an exported graph."""

from __future__ import annotations

import torch
from torch import Tensor

PRIME = 2**31 - 1
"""Squares of numbers below it fit into 64 bits."""


def drawn(*numbers: Tensor | int) -> Tensor:
    """A number in (0, 1), float32, for each combination of integers (broadcast against each other); at least one is a tensor."""
    x: Tensor | int = 0
    for place, number in enumerate(numbers):
        # Mixed alone, which is little work; of all combinations there are many.
        x = x + _mixed(_mixed(_mixed((number + 1) * 48_271 + place * 7_654_321)))
    x = _mixed(x)
    assert isinstance(x, Tensor)
    return ((x // 256).float() + 0.5) / 2**23  # of 23 bits, so that neither 0 nor 1 is among them


def gumbel(*numbers: Tensor | int) -> Tensor:
    """The same as a draw of the standard Gumbel distribution."""
    return -torch.log(-torch.log(drawn(*numbers)))


def _mixed(x: Tensor | int) -> Tensor | int:
    x = x % PRIME
    return (x * x + 40_692 + x) % PRIME
