"""``probe``: what a pass gathers of one group of data, and of another."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from rich.progress import Progress
from torch import Tensor, nn

from accelpass.api.calibration.loss_study import MARKS
from accelpass.api.stateful import read
from accelpass.ir.core.program import Program
from accelpass.ir.core.state import STATE
from accelpass.ir.errors import OptionError, PassError
from accelpass.ir.transform.real_tokens import MASK, has_padding
from accelpass.passes.core.base import Record
from accelpass.passes.core.manager import Observer, watched
from accelpass.passes.core.registry import make


@dataclass(frozen=True)
class Gathered:
    """What a pass gathered of one group of data.

    Attributes:
        tokens: how many tokens there were, without padding; 0 of data without tokens.
        values: by the name of the point, as :func:`accelpass.read` has it, without the pass's.
    """

    tokens: int
    values: Mapping[str, Tensor]


def probe(
    model: nn.Module,
    gathering: Any,
    groups: Mapping[str, Iterable[Any]],
    *,
    progress: bool = True,
    options: Mapping[str, Any] | None = None,
) -> dict[str, Gathered]:
    """Run groups of data through a model with a pass that gathers by taps, and tell what it gathered of each.

    Groups are languages, tasks, classes: whatever is to be compared. Which tokens are padding the taps are told by
    ``Tap(also=real_tokens)``. The compiled model is forgotten afterwards, and so is what the pass gathered; what another compiled form of
    the model has gathered with it stays.

    Args:
        model: the model as it is, not compiled.
        gathering: the pass, as in ``torch.compile``'s options.
        groups: by name, batches: token ids ``(batch, tokens)``, or dicts of the model's arguments, ``attention_mask`` among them
            where there is padding.
        progress: show a bar.
        options: further options of the backend. Without ``lowering``, graphs are run as they are, uncompiled.

    Raises:
        OptionError: no group, or one without data; or there is padding, which the pass would count.
        PassError: the pass gathers nothing in this model.
    """
    one = make(gathering)
    held = {name: [_arguments(model, batch) for batch in batches] for name, batches in groups.items()}
    if not held or not all(held.values()):
        empty = next((name for name, batches in held.items() if not batches), None)
        raise OptionError(
            "probe needs groups of batches; there are none" if empty is None else f"the group {empty!r} has no batch"
        )
    padded = any(has_padding(batch) for batches in held.values() for batch in batches)
    own, prefix, counted = [*model.parameters(), *model.buffers()], f"{one.name}.", set[str]()
    before, known = [(t, STATE.snapshot(t)) for t in own if STATE.of([t])], bool(STATE.of(own, prefix))

    def after(program: Program, record: Record) -> None:
        counted.update(program.counts_padding)

    asked: dict[str, Any] = {"lowering": "eager", **(options or {}), "passes": [one]}
    fast = torch.compile(model, backend="accelpass", options=asked)
    found: dict[str, Gathered] = {}
    try:
        with Progress(disable=not progress) as bar, torch.no_grad(), watched(Observer(after)):
            for name, batches in held.items():
                for t in own:
                    STATE.reset(t)
                for batch in bar.track(batches, description=f"{one.name}: {name}"):
                    fast(**batch)
                    if padded and counted:
                        raise OptionError(
                            f"{one.name}: there is padding, which {sorted(counted)[0]} would count; use Tap(also=real_tokens), or give "
                            "texts without"
                        )
                if not STATE.of(own, prefix):
                    raise PassError(f"{one.name} gathers nothing in this model; probe takes a pass that has taps")
                values = {key.removeprefix(prefix): made for key, made in read(fast, f"{prefix}*").items()}
                found[name] = Gathered(sum(map(_tokens, batches)), values)
    finally:
        if not known:
            STATE.discard(own, prefix)
        for t, snapshot in before:
            STATE.restore(t, snapshot)
    return found


def _arguments(model: nn.Module, batch: Any) -> dict[str, Any]:
    """A batch as the model is called; with a mask, if it takes one, so that all batches have one graph."""
    takes = inspect.signature(model.forward).parameters
    if not isinstance(batch, Mapping):
        batch = {next(iter(takes)): batch}
    given = {k: v for k, v in batch.items() if k not in MARKS}
    if "use_cache" in takes:
        given.setdefault("use_cache", False)
    if MASK in takes and given.get(MASK) is None and isinstance(ids := given.get("input_ids"), Tensor):
        given[MASK] = torch.ones_like(ids)
    return given


def _tokens(batch: Mapping[str, Any]) -> int:
    if isinstance(batch.get(MASK), Tensor):
        return int((batch[MASK] != 0).sum())
    ids = next(
        (t for t in batch.values() if isinstance(t, Tensor) and t.dim() == 2 and not t.is_floating_point()), None
    )
    return 0 if ids is None else ids.numel()
