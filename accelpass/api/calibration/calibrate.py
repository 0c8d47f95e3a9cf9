"""``calibrate``: run a model on data so that passes can fit what they need, and put it into a plan."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress
from torch import Tensor, fx, nn

from accelpass.api.calibration.block_walk import walk
from accelpass.api.calibration.loss_study import LossStudy, parted
from accelpass.api.calibration.resuming import BlockStore
from accelpass.caches.kv_cache import KVCache
from accelpass.ir import attention
from accelpass.ir.analyses.structure.linear import linears
from accelpass.ir.core.program import Program
from accelpass.ir.core.state import STATE
from accelpass.ir.core.tensors import FromInputs
from accelpass.ir.errors import AccelpassError, OptionError, PassError
from accelpass.ir.transform.real_tokens import has_padding
from accelpass.ir.transform.tap import Tap, tap
from accelpass.passes.core.base import BlockRun, Calibrated, CalibratedOnLoss, Watch
from accelpass.passes.core.plan import Plan
from accelpass.passes.core.registry import make


def calibrate(
    model: nn.Module,
    batches: Iterable[Any],
    passes: Sequence[Any],
    progress: bool = True,
    validation: Iterable[Any] | None = None,
    resume: str | Path | None = None,
) -> Plan:
    """Fit what ``passes`` learn from data; give the plan to ``torch.compile`` as ``options={"plan": plan}``.

    Args:
        model: the model as it is, not compiled.
        batches: token ids ``(batch, tokens)``, or dicts of the model's arguments. They are read several times. For passes
            that learn from the loss (``moa``), a dict may have ``labels`` as transformers takes them: the token at each
            place, -100 where it does not count; without, every next token counts. ``compresskv`` also reads ``needle``: True where
            a text has what its answer repeats.
        passes: as in ``torch.compile``'s options; those that learn nothing are put into the plan with their settings.
        progress: show a bar.
        validation: batches that candidates of such passes are compared on. Of ``batches`` alone, the longest are held
            back for it; of several that are all equally long, the last.
        resume: a folder, in which what is learnt of each block is kept as it is finished: a run that was interrupted goes on from
            there when it is called again with the same arguments. It may be removed afterwards.

    Raises:
        OptionError: no batch, or no pass; or ``resume`` is of a calibration with other arguments.
        AccelpassError: a pass found nothing to fit; says why.
    """
    held = _held(batches)
    made = [make(p) for p in passes]
    if not held or not made:
        raise OptionError(f"calibrate needs {'batches of data' if not held else 'passes'}; there are none")
    tensors: dict[str, Tensor] = {}
    store = None if resume is None else BlockStore(Path(resume).expanduser(), model, held, made)
    with Progress(disable=not progress) as bar:
        if any(isinstance(p, Calibrated) for p in made):
            program = _captured(model, held[0], any(isinstance(p, Calibrated) and p.fits_cache for p in made))
        for p in made:
            if isinstance(p, Calibrated):
                tensors |= p.calibrate(program, _Runner(model, held, bar, p.name, store))
            if isinstance(p, CalibratedOnLoss) and p.wants_loss:
                kept, others = parted(held, _held(validation or ()))
                learnt = {name: t for name, t in tensors.items() if name.startswith(f"{p.name}/")}
                tensors |= p.calibrate_on_loss(LossStudy(model, kept, others, bar, p.name, learnt))
    return Plan.of(model, [*made], tensors)


def _held(batches: Iterable[Any]) -> list[Mapping[str, Any]]:
    return [b if isinstance(b, Mapping) else {"input_ids": b} for b in batches]


class _Runner:
    """Runs all batches through the model's own graph, in which what a pass wants to see is tapped."""

    def __init__(
        self, model: nn.Module, batches: Sequence[Mapping[str, Any]], bar: Progress, name: str, store: BlockStore | None
    ) -> None:
        self.model, self.batches, self.bar, self.name, self.store = model, batches, bar, name, store

    def kept(self, number: int) -> dict[str, Tensor] | None:
        return None if self.store is None else self.store.read(self.name, number)

    def keep(self, number: int, learnt: Mapping[str, Tensor]) -> None:
        if self.store is not None:
            self.store.write(self.name, number, learnt)

    def __call__(self, watched: Mapping[str, Watch], what: str) -> None:
        seen: set[str] = set()

        def begin(program: Program) -> Sequence[tuple[fx.Node, Watch]]:
            of = {program.tensors.path(site.weight): site.operand() for site in program.analysis(linears)}
            seen.update(path for path in watched if path in of)
            return [(of[path], watch) for path, watch in watched.items() if path in of]

        self._run(begin, what)
        if missed := watched.keys() - seen:
            raise PassError(f"{self.name}: {sorted(missed)[0]} is the weight of no linear that the model runs")

    def gather(self, taps: Sequence[Tap], what: str) -> dict[str, Tensor]:
        by, anchors = f"calibrate.{self.name}", [*self.model.parameters(), *self.model.buffers()]

        def begin(program: Program) -> Sequence[tuple[fx.Node, Watch]]:
            tap(program, taps, by)
            return ()

        if any(one.counts_padding for one in taps) and any(map(has_padding, self.batches)):
            raise OptionError(f"{self.name}: a batch has padding, which would be counted; calibrate on texts without")
        STATE.discard(anchors, f"{by}.")
        self._run(begin, what)
        return {name.removeprefix(f"{by}."): made for name, made in STATE.discard(anchors, f"{by}.").items()}

    def blocks(self, what: str, rest: bool = False) -> Iterator[BlockRun]:
        batches = [{**batch, **_without_cache(self.model, batch)} for batch in self.batches]
        yield from walk(
            self.model, batches, lambda held: self.bar.track(held, description=f"{self.name}: {what}"), rest
        )

    def _run(self, begin: Callable[[Program], Sequence[tuple[fx.Node, Watch]]], what: str) -> None:
        def backend(gm: fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
            program = attention.captured(gm, inputs)
            assert isinstance(program.tensors, FromInputs)
            with torch.no_grad():
                watched = begin(program)
                attention.lower(program)
            (output,) = program.graph.find_nodes(op="output")
            own: Any = output.args[0]
            output.args = ((*own, *(node for node, _ in watched)),)
            binder = program.tensors.binder()
            program.gm.recompile()

            def run(*given: Any) -> Any:
                made = program.gm(*binder(given))
                for (_, watch), found in zip(watched, made[len(own) :], strict=True):
                    watch(found.detach())
                return made[: len(own)]

            return run

        fast = torch.compile(self.model, backend=backend)
        with torch.no_grad():
            for batch in self.bar.track(self.batches, description=f"{self.name}: {what}"):
                fast(**batch, **_without_cache(self.model, batch))


def _captured(model: nn.Module, batch: Mapping[str, Any], cached: bool) -> Program:
    """The graph of a prompt, into an empty KVCache if ``cached`` passes want one."""
    programs: list[Program] = []

    def collect(gm: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        programs.append(attention.captured(gm, inputs))
        return gm.forward

    given = _without_cache(model, batch)
    if cached:
        sequences, tokens = batch["input_ids"].shape
        given = {"past_key_values": KVCache(model, tokens, sequences), "use_cache": True}
    with torch.no_grad():
        torch.compile(model, backend=collect)(**batch, **given)
    if len(programs) != 1:
        raise AccelpassError(f"the model was captured as {len(programs)} graphs; calibration needs it as one")
    return programs[0]


def _without_cache(model: nn.Module, batch: Mapping[str, Any]) -> dict[str, Any]:
    takes = "use_cache" in inspect.signature(model.forward).parameters and "use_cache" not in batch
    return {"use_cache": False} if takes else {}
