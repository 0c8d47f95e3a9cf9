"""A model with a pass that works across denoising steps: one graph for each way of computing a step, and which step uses which.

What a step keeps for later ones is an output of its graph (``present.NAME``), what it reads an input (``past.NAME``), as
under torch.compile. Tensors that a plan holds for each step (``plan.NAME``) are in a safetensors file.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.fx.graph import CodeGen

from accelpass.backends.export.capture import Captured
from accelpass.backends.export.errors import ExportError
from accelpass.backends.onnx import runtime
from accelpass.ir.core.graph import value
from accelpass.ir.core.program import Program
from accelpass.ir.transform.steps import prepare
from accelpass.passes.core.base import Pass
from accelpass.passes.core.plan import write_json
from accelpass.passes.step_cache.base import FIRST, FULL, StepPass

if TYPE_CHECKING:
    from accelpass.backends.onnx.export import Graph

FORMAT = 1
Row = tuple[str, ...]
"""What is done at each site."""


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
class Steps:
    """The graphs of a schedule.

    Attributes:
        graphs: by file name.
        calls: by step and call of the step, the file.
        sources: by file and input, where it comes from; what no entry names is the caller's.
    """

    by: StepPass
    graphs: dict[str, Graph] = field(default_factory=dict)
    calls: list[list[str]] = field(default_factory=list)
    sources: dict[str, dict[str, Source]] = field(default_factory=dict)

    def operands(self) -> dict[str, Tensor]:
        """The plan's tensors: ``STEP/NAME``."""
        found = {}
        for step, files in enumerate(self.calls):
            for source in {s for file in files for s in self.sources[file].values() if s.kind == "plan"}:
                tensor = self.by.operand(source.name, step)
                assert tensor is not None
                found[f"{step}/{source.name}"] = tensor.contiguous()
        return found

    def write(self, target: Path, data: str | None) -> None:
        """The JSON, and the plan's tensors if there are any."""
        operands = self.operands()
        if operands:
            save_file(operands, str(target.with_suffix(".steps.safetensors")))
        timesteps = self.by.timesteps or [None] * len(self.calls)
        graph = next(iter(self.graphs.values()))
        content = {
            "format": FORMAT,
            "data": data,
            "operands": target.with_suffix(".steps.safetensors").name if operands else None,
            "outputs": [name for name in graph.made.outputs if not name.startswith("present.")],
            "files": {name: self._inputs(name) for name in self.graphs},
            "steps": [{"timestep": t, "calls": c} for t, c in zip(timesteps, self.calls, strict=True)],
            "passes": [{"name": r.name, "sites": len(r.took)} for r in graph.records],
        }
        write_json(target, content)

    def _inputs(self, file: str) -> list[dict[str, Any]]:
        found = []
        for held in self.graphs[file].model.graph.inputs:
            source = self.sources[file].get(str(held.name), Source("caller", str(held.name)))
            shape = [d if isinstance(d, int) else str(d.value) for d in held.shape or ()]
            one = {"name": held.name, "shape": shape, "dtype": str(held.dtype).lower(), "from": source.kind}
            found.append(one | ({} if source.kind == "caller" else {"key": source.name, "first_call": source.first}))
        return found


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
    stem: str,
    dense: Captured,
    count: int | None,
    finish: Callable[[Captured], Graph],
    update: Callable[[str], None],
) -> Steps:
    """Rewrite the model once for each different step.

    Args:
        dense: the model's graph.
        count: how many steps a run has; None for as many as the plan was made for.
        finish: applies the passes, and translates.

    Raises:
        ExportError: the model has no blocks that latents pass through, or the plan is for another number of steps.
    """
    if by.timesteps and count not in (None, len(by.timesteps)):
        raise ExportError(f"the plan of {by.name} is for {len(by.timesteps)} steps, and steps={count} was asked for")
    count = count or by.run_length
    paths = _sites(by, dense.anew().program)
    refused: set[str] = set()
    while True:
        made, known, skipped = Steps(by), dict[Row, str](), set[str]()
        for step in range(count):
            files = []
            for call in range(by.calls or 1):
                row = tuple(FULL if path in refused else by.action(step, path, call) for path in paths)
                if row not in known:
                    update(f"Graph {len(known) + 1}, first used at step {step + 1} of {count}")
                    known[row] = name = f"{stem}.{len(known)}.onnx"
                    captured = dense.anew()
                    prepare(captured.program)
                    captured.program.actions = {by.name: dict(zip(paths, row, strict=True))}
                    made.graphs[name] = graph = finish(captured)
                    made.sources[name] = captured.sources
                    _refuse_beside_weights(by, graph)
                    skipped |= {path for r in graph.records if r.name == by.name for path in r.skipped}
                files.append(known[row])
            made.calls.append(files)
        if skipped <= refused:
            return made
        # A site that cannot do all that is planned does nothing: half a plan would read what nobody kept.
        refused |= skipped


def _refuse_beside_weights(by: StepPass, graph: Graph) -> None:
    """What lives with a weight is written by the blocks that run; in one file for a step it cannot be told which of them do."""
    if graph.made.states:
        others = [r.name for r in graph.records if r.name != by.name and r.took]
        raise ExportError(
            f"{graph.made.states[0].name} is remembered beside a weight ({' or '.join(others)}), and the files of {by.name} leave "
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


def compared(
    folder: Path,
    steps: Steps,
    examples: Mapping[str, Mapping[str, Tensor]],
    tolerance: float,
    optimised: bool = False,
) -> float:
    """Run the whole schedule on ``examples``, inputs by file; see :func:`accelpass.backends.onnx.runtime.difference`.

    Their floats shrink from step to step, as a run's latents change: between equal steps a slope would be rounding alone.
    """
    sessions = {name: runtime.session(folder / name, optimised) for name in steps.graphs}
    kept: dict[tuple[int, str], Tensor] = {}
    worst = 0.0
    for step, files in enumerate(steps.calls):
        for call, file in enumerate(files):
            made = steps.graphs[file].made
            left = 1 - step / (2 * len(steps.calls))
            inputs = {n: t * left if t.is_floating_point() else t for n, t in examples[file].items()}
            for name, source in steps.sources[file].items():
                found = steps.by.operand(source.name, step) if source.kind == "plan" else None
                inputs[name] = kept[0 if source.first else call, source.name] if found is None else found
            with torch.no_grad():
                expected = made.gm(*inputs.values())
            got = runtime.run(sessions[file], inputs)
            worst = max(worst, runtime.difference(made.outputs, got, expected, tolerance))
            for name, tensor in zip(made.outputs, expected, strict=True):
                if name.startswith("present."):
                    kept[call, name.removeprefix("present.")] = tensor
    return worst
