"""``calibrate``: run a model on data so that passes can fit what they need, and put it into a plan."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from rich.progress import Progress
from torch import Tensor, nn

from accelpass.api.loss_study import LossStudy, parted
from accelpass.caches.kv_cache import KVCache
from accelpass.ir import attention
from accelpass.ir.core.capture import from_dynamo
from accelpass.ir.core.program import Program
from accelpass.ir.errors import AccelpassError, OptionError
from accelpass.passes.core.base import Calibrated, CalibratedOnLoss, Run, Watch
from accelpass.passes.core.plan import Plan
from accelpass.passes.core.registry import make


def calibrate(
    model: nn.Module,
    batches: Iterable[Any],
    passes: Sequence[Any],
    progress: bool = True,
    validation: Iterable[Any] | None = None,
) -> Plan:
    """Fit what ``passes`` learn from data; give the plan to ``torch.compile`` as ``options={"plan": plan}``.

    Args:
        model: the model as it is, not compiled.
        batches: token ids ``(batch, tokens)``, or dicts of the model's arguments. They are read several times. For passes
            that learn from the loss (``moa``), a dict may have ``labels`` as transformers takes them: the token at each
            place, -100 where it does not count; without, every next token counts.
        passes: as in ``torch.compile``'s options; those that learn nothing are put into the plan with their settings.
        progress: show a bar.
        validation: batches that candidates of such passes are compared on. Of ``batches`` alone, the longest are held
            back for it; of several that are all equally long, the last.

    Raises:
        OptionError: no batch, or no pass.
        AccelpassError: a pass found nothing to fit; says why.
    """
    held = _held(batches)
    made = [make(p) for p in passes]
    if not held or not made:
        raise OptionError(f"calibrate needs {'batches of data' if not held else 'passes'}; there are none")
    tensors: dict[str, Tensor] = {}
    with Progress(disable=not progress) as bar:
        if any(isinstance(p, Calibrated) for p in made):
            program = _captured(model, held[0])
        for p in made:
            if isinstance(p, Calibrated):
                tensors |= p.calibrate(program, _runner(model, held, bar, p.name))
            if isinstance(p, CalibratedOnLoss):
                kept, others = parted(held, _held(validation or ()))
                tensors |= p.calibrate_on_loss(LossStudy(model, kept, others, bar, p.name))
    return Plan.of(model, [*made], tensors)


def _held(batches: Iterable[Any]) -> list[Mapping[str, Any]]:
    return [b if isinstance(b, Mapping) else {"input_ids": b} for b in batches]


def _runner(model: nn.Module, batches: Sequence[Mapping[str, Any]], bar: Progress, name: str) -> Run:
    def run(watched: Mapping[str, Watch], what: str) -> None:
        """All batches once; ``watched`` is called with the input of the module that owns each parameter path."""
        handles = []
        for path, watch in watched.items():
            owner = model.get_submodule(path.rpartition(".")[0])
            handles.append(owner.register_forward_pre_hook(lambda _, given, watch=watch: watch(given[0].detach())))
        try:
            with torch.no_grad():
                for batch in bar.track(batches, description=f"{name}: {what}"):
                    model(**{**batch, "use_cache": False})
        finally:
            for handle in handles:
                handle.remove()

    return run


def _captured(model: nn.Module, batch: Mapping[str, Any]) -> Program:
    """The graph of a prompt into an empty KVCache."""
    programs: list[Program] = []

    def collect(gm: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        program = from_dynamo(gm, inputs)
        with torch.no_grad():
            attention.insert(program)
        programs.append(program)
        return gm.forward

    sequences, tokens = batch["input_ids"].shape
    cache = KVCache(model, tokens, sequences)
    with torch.no_grad():
        torch.compile(model, backend=collect)(**batch, past_key_values=cache, use_cache=True)
    if len(programs) != 1:
        raise AccelpassError(f"the model was captured as {len(programs)} graphs; calibration needs it as one")
    return programs[0]
