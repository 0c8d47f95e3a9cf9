"""Results of a kernel against exact ones, each element within a bound of its own."""

import torch
from torch import Tensor


def within(got: Tensor, expected: Tensor, bound: Tensor) -> None:
    """``|got - expected| <= bound``, and minus infinity at the same places."""
    assert got.shape == expected.shape
    gone = expected == -torch.inf
    assert torch.equal(got == -torch.inf, gone)
    over = torch.where(gone, 0.0, (got.double() - expected).abs() / bound)
    assert not over.numel() or over.max() <= 1, f"{over.max():.3g} times the tolerance"
