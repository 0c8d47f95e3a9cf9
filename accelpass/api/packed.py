"""Save a packed model and load it again without packing: JSON for what, safetensors for the bytes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from accelpass.api.lookup import Found, find
from accelpass.api.stateful import named_tensors
from accelpass.ir.core.derived import DERIVED, Recipe, is_released, owns_storage
from accelpass.ir.core.tensors import digest
from accelpass.ir.errors import AccelpassError, PlanError
from accelpass.passes.core.options import Options
from accelpass.passes.core.plan import (
    Plan,
    describe,
    fingerprint,
    read_json,
    read_tensors,
    refuse_difference,
    write_json,
)
from accelpass.view.grouping import alike, collapse

FORMAT = 2
KEPT = ("lowering", "free_weights", "mode", "inductor", "regions", "skip_sites")
"""Options that are saved besides the passes. ``debug`` is about one session."""
MANIFEST, TENSORS = "accelpass.json", "accelpass.safetensors"


def save(fast: Any, folder: str | Path) -> None:
    """Write the packed weights of a compiled model that has run once, and the floats that stayed.

    Raises:
        AccelpassError: the model was not called yet, or nothing in it is packed.
    """
    found = find(fast)
    module = found.module
    if module is None:
        raise AccelpassError(f"{len(found.modules)} modules are behind this function; compile and save one model")
    named = named_tensors(module)
    names = {key: name for key, (name, _) in named.items()}
    held = DERIVED.of([t for _, t in named.values()])
    if not held:
        raise AccelpassError(f"nothing is packed: {_nothing_packed(found)}")
    tensors: dict[str, Tensor] = {}
    entries = []
    packed = set()
    for number, (recipe, ids, made) in enumerate(held):
        keys = [f"packed.{number}.{output}" for output in range(len(made))]
        tensors |= {k: t.detach().contiguous() for k, t in zip(keys, made, strict=True)}
        entries.append({"key": recipe.key, "sources": [names[i] for i in ids], "tensors": keys})
        packed |= set(ids)
    # An embedding may still read the float rows of what its tied head has in another form.
    read = {id(t) for g in found.graphs if g.binder is not None for t in g.models.read_at(g.binder.kept)}
    floats = {n: t for n, t in module.state_dict(keep_vars=True).items() if id(t) not in packed or id(t) in read}
    for name, tensor in floats.items():
        if is_released(tensor):
            raise AccelpassError(f"{name} was released and is not packed; load the model again")
    tensors |= {f"float.{n}": t.detach().clone().contiguous() for n, t in floats.items()}
    options = found.graphs[-1].options
    learnt = _learnt(options.plan, tensors)
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    save_file(tensors, str(target / TENSORS))
    content = {
        "format": FORMAT,
        "passes": [describe(p) for p in options.passes],
        "options": _settings(options),
        "entries": entries,
        "floats": sorted(floats),
        "fingerprint": fingerprint(module),
        "plan": None if options.plan is None else {"settings": options.plan.settings, "tensors": learnt},
    }
    write_json(target / MANIFEST, content)


def load(model: torch.nn.Module, folder: str | Path, **options: Any) -> Any:
    """``model`` compiled with the saved passes, plan, options and packed weights; nothing is packed again.

    The float memory of the packed weights is released, so the model may have been built with random weights.

    Args:
        options: in place of those that were saved (``lowering``, ``mode``, ``inductor``, ``regions``, ``skip_sites``, ...).

    Raises:
        PlanError: the folder is damaged or was saved from another model.
    """
    source = Path(folder)
    content = read_json(source / MANIFEST, "packed model")
    if content.get("format") != FORMAT or not {"passes", "entries", "floats", "fingerprint"} <= content.keys():
        raise PlanError(f"{source / MANIFEST} is damaged or of another format than {FORMAT}")
    saved = content.get("options", {})
    if not isinstance(saved, dict) or not saved.keys() <= set(KEPT):
        raise PlanError(f"{source / MANIFEST} is damaged: its options are {saved!r}")
    here = fingerprint(model)
    refuse_difference(content["fingerprint"], here, "the packed model")
    tensors = read_tensors(source / TENSORS)
    named = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))
    try:
        entries = [
            (_tuples(e["key"]), [named[n] for n in e["sources"]], tuple(tensors[k] for k in e["tensors"]))
            for e in content["entries"]
        ]
        floats = {n: tensors[f"float.{n}"] for n in content["floats"]}
        if (plan := content.get("plan")) is not None:
            learnt = {name: tensors[key] for name, key in plan["tensors"].items()}
            saved = {**saved, "plan": Plan(plan["settings"], here, learnt)}
    except (KeyError, TypeError) as cause:
        raise PlanError(f"{source} is damaged: {cause} is missing") from cause
    model.load_state_dict(floats, strict=False)
    read = {id(named[n]) for n in floats}
    sources = {id(s): s for _, group, _ in entries for s in group if id(s) not in read}
    DERIVED.release([s for s in sources.values() if owns_storage(s)])
    for key, group, made in entries:
        DERIVED.seed(group, Recipe(key, _unpackable), made)
    return torch.compile(model, backend="accelpass", options={"passes": content["passes"], **saved, **options})


def _learnt(plan: Plan | None, tensors: dict[str, Tensor]) -> dict[str, str]:
    """By name, under which key a plan's tensors are among what is written: codes that are packed already are not written twice."""
    if plan is None or not plan.tensors:
        return {}
    known = {(t.dtype, t.shape, digest(t)): key for key, t in tensors.items() if key.startswith("packed.")}
    found = {}
    for name, t in plan.tensors.items():
        found[name] = key = known.get((t.dtype, t.shape, digest(t)), f"plan.{name}")
        if key not in tensors:
            tensors[key] = t.detach().cpu().contiguous()
    return found


def _settings(options: Options) -> dict[str, Any]:
    """The options that are not the default, as a user types them.

    Raises:
        AccelpassError: one of Inductor's is no plain value.
    """
    plain = Options()
    found = {name: getattr(options, name) for name in KEPT if getattr(options, name) != getattr(plain, name)}
    for name, value in found.get("inductor", {}).items():
        try:
            json.dumps(value)
        except TypeError:
            raise AccelpassError(
                f"options={{'inductor': {{{name!r}: ...}}}} holds a {type(value).__name__}, which cannot be saved; compile "
                f"without it, and give it to accelpass.load"
            ) from None
    return found


def _nothing_packed(found: Found) -> str:
    """Why no weight of a model was packed, and what to type."""
    packers = {p.name for g in found.graphs for p in g.options.passes if p.phase == "weights"}
    if not packers:
        return "compile the model with int8_weights or int4_weights, then save it"
    reasons: dict[str, dict[str, str]] = {}
    for record in (r for g in found.graphs for r in g.report.records if r.name in packers):
        reasons.setdefault(record.name, {}).update(record.skipped)
    return "; ".join(f"{name} took no layer ({_said(reasons.get(name, {}))})" for name in sorted(packers))


def _said(skipped: dict[str, str]) -> str:
    groups = alike(skipped)
    said = [f"{', '.join(collapse(sites))}: {why}" for why, sites in groups[:3]]
    more = [f"and {len(groups) - 3} reasons more, see accelpass.explain"] if len(groups) > 3 else []
    return "; ".join([*said, *more]) or "it found none"


def _tuples(key: Any) -> Any:
    """JSON lists back to the tuples of a recipe's key."""
    return tuple(map(_tuples, key)) if isinstance(key, list) else key


def _unpackable(*_: Tensor) -> tuple[Tensor, ...]:
    raise AssertionError("a seeded recipe is only ever compared")
