"""What the commands print, and the check of where they write."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from accelpass.cli.terminal import UsageMistake

if TYPE_CHECKING:
    from accelpass.api.quality.compare import Comparison
    from accelpass.passes.core.base import Record
    from accelpass.view.report import Report


def check_page(html: Path | None) -> None:
    """Refuse a page that cannot be written now, not after minutes of compiling."""
    if html is not None and not html.expanduser().parent.is_dir():
        raise UsageMistake(f"--html {html}: there is no folder {html.expanduser().parent}; make it first")


def show(report: Report) -> None:
    """Print a report."""
    # A pipe has no width of its own, and rich would cut the reasons at 80 columns.
    console = Console(highlight=False)
    console.print(report if console.is_terminal else str(report), markup=False, soft_wrap=not console.is_terminal)


def as_json(what: Any) -> None:
    """Print JSON alone."""
    print(json.dumps(what, indent=2))


def print_passes(console: Console, records: Mapping[str, Sequence[Record]]) -> None:
    """Print what each pass took and left alone, as a table; a name of the graph stands beside a pass where there are several."""
    table = Table("", "sites taken", "left alone", box=None, padding=(0, 3, 0, 0))
    for graph, of_graph in records.items():
        for record in of_graph:
            title = f"{record.name} ({graph})" if len(records) > 1 else record.name
            table.add_row(title, str(len(record.took)), str(len(record.skipped)))
    if table.rows:
        console.print(table)
        console.print()


def comparison(result: Comparison, answers: bool = True) -> None:
    """Print two contenders as a table, and what they answered."""
    from accelpass.view.text import ratio, size

    console = Console(highlight=False)
    table = Table("", "ms a token", "tokens/s", "prompt", box=None, padding=(0, 3, 0, 0))
    for c in (result.baseline, result.candidate):
        seconds = c.token_seconds
        speed = f"{1 / seconds:.1f}" if seconds else "-"
        table.add_row(c.name, f"{seconds * 1000:.1f}", speed, f"{c.prefill_seconds * 1000:.0f} ms")
    if answers:
        for name, answer in result.answers.items():
            console.print(Text(f"{name:<14}{answer!r}"))
        console.print()
    console.print(table)
    if result.ratio:
        other = result.baseline.name
        console.print(f"\na token takes {1 / result.ratio:.2f} of {other}'s time ({result.ratio:.2f}x the speed)")
        if other == "eager":
            console.print("nothing was lowered on either side, so this says nothing about compiled speed")
    before, after = result.report.weight_bytes
    console.print(f"weights read per token: {size(before)} -> {size(after)}{ratio(before, after)}")
