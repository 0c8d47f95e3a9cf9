"""The policy of denoising steps: finds the sampling run that a call belongs to, chooses the step's variants, and hands what one
step keeps to the next."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor

from accelpass.backends.runtime.run import Call, Ran, Run, times_of
from accelpass.backends.runtime.runs import RENEWED, RUNS, Runs, Turn
from accelpass.backends.runtime.step_clock import Clock, Tick
from accelpass.backends.staged.graph import StagedGraph
from accelpass.backends.staged.model import Actions, Row, StagedModel, all_full
from accelpass.ir.transform.steps import StepError
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
class SteppedGraph(StagedGraph):
    """The callable.

    Attributes:
        passes: those that choose actions by step.
        key: what tells models apart that were compiled in different ways.
    """

    passes: tuple[StepPass, ...]
    at: Arguments
    key: Any
    _runs: dict[int, tuple[weakref.ref[Tensor] | None, Runs]] = field(default_factory=dict)

    def __call__(self, *args: Any) -> Any:
        model, runs, call = self.model(args), self.runs_of(args), self._call(args)
        searcher = next((p.decides for p in self.passes if p.decides is not None), None)
        with runs.turn(call, self._begin, searcher is not None) as turn:
            if turn.run is None:
                return model.evaluate(model.full, args, _nothing)[0]
            if turn.tick.fresh or turn.run.past[-1].latents.shape != call.latents.shape:
                for p in self.passes:
                    p.check_call(call.latents)
            recalled = self._recalled(model, turn, call.latents.device)
            if searcher is not None:
                row: Row = searcher.choose(_Trial(model, args, recalled, turn.tick, turn.time, call.latents))
            else:
                row = self._row(model, turn)
                known = turn.branch in turn.run.branches  # else it is said already why it begins anew
                if known and row != planned_row(model, turn.tick.step, turn.tick.branch):
                    runs.notes[RENEWED] += 1
            made, kept = model.evaluate(row, args, recalled)
            ran = Ran(turn.tick, turn.time, row, *model.flops(row), model)
            runs.done(call, turn, made, kept, ran)
            return made

    def _row(self, model: StagedModel, turn: Turn) -> Row:
        def held(name: str, oldest: int) -> bool:
            return self._found(model, turn, name, oldest) is not None

        return possible_row(model, turn.tick.step, turn.tick.branch, held)

    def _found(self, model: StagedModel, turn: Turn, name: str, oldest: int) -> Tensor | None:
        assert turn.run is not None
        if turn.tick.fresh:
            return None
        branch = turn.run.first if name.startswith(FIRST) else turn.branch.number
        like: Hashable = model.recalls[name]
        exact = any(p.exact_age for p in self.passes)
        return turn.run.memory.find(branch, name.removeprefix(FIRST), like, oldest, exact)

    def _recalled(self, model: StagedModel, turn: Turn, device: torch.device) -> Callable[[str], Tensor]:
        """Finds what a step reads: a tensor of the plan, or what an earlier step has kept."""

        def find(name: str) -> Tensor:
            step = turn.tick.step
            planned = _operand(model, name, step)
            if planned is not None:
                return planned.to(device)
            assert turn.run is not None
            branch = turn.run.first if name.startswith(FIRST) else turn.branch.number
            found = turn.run.memory.find(branch, name.removeprefix(FIRST), model.recalls[name], 0)
            if found is None or turn.tick.fresh:
                raise StepError(
                    f"step {step} reads {name!r}, which no earlier step of this run has kept (call {turn.tick.branch + 1} "
                    "of the step); accelpass.reset(model) begins a new run"
                )
            return found

        return find

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
        return Call(args[self.at.latents], times_of(args[self.at.time]), given, anchor)

    def _begin(self) -> Run:
        timesteps = next((p.timesteps for p in self.passes if p.timesteps), None)
        calls = next((p.calls for p in self.passes if p.calls is not None), None)
        return Run(Clock(timesteps, calls), next((p.ends for p in self.passes if p.ends), None))


def planned_row(model: StagedModel, step: int, branch: int) -> Row:
    """What the passes want at a step."""
    return tuple(
        model.chosen(n, lambda p, path: p.action(step, path, branch))  # type: ignore[attr-defined]
        for n in range(len(model.sites))
    )


def possible_row(model: StagedModel, step: int, branch: int, held: Callable[[str, int], bool]) -> Row:
    """What the passes want at a step, as far as what it reads was kept.

    A block that reads what is missing does what the latest step before did that reads nothing missing, which is as a
    rule the step that keeps it.

    Args:
        held: whether something is remembered under a name, by the given step or a later one.
    """
    rows: dict[int, Row] = {}

    def actions(at: int, block: int) -> Actions:
        if at not in rows:
            rows[at] = planned_row(model, at, branch)
        return rows[at][block]

    def has_all(block: int, way: Actions) -> bool:
        names = [what for kind, what in model.stages[block, way].reads if kind == "recalled"]
        return all(held(n, kept_at(n, block)) for n in names if _operand(model, n, step) is None)

    def kept_at(name: str, block: int) -> int:
        if name.startswith(FIRST):
            return step  # by the step's first call
        keeps = (t for t in range(step - 1, -1, -1) if name in dict(model.stages[block, actions(t, block)].keeps))
        return next(keeps, step)  # never: nothing is as new as this step

    chosen = []
    for block, wanted in enumerate(planned_row(model, step, branch)):
        tried = (wanted, *(actions(t, block) for t in range(step - 1, -1, -1)))
        chosen.append(next((way for way in tried if has_all(block, way)), all_full(model.sites[block])))
    return tuple(chosen)


def _operand(model: StagedModel, name: str, step: int) -> Tensor | None:
    """A tensor that a step reads and that the plan holds, not an earlier step."""
    steps = cast(list[StepPass], model.passes)
    return next((t for p in steps if (t := p.operand(name, step)) is not None), None)


def _nothing(name: str) -> Tensor:
    raise StepError(f"{name!r} is read by a step that computes everything")


@dataclass(frozen=True, eq=False)
class _Trial:
    """See :class:`accelpass.passes.step_cache.base.Trial`."""

    model: StagedModel
    args: Sequence[Any]
    recalled: Callable[[str], Tensor]
    tick: Tick
    time: float
    latents: Tensor

    @property
    def sites(self) -> Sequence[Sequence[tuple[StepPass, str]]]:
        return cast(Sequence[Sequence[tuple[StepPass, str]]], self.model.sites)

    @property
    def step(self) -> int:
        return self.tick.step

    @property
    def branch(self) -> int:
        return self.tick.branch

    def can(self, block: int, actions: tuple[str, ...]) -> bool:
        return (block, actions) in self.model.stages

    def run(self, row: Sequence[tuple[str, ...]]) -> tuple[tuple[Any, ...], dict[str, Tensor]]:
        return self.model.evaluate(tuple(row), self.args, self.recalled)
