"""Tensors derived from weights (packed, concatenated), kept beside the weights themselves.

Dynamo shares one compiled graph among all instances of a class and does not recompile when a weight is swapped or
reloaded. What a pass computes from a weight is therefore found by the identity of the weight that was passed in.
"""

from __future__ import annotations

import itertools
import operator
import threading
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from accelpass.ir.core.state import STATE, Slot, StateSpec
from accelpass.ir.core.weight_identity import VOID, Place, Stamp, probes, same_values, stamp
from accelpass.ir.errors import ReleasedWeightError


@dataclass(frozen=True)
class Recipe:
    """How to derive tensors from model tensors. Equal recipes on equal tensors share their result.

    ``key`` must identify everything that changes the result (method, options, format version), because derived tensors
    are shared between graphs by it. ``fn`` takes the source tensors (detached) and returns the derived ones.
    ``first``: what it makes is the first source in another form, and is called by its path alone.
    """

    key: tuple[Any, ...]
    fn: Callable[..., tuple[Tensor, ...]]
    state: StateSpec | None = None
    first: bool = False

    @staticmethod
    def of_state(spec: StateSpec) -> Recipe:
        """State is derived from its owner in one respect: it lives with it, on its device. It is kept in :data:`.state.STATE`."""
        key = ("state", spec.name, spec.shape, str(spec.dtype), spec.lifetime, spec.fill, spec.batched)
        return Recipe(key, lambda owner: (spec.start(owner),), spec)

    def __hash__(self) -> int:
        return hash(self.key)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Recipe) and self.key == other.key

    def after(self, parts: Sequence[tuple[Recipe | None, int, int, int]]) -> Recipe:
        """This recipe applied to outputs of other recipes: (recipe or None, its output, first and end source)."""
        if all(inner is None for inner, *_ in parts):
            return self

        def fn(*sources: Tensor) -> tuple[Tensor, ...]:
            # Several outputs of one derivation come from one run of it.
            made = {a: i.fn(*sources[a:b]) for i, _, a, b in parts if i}
            return self.fn(*(made[a][o] if i else sources[a] for i, o, a, _ in parts))

        return Recipe((self.key, *((i.key if i else None, o, a, b) for i, o, a, b in parts)), fn)


def is_released(tensor: Tensor) -> bool:
    """True if ``free_weights`` gave the tensor's memory back; shape and dtype remain."""
    return tensor.numel() > 0 and tensor.untyped_storage().size() == 0


_REFUSING: weakref.WeakSet[nn.Module] = weakref.WeakSet()


def refuse_uncompiled_calls(model: nn.Module) -> None:
    """Let modules whose weights were released say so when they run uncompiled; compiled graphs never run their hooks."""
    for module in model.modules():
        if module not in _REFUSING and any(is_released(p) for p in module.parameters(recurse=False)):
            _REFUSING.add(module)
            module.register_forward_pre_hook(_refuse)


def _refuse(module: nn.Module, args: Any) -> None:
    if not torch.compiler.is_compiling() and any(is_released(p) for p in module.parameters(recurse=False)):
        raise ReleasedWeightError(
            f"{type(module).__name__} runs uncompiled, and free_weights released the storage of its weights. Call what torch.compile "
            "returned; if you do, Dynamo has reached its recompile limit (torch._dynamo.config.recompile_limit) or calls "
            "the layer from code that it does not compile. Otherwise load the model again, without free_weights."
        )


def owns_storage(tensor: Tensor) -> bool:
    """True if no other tensor can live in the same memory, and it has not been given back yet."""
    return tensor.untyped_storage().size() == tensor.numel() * tensor.element_size()


def _give_back(tensor: Tensor) -> int:
    """Free the tensor's memory, keeping its shape; returns the bytes."""
    storage = tensor.untyped_storage()
    size = storage.size()
    if not storage.resizable():  # memory of somebody else, a loaded file's for one: let go of it
        tensor.data = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device)
        storage = tensor.untyped_storage()
    storage.resize_(0)
    return size


