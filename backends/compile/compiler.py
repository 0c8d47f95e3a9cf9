"""What ``torch.compile(model, backend="accelpass")`` calls for each graph."""

from __future__ import annotations

import time
import traceback
import warnings
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx

from accelpass.backends.compile.inductor import compile_whole
from accelpass.backends.compile.rewriting import captured, code_for, compile_steps, rewritten
from accelpass.backends.kernels.cuda import block_sparse as block_sparse  # registers its kernel
from accelpass.backends.kernels.cuda import kv_decode as kv_decode  # registers its kernel
from accelpass.backends.runtime.caches import CacheCalls
from accelpass.backends.runtime.owners import Owners
from accelpass.backends.runtime.survivors import Choices
from accelpass.backends.staged.by_step import SteppedGraph
from accelpass.backends.staged.compiler import marks, staged_graph
from accelpass.ir.core.canonical import autocast
from accelpass.ir.core.capture import NotCanonical, model_path
from accelpass.ir.core.derived import refuse_uncompiled_calls
from accelpass.ir.core.graph import placeholders
from accelpass.ir.core.tensors import Binder, FromInputs
from accelpass.ir.errors import AccelpassError, DefaultPassFailed, GraphError, PassError
from accelpass.ir.torch_private import allow_recompilations, frame_of
from accelpass.passes.core.options import Options, parse
from accelpass.passes.core.report import GraphReport, measure

_COMPILED: weakref.WeakSet[CompiledGraph] = weakref.WeakSet()


@dataclass(eq=False)
class CompiledGraph:
    """One compiled graph: what Dynamo calls, and the report of how it came about.

    Attributes:
        models: whose tensors it has been run with.
    """

    fn: Callable[..., Any]
    binder: Binder | None
    options: Options
    given: dict[str, Any] | None
    report: GraphReport
    models: Owners = field(repr=False)
    caches: CacheCalls | None = None
    steps: SteppedGraph | None = None
    choices: Choices | None = None
    is_cast: bool = False
    """Autocast was on around the call and is part of the graph: it is off while the graph runs."""

    def __post_init__(self) -> None:
        _COMPILED.add(self)

    def __call__(self, *args: Any) -> Any:
        if self.is_cast:
            with autocast.switched({}):
                return self._checked(args)
        return self._checked(args)

    @property
    def owners(self) -> tuple[weakref.ref[Tensor], ...]:
        """The model's tensors that it was compiled for; they may be gone, and another model of the class use it."""
        return self.models.compiled_for

    def _checked(self, args: Sequence[Any]) -> Any:
        self.models.note(args)
        if self.caches is None:
            return self._run(args)
        holdings = self.caches.check(args)
        made = self._run(args)
        self.caches.note(args, holdings)
        return made

    def _run(self, args: Sequence[Any]) -> Any:
        made = self.fn(*(args if self.binder is None else self.binder(args)))
        return made if self.choices is None else self.choices.note(args, made)


def graphs_of(module: torch.nn.Module) -> list[CompiledGraph]:
    """The live graphs that were compiled for this very module, oldest first."""
    mine = {id(t) for t in (*module.parameters(), *module.buffers())}
    return [c for c in compiled_graphs() if any(id(r()) in mine for r in c.owners)]


def compiled_graphs() -> list[CompiledGraph]:
    """The graphs that are alive now, oldest first."""
    return sorted(_COMPILED, key=lambda c: c.report.number)


def backend(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: dict[str, Any] | None = None,
) -> CompiledGraph:
    """Compile one Dynamo graph.

    Raises:
        OptionError: an option, a pass or a field that does not exist or is out of range.
        PassError: a pass failed, or gradients are wanted through one that has none.
    """
    allow_recompilations()
    made = compiled(gm, example_inputs, parse(options, mode), options)
    frame = made.models.frame
    if frame is not None and frame.is_last:
        warnings.warn(
            f"{frame.name} was compiled {frame.compilation + 1} times, and Dynamo will not do so again: calls that none of these "
            "graphs fit now run uncompiled, without the passes. Raise torch._dynamo.config.recompile_limit, or let calls "
            "be more alike (TORCH_LOGS=recompiles tells what differed).",
            stacklevel=2,
        )
    return made


