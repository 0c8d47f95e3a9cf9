"""One sampling run of a model: where it is, what its calls have in common, and what it remembers."""

from __future__ import annotations

import threading
import weakref
from collections import Counter, deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from accelpass.backends.runtime.continuity import STEPS, Past
from accelpass.backends.runtime.run_memory import RunMemory
from accelpass.backends.runtime.step_clock import Clock, Tick

_COPIED = 4 * 2**20
"""Bytes up to which an input is compared by its values; a larger one by identity."""


@dataclass(eq=False)
class Call:
    """What a run is told from.

    Attributes:
        times: least and largest timestep; they differ where each sample or token has its own.
        given: the other tensors that the caller passes, by name.
        tensor: one of the model's own.
    """

    latents: Tensor
    times: tuple[float, float]
    given: Mapping[str, Tensor]
    tensor: Tensor | None = None


def times_of(time: Any) -> tuple[float, float]:
    """The least and the largest timestep, which differ where each sample or token has its own."""
    if not isinstance(time, Tensor):
        return float(time), float(time)
    if time.numel() == 1:
        return (float(time),) * 2
    least, largest = torch.stack(time.detach().aminmax()).tolist()
    return float(least), float(largest)


class Seen:
    """An input as a call was given it."""

    def __init__(self, t: Tensor) -> None:
        self._ref, self._version = weakref.ref(t), None if t.is_inference() else t._version
        self._copy = t.detach().clone() if t.numel() * t.element_size() <= _COPIED else None

    def same(self, t: Tensor) -> bool:
        """It is this very tensor, not written to since."""
        if self._ref() is not t:
            return False
        return self._holds(t) if t.is_inference() else t._version == self._version

    @property
    def kept(self) -> Tensor | None:
        """The copy that values are compared with; None of a large input."""
        return self._copy

    def equal(self, t: Tensor) -> bool:
        return self.same(t) or (self._copy is not None and self._holds(t))

    def _holds(self, t: Tensor) -> bool:
        kept = self._copy
        if kept is None:
            return True
        return (kept.shape, kept.dtype, kept.device) == (t.shape, t.dtype, t.device) and torch.equal(kept, t)


@dataclass(eq=False)
class Branch:
    """Calls of a run, one a step, that have all inputs in common but the latents: one side of guidance as two calls.

    Attributes:
        order: its place among the calls of the last step that had it.
    """

    number: int
    given: dict[str, Seen]
    order: int
    step: int


@dataclass(frozen=True, eq=False)
class Ran:
    """What one call computed: the row of actions, and its FLOPs; ``by`` is the compiled code, a StagedModel; of a package None."""

    tick: Tick
    time: float
    row: Any
    flops: int
    attention: int
    by: Any


@dataclass(eq=False)
class Run:
    """A sampling run: its clock, and what its steps keep.

    Attributes:
        length: model calls after which it has ended, if its schedule says so.
        passed: steps of other runs in this run's thread since its last call.
        doubts: steps whose latents were not a sum of what was before.
    """

    clock: Clock
    length: int | None = None
    memory: RunMemory = field(default_factory=RunMemory)
    log: deque[Ran] = field(default_factory=lambda: deque(maxlen=1000))
    past: deque[Past] = field(default_factory=lambda: deque(maxlen=STEPS))
    branches: list[Branch] = field(default_factory=list)
    first: int = 0
    busy: bool = False
    passed: Counter[int] = field(default_factory=Counter)
    proofs: int = 0
    doubts: int = 0
    _thread: weakref.ref[threading.Thread] | None = None
    _times: tuple[float, float] | None = None
    _end: int = 1
    _changed: set[str] = field(default_factory=set)
    _repeated: set[str] = field(default_factory=set)

    def reset(self) -> None:
        """Back to its beginning."""
        self.clock.reset()
        self.memory.clear()
        self.branches.clear()
        self.past.clear()
        self.log.clear()
        self._changed.clear()
        self._repeated.clear()
        self._times, self._end, self.proofs, self.doubts = None, 1, 0, 0

    @property
    def thread(self) -> threading.Thread | None:
        """That made the last call; None if it has ended."""
        found = None if self._thread is None else self._thread()
        return found if found is not None and found.is_alive() else None

    @property
    def ended(self) -> bool:
        last = self.clock.last
        return self.length is not None and last is not None and last.step + 1 >= self.length

    def time(self, times: tuple[float, float]) -> float:
        """The noise level of a call: where tokens have their own, that end of their range which moves from step to step."""
        if self._times is not None and times != self._times:
            self._end = 1 if times[1] != self._times[1] else 0
            self.clock.before = self._times[self._end]
        return times[self._end]

    def tick(self, call: Call, follows: bool = False) -> Tick:
        return self.clock.tick(self.time(call.times), call.latents, follows)

    def repeats(self, call: Call) -> bool:
        return self.clock.repeats(self.time(call.times), call.latents)

    def branch(self, given: Mapping[str, Tensor], tick: Tick) -> Branch | None:
        """The branch that a call belongs to; None if none of the steps before had its inputs.

        Inputs that have changed at every step so far (a ControlNet's) tell nothing. Where inputs cannot tell, the order can.
        """
        told = {n: t for n, t in given.items() if n not in self._changed - self._repeated}
        free = [b for b in self.branches if b.step < tick.step]
        fits = [b for b in free if all(b.given[n].equal(t) for n, t in told.items() if n in b.given)]
        in_order = [b for b in fits if b.order == tick.branch]
        return next(iter(in_order or (fits if told else [])), None)

    def has(self, given: Mapping[str, Tensor]) -> bool:
        """Whether an earlier call had one of these very tensors."""
        return any(b.given[n].same(t) for b in self.branches for n, t in given.items() if n in b.given)

    def note(self, call: Call, tick: Tick, branch: Branch, result: Tensor | None) -> None:
        """The call went well."""
        time, latents = self.time(call.times), self.past[-1].latents if tick.branch else call.latents.detach().clone()
        if tick.branch == 0:
            self.past.append(Past(latents, []))
            self.first = branch.number
        if result is not None and not self.clock.declared:
            self.past[-1].results.append(result.detach().clone())
        for name, t in call.given.items() if tick.step else ():
            known = any(b.given[name].equal(t) for b in self.branches if name in b.given and b.step < tick.step)
            (self._repeated if known else self._changed).add(name)
        for name, t in call.given.items():
            if name not in branch.given or not branch.given[name].same(t):
                branch.given[name] = Seen(t)
        branch.order, branch.step = tick.branch, tick.step
        if branch not in self.branches:
            self.branches.append(branch)
        for gone in [b for b in self.branches if b.step < tick.step - 1]:
            self.branches.remove(gone)
            self.memory.drop(gone.number)
        self.clock.done(tick, time, latents)
        self._times, self._thread = call.times, weakref.ref(threading.current_thread())
        self.passed.clear()

    def history(self) -> list[tuple[str, Tensor]]:
        """What the next call is recognised by: latents and results of the last steps, and copies of small inputs."""
        named = []
        for ago, step in enumerate(reversed(self.past), 1):
            named.append((f"latents[-{ago}]", step.latents))
            named += [(f"result {number}[-{ago}]", t) for number, t in enumerate(step.results, 1)]
        for b in self.branches:
            named += [
                (f"{name} (call {b.number + 1})", seen.kept) for name, seen in b.given.items() if seen.kept is not None
            ]
        return named

    def new_branch(self, tick: Tick) -> Branch:
        taken = {b.number for b in self.branches}
        number = next(n for n in range(len(taken) + 1) if n not in taken)
        return Branch(number, {}, tick.branch, tick.step)
