"""What ``torch.compile`` calls for a model whose passes work across denoising steps: it finds the sampling run that a call
belongs to, chooses the step's graph, and hands what one step keeps to the next."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from accelpass.backends.runs import RENEWED, RUNS, Call, Ran, Run, Runs, Turn
from accelpass.backends.step_clock import Clock, Tick
from accelpass.backends.steps import Composition, Row
from accelpass.ir.steps import StepError
from accelpass.passes.step_cache.base import FIRST, StepPass


@dataclass(frozen=True)
class Arguments:
    """Where a graph's arguments are that tell a call's run and step.

    Attributes:
        time, latents: positions of the timestep and the latents.
        others: of the other tensors that the caller passes, by name.
        model: of the model's own tensors, which tell instances apart.
    """

    time: int
    latents: int
    others: Mapping[str, int]
    model: tuple[int, ...]


@dataclass(eq=False)
class SteppedGraph:
    """The callable.

    Attributes:
        passes: those that choose actions by step.
        build: compiles the model for the sizes of a call's arguments.
        key: what tells models apart that were compiled in different ways.
    """

    passes: tuple[StepPass, ...]
    build: Callable[[Sequence[Any]], Composition]
    at: Arguments
    key: Any
    compositions: dict[tuple[int, ...], Composition] = field(default_factory=dict)
    _runs: dict[int, tuple[weakref.ref[Tensor] | None, Runs]] = field(default_factory=dict)
    _building: threading.RLock = field(default_factory=threading.RLock)

    def __call__(self, *args: Any) -> Any:
        composition, runs, call = self.composition(args), self.runs_of(args), self._call(args)
        searcher = next((p.decides for p in self.passes if p.decides is not None), None)
        with runs.turn(call, self._begin, searcher is not None) as turn:
            if turn.run is None:
                return composition.evaluate(composition.full, args, _nothing)[0]
            if turn.tick.fresh or turn.run.past[-1].latents.shape != call.latents.shape:
                for p in self.passes:
                    p.check_call(call.latents)
            recalled = self._recalled(composition, turn, call.latents.device)
            if searcher is not None:
                row: Row = searcher.choose(_Trial(composition, args, recalled, turn.tick, turn.time, call.latents))
            else:
                row = self._row(composition, turn)
                known = turn.branch in turn.run.branches  # else it is said already why it begins anew
                if known and row != composition.row(turn.tick.step, turn.tick.branch):
                    runs.notes[RENEWED] += 1
            made, kept = composition.evaluate(row, args, recalled)
            graph = composition.linked(row)
            ran = Ran(turn.tick, turn.time, row, graph.flops, graph.attention, composition)
            runs.done(call, turn, made, kept, ran)
            return made

    def _row(self, composition: Composition, turn: Turn) -> Row:
        def held(name: str, oldest: int) -> bool:
            return self._found(composition, turn, name, oldest) is not None

        return composition.possible(turn.tick.step, turn.tick.branch, held)

    def _found(self, composition: Composition, turn: Turn, name: str, oldest: int) -> Tensor | None:
        assert turn.run is not None
        if turn.tick.fresh:
            return None
        branch = turn.run.first if name.startswith(FIRST) else turn.branch.number
        like: Hashable = composition.recalls[name]
        exact = any(p.exact_age for p in self.passes)
        return turn.run.memory.find(branch, name.removeprefix(FIRST), like, oldest, exact)

    def _recalled(self, composition: Composition, turn: Turn, device: torch.device) -> Callable[[str], Tensor]:
        """Finds what a step reads: a tensor of the plan, or what an earlier step has kept."""

        def find(name: str) -> Tensor:
            step = turn.tick.step
            planned = composition.planned(name, step)
            if planned is not None:
                return planned.to(device)
            assert turn.run is not None
            branch = turn.run.first if name.startswith(FIRST) else turn.branch.number
            found = turn.run.memory.find(branch, name.removeprefix(FIRST), composition.recalls[name], 0)
            if found is None or turn.tick.fresh:
                raise StepError(
                    f"step {step} reads {name!r}, which no earlier step of this run has kept (call {turn.tick.branch + 1} "
                    "of the step); accelpass.reset(model) begins a new run"
                )
            return found

        return find

    def composition(self, args: Sequence[Any]) -> Composition:
        """The compiled parts for a call's sizes, compiled if they are new."""
        sizes = tuple(a for a in args if isinstance(a, int) and not isinstance(a, bool))
        if sizes not in self.compositions:
            with self._building, torch.no_grad():
                if sizes not in self.compositions:
                    self.compositions[sizes] = self.build(args)
        return self.compositions[sizes]

    def runs_of(self, args: Sequence[Any]) -> Runs:
        """The runs of the model instance that a call is for."""
        anchor = args[self.at.model[0]] if self.at.model else None
        key = id(anchor)
        known = self._runs.get(key)
        if known is None or (known[0] is not None and known[0]() is not anchor):
            me = weakref.ref(self)  # a callback that held this object would keep it alive

            def gone(_: object) -> None:
                graph = me()
                if graph is not None:
                    graph._runs.pop(key, None)

            ref = None if anchor is None else weakref.ref(anchor, gone)
            known = self._runs[key] = (ref, RUNS.of([args[p] for p in self.at.model], self.key))
        return known[1]

    def _call(self, args: Sequence[Any]) -> Call:
        anchor = args[self.at.model[0]] if self.at.model else None
        given = {name: args[p] for name, p in self.at.others.items() if isinstance(args[p], Tensor)}
        return Call(args[self.at.latents], _range(args[self.at.time]), given, anchor)

    def _begin(self) -> Run:
        timesteps = next((p.timesteps for p in self.passes if p.timesteps), None)
        calls = next((p.calls for p in self.passes if p.calls is not None), None)
        return Run(Clock(timesteps, calls), next((p.ends for p in self.passes if p.ends), None))


def _range(time: Any) -> tuple[float, float]:
    """The least and the largest timestep, which differ where each sample or token has its own."""
    if not isinstance(time, Tensor):
        return float(time), float(time)
    if time.numel() == 1:
        return (float(time),) * 2
    least, largest = torch.stack(time.detach().aminmax()).tolist()
    return float(least), float(largest)


def _nothing(name: str) -> Tensor:
    raise StepError(f"{name!r} is read by a step that computes everything")


@dataclass(frozen=True, eq=False)
class _Trial:
    """See :class:`accelpass.passes.step_cache.base.Trial`."""

    composition: Composition
    args: Sequence[Any]
    recalled: Callable[[str], Tensor]
    tick: Tick
    time: float
    latents: Tensor

    @property
    def sites(self) -> Sequence[Sequence[tuple[StepPass, str]]]:
        return self.composition.sites

    @property
    def step(self) -> int:
        return self.tick.step

    @property
    def branch(self) -> int:
        return self.tick.branch

    def can(self, block: int, actions: tuple[str, ...]) -> bool:
        return (block, actions) in self.composition.pieces

    def run(self, row: Sequence[tuple[str, ...]]) -> tuple[tuple[Any, ...], dict[str, Tensor]]:
        return self.composition.evaluate(tuple(row), self.args, self.recalled)
