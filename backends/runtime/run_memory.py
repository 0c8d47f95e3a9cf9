"""What a sampling run remembers from one denoising step to a later one."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from accelpass.ir.core.derived import StateSpec


@dataclass(frozen=True, eq=False)
class Kept:
    """A tensor, and the step that kept it."""

    tensor: Tensor
    step: int


@dataclass(eq=False)
class RunMemory:
    """Tensors by branch (which of the calls of a step) and name; :meth:`find` looks at shape and age besides.

    One name is one tensor: where the batch changes in the middle of a run, the new tensor takes the old one's place.
    """

    held: dict[tuple[int, str], Kept] = field(default_factory=dict)

    def keep(self, branch: int, step: int, tensors: dict[str, Tensor]) -> None:
        self.held.update({(branch, name): Kept(t, step) for name, t in tensors.items()})

    def find(self, branch: int, name: str, like: Hashable, oldest: int, exact: bool = False) -> Tensor | None:
        """What is remembered, laid out in memory as ``like`` says (:func:`accelpass.backends.staged.stage.layout`).

        Args:
            oldest: the step that must have kept it, or a later one; with ``exact``, that very step.

        Returns:
            None if there is nothing, or it is of another shape, or of an earlier step than the schedule means.
        """
        kept = self.held.get((branch, name))
        if kept is None or kept.step < oldest or (exact and kept.step > oldest):
            return None
        shape, strides, dtype, device, *_ = _laid_out(like)
        found = kept.tensor
        if (tuple(found.shape), found.dtype, found.device) != (shape, dtype, device):
            return None
        if found.stride() == strides:
            return found
        return torch.empty_strided(shape, strides, dtype=dtype, device=device).copy_(found)

    def drop(self, branch: int) -> None:
        self.held = {key: kept for key, kept in self.held.items() if key[0] != branch}

    def states(self) -> list[tuple[StateSpec, Tensor]]:
        """What is held, for ``accelpass.state``."""
        made = []
        for (branch, name), kept in self.held.items():
            called = name if branch == 0 else f"{name} (call {branch + 1})"
            made.append((StateSpec(called, tuple(kept.tensor.shape), kept.tensor.dtype, "sampling_run"), kept.tensor))
        return made


def _laid_out(like: Any) -> tuple[Any, ...]:
    assert isinstance(like, tuple)
    return like