def leave_file(tensors: Sequence[Tensor]) -> None:
    """Copy tensors that live in a file's mapping: the whole of it stays in memory until the last one has left."""
    for tensor in tensors:
        if not tensor.untyped_storage().resizable() and tensor.device.type == "cpu":
            tensor.data = tensor.detach().clone()


@dataclass
class Entry:
    """Derived tensors and what they were derived from."""

    refs: tuple[weakref.ref[Tensor], ...]
    stamps: tuple[Stamp, ...]
    tensors: tuple[Tensor, ...]

    def serves(self, sources: Sequence[Tensor]) -> bool:
        """Whether ``sources`` are the tensors that these were derived from, unchanged."""
        if any(ref() is not source for ref, source in zip(self.refs, sources, strict=True)):
            return False
        return all(known.fits(source) for known, source in zip(self.stamps, sources, strict=True))


class SeenSources:
    """The sources of several entries as one call found them, for the next call to compare all at once.

    :meth:`Entry.serves` asks tensor by tensor, some 10 us a weight. Comparing all at once takes a tenth of a microsecond each
    for what a tensor says of itself. Its values take longer, so that a call of few tokens compares those of some weights
    alone, others each time; if one differs, all are looked at.
    """

    TURNS = 4
    """Weights whose values a small call compares."""
    EVERY = 64
    """On a GPU reading a value waits for it: small calls then compare all weights, once in so many calls."""

    def __init__(self, entries: Sequence[Entry | Slot], restamped: int) -> None:
        """
        Args:
            restamped: ``DERIVED.restamped`` from before the entries were asked.
        """
        self._entries = [weakref.ref(e) for e in entries]  # weak: the entries of a cache go when the cache does
        self._sources = [r for e in entries for r in e.refs]
        self._stamped = [bool(e.stamps) for e in entries for _ in e.refs]
        stamps = [s for e in entries for s in e.stamps]
        self._pointers = [s.pointer for s in stamps]
        self._versions = [s.version for s in stamps]
        self._storages = [s.storage for s in stamps if s.storage is not None]
        self._probes = [s.probe for s in stamps]
        self._places: list[Place | None] | None = None
        self._turn = 0
        self._restamped = restamped

    @property
    def entries(self) -> list[Entry | Slot | None]:
        """The entries; None for one that is gone."""
        return [ref() for ref in self._entries]

    def served(self, sources: Sequence[Tensor], thorough: bool = True) -> list[Entry | Slot] | None:
        """The entries, if they still serve ``sources``; None also where only a closer look can tell.

        Args:
            thorough: compare values of all weights, not of some.
        """
        entries = [entry for ref in self._entries if (entry := ref()) is not None]
        if self._restamped != DERIVED.restamped or len(entries) < len(self._entries) or None in self._versions:
            return None
        if not all(map(operator.is_, [ref() for ref in self._sources], sources)):
            return None
        stamped = list(itertools.compress(sources, self._stamped))
        if list(map(Tensor.data_ptr, stamped)) != self._pointers:
            return None
        if not all(map(operator.is_, [ref() for ref in self._storages], map(Tensor.untyped_storage, stamped))):
            return None
        if [t._version for t in stamped] != self._versions:
            return None
        return entries if self._same_values(stamped, thorough) else None

    def _same_values(self, stamped: Sequence[Tensor], thorough: bool) -> bool:
        count = len(stamped)
        if self._places is None:
            self._places = list(map(Place.of, stamped))
        if thorough or count <= self.TURNS:
            return same_values(probes(stamped, self._places), self._probes)
        turn, self._turn = self._turn, self._turn + 1
        if stamped[0].is_cuda:
            return turn % self.EVERY > 0 or same_values(probes(stamped, self._places), self._probes)
        chosen = [(turn * self.TURNS + i) % count for i in range(self.TURNS)]
        now = probes([stamped[i] for i in chosen], [self._places[i] for i in chosen])
        return same_values(now, [self._probes[i] for i in chosen])


