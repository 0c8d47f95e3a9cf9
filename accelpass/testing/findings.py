"""What a check found: what was compared, by how much it differs, and what to look at."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Status = Literal["passed", "failed", "skipped"]


@dataclass(frozen=True)
class Finding:
    """One check on one model.

    Attributes:
        check: ``identity``, ``oracle``, ...
        subject: the model, or the pass beside which it ran.
        what: what was compared or seen; of a skipped check, why.
        error: the largest difference, relative to the largest wanted value; None where no numbers are compared.
        look_at: of a failed check, where the mistake may be.
    """

    check: str
    subject: str
    status: Status
    what: str
    error: float | None = None
    look_at: str = ""

    def __str__(self) -> str:
        by = "" if self.error is None else f"; they differ by {self.error:.1e} relative"
        hint = f"\n    look at: {self.look_at}" if self.look_at and self.status == "failed" else ""
        return f"{self.check} on {self.subject}: {self.status}: {self.what}{by}{hint}"


class NotConforming(AssertionError):
    """A pass failed a check of the conformance kit."""


def passed(check: str, subject: str, what: str, error: float | None = None) -> Finding:
    return Finding(check, subject, "passed", what, error)


def failed(check: str, subject: str, what: str, look_at: str, error: float | None = None) -> Finding:
    return Finding(check, subject, "failed", what, error, look_at)


def skipped(check: str, subject: str, why: str) -> Finding:
    return Finding(check, subject, "skipped", why)