def compiled(
    gm: fx.GraphModule, example_inputs: Sequence[Any], chosen: Options, options: dict[str, Any] | None = None
) -> CompiledGraph:
    """As :func:`backend`, with options that were read already; ``options`` are what a user typed."""
    started = time.perf_counter()
    if any(isinstance(t, Tensor) and t.device.type == "cuda" for t in example_inputs) and not torch.cuda.is_available():
        raise PassError("the model is on CUDA, and torch sees no GPU")
    report = GraphReport.start()
    needs_grad = torch.is_grad_enabled() and any(isinstance(t, Tensor) and t.requires_grad for t in example_inputs)
    if needs_grad:
        lossy = sorted(p.name for p in chosen.passes if not p.exact)
        if lossy:
            raise PassError(
                f"{', '.join(lossy)}: there is no gradient through what it rewrites. "
                "Call the compiled model under torch.no_grad() or torch.inference_mode()."
            )
        report.note = (
            "gradients are wanted, so the graph was compiled without passes; use torch.no_grad() for inference"
        )
        return _plain(gm, example_inputs, chosen, options, report, started)
    gm.meta[autocast.AROUND] = around = autocast.current()
    while True:
        try:
            with autocast.switched({}):
                made = _canonical(gm, example_inputs, chosen, options, report, started)
        except NotCanonical as cause:
            report.add_note(f"not canonicalised: {cause}")
            return _plain(gm, example_inputs, chosen, options, report, started)
        except DefaultPassFailed as failure:
            report = report.anew(_unforeseen(failure.pass_name, failure))
            chosen = replace(chosen, passes=tuple(p for p in chosen.passes if p.name != failure.pass_name))
        except Exception as cause:
            if _is_meant(cause) or (chosen.asked and isinstance(cause, AccelpassError)):
                raise
            if chosen.asked:
                names = ", ".join(p.name for p in chosen.passes if p.name in chosen.asked)
                raise PassError(f"compiling with {names} failed: {type(cause).__name__}: {cause}") from cause
            report = report.anew(_unforeseen("this graph", cause))
            return _plain(gm, example_inputs, chosen, options, report, started)
        else:
            made.is_cast = bool(around)
            if chosen.free_weights and (model := made.models.module) is not None:
                refuse_uncompiled_calls(model)
            return made


def _is_meant(cause: Exception) -> bool:
    """Whether an error is an answer: ours that names what is wrong, or torch's, by which Dynamo also starts anew."""
    if isinstance(cause, AccelpassError):
        return not isinstance(cause, GraphError)
    return type(cause).__module__.partition(".")[0] == "torch"


def _unforeseen(what: str, cause: Exception) -> str:
    """Tell of a fault of our own that costs speed alone; returns the note for the report."""
    told = f"compiled without {what}" if what != "this graph" else "compiled without passes"
    note = f"{told}, which failed: {' '.join(str(cause).split())}"
    if not isinstance(cause, AccelpassError):
        note = f"{told}: {type(cause).__name__}: {' '.join(str(cause).split())}"
    where = traceback.extract_tb((cause.__cause__ or cause).__traceback__)[-1]
    warnings.warn(
        f"accelpass: {note} ({Path(where.filename).name}, line {where.lineno}). Results are right, and slower than they could "
        "be. Please report it with the model's class and this message.",
        stacklevel=2,
    )
    return note


def _canonical(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    chosen: Options,
    options: dict[str, Any] | None,
    report: GraphReport,
    started: float,
) -> CompiledGraph:
    """Capture, rewrite and compile; autocast is off, because the graph holds its casts."""
    program = captured(gm, example_inputs, report)
    tensors = program.tensors
    assert isinstance(tensors, FromInputs)
    with torch.no_grad():
        report.before = measure(program)
        report.add_note(*report.before.failed)
    places = [(tensors.position(n), path) for n, (path, _) in tensors.paths.items()]
    models = Owners(places, example_inputs, frame_of(gm))
    if (staged := staged_graph(gm, program, example_inputs, chosen, report)) is not None:
        graph, calls = staged
        report.seconds = time.perf_counter() - started
        steps = graph if isinstance(graph, SteppedGraph) else None
        return CompiledGraph(graph, None, chosen, options, report, models, calls, steps=steps)
    made = rewritten(program, example_inputs, chosen, report)
    binder, report.records, report.after = made.binder, made.records, made.cost
    with torch.no_grad():
        inputs = binder(example_inputs)
    fn = code_for(program.gm, inputs, chosen, made.exact, report)
    compile_steps(made.uses, chosen, made.exact, report)
    report.seconds = time.perf_counter() - started
    report.derived_bytes = binder.derived_bytes()
    text = [*(program.survivors or {}).values()]
    caches = CacheCalls.of(made.uses, tensors, marks(chosen), text) if made.uses else None
    return CompiledGraph(fn, binder, chosen, options, report, models, caches, choices=Choices.of(program))


def _plain(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    chosen: Options,
    given: dict[str, Any] | None,
    report: GraphReport,
    started: float,
) -> CompiledGraph:
    """Compile what Dynamo gave, unrewritten."""
    fn = compile_whole(gm, list(example_inputs), chosen) if chosen.lowering == "inductor" else gm.forward
    report.seconds = time.perf_counter() - started
    found = ((p, model_path(node)) for p, node in enumerate(placeholders(gm)))
    places = [(p, path[0]) for p, path in found if path is not None]
    return CompiledGraph(fn, None, chosen, given, report, Owners(places, example_inputs, frame_of(gm)))
