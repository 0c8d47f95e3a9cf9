"""The state store: every tensor that is remembered between calls is a slot, found by what it belongs to and its name."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

LIFETIMES = ("sequence", "sampling_run", "model")


@dataclass(frozen=True)
class StateSpec:
    """A tensor that is remembered between calls, as it is declared.

    Attributes:
        name: unique for its owner: ``h2o.scores``.
        shape, dtype, fill: how it starts, and what ``reset`` makes of it.
        lifetime: what ends it: ``sequence``, ``sampling_run`` or ``model``.
        batched: one such tensor for each sequence: the owner's first dimension comes before ``shape``.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    lifetime: str
    fill: float = 0.0
    batched: bool = False

    def __post_init__(self) -> None:
        if self.lifetime not in LIFETIMES:
            raise ValueError(
                f"lifetime={self.lifetime!r} is not known; use {', '.join(LIFETIMES[:-1])} or {LIFETIMES[-1]}"
            )

    def start(self, owner: Tensor) -> Tensor:
        """What it is before the first call, on the owner's device."""
        shape = (owner.shape[0], *self.shape) if self.batched else self.shape
        return torch.full(shape, self.fill, dtype=self.dtype, device=owner.device)


@dataclass(eq=False)
class Slot:
    """A remembered tensor and whose it is.

    Attributes:
        owner: a tensor of a model, the counter of a cache's layer, a branch of a sampling run; the slot goes with it.
        begins: it has a value before the first call. Others exist from the call on that keeps them, to the next reset.
        mark: a number that whoever keeps a value wants back with it: the denoising step, say.
    """

    owner: weakref.ref[Any]
    spec: StateSpec
    tensor: Tensor
    begins: bool
    mark: int = 0

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The tensor, as derived tensors are read."""
        return (self.tensor,)

    @property
    def refs(self) -> tuple[weakref.ref[Any], ...]:
        return (self.owner,)

    @property
    def stamps(self) -> tuple[()]:
        """None: state outlives a change of its owner's values."""
        return ()

    def serves(self, sources: Sequence[Any]) -> bool:
        """Whether it is the state of these owners."""
        return len(sources) == 1 and self.owner() is sources[0]


@dataclass(frozen=True, eq=False)
class Snapshot:
    """Copies of all that one owner's slots held."""

    slots: Mapping[Hashable, tuple[StateSpec, Tensor, bool, int]]

    def nbytes(self) -> int:
        return sum(t.numel() * t.element_size() for _, t, _, _ in self.slots.values())


class StateStore:
    """All that compiled models remember, in one place: by owner, which is held weakly, and by what was declared."""

    def __init__(self) -> None:
        self._slots: dict[int, tuple[weakref.ref[Any], dict[Hashable, Slot]]] = {}
        self._lock = threading.RLock()

    def slot(self, owner: Tensor, spec: StateSpec) -> Slot:
        """The owner's slot of this declaration, at its start if no call has asked for it before."""
        known = self._slots.get(id(owner))
        found = None if known is None or known[0]() is not owner else known[1].get(spec)
        if found is not None:
            return found
        with self._lock:
            ref, held = self._of(owner)
            if spec not in held:
                with torch.no_grad():
                    held[spec] = Slot(ref, spec, spec.start(owner), True)
            return held[spec]

    def keep(self, owner: Any, name: str, tensor: Tensor, lifetime: str, mark: int = 0) -> Slot:
        """Remember what a call has made, in the place of what an earlier one kept by this name."""
        with self._lock:
            ref, held = self._of(owner)
            spec = StateSpec(name, tuple(tensor.shape), tensor.dtype, lifetime)
            held[name] = Slot(ref, spec, tensor, False, mark)
            return held[name]

    def kept(self, owner: Any, name: str) -> Slot | None:
        """What :meth:`keep` has kept, or None."""
        known = self._slots.get(id(owner))
        return None if known is None or known[0]() is not owner else known[1].get(name)

    def of(self, owners: Iterable[Any], prefix: str = "") -> list[tuple[int, Slot]]:
        """The slots of these owners whose name begins so, with the owner's ``id``."""
        with self._lock:
            known = [(id(owner), self._slots[id(owner)]) for owner in owners if id(owner) in self._slots]
            return [(key, s) for key, (_, held) in known for s in held.values() if s.spec.name.startswith(prefix)]

    def reset(self, owner: Any) -> None:
        """Back to the start: what has a first value gets it, all else is forgotten."""
        with self._lock, torch.no_grad():
            _, held = self._slots.get(id(owner), (None, {}))
            for key, slot in list(held.items()):
                if slot.begins:
                    slot.tensor.fill_(slot.spec.fill)
                else:
                    del held[key]

    def discard(self, owners: Iterable[Any], prefix: str = "") -> dict[str, Tensor]:
        """Forget slots whose name begins so; returns what they held."""
        found: dict[str, Tensor] = {}
        with self._lock:
            for owner in owners:
                _, held = self._slots.get(id(owner), (None, {}))
                for key, slot in list(held.items()):
                    if slot.spec.name.startswith(prefix):
                        found[slot.spec.name] = held.pop(key).tensor
        return found

    def reorder(self, owner: Any, index: Tensor) -> None:
        """Let each sequence have what the sequence ``index`` had, ``(batch,)``: beams."""
        with torch.no_grad():
            for slot in (slot for _, slot in self.of([owner]) if slot.spec.batched):
                slot.tensor.copy_(slot.tensor.index_select(0, index.to(slot.tensor.device)))

    def snapshot(self, owner: Any, copied: bool = True) -> Snapshot:
        """What the owner's slots hold: copies, or, for a snapshot that is restored elsewhere at once, the tensors themselves."""
        with self._lock:
            _, held = self._slots.get(id(owner), (None, {}))
            return Snapshot(
                {key: (s.spec, s.tensor.clone() if copied else s.tensor, s.begins, s.mark) for key, s in held.items()}
            )

    def restore(self, owner: Any, snapshot: Snapshot) -> None:
        """Put a snapshot back, of this owner or another; slots that it does not have go back to their start.

        Tensors stay where they are in memory, as graphs may have been recorded with their addresses.
        """
        self.reset(owner)
        with self._lock, torch.no_grad():
            ref, held = self._of(owner)
            for key, (spec, tensor, begins, mark) in snapshot.slots.items():
                there = held.get(key)
                if there is not None and there.tensor.shape == tensor.shape:
                    there.tensor.copy_(tensor)
                    there.mark = mark
                else:
                    held[key] = Slot(ref, spec, tensor.clone(), begins, mark)

    def _of(self, owner: Any) -> tuple[weakref.ref[Any], dict[Hashable, Slot]]:
        known = self._slots.get(id(owner))
        if known is None or known[0]() is not owner:
            key, slots = id(owner), self._slots

            def gone(ref: weakref.ref[Any]) -> None:
                if key in slots and slots[key][0] is ref:
                    del slots[key]

            known = slots[key] = (weakref.ref(owner, gone), {})
        return known


STATE = StateStore()
