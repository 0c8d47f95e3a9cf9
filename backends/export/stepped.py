"""A schedule of a pass that works across denoising steps, as graphs for a file: one for each way of computing a step.

What a step keeps for later ones is an output of its graph (``present.NAME``), what it reads an input (``past.NAME``), as
under torch.compile. Tensors that a plan holds for each step are inputs, too (``plan.NAME``).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar, cast

import torch
from torch import Tensor
from torch.fx.graph import CodeGen

from accelpass.backends.export.capture import Captured
from accelpass.backends.export.errors import ExportError
from accelpass.backends.export.functional import Functional
from accelpass.ir.core.graph import value
from accelpass.ir.core.program import Program
from accelpass.ir.transform.steps import prepare
from accelpass.passes.core.base import Pass, Record
from accelpass.passes.core.options import Options
from accelpass.passes.step_cache.base import FIRST, FULL, StepPass

Row = tuple[str, ...]
"""What is done at each site."""


class Rewritten(Protocol):
    """A graph on its way into a file, its passes applied."""

    @property
    def made(self) -> Functional: ...
    @property
    def records(self) -> list[Record]: ...


G = TypeVar("G", bound=Rewritten)


@dataclass(frozen=True)
class Source:
    """Where an input comes from: ``caller``; ``state``, what an earlier call kept; ``plan``, a tensor for each step.

    Attributes:
        first: it is what the first call of a step kept, not this one.
    """

    kind: str
    name: str
    first: bool = False


@dataclass
class Schedule(Generic[G]):
    """The graphs of a schedule.

    Attributes:
        graphs: by name.
        calls: by step and call of the step, the graph.
        sources: by graph and input, where it comes from; what no entry names is the caller's.
    """

    by: StepPass
    graphs: dict[str, G] = field(default_factory=dict)
    calls: list[list[str]] = field(default_factory=list)
    sources: dict[str, dict[str, Source]] = field(default_factory=dict)

    def operands(self) -> dict[str, Tensor]:
        """The plan's tensors: ``STEP/NAME``."""
        found = {}
        for step, names in enumerate(self.calls):
            for source in {s for name in names for s in self.sources[name].values() if s.kind == "plan"}:
                tensor = self.by.operand(source.name, step)
                assert tensor is not None
                found[f"{step}/{source.name}"] = tensor.contiguous()
        return found

    def replay(
        self, examples: Mapping[str, Mapping[str, Tensor]], run: Callable[[str, dict[str, Tensor]], Sequence[Tensor]]
    ) -> None:
        """Run all steps, to compare what was compiled with torch.

        Floats of an example shrink from step to step, as a run's latents change: between equal steps a slope would be rounding alone.

        Args:
            examples: by graph, inputs of which those that are not the caller's are replaced.
            run: is given a graph's name and inputs, and returns the outputs that the run goes on with.
        """
        kept: dict[tuple[int, str], Tensor] = {}
        for step, names in enumerate(self.calls):
            left = 1 - step / (2 * len(self.calls))
            for call, name in enumerate(names):
                inputs = {n: t * left if t.is_floating_point() else t for n, t in examples[name].items()}
                for given, source in self.sources[name].items():
                    planned = self.by.operand(source.name, step) if source.kind == "plan" else None
                    inputs[given] = kept[0 if source.first else call, source.name] if planned is None else planned
                for output, tensor in zip(self.graphs[name].made.outputs, run(name, inputs), strict=True):
                    if output.startswith("present."):
                        kept[call, output.removeprefix("present.")] = tensor


def step_pass(passes: Sequence[Pass]) -> StepPass | None:
    """The pass that chooses by step.

    Raises:
        ExportError: there are two, or it searches.
    """
    found = [cast(StepPass, p) for p in passes if p.by_step]
    if len(found) > 1:
        raise ExportError(f"{' and '.join(p.name for p in found)} both choose by denoising step; use one of them")
    if found and found[0].searching:
        raise ExportError(f"{found[0].name} still searches; export with the plan that it found (plan=...)")
    return found[0] if found else None


