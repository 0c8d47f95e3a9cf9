"""Whose sampling run a model call belongs to, and where that run is.

Runs belong to the model, not to compiled code: a recompilation in the middle (texts of another length, guidance switched
off) goes on with the same run. A call is of the run that its caller declares, else of the one that its latents come of
(:mod:`accelpass.backends.runtime.continuity`). A call of which that cannot be told begins a run, which computes in full.
"""

from __future__ import annotations

import threading
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from accelpass.backends.runtime.continuity import origin, result_of
from accelpass.backends.runtime.run import Branch, Call, Ran, Run
from accelpass.backends.runtime.step_clock import Declared, Tick, declaration_of
from accelpass.ir.transform.steps import StepError

MOST = 16
"""Undeclared runs of a model that are remembered at once."""
PATIENCE = 3
"""A run is given up when another of the same thread has made so many steps without it; in turns each makes one."""
DOUBTED = (
    "began a run of their own, or were computed by themselves, though their timestep could be the next of an earlier run: their "
    "latents are not a sum of what it had (a sampler that adds noise or clips). Declare runs: with accelpass.sampling_run(model): ..."
)
CHANGED = "had inputs that no call of the step before had, so that nothing was reused"
RENEWED = "found nothing that an earlier step of the run had kept in this shape, and computed it anew"


@dataclass(eq=False)
class Turn:
    """One call of a run.

    Attributes:
        run: None if no run could be told and none can begin here: everything is computed, and nothing kept.
    """

    run: Run | None
    tick: Tick
    branch: Branch
    time: float


