"""Debug mode: after each pass its graph is run against the one before it, and both are written out."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from accelpass.ir.errors import PassError
from accelpass.ir.program import Program
from accelpass.ir.tensors import FromInputs
from accelpass.passes.base import Record
from accelpass.passes.manager import Observer
from accelpass.passes.registry import registered

EXACT_TOLERANCE = 1e-3
"""Relative difference that float reordering may cause; a pass declared exact that exceeds it is refused."""


def replay(program: Program, example_inputs: Sequence[Any]) -> Observer:
    """An observer that compares outputs before and after each pass and notes the difference in its record."""
    tensors = program.tensors
    assert isinstance(tensors, FromInputs)
    folder = os.environ.get("ACCELPASS_DEBUG")
    last: dict[str, Any] = {"outputs": _run(program, tensors, example_inputs), "code": program.gm.code}

    def after(program: Program, record: Record) -> None:
        outputs = _run(program, tensors, example_inputs)
        record.difference = max((_relative(a, b) for a, b in zip(last["outputs"], outputs, strict=True)), default=0.0)
        if folder:
            _write(Path(folder), record.name, str(last["code"]), program.gm.code)
        p = registered().get(record.name)
        if p is not None and p.exact and not record.difference <= EXACT_TOLERANCE:
            raise PassError(
                f"debug: the pass {record.name!r} is declared exact and changed the outputs by {record.difference:.2e} "
                f"relative; sites: {', '.join(list(record.took)[:3])}"
            )
        last.update(outputs=outputs, code=program.gm.code)

    return Observer(after)


def _run(program: Program, tensors: FromInputs, example_inputs: Sequence[Any]) -> list[Tensor]:
    # User tensors may be written to (caches): run on copies.
    args = [
        a.clone() if isinstance(a, Tensor) and not isinstance(a, torch.nn.Parameter) else a
        for a in tensors.arguments(example_inputs)
    ]
    return [t for t in tree_leaves(program.gm(*args)) if isinstance(t, Tensor)]


def _relative(a: Tensor, b: Tensor) -> float:
    if not a.is_floating_point() or a.numel() == 0:
        return 0.0 if torch.equal(a, b) else float("inf")
    return float((a.float() - b.float()).abs().max() / a.float().abs().max().clamp_min(1e-12))


def _write(folder: Path, name: str, before: str, after: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    number = len(list(folder.glob("*.before.py")))
    (folder / f"{number:02d}-{name}.before.py").write_text(before)
    (folder / f"{number:02d}-{name}.after.py").write_text(after)
