"""The stations between Dynamo's graph and the compiler that all graphs pass: capture, lowering, and a check of what is left."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode

from accelpass.backends.lowering import lower
from accelpass.ir import attention
from accelpass.ir.capture import from_dynamo
from accelpass.ir.derived import is_released
from accelpass.ir.errors import ReleasedWeightError
from accelpass.ir.kv import lower as kv
from accelpass.ir.program import Program
from accelpass.ir.tensors import Binder, FromInputs
from accelpass.passes.options import Options
from accelpass.passes.report import GraphReport


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
    for old, new in copies.items():
        if hasattr(old, "_dynamo_source"):
            new._dynamo_source = old._dynamo_source
    made = fx.GraphModule(gm, graph)
    made.meta.update(gm.meta)
    made._param_name_to_source = dict(getattr(gm, "_param_name_to_source", {}))  # type: ignore[assignment]
    return made


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
