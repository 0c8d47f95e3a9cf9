"""The way of a model into a file: capture, passes, lowering, translation, checks, and files that appear whole or not at all."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor

from accelpass.backends.export.capture import Captured, bound, captured, tensors_by_name
from accelpass.backends.export.decoder import cache_of, decoding, refuse_kept
from accelpass.backends.export.errors import ExportError
from accelpass.backends.export.files import staged, writable
from accelpass.backends.export.functional import Functional, functional
from accelpass.backends.export.passes import after_prompt, applied, computed_in_full, refuse_guarded
from accelpass.backends.export.refusals import refuse_left_out
from accelpass.backends.export.stepped import step_graphs, step_pass, with_plan, with_state
from accelpass.backends.onnx import files, runtime, stepped
from accelpass.backends.onnx.cached import manifest, started, stateful
from accelpass.backends.onnx.examples import others
from accelpass.backends.onnx.report import ExportReport, Written
from accelpass.backends.onnx.translation import activations as rounding
from accelpass.backends.onnx.translation import packed_weights
from accelpass.backends.onnx.translation.activations import StaticRanges
from accelpass.backends.onnx.translation.masked_attention import lowerings
from accelpass.backends.onnx.translation.translate import Form, check_opset, constant_bytes, summary, translated
from accelpass.backends.onnx.translation.translations import own_operators
from accelpass.ir import attention
from accelpass.ir.analyses.structure.cost import weight_bytes
from accelpass.ir.kv import lower as kv
from accelpass.ir.linear.lower import make_plain, unpack_others
from accelpass.ir.transform.splice import write_out
from accelpass.passes.core.base import Pass, Record
from accelpass.passes.core.options import Options, parse
from accelpass.passes.core.plan import write_json

Update = Callable[[str], None]
ACTIVATIONS = ("float32", "int8", "qdq")
STEPS = 4
"""Decoding steps by which the files of a decoder are compared with torch."""


@dataclass(frozen=True)
class Wanted:
    """What the caller asked for, checked."""

    chosen: Options
    passes: tuple[Pass, ...]
    form: Form
    ranges: StaticRanges | None = None

    @property
    def who(self) -> str:
        """The passes, for messages."""
        return "the pass " + " and ".join(repr(p.name) for p in self.passes) if self.passes else "the model"


@dataclass
class Graph:
    """One file to be: its graph, what the passes did, and its ONNX model."""

    made: Functional
    records: list[Record]
    model: ir.Model
    weights_before: int
    notes: list[str]
    tolerance: float = runtime.TOLERANCE
    """How far its outputs may be off; see :func:`runtime.tolerance_of`."""
    rounds: bool = False
    """A pass rounds inputs of products to integers."""

    @property
    def allowed(self) -> float:
        """The tolerance; what lies near a half may be rounded to either side, no further than rounding goes by itself."""
        return max(self.tolerance, rounding.effect_of_rounding(self.made)) if self.rounds else self.tolerance


def wanted(
    passes: Sequence[Any],
    plan: Any,
    opset: int,
    contrib: bool,
    activations: str = "float32",
    skip_sites: Mapping[str, Sequence[str]] | None = None,
    debug: bool = False,
) -> Wanted:
    """Check what can be checked without the model.

    Raises:
        OptionError: a pass or option that does not exist.
        ExportError: an opset, or a pass, that cannot be written.
    """
    check_opset(opset)
    if activations not in ACTIVATIONS:
        raise ExportError(f"activations={activations!r} is not known; use {' or '.join(map(repr, ACTIVATIONS))}")
    chosen = parse({"passes": list(passes), "plan": plan, "skip_sites": dict(skip_sites or {}), "debug": debug})
    # Passes that torch.compile has by default choose kernels of its own compilers.
    picked = tuple(p for p in chosen.passes if p.name in chosen.asked)
    if activations != "qdq":
        return Wanted(chosen, picked, Form(opset, contrib, activations == "int8"))
    if contrib:
        raise ExportError("activations='qdq' is written in operators of the standard; leave out contrib")
    return Wanted(chosen, picked, Form(opset, rounded=True), StaticRanges())


def export(
    model: torch.nn.Module,
    args: Sequence[Any],
    path: Any,
    want: Wanted,
    kwargs: Mapping[str, Any] | None = None,
    dynamic_shapes: Any = None,
    external_data: bool | None = None,
    verify: bool = True,
    decode: Mapping[str, Any] | None = None,
    update: Update = lambda news: None,
    step_count: int | None = None,
    calibration: Sequence[Mapping[str, Any]] = (),
) -> ExportReport:
    """See :func:`accelpass.export_onnx`."""
    target = writable(path, ".onnx")
    given = bound(model, args, kwargs)
    if want.ranges is not None:
        want.ranges.calls = [tensors_by_name(bound(model, (), call)) for call in calibration]
    elif calibration:
        raise ExportError("calibration calls are for activations='qdq'; type it, or leave them out")
    cache = cache_of(given)
    if cache is None:
        refuse_kept(model)
    refuse_left_out(want.passes, cache)
    graphs: dict[str, Graph] = {}
    by, steps = step_pass(want.passes), None
    if by is not None:
        if cache is not None:
            raise ExportError(f"{by.name} works across denoising steps, and a key/value cache is no part of those")
        passes, by = with_plan(want.chosen, want.passes, by)
        want = replace(want, passes=passes)
        steps = step_graphs(
            by,
            lambda number: f"{target.stem}.{number}.onnx",
            captured(model, given, dynamic_shapes),
            step_count,
            lambda found: _finished(found, want, update, " the graph", lambda: with_state(found, by)),
            update,
        )
        graphs |= steps.graphs
    elif cache is None:
        graphs[target.name] = _graph(model, given, dynamic_shapes, want, update)
    else:
        place, held = cache
        step = decoding(given, place, decode)
        names = {kind: f"{target.stem}.{kind}.onnx" for kind in ("prompt", "decode")}
        graphs[names["prompt"]] = _graph(model, given, dynamic_shapes, want, update, held, fresh=True)
        chosen, aside = after_prompt(want.chosen, graphs[names["prompt"]].records)
        later = replace(want, chosen=chosen, passes=tuple(p for p in want.passes if p in chosen.passes))
        graphs[names["decode"]] = _graph(model, step, None, later, update, held, fresh=False)
        graphs[names["decode"]].records += aside
    report = ExportReport([], want.form.opset, want.form.contrib)
    with staged(target) as folder:
        update("Writing")
        models = {name: graph.model for name, graph in graphs.items()}
        data = f"{target.name}.data"
        sizes = [constant_bytes(m) for m in models.values()]
        has_data = files.write(models, folder, data, external_data)
        for name, graph in graphs.items():
            update(f"Checking {name}")
            runtime.check(folder / name)
            report.files.append(_written(target.absolute().parent / name, folder / name, graph))
            report.records[name] = graph.records
            report.notes += [note for note in graph.notes if note not in report.notes]
        if cache is not None:
            write_json(folder / f"{target.stem}.json", manifest(graphs, names, data if has_data else None, cache[1]))
            report.manifest = target.absolute().parent / f"{target.stem}.json"
        elif steps is None and (only := graphs[target.name]).made.states:
            write_json(folder / f"{target.stem}.json", stateful(only, target.name, data if has_data else None))
            report.manifest = target.absolute().parent / f"{target.stem}.json"
        if steps is not None:
            stepped.write(steps, folder / f"{target.stem}.json", data if has_data else None)
            report.manifest = target.absolute().parent / f"{target.stem}.json"
            report.notes.append(
                f"{len(graphs)} files for {len(steps.calls)} steps; which uses which: {target.stem}.json"
            )
        if verify:
            update("Comparing ONNX Runtime with torch")
            inputs = {}
            for name, graph in graphs.items():
                own = {} if steps is None else steps.sources[name]
                inputs[name], note = others(graph.made, {**own, **{s.past: s for s in graph.made.states}})
                report.notes += [f"{name}: {note}"] if note else []
            checked = (
                partial(compared, folder, graphs, inputs)
                if steps is None
                else partial(stepped.compared, folder, steps, inputs)
            )
            allowed = max(graph.allowed for graph in graphs.values())
            tolerance = math.inf if want.form.rounded and want.form.contrib else allowed
            if want.ranges is not None:
                # A number on the edge of two codes may fall to either side: no further than rounding goes by itself.
                tolerance = max(allowed, want.ranges.effect)
            report.difference = checked(tolerance)
            if want.form.rounded:
                far = checked(math.inf, optimised=True)
                how = "rounds activations" if want.ranges is None else "multiplies integers"
                report.notes.append(f"ONNX Runtime at its default settings {how}, and differs by {far:.1e}")
        report.bytes = sum(f.stat().st_size for f in folder.iterdir())
    report.data = target.absolute().parent / data if has_data else None
    first = next(iter(graphs.values()))
    report.weights_before, report.weights_after = first.weights_before, sizes[0]
    return report


def _graph(
    model: torch.nn.Module,
    given: Mapping[str, Any],
    dynamic_shapes: Any,
    want: Wanted,
    update: Update,
    cache: Any = None,
    fresh: bool = True,
) -> Graph:
    """Capture, rewrite and translate one graph."""
    kind = "" if cache is None else " the prompt's graph" if fresh else " the decoding step's graph"
    update(f"Capturing{kind or ' the graph'}")
    found = captured(model, given, dynamic_shapes, cache, fresh)
    return _finished(found, want, update, kind or " the graph", starts=cache is not None and fresh)


def _finished(
    found: Captured,
    want: Wanted,
    update: Update,
    kind: str,
    edit: Callable[[], None] = lambda: None,
    starts: bool = False,
) -> Graph:
    """Rewrite and translate one graph; ``edit`` changes it after the passes, ``starts``: its state starts empty."""
    before, theirs = weight_bytes(found.program), own_operators(found.program.graph)
    dtype = runtime.coarsest(found.program.graph)  # of the model: what passes store in less is computed in more
    update(f"Rewriting{kind}")
    records, after, masked = rewritten(found, want)
    edit()
    made = functional(found)
    if starts:
        made = started(made)
    about = "" if want.ranges is None else want.ranges.apply(made)
    update(f"Translating{kind}")
    translation, notes = translated(made, found.wishes, want.form, after, want.who, theirs)
    notes += [note for note in (found.note, about, *masked) if note]
    tolerance = runtime.tolerance_of(dtype)
    rounds = runtime.rounds_inputs(found.program.graph)
    return Graph(made, records, translation, before, notes, tolerance, rounds)


def rewritten(found: Captured, want: Wanted) -> tuple[list[Record], int, list[str]]:
    """Apply the passes and lower what they made.

    Returns:
        What the passes did, bytes of the constants that are left, and notes for the report.

    Raises:
        PlanError: the plan is for another model.
        ExportError: a pass fixes a dimension that was to be dynamic.
    """
    program = found.program
    records, debugging = applied(found, want.passes, want.chosen, want.who)
    with torch.no_grad():
        kv.lower(program)
        notes = computed_in_full(program, "no operator of ONNX leaves blocks of keys out")
        # Kernels of torch's are no operators of ONNX.
        attention.lower(program, lowerings(want.form.opset))
        write_out(program)
        rounding.write_static(program)
        others = unpack_others(program, packed_weights.FORMATS, make_plain(program))
        notes += [f"weights in {form} are unpacked by operators of the standard in each call" for form in others]
    program.graph.eliminate_dead_code()
    program.changed()
    refuse_guarded(found, want.who)
    if debugging is not None:
        debugging.lowered(program)
        notes.append(debugging.note)
    return records, weight_bytes(program), notes


def compared(
    folder: Path,
    graphs: Mapping[str, Graph],
    inputs: Mapping[str, Mapping[str, Tensor]],
    tolerance: float,
    optimised: bool = False,
) -> float:
    """Run the files on inputs, and of a decoder several steps after the prompt; see :func:`runtime.difference`.

    Each side goes on from its own state, whose rows may lie in another order where scores are equal. What was stored wrongly
    shows in the model's outputs.
    """
    *before, last = graphs
    several = before or graphs[last].made.states
    worst, states = 0.0, (dict[str, Tensor](), dict[str, Tensor]())
    for name in [*before, *[last] * (STEPS if several else 1)]:
        made, loaded = graphs[name].made, runtime.session(folder / name, optimised)
        mine, its = ({**inputs[name], **{k: v for k, v in state.items() if k in made.inputs}} for state in states)
        with torch.no_grad():
            expected = made.gm(*(t.clone() for t in mine.values()))
        got = runtime.run(loaded, its)
        results = [name for name in made.outputs if not name.startswith("present.")]
        worst = max(worst, runtime.difference(results, got, expected, tolerance))
        states = (_carried(made, expected), _carried(made, got))
    return worst


def _carried(made: Functional, outputs: Sequence[Tensor]) -> dict[str, Tensor]:
    """The state that a call leaves to the next."""
    named = zip(made.outputs, outputs, strict=True)
    return {"past." + name.removeprefix("present."): t.clone() for name, t in named if name.startswith("present.")}


def _written(target: Path, file: Path, graph: Graph) -> Written:
    model = graph.model
    inputs = tuple(str(v.name) for v in model.graph.inputs)
    outputs = tuple(str(v.name) for v in model.graph.outputs)
    return Written(target, file.stat().st_size, inputs, outputs, dict(summary(model)))
