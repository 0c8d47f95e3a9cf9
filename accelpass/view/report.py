"""What ``explain`` returns: per pass and per site what was done and why not, and what it cost."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from accelpass.api.lookup import Execution, Found
from accelpass.api.stateful import remembered_by
from accelpass.backends import CompiledGraph
from accelpass.backends.runtime.step_report import describe_run
from accelpass.caches.cache_report import CacheReport, cache_reports
from accelpass.ir.core.derived import is_released
from accelpass.passes.core.base import Done
from accelpass.passes.core.registry import registered
from accelpass.view.density_view import DensityView
from accelpass.view.step_plan_view import StepPlanView
from accelpass.view.surviving import SurvivingTokens, surviving_of

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult

FORMAT = 1


@dataclass(frozen=True)
class PassReport:
    """One pass over all graphs. A site that was taken in any graph counts as taken.

    Attributes:
        took: site -> what was done, with bytes.
        skipped: site -> why; a site that two graphs skip for two reasons has both.
        difference: largest relative change of an output that debug mode measured in any graph; None without it.
    """

    name: str
    phase: str
    summary: str
    paper: str
    took: dict[str, Done] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    difference: float | None = None


@dataclass(frozen=True)
class GraphRow:
    """One compiled graph. ``flops`` are None where nothing counted them."""

    number: int
    found: dict[str, int]
    weight_bytes: tuple[int, int]
    flops: tuple[int, int] | None
    seconds: float
    seconds_in_passes: float
    note: str
    parts: tuple[int, int] = (0, 0)
    """Calls of compiled parts, and different parts; zeros if the graph was compiled as one."""
    refused: dict[str, str] = field(default_factory=dict)
    """What looks like an attention and stays as the model wrote it, so that no pass sees it: where -> why."""


@dataclass(frozen=True)
class Report:
    """What was done to one compiled model.

    Counts and costs are those of one forward. Graphs that read the same weights are recompilations of each other
    (prefill and decode), of which the largest counts; graphs that read different weights are pieces of one forward that
    a graph break parted, and are added.

    Attributes:
        model: class name.
        found: call sites by kind.
        weight_bytes: read by one forward, before and after.
        flops: of one forward at the compiled sizes, before and after; None where nothing counted them.
        memory: ``own``: bytes of the model's tensors that are in memory now; ``released``: given back by
            ``free_weights``; ``derived``: packed forms, held besides.
        seconds: spent in compiling all graphs; ``seconds_in_passes`` of them in accelpass.
        notes: what a reader must know to read the figures right.
        steps: what the latest sampling run did at each denoising step, if a pass chooses by step; FLOPs are then the mean over
            its calls.
        refused: what looks like an attention and stays as the model wrote it in any graph, so that no pass sees it: where -> why.
        densities: of each pass that chose what the heads of prompts read, how much that is.
        caches: each live ``accelpass.KVCache`` that holds tokens of this model, as it is now.
        survivors: which tokens of the last prompt went on, for each place that chose some.
    """

    model: str
    found: dict[str, int]
    graphs: tuple[GraphRow, ...]
    passes: dict[str, PassReport]
    weight_bytes: tuple[int, int]
    flops: tuple[int, int] | None
    memory: dict[str, int]
    seconds: float
    seconds_in_passes: float
    notes: tuple[str, ...]
    modules: tuple[str, ...] = ()
    """Paths of the modules that hold weights themselves, in the model's order: what the picture shows."""
    caches: tuple[CacheReport, ...] = ()
    steps: StepPlanView | None = None
    survivors: tuple[SurvivingTokens, ...] = ()
    densities: tuple[DensityView, ...] = ()
    refused: dict[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, found: Found) -> Report:
        """The report of the graphs of one compiled model."""
        tensors = [t for m in found.modules for t in (*m.parameters(), *m.buffers())]
        untold = [n for g in found.graphs if g.steps is not None for n in describe_run(g.report, g.steps, tensors)]
        graphs = [_row(g) for g in found.graphs]
        chosen = _one_forward(found)
        kinds = {k: 0 for g in graphs for k in g.found}
        flops: tuple[int, int] | None = (0, 0)
        before = after = derived = 0
        remembered = set(map(id, remembered_by(tensors)))
        for group in chosen:
            rows = [r for r in graphs if r.number in {e.graph.report.number for e in group}]
            for kind in kinds:
                kinds[kind] += max(r.found.get(kind, 0) for r in rows)
            largest = max(rows, key=lambda r: r.weight_bytes[0])
            before, after = _sum((before, after), largest.weight_bytes)
            counted = [r.flops for r in rows if r.flops is not None]
            flops = None if flops is None or not counted else _sum(flops, max(counted))
            derived += max(_packed_bytes(e.graph, remembered) for e in group)
        memory = {**_memory(found), "derived": derived}
        passes = _passes(_executions(found))
        return cls(
            model=", ".join(type(m).__name__ for m in found.modules) or "function",
            found={k: n for k, n in kinds.items() if n},
            graphs=tuple(graphs),
            passes=passes,
            refused={place: why for g in graphs for place, why in g.refused.items()},
            densities=tuple(filter(None, (DensityView.of(p.name, p.took) for p in passes.values()))),
            weight_bytes=(before, after),
            flops=flops,
            memory=memory,
            seconds=sum(g.seconds for g in graphs),
            seconds_in_passes=sum(g.seconds_in_passes for g in graphs),
            notes=tuple(dict.fromkeys([*_notes(found, memory, flops), *untold])),
            modules=tuple(_leaves(found.modules)),
            steps=next(filter(None, (_steps(g) for g in reversed(found.graphs))), None),
            survivors=surviving_of(tensors),
            caches=cache_reports(tensors),
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain values alone; ``format`` grows when the meaning of a field changes."""
        return {"format": FORMAT, **json.loads(json.dumps(asdict(self)))}

    def to_json(self, indent: int | None = 2) -> str:
        return json.dumps(self.to_dict(), indent=indent)

    def to_html(self, path: str | Path) -> Path:
        """Write one self-contained page; returns where it is."""
        from accelpass.view.page import render

        target = Path(path).expanduser()
        target.write_text(render(self), encoding="utf-8")
        return target.resolve()

    def __str__(self) -> str:
        from accelpass.view.text import plain

        return plain(self)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        from accelpass.view.text import lines

        yield from lines(self, options.max_width)


def _row(graph: CompiledGraph) -> GraphRow:
    r = graph.report
    flops = (r.before.flops, r.after.flops) if r.before.flops and r.after.flops else None
    return GraphRow(
        r.number,
        {k: n for k, n in r.before.found.items() if n},
        (r.before.weight_bytes, r.after.weight_bytes),
        flops,
        r.seconds,
        r.seconds_in_passes,
        r.note,
        (r.parts, r.parts_compiled),
        r.before.refused,
    )


def _steps(graph: CompiledGraph) -> StepPlanView | None:
    done = graph.report.steps
    if done is None or not done.actions or not done.sites:
        return None
    shares = tuple(flops / done.dense for flops in done.flops)
    title = ", ".join(p.name for p in graph.steps.passes) if graph.steps is not None else ""
    return StepPlanView(title, done.sites, len(done.actions), done.actions, shares, done.timesteps)


def _executions(found: Found) -> list[Execution]:
    """What ran for this model; of a graph whose weights are gone, or another instance's, that it exists."""
    ran = {e.graph for e in found.executions}
    return [*found.executions, *(Execution(g, frozenset()) for g in found.graphs if g not in ran)]


def _one_forward(found: Found) -> list[list[Execution]]:
    """Executions grouped into recompilations of each other, by the tensors that they read.

    A graph that reads a part of what another reads is taken for a recompilation of that part (a decode step without
    the image tower), so that its sites are not counted twice.
    """
    groups: dict[frozenset[object], list[Execution]] = {}
    for e in sorted(_executions(found), key=lambda e: (-len(_read(e)), e.graph.report.number)):
        mine = _read(e)
        whole = next((key for key in groups if mine <= key), mine)
        groups.setdefault(whole, []).append(e)
    return list(groups.values())


def _read(execution: Execution) -> frozenset[object]:
    """What identifies the part of the model that a graph reads: its tensors; their paths where these are another instance's."""
    graph = execution.graph
    return execution.tensors or frozenset(graph.binder.paths.values() if graph.binder else ())


def _passes(executions: Sequence[Execution]) -> dict[str, PassReport]:
    found: dict[str, PassReport] = {}
    for execution in executions:
        graph = execution.graph
        of = {p.name: type(p) for p in graph.options.passes}
        for record in graph.report.records:
            made = of.get(record.name) or registered().get(record.name)
            summary, phase, paper = (made.summary, made.phase, made.paper) if made else ("", "", "")
            into = found.setdefault(record.name, PassReport(record.name, phase, summary, paper))
            measured = [d for d in (into.difference, record.difference) if d is not None]
            into = found[record.name] = replace(into, difference=max(measured, default=None))
            for site, done in record.took.items():
                site = execution.site(site)
                into.took.setdefault(site, done)
                into.skipped.pop(site, None)
            for site, why in record.skipped.items():
                site = execution.site(site)
                if site not in into.took and why not in into.skipped.get(site, "").split("; or "):
                    into.skipped[site] = "; or ".join(filter(None, (into.skipped.get(site), why)))
    return found


def _packed_bytes(graph: CompiledGraph, remembered: set[int]) -> int:
    """What was derived from weights; state is derived from its anchor in form alone."""
    binders = [graph.binder] if graph.binder else []
    if graph.steps is not None:
        binders = [made.derived for made in graph.steps.models.values()]
    made = [t for binder in binders for t in binder.tensors()]
    return sum(t.numel() * t.element_size() for t in made if id(t) not in remembered)


def _memory(found: Found) -> dict[str, int]:
    tensors = [t for m in found.modules for t in (*m.parameters(), *m.buffers())]
    if not tensors:
        tensors = [t for g in found.graphs for t in (r() for r in g.owners) if t is not None]
    each = {id(t): t for t in tensors}.values()
    own = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in each if not is_released(t)}
    released = sum(t.numel() * t.element_size() for t in each if is_released(t))
    return {"own": sum(own.values()), "released": released}


