"""``options=`` of ``torch.compile``, validated. Every mistake is named with what would be right."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from accelpass.ir.errors import OptionError
from accelpass.ir.inductor_private import inductor_modes
from accelpass.passes.core.base import Pass
from accelpass.passes.core.fields import nearest, typed
from accelpass.passes.core.registry import make, registered

LOWERINGS = ("inductor", "aten", "eager")
DEFAULTS = ("horizontal_fusion", "cpu_decode_attention", "grouped_query", "cpu_gemv")
PRESETS: dict[str, tuple[Any, ...]] = {
    "exact": DEFAULTS,
    "llm": ("int8_weights", *DEFAULTS),
    "llm-small": ({"name": "int4_weights", "group_size": 32}, *DEFAULTS),
}


@dataclass(frozen=True)
class Options:
    """What the backend was asked for.

    Attributes:
        passes: passes in the order typed; the manager sorts them.
        plan: settings per site and tensors from calibration, or None.
        lowering: ``inductor``; for debugging ``aten``, which runs what Inductor would be given, and ``eager``, which
            runs the semantic ops' own definitions.
        debug: after each pass, run its graph against the one before it, and write both where
            ``ACCELPASS_DEBUG`` points.
        free_weights: give back the memory of weights that only packed forms still need.
        mode: a ``torch.compile`` mode; goes here because torch refuses ``mode`` beside ``options``.
        inductor: Inductor settings for this compilation.
        regions: on CPU, compile equal blocks of a model once and call that code for each; False compiles the whole
            graph as one, which fuses across blocks and takes longer the deeper the model is.
        skip_sites: by name of a pass, sites that it leaves alone, as the report names them.
    """

    passes: tuple[Pass, ...] = ()
    plan: Any = None
    lowering: str = "inductor"
    debug: bool = False
    free_weights: bool = False
    mode: str | None = None
    inductor: dict[str, Any] = field(default_factory=dict)
    regions: bool = True
    skip_sites: dict[str, tuple[str, ...]] = field(default_factory=dict)
    asked: frozenset[str] = frozenset()
    """Names of passes that the user typed, as opposed to those that are on by default."""


def parse(options: dict[str, Any] | None, mode: str | None = None) -> Options:
    """Validate; ``None`` gives the default, whose results equal the model's up to float reordering."""
    given = dict(options or {})
    known = [*(f.name for f in fields(Options) if f.name != "asked"), "preset"]
    for key in given:
        if key not in known:
            raise OptionError(f"unknown option {key!r}{nearest(key, known)}; known: {', '.join(known)}")
    mode = given.pop("mode", None) or mode
    if mode in (None, "default"):
        mode = None
    else:
        modes = inductor_modes()
        if mode not in modes:
            raise OptionError(f"unknown mode {mode!r}{nearest(str(mode), modes)}; known: default, {', '.join(modes)}")
    for flag in ("debug", "free_weights", "regions"):
        if not isinstance(given.get(flag, False), bool):
            raise OptionError(f"option {flag!r} is {given[flag]!r}; it takes True or False")
    if given.get("lowering", "inductor") not in LOWERINGS:
        raise OptionError(f"lowering={given['lowering']!r} is not known; use {', '.join(map(repr, LOWERINGS))}")
    typed(given.get("inductor", {}), dict[str, Any], "option 'inductor' (settings of torch._inductor.config)")
    if "skip_sites" in given:
        given["skip_sites"] = _skip_sites(given["skip_sites"])
    preset = given.pop("preset", None)
    if preset is not None and preset not in PRESETS:
        raise OptionError(f"unknown preset {preset!r}{nearest(str(preset), PRESETS)}; known: {', '.join(PRESETS)}")
    listed = given.pop("passes", None)
    if listed is not None and (isinstance(listed, str | dict) or not hasattr(listed, "__iter__")):
        raise OptionError(f"option 'passes' is {listed!r}; it takes a list, for example ['int8_weights']")
    plan = given.pop("plan", None)
    if isinstance(plan, str | Path):
        from accelpass.passes.core.plan import Plan

        plan = Plan.load(plan)
    chosen = [make(p) for p in (listed or ())]
    names = {p.name for p in chosen}
    if len(names) != len(chosen):
        twice = next(p.name for i, p in enumerate(chosen) if p.name in {q.name for q in chosen[:i]})
        raise OptionError(f"pass {twice!r} is given twice; use include= and exclude= of one entry, or a plan")
    asked = set(names)
    if plan is not None:
        for p in plan.passes():
            if p.name not in names:
                chosen.append(p)
                asked.add(p.name)
    for p in PRESETS[preset] if preset else (() if listed == [] else DEFAULTS):
        made = make(p)
        if made.name not in {c.name for c in chosen} and made.name in registered():
            chosen.append(made)
            if preset and made.name not in DEFAULTS:
                asked.add(made.name)
    return Options(passes=tuple(chosen), plan=plan, mode=mode, asked=frozenset(asked), **given)


def _skip_sites(given: Any) -> dict[str, tuple[str, ...]]:
    what = "option 'skip_sites' (lists of sites by name of a pass, {'int4_weights': ['model.layers.0.mlp.down_proj']})"
    sites: dict[str, tuple[str, ...]] = typed(given, dict[str, tuple[str, ...]], what)
    for name in sites:
        if name not in registered():
            raise OptionError(
                f"skip_sites: unknown pass {name!r}{nearest(name, registered())}; known: {', '.join(sorted(registered()))}"
            )
    return sites
