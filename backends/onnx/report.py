"""What an export wrote, as data."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from accelpass.passes.core.base import Record


@dataclass(frozen=True)
class Written:
    """One model file: its path, bytes without external weights, inputs and outputs, and how often each operator occurs."""

    path: Path
    bytes: int
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    operators: dict[str, int]


@dataclass
class ExportReport:
    """What :func:`accelpass.export_onnx` wrote, and what each pass did.

    Attributes:
        files: one model, or the prompt's and the decoding step's.
        data: the file of weights beside them, if there is one.
        manifest: the JSON that says how state goes from call to call, if there is state.
        bytes: of all files.
        weights_before, weights_after: bytes of the constants that the model reads, and of those in the file.
        difference: largest relative difference of ONNX Runtime from the graph run by torch; None if that was not checked.
        records: what each pass took and skipped, for each file.
    """

    files: list[Written]
    opset: int
    contrib: bool
    records: dict[str, list[Record]] = field(default_factory=dict)
    data: Path | None = None
    manifest: Path | None = None
    bytes: int = 0
    weights_before: int = 0
    weights_after: int = 0
    difference: float | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def path(self) -> Path:
        """The model file; of several the first."""
        return self.files[0].path

    def took(self) -> dict[str, int]:
        """Sites that each pass rewrote, in the first file."""
        return {r.name: len(r.took) for r in next(iter(self.records.values()), [])}

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        content = asdict(self)
        content["files"] = [{**asdict(f), "path": str(f.path)} for f in self.files]
        content["data"], content["manifest"] = (None if p is None else str(p) for p in (self.data, self.manifest))
        content["records"] = {
            name: [
                {"name": r.name, "took": {s: d.what for s, d in r.took.items()}, "skipped": r.skipped} for r in records
            ]
            for name, records in self.records.items()
        }
        return content

    def __str__(self) -> str:
        lines = [f"{f.path}  {f.bytes / 1e6:.1f} MB" for f in self.files]
        lines += [f"{p}  {p.stat().st_size / 1e6:.1f} MB" for p in (self.data, self.manifest) if p is not None]
        domain = ", and ONNX Runtime's own operators" if self.contrib else ""
        lines.append(
            f"opset {self.opset}{domain}; weights {self.weights_before / 1e6:.1f} MB -> {self.weights_after / 1e6:.1f} MB"
        )
        if self.difference is not None:
            lines.append(f"ONNX Runtime differs from torch by {self.difference:.1e} at most")
        for file, records in self.records.items():
            title = f"{file}: " if len(self.records) > 1 else ""
            for record in records:
                lines.append(f"{title}{record.name}: {len(record.took)} sites taken, {len(record.skipped)} left alone")
                lines += [f"  {site}: {why}" for site, why in record.skipped.items()]
        return "\n".join([*lines, *self.notes])
