"""What a sampling run remembers from one denoising step to a later one."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from accelpass.ir.core.state import STATE, Slot


class _Calls:
    """Which of the calls of a step: the owner of what they keep."""


@dataclass(eq=False)
class RunMemory:
    """Slots by branch (which of the calls of a step) and name; :meth:`find` looks at shape and age besides.

    One name is one tensor: where the batch changes in the middle of a run, the new tensor takes the old one's place.
    """

    _branches: dict[int, _Calls] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.slots())

    def keep(self, branch: int, step: int, tensors: dict[str, Tensor]) -> None:
        owner = self._branches.setdefault(branch, _Calls())
        for name, t in tensors.items():
            STATE.keep(owner, name, t, "sampling_run", step)

    def get(self, branch: int, name: str) -> Slot | None:
        """What is remembered, of any shape and age."""
        owner = self._branches.get(branch)
        return None if owner is None else STATE.kept(owner, name)

    def find(self, branch: int, name: str, like: Hashable, oldest: int, exact: bool = False) -> Tensor | None:
        """What is remembered, laid out in memory as ``like`` says (:func:`accelpass.backends.staged.stage.layout`).

        Args:
            oldest: the step that must have kept it, or a later one; with ``exact``, that very step.

        Returns:
            None if there is nothing, or it is of another shape, or of an earlier step than the schedule means.
        """
        kept = self.get(branch, name)
        if kept is None or kept.mark < oldest or (exact and kept.mark > oldest):
            return None
        shape, strides, dtype, device, *_ = _laid_out(like)
        found = kept.tensor
        if (tuple(found.shape), found.dtype, found.device) != (shape, dtype, device):
            return None
        if found.stride() == strides:
            return found
        return torch.empty_strided(shape, strides, dtype=dtype, device=device).copy_(found)

    def drop(self, branch: int) -> None:
        self._branches.pop(branch, None)

    def clear(self) -> None:
        self._branches.clear()

    def slots(self) -> list[tuple[str, Slot]]:
        """What is held, by name; of later calls of a step, with their number."""
        return [
            (slot.spec.name if branch == 0 else f"{slot.spec.name} (call {branch + 1})", slot)
            for branch, owner in self._branches.items()
            for _, slot in STATE.of([owner])
        ]


def _laid_out(like: Any) -> tuple[Any, ...]:
    assert isinstance(like, tuple)
    return like
