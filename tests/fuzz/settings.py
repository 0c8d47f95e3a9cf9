"""Options that a program is compiled with: the default passes, none, and registered ones where they must change nothing."""

from __future__ import annotations

import random
from typing import Any

from accelpass.passes.core.registry import registered
from tests.pass_settings import names, setting

Options = dict[str, Any]
ROUNDING = ("int8_weights",)
"""Passes without an identity that are compared with the model whose weights are rounded alike."""


def identities() -> dict[str, dict[str, Any]]:
    """Options by name of each pass at which it equals the dense model; those that need the tensors of a plan are left out."""
    found = {}
    for name in names():
        chosen = setting(name)
        trial = chosen.trial(name)
        if trial.identity is not None and not chosen.tensors:
            found[name] = {**chosen.options, **trial.identity}
    return found


_IDENTITIES: dict[str, dict[str, Any]] = {}


def draw(rng: random.Random, inductor: float = 0.0) -> Options:
    """Options of one compilation, plain values that can be printed."""
    if not _IDENTITIES:
        _IDENTITIES.update(identities())
    lowering = "inductor" if rng.random() < inductor else rng.choice(("eager", "eager", "aten"))
    options: Options = {"lowering": lowering}
    way = rng.random()
    if way < 0.3:
        return options
    if way < 0.36:
        return {**options, "passes": []}
    if way < 0.5:
        return {**options, "passes": [rng.choice(ROUNDING)]}
    if way < 0.55:
        return {**options, "preset": "exact", "regions": False}
    # In a few calls of a plain model the passes of caches find nothing; those of prompts and linears find much.
    chosen = rng.sample(sorted(_IDENTITIES), rng.choice((1, 1, 2, 3)))
    options["passes"] = [{"name": name, **_IDENTITIES[name]} for name in sorted(chosen)]
    if rng.random() < 0.1:
        options["debug"] = True
    return options


def rounds(options: Options) -> bool:
    """Whether the result may differ from the dense model's by rounded weights."""
    return any((p if isinstance(p, str) else p["name"]) in ROUNDING for p in options.get("passes", ()))


def known(options: Options) -> bool:
    """Whether every pass that is named is registered."""
    return all((p if isinstance(p, str) else p["name"]) in registered() for p in options.get("passes", ()))