class DerivedTensors:
    """All derived tensors of the process, each owned by the source tensors that it was derived from."""

    def __init__(self) -> None:
        self._entries: dict[tuple[tuple[int, ...], Recipe], Entry] = {}
        self._lock = threading.RLock()
        self.restamped = 0
        """How often the stamps of entries were changed; what a :class:`SeenSources` compared before is void then."""

    def get(self, sources: Sequence[Tensor], recipe: Recipe, path: str = "") -> Entry | Slot:
        """The derived tensors; computed if they are missing or a source changed since. Of state, the slot."""
        if recipe.state is not None:
            return STATE.slot(sources[0], recipe.state)
        key = (tuple(map(id, sources)), recipe)
        entry = self._entries.get(key)
        if entry is not None and entry.serves(sources):
            return entry
        with self._lock:
            entry = self._entries.get(key)
            if entry is not None and entry.serves(sources):
                return entry
            if any(map(is_released, sources)):
                raise ReleasedWeightError(
                    f"the memory of {path or 'a weight'} was released by free_weights, and it is needed again by "
                    f"{_pass_name(recipe.key)}. Load the model again, or compile it once with all the passes you want."
                )
            with torch.no_grad():
                made = recipe.fn(*(s.detach() for s in sources))
            return self._store(key, sources, made)

    def __len__(self) -> int:
        return len(self._entries)

    def seed(self, sources: Sequence[Tensor], recipe: Recipe, tensors: tuple[Tensor, ...]) -> None:
        """Put in tensors that were derived earlier (a saved packed model)."""
        with self._lock:
            self._store((tuple(map(id, sources)), recipe), sources, tensors)

    def release(self, sources: Sequence[Tensor]) -> int:
        """Give back the memory of ``sources``; returns the bytes. What was derived from them stays valid."""
        wanted = set(map(id, sources))
        with self._lock:
            self.restamped += 1
            freed = sum(map(_give_back, sources))
            for (ids, _), entry in self._entries.items():
                if wanted.intersection(ids):
                    alive = [r() for r in entry.refs]
                    entry.stamps = tuple(stamp(t) for t in alive if t is not None)
        return freed

    def forget(self, sources: Sequence[Tensor]) -> None:
        """Drop what was derived from ``sources`` so that the next call derives it anew (after a ``.data`` write)."""
        wanted = set(map(id, sources))
        with self._lock:
            self.restamped += 1
            for key in [k for k in self._entries if wanted.intersection(k[0])]:
                entry = self._entries[key]
                if not any(t is not None and is_released(t) for t in (r() for r in entry.refs)):
                    entry.stamps = (VOID,) * len(entry.refs)  # compiled graphs hold the entry too
                    del self._entries[key]

    def of(self, sources: Sequence[Tensor]) -> list[tuple[Recipe, tuple[int, ...], tuple[Tensor, ...]]]:
        """What is held for ``sources``: (recipe, ids of its sources, tensors)."""
        wanted = set(map(id, sources))
        with self._lock:
            return [(k[1], k[0], e.tensors) for k, e in self._entries.items() if wanted.issuperset(k[0])]

    def _store(self, key: tuple[tuple[int, ...], Recipe], sources: Sequence[Tensor], made: tuple[Tensor, ...]) -> Entry:
        def drop(_: object, key: tuple[tuple[int, ...], Recipe] = key) -> None:
            self._entries.pop(key, None)

        entry = Entry(tuple(weakref.ref(s, drop) for s in sources), tuple(map(stamp, sources)), tuple(made))
        self._entries[key] = entry
        return entry


def _pass_name(key: tuple[Any, ...]) -> str:
    """The first name in a recipe's key, which composition nests."""
    while not isinstance(key[0], str):
        key = key[0]
    return key[0]


DERIVED = DerivedTensors()
