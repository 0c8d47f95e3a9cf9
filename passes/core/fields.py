"""Values as their fields want them: what a user types, or a file holds, checked against type hints."""

from __future__ import annotations

import difflib
import typing
from collections.abc import Iterable
from typing import Any

import msgspec

from accelpass.ir.errors import OptionError


def typed(given: Any, hint: Any, what: str) -> Any:
    """``given`` as ``hint`` says: lists become tuples, integers floats; a bool is not taken for a number.

    Raises:
        OptionError: it is of another type; names ``what`` it is (``int4_weights: option 'group_size'``), what was given, and what is
            wanted.
    """
    try:
        return msgspec.convert(given, hint)
    except msgspec.ValidationError as cause:
        inner = str(cause).rpartition(" - at ")[2].strip("`$") if " - at " in str(cause) else ""
        at = f" (wrong at {inner})" if inner else ""
        raise OptionError(f"{what} is {given!r} ({type(given).__name__}); it takes {wanted(hint)}{at}") from cause


def wanted(hint: Any) -> str:
    """A type hint in words: ``int or None``, ``tuple of str``, ``'inductor', 'aten' or 'eager'``."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Literal:
        return ", ".join(map(repr, args))
    if origin is tuple:
        inner = [wanted(a) for a in args if a is not ...]
        return f"tuple of {inner[0]}" if ... in args else f"tuple ({', '.join(inner)})"
    if args and origin is not dict:
        return " or ".join(map(wanted, args))
    return "None" if hint is type(None) else str(getattr(origin or hint, "__name__", hint))


def nearest(word: str, known: Iterable[str]) -> str:
    """`` (did you mean 'x'?)`` or nothing."""
    near = difflib.get_close_matches(word, list(known), 1)
    return f" (did you mean {near[0]!r}?)" if near else ""
