"""Long runs that go on where an earlier one was interrupted, with a bar that tells the time that is left."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

DATA = Path(__file__).parent / "data"


@dataclass(frozen=True)
class Notes:
    """What a run has done so far, a JSON line for each thing, in a file that git ignores."""

    name: str

    @property
    def path(self) -> Path:
        return DATA / f"{self.name}.partial"

    def rows(self) -> list[dict[str, Any]]:
        """What earlier runs have left; the line at which one was cut off is not there."""
        lines = self.path.read_text().splitlines(keepends=True) if self.path.exists() else []
        return [json.loads(line) for line in lines if line.endswith("\n")]

    def add(self, row: dict[str, Any]) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")

    def end(self) -> None:
        """All is done and written elsewhere: the next run begins anew."""
        self.path.unlink(missing_ok=True)


class Bar:
    """How many of the things are done; lines are printed above it."""

    def __init__(self, progress: Progress, title: str, total: int, completed: int) -> None:
        self._progress = progress
        self._task = progress.add_task(title, total=total, completed=completed)

    def advance(self, count: int = 1, title: str | None = None) -> None:
        self._progress.update(self._task, advance=count, **({} if title is None else {"description": title}))

    def say(self, text: str) -> None:
        self._progress.console.print(text, soft_wrap=True, markup=False)


@contextmanager
def bar(title: str, total: int, completed: int = 0) -> Iterator[Bar]:
    """A bar on stderr for ``total`` things of which some were done before."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as progress:
        yield Bar(progress, title, total, completed)
