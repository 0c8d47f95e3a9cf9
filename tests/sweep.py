"""What of a sweep the fast suite runs; `make test-slow` runs all of it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import pytest


def sweep(*values: Any, fast: int = 1) -> list[Any]:
    """Parameters of which the first few are for the fast suite, and the others slow: more of a kind that it has covered.

    A tuple is one value for each argument, as pytest has it; a `pytest.param` keeps its marks and its id.
    """
    return [*values[:fast], *(_slow(value) for value in values[fast:])]


def quick(values: Sequence[Any], *fast: Any) -> list[Any]:
    """The same, where the ones for the fast suite are named."""
    missing = [value for value in fast if value not in values]
    assert not missing, f"{missing} is none of {list(values)}"
    return [value if value in fast else _slow(value) for value in values]


def _slow(value: Any) -> Any:
    given = value if isinstance(value, type(pytest.param())) else None
    if given is not None:
        return pytest.param(*given.values, marks=[*given.marks, pytest.mark.slow], id=given.id)
    return pytest.param(*(value if isinstance(value, tuple) else (value,)), marks=pytest.mark.slow)


def examples(fast: int) -> int:
    """How many examples hypothesis tries; ACCELPASS_EXAMPLES is the number for a sweep."""
    return int(os.environ.get("ACCELPASS_EXAMPLES", fast))
