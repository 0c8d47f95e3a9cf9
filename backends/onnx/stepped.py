"""The files of a schedule of denoising steps: the JSON that says which computes which step, and the schedule run on ONNX Runtime.

Tensors that a plan holds for each step are in a safetensors file.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from accelpass.backends.export.stepped import Schedule, Source
from accelpass.backends.onnx import runtime
from accelpass.passes.core.plan import write_json

if TYPE_CHECKING:
    from accelpass.backends.onnx.export import Graph

FORMAT = 1


def write(steps: Schedule[Graph], target: Path, data: str | None) -> None:
    """The JSON, and the plan's tensors if there are any."""
    operands = steps.operands()
    if operands:
        save_file(operands, str(target.with_suffix(".steps.safetensors")))
    timesteps = steps.by.timesteps or [None] * len(steps.calls)
    graph = next(iter(steps.graphs.values()))
    content = {
        "format": FORMAT,
        "data": data,
        "operands": target.with_suffix(".steps.safetensors").name if operands else None,
        "outputs": [name for name in graph.made.outputs if not name.startswith("present.")],
        "files": {name: _inputs(steps, name) for name in steps.graphs},
        "steps": [{"timestep": t, "calls": c} for t, c in zip(timesteps, steps.calls, strict=True)],
        "passes": [{"name": r.name, "sites": len(r.took)} for r in graph.records],
    }
    write_json(target, content)


def _inputs(steps: Schedule[Graph], file: str) -> list[dict[str, Any]]:
    found = []
    for held in steps.graphs[file].model.graph.inputs:
        source = steps.sources[file].get(str(held.name), Source("caller", str(held.name)))
        shape = [d if isinstance(d, int) else str(d.value) for d in held.shape or ()]
        one = {"name": held.name, "shape": shape, "dtype": str(held.dtype).lower(), "from": source.kind}
        found.append(one | ({} if source.kind == "caller" else {"key": source.name, "first_call": source.first}))
    return found


def compared(
    folder: Path,
    steps: Schedule[Graph],
    examples: Mapping[str, Mapping[str, Tensor]],
    tolerance: float,
    optimised: bool = False,
) -> float:
    """Run the whole schedule on ``examples``, inputs by file; see :func:`accelpass.backends.onnx.runtime.difference`."""
    sessions = {name: runtime.session(folder / name, optimised) for name in steps.graphs}
    worst = 0.0

    def run(file: str, inputs: dict[str, Tensor]) -> list[Tensor]:
        nonlocal worst
        made = steps.graphs[file].made
        with torch.no_grad():
            expected: list[Tensor] = made.gm(*inputs.values())
        got = runtime.run(sessions[file], inputs)
        worst = max(worst, runtime.difference(made.outputs, got, expected, tolerance))
        return expected

    steps.replay(examples, run)
    return worst