def _notes(found: Found, memory: dict[str, int], flops: tuple[int, int] | None) -> list[str]:
    notes = []
    if found.shared:
        notes.append("Compiled for another instance of this class: Dynamo shares one graph among instances.")
    notes += dict.fromkeys(f"graph {g.report.number}: {g.report.note}" for g in found.graphs if g.report.note)
    notes += dict.fromkeys(
        f"{frame.name} ({frame.place}) was compiled so often that Dynamo runs it uncompiled, without the passes, where none of "
        "its graphs fits; raise torch._dynamo.config.recompile_limit"
        for frame in (g.models.frame for g in found.graphs)
        if frame is not None and frame.is_past_limit
    )
    packed = any(g.options.free_weights for g in found.graphs)
    if memory["derived"] and not packed:
        notes.append(
            "The model still holds its float weights beside the packed ones; options={'free_weights': True} gives the "
            "memory of those that nothing reads any more back."
        )
    if any(g.options.lowering == "eager" for g in found.graphs):
        notes.append("lowering='eager': the rewritten graph runs uncompiled, and compile time is that of the passes.")
    if flops is None:
        notes.append("FLOPs were not counted for these graphs.")
    return notes


def _leaves(modules: Sequence[nn.Module]) -> list[str]:
    found = []
    for module in modules:
        for path, part in module.named_modules(remove_duplicate=False):
            if any(True for _ in part.parameters(recurse=False)):
                found.append(path or type(module).__name__)
    return list(dict.fromkeys(found))


def _sum(a: tuple[int, int], b: tuple[int, int]) -> tuple[int, int]:
    return a[0] + b[0], a[1] + b[1]
