"""Codes that a plan holds for one weight: they take its place if it is the weight that they were made for."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from accelpass.ir.core.tensors import placed
from accelpass.ir.errors import PlanError
from accelpass.ir.torch_private import FakeTensor

_CHANGED = 0.01
"""Relative change of a weight from which on codes are not those of it; rounding a model to bfloat16 changes a fifth of that."""


def probe(weight: Tensor) -> Tensor:
    """The weight ``(out, in)`` times one fixed direction, ``(out,)``: what tells it from another at a fraction of its size."""
    direction = torch.randn(weight.shape[1], generator=torch.Generator().manual_seed(0)).to(weight.device)
    return weight.detach().float() @ direction


def codes_of(
    packed: Sequence[Tensor], known: Tensor | None, transposed: bool, otherwise: str
) -> Callable[[Tensor], tuple[Tensor, ...]]:
    """A recipe's function: the codes of a weight.

    Args:
        known: the probe of the weight that they were made for; None lets any weight have them.
        transposed: the weight is stored as ``(in, out)``.
        otherwise: what the :class:`PlanError` says for another weight.
    """

    def stored(w: Tensor) -> tuple[Tensor, ...]:
        if known is not None and not isinstance(w, FakeTensor):
            (held,) = placed(w, [known])
            away = (probe(w.t() if transposed else w) - held).norm()
            if not bool(away <= _CHANGED * held.norm()):
                raise PlanError(otherwise)
        return placed(w, packed)

    return stored
