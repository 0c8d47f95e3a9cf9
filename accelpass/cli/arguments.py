"""Passes as they are typed on a command line: ``int4_weights:group_size=32,exclude=lm_head|embed_tokens``."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import MISSING, fields
from typing import Any, get_args, get_origin, get_type_hints

from accelpass.ir.errors import OptionError
from accelpass.passes.core.base import Pass
from accelpass.passes.core.registry import registered

NONE = "none"


def passes_from(typed: Sequence[str]) -> list[dict[str, Any]] | None:
    """What ``options={"passes": ...}`` takes; None if nothing was typed, and an empty list for ``none``.

    An entry that begins with ``{`` or ``[`` is JSON, as ``options`` takes it. Any other holds passes parted by commas;
    ``name:key=value,key=value`` gives a pass options. What has an equals sign belongs to the pass before it.
    """
    if not typed:
        return None
    if list(typed) == [NONE]:
        return []
    found: list[dict[str, Any]] = []
    for entry in typed:
        if entry.lstrip().startswith(("{", "[")):
            found += _from_json(entry)
            continue
        open_pass = False
        for token in filter(None, (t.strip() for t in entry.split(","))):
            name, colon, rest = token.partition(":")
            if colon and "=" not in name:
                found.append({"name": name})
                open_pass, token = True, rest
                if not rest:
                    continue
            elif "=" not in token:
                found.append({"name": token})
                open_pass = False
                continue
            key, equals, value = token.partition("=")
            if not open_pass or not equals:
                raise OptionError(f"{entry!r}: {token!r} is no option of a pass; write NAME:key=value,key=value")
            found[-1][key] = _value(found[-1]["name"], key, value)
    if not found:
        raise OptionError("--passes is empty; give names, or 'none' for a plain compilation")
    return found


def _from_json(text: str) -> list[dict[str, Any]]:
    """The passes of one JSON entry: a list of names and objects, or one object."""
    try:
        given = json.loads(text)
    except json.JSONDecodeError as cause:
        raise OptionError(
            f'{text!r} is not JSON: {cause}; write \'[{{"name": "int4_weights", "group_size": 32}}]\''
        ) from cause
    found = [{"name": p} if isinstance(p, str) else p for p in (given if isinstance(given, list) else [given])]
    if wrong := [p for p in found if not (isinstance(p, dict) and isinstance(p.get("name"), str))]:
        raise OptionError(f'{wrong[0]!r} is no pass; write a name or {{"name": ..., "option": value}}')
    return found


def options_of(cls: type[Pass]) -> dict[str, Any]:
    """A pass's options and their defaults, as plain values; a required one has the default ``...``."""
    found: dict[str, Any] = {}
    for f in fields(cls):
        default = f.default_factory() if f.default_factory is not MISSING else f.default
        found[f.name] = "..." if default is MISSING else list(default) if isinstance(default, tuple) else default
    return found


def _value(owner: str, key: str, text: str) -> Any:
    """``text`` as the field wants it. Unknown passes and fields go on as they are: the pass names the nearest."""
    cls = registered().get(owner)
    hint = get_type_hints(cls).get(key) if cls is not None else None
    if (get_origin(hint) or hint) is tuple or "|" in text:
        words = text.split("|")
        return words if str in get_args(hint) else [_plain(word) for word in words]
    return _plain(text)


def _plain(text: str) -> Any:
    try:
        return json.loads({"True": "true", "False": "false", "None": "null"}.get(text, text))
    except json.JSONDecodeError:
        return text