@dataclass(eq=False)
class Runs:
    """The sampling runs of one model, compiled in one way.

    Attributes:
        key: what it was compiled with; equal ones share runs.
        notes: how often something kept a call from reusing what was there.
        log: what the calls of the latest run computed.
    """

    key: Any
    live: list[Run] = field(default_factory=list)
    declared: weakref.WeakSet[Run] = field(default_factory=weakref.WeakSet)
    notes: Counter[str] = field(default_factory=Counter)
    log: Sequence[Ran] = ()
    _lock: threading.RLock = field(default_factory=threading.RLock)

    @contextmanager
    def turn(self, call: Call, begin: Callable[[], Run], searching: bool = False) -> Iterator[Turn]:
        """The call's run, its own until the block ends. What the block does not finish has not happened.

        Args:
            begin: makes a run that begins.
            searching: a pass fits itself in this run, and there is no other.

        Raises:
            StepError: the timestep is not the plan's.
        """
        with self._lock:
            run, tick = self._place(call, begin, searching)
            if run is None:
                turn = Turn(None, tick, Branch(0, {}, 0, 0), call.times[1])
            else:
                branch = run.branch(call.given, tick)
                if branch is None and tick.step and run.branches and tick.branch <= max(b.order for b in run.branches):
                    self.notes[CHANGED] += 1
                run.busy = True
                turn = Turn(run, tick, branch or run.new_branch(tick), run.time(call.times))
        try:
            yield turn
        finally:
            if run is not None:
                run.busy = False

    def done(self, call: Call, turn: Turn, made: Sequence[Any], kept: dict[str, Tensor], ran: Ran) -> None:
        """The call went well: what it keeps is the run's, and runs that nobody goes on with are dropped."""
        run, tick = turn.run, turn.tick
        if run is None:
            return
        with self._lock:
            if tick.fresh:
                run.reset()
                if not run.clock.declared and run not in self.live:
                    self.live.append(run)
            run.note(call, tick, turn.branch, result_of(made, call.latents))
            run.memory.keep(turn.branch.number, tick.step, kept)
            run.log.append(ran)
            self.log = run.log
            self._give_up(run, tick)

    def all(self) -> list[Run]:
        with self._lock:
            return [*self.live, *self.declared]

    def reset(self) -> None:
        with self._lock:
            for run in self.all():
                run.reset()
            self.live.clear()
            self.notes.clear()
            self.log = ()

    def _place(self, call: Call, begin: Callable[[], Run], searching: bool) -> tuple[Run | None, Tick]:
        declaration = declaration_of(call.tensor)
        if declaration is not None:
            return self._in_declared(declaration, call, begin)
        if searching:
            run = self.live[-1] if self.live else begin()
            return run, run.tick(call)
        free = [run for run in reversed(self.live) if not run.busy]
        own = [run for run in free if run.thread is threading.current_thread()]
        likely: list[tuple[Run, Tick]] = []
        foreign: list[tuple[Run, StepError]] = []
        doubted = False
        # Two requests may have the very same latents: a thread goes on with its own before it looks at another's.
        for among in (own, [run for run in free if run not in own]):
            again = [run for run in among if run.repeats(call)]
            for run in again:
                if (tick := run.tick(call)).branch:
                    return run, tick
            for run in among:
                if run in again:
                    continue
                try:
                    tick = run.tick(call, follows=True)
                except StepError as cause:
                    foreign.append((run, cause))
                    # A call of it before this one could not be told, and was not counted.
                    doubted |= run.clock.ahead(run.time(call.times))
                    continue
                if tick.fresh:
                    continue
                found = origin(call.latents, run.past)
                if found.proved or (found.still and run.clock.timesteps is not None):
                    run.proofs += 1
                    return run, tick
                doubted |= run.clock.timesteps is not None  # it is the plan's next
                if run.tick(call).fresh:
                    continue
                known = run.has(call.given)
                # A sampler that was exact at every step does not begin to add noise.
                if found.alike and known and not (run.proofs > 1 and not run.doubts):
                    likely.append((run, tick))
                doubted |= found.alike or known
        if len(likely) == 1:
            likely[0][0].doubts += 1
            return likely[0]
        if doubted:
            self.notes[DOUBTED] += 1
        run = begin()
        try:
            return run, run.tick(call)
        except StepError as cause:
            if doubted:
                return None, Tick(0, 0, True)
            told = [why for earlier, why in foreign if origin(call.latents, earlier.past).proved]
            raise (told[0] if told else cause) from None

    def _in_declared(self, declaration: Declared, call: Call, begin: Callable[[], Run]) -> tuple[Run, Tick]:
        run = declaration.runs.get(self)
        if run is None:
            run = declaration.runs[self] = begin()
            run.clock.declared = True
            self.declared.add(run)
        if run.busy:
            raise StepError("two calls of one declared sampling run at once; declare a run for each thread or request")
        return run, run.tick(call, follows=True)

    def _give_up(self, now: Run, tick: Tick) -> None:
        """Drop runs that have ended or were abandoned.

        A run is over when its thread is gone; when its schedule is through and its thread begins another; when another
        run of its thread makes :data:`PATIENCE` steps without it; and when it is the oldest of more than :data:`MOST`.
        """
        mine = threading.current_thread()
        for run in [r for r in self.live if r is not now and not r.busy]:
            if run.thread is mine and tick.branch == 0:
                run.passed[id(now)] += 1
            over = (
                run.thread is None
                or (run.thread is mine and run.ended)
                or max(run.passed.values(), default=0) >= PATIENCE
            )
            if over:
                self.live.remove(run)
        if now in self.live:
            self.live.remove(now)
            self.live.append(now)
        idle = [r for r in self.live if not r.busy and r is not now]
        for run in idle[: max(0, len(self.live) - MOST)]:
            self.live.remove(run)


class Registry:
    """The runs of every model, found by any of its tensors; they live as long as code that was compiled for the model."""

    def __init__(self) -> None:
        self._known: dict[int, tuple[weakref.ref[Tensor], weakref.WeakSet[Runs]]] = {}
        self._unowned: weakref.WeakSet[Runs] = weakref.WeakSet()
        self._lock = threading.RLock()

    def of(self, tensors: Sequence[Tensor], key: Any) -> Runs:
        """The runs of the model that has these tensors, compiled with ``key``."""
        with self._lock:
            known = (runs for t in tensors for runs in list(self._at(t)) if runs.key == key)
            found = next(known, None) or Runs(key)
            for t in tensors:
                self._at(t).add(found)
            if not tensors:
                self._unowned.add(found)
            return found

    def all_of(self, tensors: Iterable[Tensor]) -> list[Runs]:
        """The runs of the model with these tensors, however it was compiled."""
        with self._lock:
            own = [runs for t in tensors if id(t) in self._known for runs in self._at(t)]
            return list(dict.fromkeys([*own, *self._unowned]))

    def _at(self, t: Tensor) -> weakref.WeakSet[Runs]:
        entry = self._known.get(id(t))
        if entry is None or entry[0]() is not t:
            key, known = id(t), self._known
            entry = known[key] = (weakref.ref(t, lambda _: known.pop(key, None)), weakref.WeakSet())
        return entry[1]


RUNS = Registry()
