"""What packaging did, as data."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from accelpass.passes.core.base import Record


@dataclass
class PackageReport:
    """What :func:`accelpass.package` wrote, and what each pass did.

    Attributes:
        bytes: of the file.
        weights_before, weights_after: bytes of the constants that the model reads, and of those in the file.
        records: what each pass took and skipped, for each graph.
        difference: largest difference of a compiled graph from torch, over the largest value of the output; None if that was not
            checked.
        seconds: that compiling took, for each graph.
    """

    path: Path
    bytes: int = 0
    weights_before: int = 0
    weights_after: int = 0
    records: dict[str, list[Record]] = field(default_factory=dict)
    difference: float | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def took(self) -> dict[str, int]:
        """Sites that each pass rewrote, in the graph that runs most: the decoding step's, or the only one."""
        return {r.name: len(r.took) for r in list(self.records.values())[-1]}

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {
            "path": str(self.path),
            "bytes": self.bytes,
            "weights_before": self.weights_before,
            "weights_after": self.weights_after,
            "difference": self.difference,
            "seconds": self.seconds,
            "notes": self.notes,
            "records": described(self.records),
        }

    def __str__(self) -> str:
        lines = [f"{self.path}  {self.bytes / 1e6:.1f} MB"]
        lines.append(f"weights {self.weights_before / 1e6:.1f} MB -> {self.weights_after / 1e6:.1f} MB")
        if self.difference is not None:
            lines.append(f"compiled graphs differ from torch by {self.difference:.1e} at most")
        for graph, records in self.records.items():
            for record in records:
                lines.append(
                    f"{graph}: {record.name}: {len(record.took)} sites taken, {len(record.skipped)} left alone"
                )
                lines += [f"  {site}: {why}" for site, why in record.skipped.items()]
        return "\n".join([*lines, *self.notes])


def described(records: dict[str, list[Record]]) -> dict[str, Any]:
    """By graph, what each pass took and skipped."""
    return {
        graph: [{"name": r.name, "took": {s: d.what for s, d in r.took.items()}, "skipped": r.skipped} for r in some]
        for graph, some in records.items()
    }
