"""Compiles the two graphs of a prompt that is shortened before the model reads it, and runs the first before the second."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from accelpass.backends.compile.rewriting import Rewritten, captured, code_for, rewritten
from accelpass.backends.runtime.caches import CacheCalls
from accelpass.backends.runtime.rows import rows_of
from accelpass.backends.runtime.survivors import Survivors, keep_last
from accelpass.ir.core.capture import NotCanonical
from accelpass.ir.core.graph import fake_mode, hint, known, value
from accelpass.ir.core.program import Program
from accelpass.ir.core.tensors import Binder, FromInputs
from accelpass.ir.kv import shortened
from accelpass.ir.kv.ledger import holding_of
from accelpass.ir.kv.sites import kv_sites
from accelpass.ir.torch_private import FakeTensorMode, TracingContext, tracing
from accelpass.ir.transform.prompt import NoPrompt, Prompt, TokenInput, prompt, shorten
from accelpass.passes.core.base import Done, Record
from accelpass.passes.core.manager import ordered
from accelpass.passes.core.options import Options
from accelpass.passes.core.report import GraphReport
from accelpass.passes.token_pruning.filter import PromptFilter


@dataclass(frozen=True, eq=False)
class Part:
    """One compiled graph."""

    fn: Callable[..., Any]
    binder: Binder

    def __call__(self, args: Sequence[Any]) -> Any:
        return self.fn(*self.binder(args))


@dataclass(frozen=True, eq=False)
class WholePrompt:
    """A prompt that a pass would shorten and does not: all of its tokens survive."""

    whole: Part
    model: int | None

    def __call__(self, args: Sequence[Any]) -> Any:
        keep_last(None if self.model is None else args[self.model], [])
        return self.whole(args)


@dataclass(frozen=True, eq=False)
class FilteredPrompt:
    """Chooses tokens, runs the model on them, and notes what was left out.

    Attributes:
        path: the module whose queries choose.
        first: returns what :func:`accelpass.passes.token_pruning.look.chosen` says.
        second: the model for ``keep`` tokens.
        inputs: the arguments that depend on the tokens.
        counters: positions of the cache layers' counters; none without a cache. A layer holds ``capacity`` tokens.
        caches: checks of what ``second`` does to them.
        model: the position of one of the model's own tensors.
    """

    path: str
    keep: int
    first: Part
    second: Part
    inputs: tuple[TokenInput, ...]
    counters: tuple[int, ...]
    capacity: int
    caches: CacheCalls | None
    model: int | None

    def __call__(self, args: Sequence[Any]) -> Any:
        rows, positions, seen, moved = self.first(args)
        made = self.second(taken(args, self.inputs, rows, positions))
        one = next(i for i in self.inputs if i.role == "rows")
        tokens = int(args[one.argument].shape[one.dims[0]])
        if self.counters:
            shortened.note(args[self.counters[0]], self.capacity, tokens - self.keep, moved, seen)
        for position in self.counters:
            held = holding_of(args[position])
            held.dropped, held.kept = tokens - self.keep, self.keep
        # A copy, because a graph that is replayed writes its results to one place.
        keep_last(None if self.model is None else args[self.model], [Survivors(self.path, rows.clone(), tokens)])
        return made


def taken(args: Sequence[Any], inputs: Sequence[TokenInput], rows: Tensor, positions: Tensor) -> list[Any]:
    """A call's arguments with the chosen tokens alone.

    Args:
        rows: ``(batch, kept)``; positions: the same, where each stands among them.
    """
    made, kept = list(args), rows.shape[1]
    for one in inputs:
        given = args[one.argument]
        if one.role == "count":
            made[one.argument] = kept
        elif one.role == "positions":
            own = given.dim() == 2 and given.shape[0] == rows.shape[0]
            places = positions if own else torch.arange(kept, device=rows.device).expand(*given.shape[:-1], -1)
            made[one.argument] = places.to(given.dtype).contiguous()
        else:
            for dim in one.dims:
                given = rows_of(given, rows, dim)
            made[one.argument] = given
    return made


def filtered(
    gm: fx.GraphModule, program: Program, inputs: Sequence[Any], chosen: Options, report: GraphReport
) -> FilteredPrompt | None:
    """Compile a prompt's graph twice; None if it is read as it is: :meth:`PromptFilter.apply` then says why.

    Args:
        program: the captured graph. It is used up if this succeeds.
    """
    ordered(chosen.passes)  # refuses what does not go together
    (by,) = (p for p in chosen.passes if isinstance(p, PromptFilter))
    others = replace(chosen, passes=tuple(p for p in chosen.passes if p is not by))
    tensors = program.tensors
    assert isinstance(tensors, FromInputs)
    try:
        found = prompt(program)
        path = found.attentions[by.layer_of(found)].path
        if path in chosen.skip_sites.get(by.name, ()):
            raise NoPrompt(f"{path}, whose queries would choose, is named in skip_sites")
        if not by.shortens(found):
            return None
        _specialise(tensors, found)
        short, model = _for_chosen(gm, program, found, by.keep, inputs, report)
    except (NoPrompt, NotCanonical) as why:
        program.refused[by.name] = str(why)
        return None
    tokens = hint(found.tokens)
    sites = kv_sites(program)
    counters, capacity = tuple(tensors.position(s.count) for s in sites), sites[0].capacity if sites else 0
    path = by.look(program, found)
    # What the first look needs is packed before the memory of any float weight is given back.
    uncached = tuple(p for p in others.passes if p.phase != "cache")
    first = rewritten(program, inputs, replace(others, passes=uncached, free_weights=False), report)
    second = rewritten(model, short, others, report)
    second.binder.released -= frozenset(first.binder.kept)
    looking, reading = (_compiled(one, args, others, report) for one, args in ((first, inputs), (second, short)))
    took = Done(f"its queries choose {by.keep} of the prompt's tokens (of {tokens} when this was compiled)")
    report.records = [Record(by.name, {path: took}), *second.records]
    report.after = replace(second.cost, flops=first.cost.flops + second.cost.flops)
    assert isinstance(model.tensors, FromInputs)
    caches = CacheCalls.of(second.uses, model.tensors, (by.name,)) if second.uses else None
    return FilteredPrompt(path, by.keep, looking, reading, found.inputs, counters, capacity, caches, tensors.model)


def _specialise(tensors: FromInputs, found: Prompt) -> None:
    """Let every size but the number of tokens be the number that it is, which guards see to."""
    for node in tensors.callers():
        given = value(node)
        if not node.users:
            continue
        for size in given.shape if isinstance(given, Tensor) else (given,):
            if isinstance(size, torch.SymInt) and not known(size == found.tokens):
                int(size)


def _for_chosen(
    gm: fx.GraphModule, program: Program, found: Prompt, keep: int, inputs: Sequence[Any], report: GraphReport
) -> tuple[list[Any], Program]:
    """The model for ``keep`` tokens, and arguments of that many.

    Raises:
        NoPrompt: a graph of static sizes cannot be made shorter.
    """
    row = torch.arange(keep, device=inputs[found.rows.argument].device).expand(int(found.batch), -1)
    given = [hint(a) if isinstance(a, torch.SymInt) else a for a in inputs]
    short = taken(given, found.inputs, row, row)
    if isinstance(found.tokens, torch.SymInt) and not known(found.tokens == hint(found.tokens)):
        return short, captured(gm, short, report, FakeTensorMode(shape_env=ShapeEnv()), guarded=True)
    return short, captured(gm, short, report, edit=lambda made: shorten(made, found.inputs, keep))


def _compiled(made: Rewritten, args: Sequence[Any], chosen: Options, report: GraphReport) -> Part:
    with torch.no_grad():
        inputs = made.binder(args)
    mode = fake_mode(made.program.gm)
    assert mode is not None
    # Each graph is compiled for itself; the length of the second is not one that Dynamo has seen.
    with tracing(TracingContext(mode)):
        return Part(code_for(made.program.gm, inputs, chosen, made.exact, report), made.binder)
