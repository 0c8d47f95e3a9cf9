"""What ``torch.compile`` calls for a model whose passes work across denoising steps: it counts the steps of a sampling run,
chooses each step's graph, and hands what one step keeps to the next."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from accelpass.backends.step_clock import Clock, Tick, is_declared
from accelpass.backends.steps import Composition
from accelpass.ir.derived import StateSpec
from accelpass.ir.steps import StepError
from accelpass.passes.step_cache.base import FIRST, StepPass


@dataclass(eq=False)
class SamplingRun:
    """One model instance's run: where it is, and what its steps keep, by branch (call of one step) and name."""

    clock: Clock
    kept: dict[tuple[int, str], Tensor] = field(default_factory=dict)

    def reset(self) -> None:
        self.clock.reset()
        self.kept.clear()

    def states(self) -> list[tuple[StateSpec, Tensor]]:
        """What is held, for ``accelpass.state``."""
        made = []
        for (branch, name), tensor in self.kept.items():
            called = name if branch == 0 else f"{name} (call {branch + 1})"
            made.append((StateSpec(called, tuple(tensor.shape), tensor.dtype, "sampling_run"), tensor))
        return made


@dataclass(eq=False)
class SteppedGraph:
    """The callable.

    Attributes:
        passes: those that choose actions by step.
        build: compiles the model for the sizes of a call's arguments.
        time, latents: positions of the timestep and the latents among a call's arguments.
        model: the position of one of the model's tensors, which tells instances apart.
    """

    passes: tuple[StepPass, ...]
    build: Callable[[Sequence[Any]], Composition]
    time: int
    latents: int
    model: int | None
    compositions: dict[tuple[int, ...], Composition] = field(default_factory=dict)
    _runs: dict[int, tuple[weakref.ref[Tensor] | None, SamplingRun]] = field(default_factory=dict)

    def __call__(self, *args: Any) -> Any:
        composition = self.composition(args)
        run = self.run_of(args)
        run.clock.declared = is_declared(None if self.model is None else args[self.model])
        time, latents = _number(args[self.time]), args[self.latents]
        tick = run.clock.tick(time, latents)
        if tick.fresh:
            run.kept.clear()
            for p in self.passes:
                p.check_call(latents)
        recalled = self._recalled(run, tick, latents.device)
        searcher = next((p.decides for p in self.passes if p.decides is not None), None)
        if searcher is not None:
            row = searcher.choose(_Trial(composition, args, recalled, tick, time, latents))
        else:
            row = composition.row(tick.step, tick.branch)
        made, kept = composition.evaluate(row, args, recalled)
        for name, tensor in kept.items():
            run.kept[tick.branch, name] = tensor
        run.clock.done(tick, time, latents)
        return made

    def _recalled(self, run: SamplingRun, tick: Tick, device: torch.device) -> Callable[[str], Tensor]:
        """Finds what a step reads: a tensor of the plan, or what an earlier step has kept."""

        def find(name: str) -> Tensor:
            planned = next((t for p in self.passes if (t := p.operand(name, tick.step)) is not None), None)
            if planned is not None:
                return planned.to(device)
            branch = 0 if name.startswith(FIRST) else tick.branch
            found = run.kept.get((branch, name.removeprefix(FIRST)))
            if found is None:
                raise StepError(
                    f"step {tick.step} reads {name!r}, which no earlier step of this run has kept (call {tick.branch + 1} "
                    "of the step). Guidance must be done in the same way at all steps; accelpass.reset(model) begins "
                    "a new run."
                )
            return found

        return find

    def composition(self, args: Sequence[Any]) -> Composition:
        """The compiled parts for a call's sizes, compiled if they are new."""
        sizes = tuple(a for a in args if isinstance(a, int) and not isinstance(a, bool))
        if sizes not in self.compositions:
            with torch.no_grad():
                self.compositions[sizes] = self.build(args)
        return self.compositions[sizes]

    def run_of(self, args: Sequence[Any]) -> SamplingRun:
        """The run of the model instance that a call is for."""
        anchor = None if self.model is None else args[self.model]
        known = self._runs.get(id(anchor))
        if known is None or (known[0] is not None and known[0]() is not anchor):
            timesteps = next((p.timesteps for p in self.passes if p.timesteps), None)
            key = id(anchor)
            ref = None if anchor is None else weakref.ref(anchor, lambda _: self._runs.pop(key, None))
            calls = next((p.calls for p in self.passes if p.calls is not None), None)
            known = (ref, SamplingRun(Clock(timesteps, calls)))
            self._runs[id(anchor)] = known
        return known[1]

    def runs(self, tensors: Sequence[Tensor]) -> list[SamplingRun]:
        """The runs of the instance with these tensors."""
        mine = {id(t) for t in tensors}
        return [run for key, (ref, run) in self._runs.items() if key in mine or ref is None]


def _number(time: Any) -> float:
    """A timestep as a number; one for each sample or token must be equal, so that the first speaks for all."""
    return float(time.flatten()[0]) if isinstance(time, Tensor) else float(time)


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
