"""A small feed-forward layer, as plain torch."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "relu": F.relu,
    "relu2": lambda x: F.relu(x).square(),
}


def small_mlp(x: Tensor, activation: str, up: Tensor, gate: Tensor | None, down: Tensor, bias: Tensor) -> Tensor:
    """``down(act(gate x) * up x)``, or ``down(act(up x))``; weights are ``(inner, in)`` and ``(out, inner)``, bias ``(out,)``."""
    act = ACTIVATIONS[activation]
    inner = act(F.linear(x, up)) if gate is None else act(F.linear(x, gate)) * F.linear(x, up)
    return F.linear(inner, down, bias)
