"""What compiled models remember between calls: the state that passes declared, and the caches that they filled."""

from __future__ import annotations

import fnmatch
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from accelpass.api.lookup import modules_of
from accelpass.backends.runtime.runs import RUNS
from accelpass.backends.runtime.step_clock import Declared, declared
from accelpass.ir.core.state import STATE, Slot
from accelpass.ir.errors import AccelpassError
from accelpass.ir.kv import holdings

if TYPE_CHECKING:
    from accelpass.caches.kv_cache import KVCache


@dataclass(frozen=True)
class StateBuffer:
    """One remembered tensor: its name, the parameter or cache layer it lives with, its size and what ends it."""

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


def counters_of(tensors: Iterable[Tensor]) -> list[Tensor]:
    """The counters of all cache layers that hold tokens which the model with these tensors wrote."""
    mine = {id(t) for t in tensors}
    found = ((count, h.model() if h.model is not None else None) for count, h in holdings.holdings())
    return [count for count, by in found if by is not None and id(by) in mine]


def caches_of(tensors: Iterable[Tensor]) -> list[KVCache]:
    """The caches that hold tokens which the model with these tensors wrote, oldest first."""
    counters = {id(count) for count in counters_of(tensors)}
    if not counters:
        return []  # and transformers need not be installed
    from accelpass.caches.kv_cache import live_caches

    return [cache for cache in live_caches() if any(id(layer.count) in counters for layer in cache.layers)]


def state(fast: Any, history: bool = False) -> list[StateBuffer]:
    """Every buffer that passes keep for this model, of every cache that holds its tokens, and of its sampling runs.

    Empty if none was declared or the model has not run yet. A cache that was reset belongs to no model until it is filled.

    Args:
        history: list as well what a sampling run's next call is recognised by: the latents and results of its last steps
            and copies of its small inputs. Passes read none of it.
    """
    return [buffer for buffer, _ in _remembered(fast, history)]


def _remembered(fast: Any, history: bool = False) -> list[tuple[StateBuffer, Tensor]]:
    known = named_tensors(fast)
    tensors = [t for _, t in known.values()]
    found = [_buffer(slot, known[anchor][0]) for anchor, slot in STATE.of(tensors)]
    for number, cache in enumerate(caches_of(tensors)):
        for index, layer in enumerate(cache.layers):
            owner = f"cache {number}, layer {index}"
            found += [_buffer(slot, owner) for _, slot in STATE.of([layer.count])]
    runs = [run for known in RUNS.all_of(tensors) for run in known.all() if run.memory or (history and run.past)]
    for number, run in enumerate(runs, 1):
        owner = f"sampling run {number}" if number > 1 else "sampling run"
        found += [_buffer(slot, owner, name) for name, slot in run.memory.slots()]
        found += [_made(name, owner, t, "sampling_run") for name, t in (run.history() if history else ())]
    return found


def read(fast: Any, pattern: str = "*") -> dict[str, Tensor]:
    """Copies of what a compiled model remembers, by name: what taps gathered, scores of a cache, and so on.

    Args:
        pattern: a shell pattern for names as :func:`state` lists them, ``wanda.*``. Of a name that several owners have,
            ``name@owner`` is meant and returned.

    Raises:
        AccelpassError: nothing has such a name; says what there is.
    """
    return {name: t.detach().clone() for name, t in _named(fast, pattern).items()}


def write(fast: Any, values: Mapping[str, Any]) -> None:
    """Set what a compiled model remembers: by name as :func:`read` has it, a tensor of the shape there or a number.

    Raises:
        AccelpassError: no such name, or another shape; nothing is written then.
    """
    found = {name: (_named(fast, name), torch.as_tensor(value)) for name, value in values.items()}
    for name, (held, value) in found.items():
        for t in held.values():
            if value.dim() and value.shape != t.shape:
                raise AccelpassError(f"{name} is {list(t.shape)}; what was given is {list(value.shape)}")
    with torch.no_grad():
        for held, value in found.values():
            for t in held.values():
                t.copy_(value)


def _named(fast: Any, pattern: str) -> dict[str, Tensor]:
    """The tensors that a model remembers, by name; of those that share one, by name and owner."""
    found = _remembered(fast)
    count = Counter(buffer.name for buffer, _ in found)
    named = {b.name if count[b.name] == 1 else f"{b.name}@{b.owner}": t for b, t in found}
    held = {name: t for name, t in named.items() if fnmatch.fnmatchcase(name, pattern)}
    if not held:
        there = ", ".join(sorted(named)[:6]) or "nothing is remembered yet; call the model once"
        raise AccelpassError(f"{type(fast).__name__} remembers nothing by the name {pattern!r}; there is: {there}")
    return held


def remembered_by(tensors: Iterable[Tensor]) -> list[Tensor]:
    """The tensors that :func:`state` lists, for the model with these tensors."""
    own = list(tensors)
    return [slot.tensor for anchors in (own, counters_of(own)) for _, slot in STATE.of(anchors)]


def _buffer(slot: Slot, owner: str, name: str = "") -> tuple[StateBuffer, Tensor]:
    return _made(name or slot.spec.name, owner, slot.tensor, slot.spec.lifetime)


def _made(name: str, owner: str, t: Tensor, lifetime: str) -> tuple[StateBuffer, Tensor]:
    return StateBuffer(name, owner, tuple(t.shape), t.dtype, t.numel() * t.element_size(), lifetime), t


def reset(fast: Any) -> None:
    """Put every state of this model back to its start, for all of its graphs, and empty every cache that it filled.

    Which tokens of the last prompt survived is forgotten. The next call of a diffusion model is the first step of a sampling run.
    """
    tensors = [t for _, t in named_tensors(fast).values()]
    for t in tensors:
        STATE.reset(t)
    for known in RUNS.all_of(tensors):
        known.reset()
    for count in counters_of(tensors):
        holdings.clear(count)
        empty = holdings.holding_of(count).empty
        if empty is not None:
            empty()


def sampling_run(fast: Any) -> Declared:
    """Declare a sampling run of a diffusion model: the calls made inside ``with sampling_run(fast):`` are one run.

    Otherwise a run is told by its latents and timesteps; inside the block timesteps may go back (restart sampling), and a
    sampler may add what noise it likes. A request whose steps take turns with another's holds on to what this returns,
    and enters it again at each step::

        request = accelpass.sampling_run(fast)
        with request:
            noise = fast(latents, timestep)

    It holds for the thread or task that enters it. What the run keeps goes with the object.
    """
    if hasattr(fast, "sampling_run"):  # of a package
        return cast(Declared, fast.sampling_run())
    return declared(t for _, t in named_tensors(fast).values())
