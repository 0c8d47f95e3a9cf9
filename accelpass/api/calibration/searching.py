"""What searches have in common: the one pass that is fitted, and the bar that counts what was tried."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Protocol, TypeVar

from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from accelpass.ir.errors import OptionError


class _Named(Protocol):
    name: ClassVar[str]


P = TypeVar("P", bound=_Named)


def only_one(fitted: Sequence[P], search: str, fits: str) -> P:
    """The one pass that a search fits.

    Args:
        fitted: those that it could fit; search: its name, for the message; fits: what passes it is for.

    Raises:
        OptionError: there is none, or more than one.
    """
    if len(fitted) != 1:
        names = ", ".join(p.name for p in fitted) or "none"
        raise OptionError(f"{search} fits one pass that {fits} at a time; {names} given")
    return fitted[0]


def counting_bar(progress: bool) -> Progress:
    """How many were tried of how many, and for how long."""
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    return Progress(*columns, disable=not progress)
