"""The stations between Dynamo's graph and its code that all graphs pass: capture, passes, lowering, compilation."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx

from accelpass.backends.compile.inductor import compile_graph
from accelpass.backends.compile.lowering import lower
from accelpass.backends.staged.linker import LinkedGraph
from accelpass.ir import attention
from accelpass.ir.core.capture import from_dynamo
from accelpass.ir.core.derived import is_released
from accelpass.ir.core.graph import placeholders, value
from accelpass.ir.core.program import Program
from accelpass.ir.core.tensors import Binder, FromInputs
from accelpass.ir.errors import ReleasedWeightError
from accelpass.ir.kv import lower as kv
from accelpass.ir.torch_private import FakeTensorMode, copy_sources, name_buffers
from accelpass.passes.core.base import Record
from accelpass.passes.core.manager import run
from accelpass.passes.core.options import Options
from accelpass.passes.core.report import GraphReport, Measured, costs

_MANY_ROWS = 8
"""Operations for each byte of weights from which on a call computes many rows: sixteen of float32, a prompt or an image."""

if TYPE_CHECKING:
    from accelpass.backends.debug.debug_mode import Debugging


def captured(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    report: GraphReport,
    at: FakeTensorMode | None = None,
    edit: Callable[[Program], None] = lambda program: None,
    guarded: bool = False,
) -> Program:
    """The canonical program with its attentions as semantic nodes; see :func:`from_dynamo`.

    Args:
        edit: changes the graph before attentions are looked for.
        at, guarded: see :func:`from_dynamo`.
    """

    def begin() -> Program:
        program = from_dynamo(gm, example_inputs, at, guarded)
        with torch.no_grad():
            edit(program)
        return program

    program = begin()
    try:
        with torch.no_grad():
            attention.insert(program)
    except Exception as cause:
        # An unforeseen spelling must not stop a model that compiles without us: take the graph anew, without the
        # semantic nodes, and say so.
        report.note = f"attention stays as the model wrote it: {type(cause).__name__}: {cause}"
        program = begin()
    return program


def copied(gm: fx.GraphModule) -> fx.GraphModule:
    """Dynamo's graph to capture from later, when Dynamo has taken its own apart."""
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    graph.output(graph.graph_copy(gm.graph, copies))
    copy_sources(copies)
    made = fx.GraphModule(gm, graph)
    made.meta.update(gm.meta)
    name_buffers(made, gm)
    return made


@dataclass(frozen=True, eq=False)
class Rewritten:
    """A program after its passes, ready to be compiled.

    Attributes:
        cost: after the passes, before they were lowered.
        binder: makes the program's inputs from a call's arguments.
        uses: what it does to key/value caches.
        exact: results must equal the model's up to the order of float additions.
    """

    program: Program
    records: list[Record]
    cost: Measured
    binder: Binder
    uses: list[kv.CacheUse]
    exact: bool


@torch.no_grad()
def rewritten(
    program: Program,
    inputs: Sequence[Any],
    chosen: Options,
    report: GraphReport,
    prepare: Callable[[Program], None] = lambda program: None,
) -> Rewritten:
    """Apply the passes, and lower what they made.

    Args:
        report: gets a note in debug mode.
        prepare: changes the graph before the passes run, after the plan was found to belong to it.

    Raises:
        PlanError: the plan is for another model.
        ReleasedWeightError: the graph needs a weight whose memory was given back.
    """
    tensors = program.tensors
    assert isinstance(tensors, FromInputs)
    if chosen.plan is not None:
        chosen.plan.check(program)
        program.artefacts = chosen.plan.tensors
    prepare(program)
    debugging = debug_of(program, inputs, chosen)
    records = run(
        program, chosen.passes, [] if debugging is None else [debugging.observer], chosen.skip_sites, chosen.asked
    )
    cost = costs(program)
    uses = lowered(program, chosen)
    if debugging is not None:
        debugging.lowered(program)
        report.add_note(debugging.note)
    binder = tensors.binder(release=chosen.free_weights)
    binder.thorough = report.before.flops >= _MANY_ROWS * report.before.weight_bytes
    program.gm.recompile()
    refuse_released(tensors, binder, inputs)
    took = {record.name for record in records if record.took}
    # A product and a sum that are one operation in one graph may be two in another: single tokens and several would part.
    exact = all(p.exact for p in chosen.passes if p.name in took) or any(use.rounds for use in uses)
    return Rewritten(program, records, cost, binder, uses, exact)


def debug_of(program: Program, inputs: Sequence[Any] | None, chosen: Options, variant: str = "") -> Debugging | None:
    """What follows a graph through its passes, in debug mode; see :class:`~accelpass.backends.debug.debug_mode.Debugging`."""
    if not (chosen.debug or os.environ.get("ACCELPASS_DEBUG")):
        return None
    from accelpass.backends.debug.debug_mode import Debugging  # neither its templates nor its pages are for other modes

    return Debugging(program, inputs, variant)


def code_for(
    gm: fx.GraphModule,
    inputs: list[Any],
    chosen: Options,
    exact: bool,
    report: GraphReport,
    code: dict[Hashable, Callable[..., Any]] | None = None,
) -> Callable[..., Any]:
    """What runs a lowered graph; the report gets the time that it took to compile, and its parts.

    Args:
        code: see :func:`~accelpass.backends.staged.repetition.compile_repeating`.
    """
    if chosen.lowering != "inductor":
        return gm
    started = time.perf_counter()
    fn = compile_graph(gm, inputs, chosen, exact, code)
    report.seconds_compiling += time.perf_counter() - started
    if isinstance(fn, LinkedGraph):
        report.parts += len(fn.stages)
        report.parts_compiled += fn.compiled
    return fn


def compile_steps(uses: Sequence[kv.CacheUse], chosen: Options, exact: bool, report: GraphReport) -> None:
    """Compile how caches that evict take candidates one by one: once for all layers that are alike."""
    steppers = {use.stepper.number: use.stepper for use in uses if use.stepper is not None}
    if chosen.lowering != "inductor":
        return
    started = time.perf_counter()
    whole = replace(chosen, regions=False)
    for stepper in steppers.values():
        if not isinstance(stepper.whole, fx.GraphModule):
            continue
        for name in ("one", "whole"):  # one takes accepted tokens again, when others are given back
            graph = getattr(stepper, name)
            setattr(stepper, name, compile_graph(graph, [value(n) for n in placeholders(graph)], whole, exact))
    report.seconds_compiling += time.perf_counter() - started


def lowered(program: Program, chosen: Options) -> list[kv.CacheUse]:
    """Make a rewritten program what the compiler is given; returns what it does to key/value caches."""
    uses = kv.lower(program)
    attention.lower(program)
    if chosen.lowering != "eager":
        lower(program)
    return uses


def refuse_released(tensors: FromInputs, binder: Binder, inputs: Sequence[Any]) -> None:
    for position in binder.kept:
        if isinstance(inputs[position], Tensor) and is_released(inputs[position]):
            path = next((p for n, (p, _) in tensors.paths.items() if tensors.position(n) == position), "a weight")
            raise ReleasedWeightError(
                f"this graph needs {path} as floats, and free_weights released it. "
                "Load the model again, or compile without free_weights."
            )
