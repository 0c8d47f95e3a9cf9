"""Whether a site is taken, or why it is left alone."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Take:
    """This site is taken."""


@dataclass(frozen=True)
class Skip:
    """This site is left alone; ``why`` is read by a user: what was seen and what was needed."""

    why: str


Verdict = Take | Skip
