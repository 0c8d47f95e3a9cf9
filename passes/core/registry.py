"""Passes by name. Ours and third parties' come through one entry: the entry-point group ``accelpass.passes``.

What is wrong with one entry never takes another's passes away: it is told once as a warning, and is an error when the pass is
asked for by name.
"""

from __future__ import annotations

import re
import warnings
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from accelpass.ir.errors import AccelpassError, OptionError
from accelpass.passes.core.base import PHASES, Pass
from accelpass.passes.core.fields import nearest

GROUP = "accelpass.passes"
OURS = "accelpass"
NAME = re.compile(r"[a-z][a-z0-9_]*")
_BROKEN: dict[str, str] = {}
"""What is wrong with entries that cannot be used, by name."""


@cache
def registered() -> dict[str, type[Pass]]:
    """All installed passes by the name that a user types; what cannot be used is warned about and left out."""
    found: dict[str, type[Pass]] = {}
    owners: dict[str, str] = {}
    # Ours first: no other package takes one of our names.
    for entry in sorted(entry_points(group=GROUP), key=lambda e: (_owner(e) != OURS, e.name, e.value)):
        owner = _owner(entry)
        loaded = _loaded(entry, owner)
        if isinstance(loaded, str):
            _broken(entry.name, loaded)
            continue
        holder = owners.get(loaded.name)
        if holder is None and loaded.name not in _BROKEN:
            found[loaded.name], owners[loaded.name] = loaded, owner
        elif found.get(loaded.name) is loaded:
            continue  # one package, seen twice on the path
        elif holder == OURS:
            _warn(
                f"the pass {loaded.name!r} of {owner} is left out: accelpass has one of that name. Its author must rename it"
            )
        else:
            # Neither is used: which of them came first is chance.
            _broken(
                loaded.name,
                f"the pass name {loaded.name!r} is registered by {holder or 'another package'} and by {owner}; uninstall one of them",
            )
            found.pop(loaded.name, None)
    return found


def make(given: Any) -> Pass:
    """A pass from what a user typed: a name, ``{"name": ..., option: value}``, or a pass object.

    Raises:
        OptionError: no such pass, one that cannot be used, or an option that it does not have or cannot take.
    """
    if isinstance(given, Pass):
        why = why_unfit(type(given))
        if why is not None:
            raise OptionError(f"{given!r} cannot be used: {why}")
        return given
    if isinstance(given, str):
        given = {"name": given}
    if not isinstance(given, dict) or not isinstance(given.get("name"), str):
        raise OptionError(f"{given!r} is not a pass; give a name, {{'name': ..., option: value}} or a pass object")
    name = given["name"]
    known = registered()
    if name not in known and name in _BROKEN:
        raise OptionError(f"{_BROKEN[name]}. Other passes work without it.")
    if name not in known:
        raise OptionError(f"unknown pass {name!r}{nearest(name, known)}; known: {', '.join(sorted(known))}")
    options = {k: v for k, v in given.items() if k != "name"}
    try:
        return known[name].from_options(options)
    except AccelpassError:
        raise
    except Exception as cause:  # a __post_init__ may raise anything
        said = f"the pass {name!r} does not take {options}: {type(cause).__name__}: {cause}"
        raise OptionError(". ".join(filter(None, (said, origin(known[name]))))) from cause


def why_unfit(kind: Any) -> str | None:
    """What is wrong with a class that is meant to be a pass, or None."""
    if not (isinstance(kind, type) and issubclass(kind, Pass)):
        return f"{kind!r} is not an accelpass Pass; the entry point must name a subclass of accelpass.passes.Pass"
    for attribute in ("name", "phase", "summary"):
        if not isinstance(getattr(kind, attribute, None), str):
            return f"{kind.__name__} has no {attribute}; write {attribute}: ClassVar[str] = '...' in the class"
    if not NAME.fullmatch(kind.name):
        return f"{kind.name!r} is not a name for a pass; use lower-case letters, digits and _"
    if kind.phase not in PHASES:
        return f"{kind.name!r} has the phase {kind.phase!r}{nearest(kind.phase, PHASES)}; phases: {', '.join(PHASES)}"
    made = vars(kind).get("__dataclass_params__")
    if made is None or not made.frozen:
        return f"{kind.__name__} is not a frozen dataclass; write @dataclass(frozen=True) above the class"
    if kind.apply is Pass.apply:
        return f"{kind.__name__} does not define apply(self, program, record), which rewrites the graph"
    missing = sorted(n for n in dir(kind) if getattr(getattr(kind, n, None), "__isabstractmethod__", False))
    if missing:
        return f"{kind.__name__} does not define {', '.join(missing)}, which its base asks for"
    return None


def origin(kind: type[Pass]) -> str:
    """Where a pass comes from, as the last sentence of an error; empty for those of accelpass."""
    package = package_of(kind)
    return "" if package == OURS else f"It comes from {package}; leave it out of passes= to go on without it."


def package_of(kind: type[Pass]) -> str:
    """The distribution that registers a pass, or the module of one that is in none."""
    if kind.__module__.split(".")[0] == OURS:
        return OURS
    for entry in entry_points(group=GROUP):
        if entry.value == f"{kind.__module__}:{kind.__qualname__}" and entry.dist is not None:
            return _owner(entry)
    return f"the module {kind.__module__}"


def _owner(entry: EntryPoint) -> str:
    return entry.dist.name if entry.dist else entry.value


def _loaded(entry: EntryPoint, owner: str) -> type[Pass] | str:
    """The class of an entry, or what is wrong with it."""
    try:
        loaded = entry.load()
    except (Exception, SystemExit) as cause:  # whatever a package does when it is imported
        reason = f"{type(cause).__name__}: {cause}"
        return f"pass {entry.name!r} of {owner} cannot be loaded: {reason}. Install what it needs, or remove {owner}"
    why = why_unfit(loaded)
    if why is not None:
        return f"pass {entry.name!r} of {owner} cannot be used: {why}"
    if loaded.name != entry.name:
        return (
            f"the entry point {entry.name!r} of {owner} is for a pass that is named {loaded.name!r}; "
            "its author must give both one name"
        )
    kind: type[Pass] = loaded
    return kind


def _broken(name: str, why: str) -> None:
    _BROKEN[name] = why
    _warn(why)


def _warn(why: str) -> None:
    warnings.warn(f"{why}. All other passes work.", stacklevel=4)
