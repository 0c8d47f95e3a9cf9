"""A plan: pass settings and calibration tensors, tied by a fingerprint to the model they were made for."""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from accelpass.ir.core.program import Program
from accelpass.ir.errors import PlanError
from accelpass.passes.core.base import Pass
from accelpass.passes.core.registry import make

FORMAT = 1


class _File(msgspec.Struct, forbid_unknown_fields=True):
    """A plan's JSON."""

    format: int
    passes: list[dict[str, Any]]
    fingerprint: dict[str, list[Any]]
    tensors: bool = False


@dataclass(eq=False)
class Plan:
    """Settings for passes, and tensors they calibrated.

    Attributes:
        settings: one ``{"name": ..., option: value}`` for each pass.
        fingerprint: parameter path -> [shape, dtype] of the model that the plan is for.
        tensors: calibration results by name; a pass prefixes its own with its name.
    """

    settings: list[dict[str, Any]]
    fingerprint: dict[str, list[Any]]
    tensors: dict[str, Tensor] = field(default_factory=dict)

    @classmethod
    def of(cls, model: torch.nn.Module, passes: Sequence[Any], tensors: dict[str, Tensor] | None = None) -> Plan:
        """A plan for ``model`` from passes as a user types them."""
        made = [make(p) for p in passes]
        return cls([describe(p) for p in made], fingerprint(model), dict(tensors or {}))

    def passes(self) -> list[Pass]:
        """The passes with the plan's settings."""
        return [make(s) for s in self.settings]

    def save(self, path: str | Path) -> None:
        """Write ``path`` (JSON) and, if there are tensors, ``path`` with the suffix ``.safetensors``."""
        target = Path(path)
        content = {
            "format": FORMAT,
            "passes": self.settings,
            "fingerprint": self.fingerprint,
            "tensors": bool(self.tensors),
        }
        if self.tensors:
            save_file({k: v.contiguous() for k, v in self.tensors.items()}, str(target.with_suffix(".safetensors")))
        write_json(target, content)

    @classmethod
    def load(cls, path: str | Path) -> Plan:
        """Read what :meth:`save` wrote.

        Raises:
            PlanError: the file is missing, damaged or of another format.
        """
        source = Path(path)
        content = read_json(source, "plan")
        if content.get("format") != FORMAT:
            raise PlanError(f"plan {source} has format {content.get('format')!r}; this accelpass reads format {FORMAT}")
        try:
            held = msgspec.convert(content, _File)
        except msgspec.ValidationError as cause:
            raise PlanError(f"plan {source} is damaged: {cause}") from cause
        tensors = read_tensors(source.with_suffix(".safetensors")) if held.tensors else {}
        return cls(held.passes, held.fingerprint, tensors)

    def check(self, program: Program) -> None:
        """Raise :class:`PlanError` naming what differs if the program is not of the plan's model."""
        here = {}
        for node in program.graph.nodes:
            path = program.tensors.path(node)
            tensor = node.meta.get("val")
            if path is not None and isinstance(program.tensors.value(node), torch.nn.Parameter):
                here[path] = [list(tensor.shape), str(tensor.dtype)]
        refuse_difference(self.fingerprint, here, "the plan")


def fingerprint(model: torch.nn.Module) -> dict[str, list[Any]]:
    """Parameter path -> [shape, dtype]; a tied parameter under each of its names."""
    named = model.named_parameters(remove_duplicate=False)
    return {name: [list(p.shape), str(p.dtype)] for name, p in named}


def refuse_difference(expected: dict[str, list[Any]], here: dict[str, list[Any]], what: str) -> None:
    """Raise :class:`PlanError` if a parameter here is unknown to ``expected`` or has another shape or dtype."""
    differing = []
    for path, found in here.items():
        if path not in expected:
            differing.append(f"{path} is not in {what}")
        elif list(expected[path]) != found:
            differing.append(f"{path} is {found[0]} {found[1]} here, {expected[path][0]} {expected[path][1]} in {what}")
    if differing:
        more = f", and {len(differing) - 3} more" if len(differing) > 3 else ""
        raise PlanError(f"{what} belongs to another model: {'; '.join(differing[:3])}{more}")


def describe(p: Pass) -> dict[str, Any]:
    """A pass as a user would type it."""
    return {"name": p.name, **asdict(p)}


def read_json(path: Path, what: str) -> dict[str, Any]:
    """The JSON object in a file, or a :class:`PlanError` that says what is wrong with it."""
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError:
        raise PlanError(f"there is no {what} at {path}") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as cause:
        raise PlanError(f"{what} {path} cannot be read: {cause}") from cause
    if not isinstance(content, dict):
        raise PlanError(f"{what} {path} is damaged: it holds {type(content).__name__}, not an object")
    return content


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors in a safetensors file, or a :class:`PlanError`."""
    try:
        return load_file(str(path))
    except (OSError, SafetensorError) as cause:
        raise PlanError(f"{path} cannot be read: {cause}") from cause


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write atomically; see :func:`write_text`."""
    write_text(path, json.dumps(content, indent=1))  # the order of patterns has a meaning


def write_text(path: Path, text: str) -> None:
    """Write atomically, so that a reader never sees half a file."""
    # Not by tempfile, whose files nobody else may read.
    begun = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        begun.write_text(text, encoding="utf-8")
        os.replace(begun, path)
    finally:
        begun.unlink(missing_ok=True)
