"""What compiled models remember between calls: the state that passes declared."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from accelpass.ir.derived import DERIVED
from accelpass.ir.errors import AccelpassError
from accelpass.lookup import modules_of


@dataclass(frozen=True)
class StateBuffer:
    """One remembered tensor: its name, the parameter it lives with, its size and what ends it."""

    name: str
    owner: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    bytes: int
    lifetime: str


def named_tensors(fast: Any) -> dict[int, tuple[str, Tensor]]:
    """(path, tensor) by identity, of every parameter and buffer of what was compiled.

    Raises:
        AccelpassError: there is no module behind ``fast``.
    """
    modules = modules_of(fast)
    if not modules:
        raise AccelpassError(f"{type(fast).__name__} runs no module; give what torch.compile(model) returned")
    return {id(t): (name, t) for m in modules for name, t in (*m.named_parameters(), *m.named_buffers())}


def state(fast: Any) -> list[StateBuffer]:
    """Every buffer that passes keep for this model; empty if none was declared or the model has not run yet."""
    known = named_tensors(fast)
    found = []
    for recipe, ids, tensors in DERIVED.of([t for _, t in known.values()]):
        if recipe.state is not None:
            (t,) = tensors
            size = t.numel() * t.element_size()
            owner = known[ids[0]][0]
            found.append(StateBuffer(recipe.state.name, owner, tuple(t.shape), t.dtype, size, recipe.state.lifetime))
    return found


def reset(fast: Any) -> None:
    """Put every state of this model back to its start, for all of its graphs."""
    for recipe, _, tensors in DERIVED.of([t for _, t in named_tensors(fast).values()]):
        if recipe.state is not None:
            with torch.no_grad():
                tensors[0].fill_(recipe.state.fill)
