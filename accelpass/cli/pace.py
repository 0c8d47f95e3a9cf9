"""How long work of known parts will still take, and a bar that shows it while each part runs for minutes in silence."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn

HEARTBEAT = 15.0
"""Seconds between lines of a log."""
TICK = 0.5
"""Seconds between two moves of the bar."""


class Pace:
    """Expected times of parts, corrected by how long those that are over took.

    Args:
        expected: seconds of each part in the order in which they come, on some machine.
        clock: what tells seconds.
    """

    def __init__(self, expected: Mapping[str, float], clock: Callable[[], float] = time.monotonic) -> None:
        self._expected, self._clock = dict(expected), clock
        self._began = self._entered = clock()
        self._over: dict[str, float] = {}
        self.part = ""

    def enter(self, part: str) -> None:
        """``part`` begins, and what ran before it is over; one that was not expected counts for nothing."""
        now = self._clock()
        if self.part in self._expected:
            self._over[self.part] = now - self._entered
        self.part, self._entered = part, now

    @property
    def elapsed(self) -> float:
        """Seconds so far."""
        return self._clock() - self._began

    @property
    def total(self) -> float:
        """Seconds that all will have taken, as far as one can tell."""
        known = sum(self._expected[part] for part in self._over)
        factor = sum(self._over.values()) / known if known else 1.0
        left = factor * sum(s for part, s in self._expected.items() if part not in self._over and part != self.part)
        here = factor * self._expected.get(self.part, 0.0) - (self._clock() - self._entered)
        return self.elapsed + max(here, 0.0) + left

    def __str__(self) -> str:
        return f"{_minutes(self.elapsed)} of about {_minutes(self.total)}"


def _minutes(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02}"


@contextmanager
def paced(
    expected: Mapping[str, float], console: Console, heartbeat: float = HEARTBEAT
) -> Iterator[Callable[[str], None]]:
    """Show which part of the work runs, the time so far and the time expected; what it yields is told each part's name.

    In a terminal it is a bar, elsewhere a line for each part and one every ``heartbeat`` seconds.
    """
    pace = Pace(expected)
    if not console.is_terminal:
        with _every(heartbeat, lambda: console.print(f"{pace.part} ({pace})", markup=False)):

            def enter(part: str) -> None:
                pace.enter(part)
                console.print(f"{part} ({pace})", markup=False)

            yield enter
        return
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}", markup=False),
        BarColumn(30),
        TextColumn("{task.fields[pace]}"),
    )
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("", total=1.0, pace="")

        def move() -> None:
            progress.update(task, description=pace.part, completed=pace.elapsed / max(pace.total, 1e-9), pace=str(pace))

        def enter_(part: str) -> None:
            pace.enter(part)
            move()
            progress.refresh()

        with _every(TICK, move):
            yield enter_


@contextmanager
def _every(seconds: float, what: Callable[[], None]) -> Iterator[None]:
    """Call ``what`` from a thread of its own until the block ends: compilers do not come back in between."""
    over = threading.Event()

    def beat() -> None:
        while not over.wait(seconds):
            what()

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
