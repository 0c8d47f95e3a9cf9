"""When guessing pays: what a call of each size has given and taken, and when it is tried again."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, field

WEIGHT = 0.25
"""Of the newest call, in the running means."""
MARGIN = 1.05
"""A size must give so many times the tokens per second of single tokens."""
LOSS = 0.03
"""Of the time of single tokens, what calls that did not pay may take: their size rests until it is so."""
LONGEST_WAIT, LONGEST_REST = 128, 1024
HICCUP = 4
"""A call counts in the mean with so many times the mean at most, and in what it lost with the square of it."""


@dataclass
class _Size:
    """``gained`` tokens and ``seconds`` a call, in the mean; it rests for ``rest`` tokens, at least ``wait`` the next time."""

    calls: int = 0
    gained: float = 0.0
    seconds: float = 0.0
    rest: int = 0
    wait: int = 4

    @property
    def rate(self) -> float:
        return self.gained / self.seconds if self.seconds else 0.0


@dataclass
class Pace:
    """Chooses how many rows a call may have.

    A size that gives fewer tokens a second than single tokens do rests until what the call has lost is a small part of the time, twice as
    long each time at first, and is then tried again, for as long as each try pays by itself or all do in the mean; larger sizes rest with
    it. What was learnt in one text holds for the next.
    The first call of a size is not counted: it may compile.

    Attributes:
        sizes: rows that a call may have, ascending, the first is 1.
        adaptive: False tries the largest always.
    """

    sizes: tuple[int, ...]
    adaptive: bool = True
    _known: dict[int, _Size] = field(default_factory=dict)

    def allowed(self, room: int) -> list[int]:
        """Sizes above 1 that may be tried now and have at most ``room`` rows."""
        fitting = [size for size in self.sizes[1:] if size <= room]
        if not self.adaptive:
            return fitting
        if self._of(1).calls < 2:  # nothing to compare with yet
            return []
        return list(itertools.takewhile(lambda size: not self._of(size).rest, fitting))

    def note(self, size: int, gained: int, seconds: float) -> None:
        """What a call of ``size`` rows gave and took, guessing included."""
        for other in self._known.values():
            other.rest = max(0, other.rest - gained)
        one = self._of(size)
        one.calls += 1
        if one.calls == 1:
            return
        if one.calls == 2:
            one.gained, one.seconds = float(gained), seconds
        else:
            one.gained += WEIGHT * (gained - one.gained)
            # A hiccup of the machine is not its pace.
            one.seconds += WEIGHT * (min(seconds, HICCUP * one.seconds) - one.seconds)
        if size == 1 or not self.adaptive:
            return
        single = self._of(1).rate
        if gained < MARGIN * single * seconds and one.rate < MARGIN * single:
            lost = min(seconds, HICCUP**2 * one.seconds) * single - gained
            one.rest = min(LONGEST_REST, max(one.wait, math.ceil(lost / LOSS)))
            one.wait = min(2 * one.wait, LONGEST_WAIT)
        elif one.rate >= MARGIN * single:
            one.wait = 4

    def _of(self, size: int) -> _Size:
        return self._known.setdefault(size, _Size())
