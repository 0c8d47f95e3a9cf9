"""Passes by name. Ours and third parties' come through one door: the entry-point group ``accelpass.passes``."""

from __future__ import annotations

import warnings
from functools import cache
from importlib.metadata import entry_points
from typing import Any

from accelpass.ir.errors import OptionError
from accelpass.passes.base import PHASES, Pass, nearest

GROUP = "accelpass.passes"
_BROKEN: dict[str, str] = {}
"""What is wrong with entries that could not be loaded, by name."""


@cache
def registered() -> dict[str, type[Pass]]:
    """All installed passes by the name that a user types.

    Raises:
        OptionError: two packages registered one name, or an entry is not a pass; names the package.
    """
    found: dict[str, type[Pass]] = {}
    owners: dict[str, str] = {}
    for entry in sorted(entry_points(group=GROUP), key=lambda e: (e.name, e.value)):
        owner = entry.dist.name if entry.dist else entry.value
        try:
            loaded = entry.load()
        except Exception as cause:  # whatever a package does when it is imported must not take the others' passes away
            _BROKEN[entry.name] = why = (
                f"pass {entry.name!r} of {owner} cannot be loaded: {type(cause).__name__}: {cause}"
            )
            warnings.warn(f"{why}. Its other passes and those of other packages work.", stacklevel=2)
            continue
        if not (isinstance(loaded, type) and issubclass(loaded, Pass)):
            raise OptionError(f"entry point {entry.name!r} of {owner} is {loaded!r}, which is not an accelpass Pass")
        if loaded.phase not in PHASES:
            raise OptionError(
                f"pass {loaded.name!r} of {owner} has phase {loaded.phase!r}; phases: {', '.join(PHASES)}"
            )
        if loaded.name in found and found[loaded.name] is not loaded:
            raise OptionError(f"the pass name {loaded.name!r} is registered by {owners[loaded.name]} and by {owner}")
        found[loaded.name], owners[loaded.name] = loaded, owner
    return found


def make(given: Any) -> Pass:
    """A pass from what a user typed: a name, ``{"name": ..., option: value}``, or a pass object."""
    if isinstance(given, Pass):
        return given
    if isinstance(given, str):
        given = {"name": given}
    if not isinstance(given, dict) or not isinstance(given.get("name"), str):
        raise OptionError(f"{given!r} is not a pass; give a name, {{'name': ..., option: value}} or a pass object")
    name = given["name"]
    known = registered()
    if name in _BROKEN:
        raise OptionError(f"{_BROKEN[name]}. Install what it needs, or remove the package.")
    if name not in known:
        raise OptionError(f"unknown pass {name!r}{nearest(name, known)}; known: {', '.join(sorted(known))}")
    return known[name].from_options({k: v for k, v in given.items() if k != "name"})