def step_graphs(
    by: StepPass,
    named: Callable[[int], str],
    dense: Captured,
    count: int | None,
    finish: Callable[[Captured], G],
    update: Callable[[str], None],
) -> Schedule[G]:
    """Rewrite the model once for each different step.

    Args:
        named: what a graph is called, by its number.
        dense: the model's graph.
        count: how many steps a run has; None for as many as the plan was made for.
        finish: applies the passes, and :func:`with_state` after them.

    Raises:
        ExportError: the model has no blocks that latents pass through, or the plan is for another number of steps.
    """
    if by.timesteps and count not in (None, len(by.timesteps)):
        raise ExportError(f"the plan of {by.name} is for {len(by.timesteps)} steps, and steps={count} was asked for")
    count = count or by.run_length
    paths = _sites(by, dense.anew().program)
    refused: set[str] = set()
    while True:
        made, known, skipped = Schedule[G](by), dict[Row, str](), set[str]()
        for step in range(count):
            names = []
            for call in range(by.calls or 1):
                row = tuple(FULL if path in refused else by.action(step, path, call) for path in paths)
                if row not in known:
                    update(f"Graph {len(known) + 1}, first used at step {step + 1} of {count}")
                    known[row] = name = named(len(known))
                    captured = dense.anew()
                    prepare(captured.program)
                    captured.program.actions = {by.name: dict(zip(paths, row, strict=True))}
                    made.graphs[name] = graph = finish(captured)
                    made.sources[name] = captured.sources
                    _refuse_beside_weights(by, graph)
                    skipped |= {path for r in graph.records if r.name == by.name for path in r.skipped}
                names.append(known[row])
            made.calls.append(names)
        if skipped <= refused:
            return made
        # A site that cannot do all that is planned does nothing: half a plan would read what nobody kept.
        refused |= skipped


def _refuse_beside_weights(by: StepPass, graph: Rewritten) -> None:
    """What lives with a weight is written by the blocks that run; in one graph for a step it cannot be told which of them do."""
    if graph.made.states:
        others = [r.name for r in graph.records if r.name != by.name and r.took]
        raise ExportError(
            f"{graph.made.states[0].name} is remembered beside a weight ({' or '.join(others)}), and the graphs of {by.name} leave "
            f"blocks out that would write it; export without one of them"
        )


def _sites(by: StepPass, program: Program) -> list[str]:
    blocks = prepare(program)
    found = [site.path for site in by.places(blocks)]
    if not found:
        raise ExportError(
            f"{by.name} has nothing to do: {'no block of the model reads the latents' if not blocks else 'no site in its blocks'}; "
            "export without it"
        )
    return found


def with_state(captured: Captured, by: StepPass) -> None:
    """Let what later calls read be outputs, and what is read be inputs by name; to be done after the passes."""
    program = captured.program
    graph = program.graph
    graph.set_codegen(CodeGen())  # the caller's structure of arguments knows nothing of what comes now
    own, _, remembered = program.results()
    (output,) = graph.find_nodes(op="output")
    output.args = ((*own, *remembered),)
    program.kept_alive = 0
    graph.eliminate_dead_code()
    captured.outputs += [f"present.{name}" for name in program.remembered]
    for node, name in program.tensors.recalled.items():
        fake = value(node)
        if by.operand(name, 0) is not None:
            called, source = f"plan.{name}", Source("plan", name)
        else:
            known = name.removeprefix(FIRST)
            first = name.startswith(FIRST)
            called, source = f"past.{'first.' if first else ''}{known}", Source("state", known, first)
        captured.sources[called] = source
        captured.inputs[called] = torch.zeros([int(n) for n in fake.shape], dtype=fake.dtype)


def with_plan(chosen: Options, passes: Sequence[Pass], by: StepPass) -> tuple[tuple[Pass, ...], StepPass]:
    """The passes, and the one among them that chooses by step, with the tensors of the plan in it."""
    bound = cast(StepPass, by.bound({} if chosen.plan is None else chosen.plan.tensors, torch.device("cpu")))
    return tuple(bound if p is by else p for p in passes), bound
