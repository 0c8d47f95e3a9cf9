"""A package of a model that samples in steps: which graph runs is told from the timestep and the latents of a call."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from accelpass.backends.package.errors import PackageError
from accelpass.backends.package.file.manifest import Manifest, Schedule, Size, Source, Value
from accelpass.backends.package.library import Library
from accelpass.backends.package.model import named
from accelpass.backends.runtime.run import Call, Ran, Run, times_of
from accelpass.backends.runtime.runs import RENEWED, Runs, Turn
from accelpass.backends.runtime.step_clock import Clock, Declared

PRESENT = "present."


class PackagedDenoiser:
    """Is called as the model was, once for each step of a sampling run; what one step keeps for later ones goes with the run.

    Whose run a call is, is told as under torch.compile: by where its latents come from, or by ``with package.sampling_run():``.
    Several runs may take turns, and several threads may call.

    Attributes:
        manifest: what the package says of itself.
    """

    def __init__(self, manifest: Manifest, graphs: Mapping[str, Library], weights: Mapping[str, Tensor]) -> None:
        assert manifest.schedule is not None
        self.manifest, self._graphs = manifest, dict(graphs)
        self._schedule: Schedule = manifest.schedule
        self._planned = {key: weights[name] for key, name in self._schedule.operands.items()}
        self._keepers: dict[tuple[int, int, str], int] = {}
        self._runs, self._anchor = Runs(key=id(self)), torch.empty(0)
        first = self._graphs[self._schedule.calls[0][0]].graph
        self._names = [v.name for v in first.inputs if v.name not in self._sources(self._schedule.calls[0][0])]
        self._outputs = [name for name in first.outputs if not name.startswith(PRESENT)]

    @property
    def steps(self) -> int:
        """Of a sampling run."""
        return len(self._schedule.calls)

    @property
    def notes(self) -> list[str]:
        """What kept calls from reusing what an earlier step had kept, and how often."""
        return [f"{count} calls {why}" for why, count in self._runs.notes.items()]

    def sampling_run(self) -> Declared:
        """The calls made inside ``with package.sampling_run():`` are one run; see :func:`accelpass.sampling_run`."""
        return Declared.of([self._anchor])

    def reset(self) -> None:
        """The next call is the first of a run."""
        self._runs.reset()

    def __call__(self, *args: Tensor, **kwargs: Tensor) -> Any:
        """The model's output if it is one tensor, else its tensors by name.

        Raises:
            PackageError: an input is missing, unknown, or not what was compiled for; or the schedule has no such step.
            StepError: the timestep is not the plan's.
        """
        about = self._schedule
        given = named(self._names, args, kwargs)
        others = {n: t for n, t in given.items() if n not in (about.latents, about.time)}
        call = Call(given[about.latents], times_of(given[about.time]), others, self._anchor)
        with self._runs.turn(call, self._begin) as turn:
            name, inputs = self._chosen(turn, given)
            library = self._graphs[name]
            made = dict(zip(library.graph.outputs, library(inputs), strict=True))
            kept = {n.removeprefix(PRESENT): t for n, t in made.items() if n.startswith(PRESENT)}
            results = [made[n] for n in self._outputs]
            self._runs.done(call, turn, results, kept, Ran(turn.tick, turn.time, name, 0, 0, None))
        return results[0] if self._outputs == ["output"] else dict(zip(self._outputs, results, strict=True))

    def _begin(self) -> Run:
        return Run(Clock(self._schedule.timesteps or None, self._schedule.most), self.steps)

    def _sources(self, graph: str) -> dict[str, Source]:
        return self._schedule.sources.get(graph, {})

    def _chosen(self, turn: Turn, given: Mapping[str, Tensor]) -> tuple[str, list[Tensor]]:
        """The graph of a call and its inputs: the schedule's, or the first one's where what that reads was not kept."""
        calls, full = self._schedule.calls, self._schedule.calls[0][0]
        if turn.run is None:
            return full, list(given.values())
        step, order = turn.tick.step, turn.tick.branch
        if step >= len(calls):
            raise PackageError(
                f"the package holds a schedule of {len(calls)} steps, and this is step {step + 1} of a run; package the model with "
                f"steps=..., or begin a new run: package.reset()"
            )
        at = min(order, len(calls[step]) - 1)
        name, inputs = calls[step][at], []
        for value in self._graphs[name].graph.inputs:
            found = given.get(value.name)
            if found is None:
                found = self._found(turn, at, self._sources(name)[value.name], value, given)
            if found is None:
                if turn.branch in turn.run.branches:  # else it is said already why it begins anew
                    self._runs.notes[RENEWED] += 1
                return full, list(given.values())
            inputs.append(found)
        return name, inputs

    def _found(self, turn: Turn, at: int, source: Source, value: Value, given: Mapping[str, Tensor]) -> Tensor | None:
        """A tensor of the plan, or what was kept; None where that is of another size, or older than the schedule means."""
        step = turn.tick.step
        if source.kind == "plan":
            return self._planned[f"{step}/{source.name}"]
        assert turn.run is not None
        branch = turn.run.first if source.first else turn.branch.number
        kept = turn.run.memory.get(branch, source.name)
        oldest = step if source.first else self._kept_at(step, at, source.name)
        if kept is None or turn.tick.fresh or kept.mark < oldest or (self._schedule.exact_age and kept.mark > oldest):
            return None
        wanted = self._shape(value, given)
        fits = len(wanted) == kept.tensor.dim() and all(
            w in (None, n) for w, n in zip(wanted, kept.tensor.shape, strict=True)
        )
        return kept.tensor if fits else None

    def _kept_at(self, step: int, at: int, name: str) -> int:
        """The latest step before this one whose graph keeps it."""
        key = step, at, name
        if key not in self._keepers:
            calls = self._schedule.calls
            earlier = ((t, calls[t][min(at, len(calls[t]) - 1)]) for t in range(step - 1, -1, -1))
            keeps = (t for t, graph in earlier if PRESENT + name in self._graphs[graph].graph.outputs)
            self._keepers[key] = next(keeps, 0)
        return self._keepers[key]

    def _shape(self, value: Value, given: Mapping[str, Tensor]) -> list[int | None]:
        """Sizes of an input, as the caller's tensors have them; None where these do not tell."""
        first = self._graphs[self._schedule.calls[0][0]].graph
        sizes = {
            size.name: given[v.name].shape[dim]
            for v in first.inputs
            for dim, size in enumerate(v.shape)
            if isinstance(size, Size)
        }
        return [sizes.get(size.name) if isinstance(size, Size) else size for size in value.shape]

    def __repr__(self) -> str:
        return f"PackagedDenoiser({', '.join(self._names)} -> {', '.join(self._outputs)}; {self.steps} steps)"
