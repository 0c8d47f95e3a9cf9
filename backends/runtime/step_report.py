"""What a model does at each denoising step, for the report: as planned when it was compiled, and as it ran."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Sequence

from torch import Tensor

from accelpass.backends.runtime.run import Ran
from accelpass.backends.runtime.runs import RUNS
from accelpass.backends.runtime.step_clock import Tick
from accelpass.backends.staged.by_step import SteppedGraph, planned_row
from accelpass.backends.staged.model import StagedModel
from accelpass.passes.core.base import Done, Record
from accelpass.passes.core.report import GraphReport, StepReport
from accelpass.passes.step_cache.base import StepPass


def planned(made: StagedModel, passes: Sequence[StepPass]) -> list[Ran]:
    """The calls of the run that the schedule is for; none while a pass still searches."""
    times = next((p.timesteps for p in passes if p.timesteps), ())
    calls = len(times) or max((p.run_length for p in passes), default=0)
    calls = 0 if any(p.searching for p in passes) else calls
    times = times[:calls] or tuple(map(float, range(calls)))
    rows = [planned_row(made, step, 0) for step in range(calls)]
    return [
        Ran(Tick(step, 0, step == 0), time, row, *made.flops(row), made)
        for step, (time, row) in enumerate(zip(times, rows, strict=True))
    ]


def describe_run(report: GraphReport, graph: SteppedGraph, tensors: Iterable[Tensor]) -> list[str]:
    """Let the report tell what the latest run of the model with these tensors computed.

    Returns:
        What kept calls from reusing what was there.
    """
    known = [runs for runs in RUNS.all_of(tensors) if runs.key == graph.key]
    for made in list(graph.models.values())[-1:]:
        # Also what other graphs of the model ran: those of the other guidance call, or of the run before it was recompiled.
        ran = [one for runs in known for one in list(runs.log) if _paths(one.by) == _paths(made)]
        if ran:
            describe(report, made, ran, graph.passes, planned=False)
    return [f"{count} call(s) {what}" for runs in known for what, count in runs.notes.items()]


def describe(
    report: GraphReport, made: StagedModel, calls: Sequence[Ran], passes: Sequence[StepPass], planned: bool = True
) -> None:
    """What was done at each site over all calls, in place of what was done in each of the graphs."""
    merged = combined(made.records)
    said = f"of {len(calls)} model calls" if planned else f"in {len(calls)} model calls that ran"
    for p in passes:
        mine = merged[p.name]
        mine.took = {}
        for number, block in enumerate(made.sites):
            for at, (q, path) in enumerate(block):
                counts = Counter(p.shown(call.row[number][at]) for call in calls)
                if q is p and (p.name, path) not in made.disabled and counts:
                    shown = ", ".join(f"{action} {count}" for action, count in counts.most_common())
                    mine.took[path] = Done(f"{said}: {shown}")
    report.records = list(merged.values())
    flat = [site for block in made.sites for site in block]
    # Guidance as two calls: the first speaks for the step.
    steps = list({call.tick.step: call for call in reversed(calls)}.values())[::-1]
    dense, dense_attention = made.flops(made.full)
    report.steps = StepReport(
        sites=tuple(path for _, path in flat),
        actions=tuple(
            tuple(p.shown(a) for (p, _), a in zip(flat, itertools.chain.from_iterable(call.row), strict=True))
            for call in steps
        ),
        flops=tuple(call.flops for call in steps),
        timesteps=tuple(call.time for call in steps),
        dense=dense,
        parts=len(made.stages),
        compiled=made.compiled,
        attention=tuple(call.attention for call in steps),
        dense_attention=dense_attention,
        variants=len({call.row for call in steps}),
    )
    report.parts, report.parts_compiled = len(made.sites) + 2, made.compiled
    report.before.flops = dense
    # The sizes of another graph's calls may be others, their share is the run's.
    full = sum(call.by.flops(call.by.full)[0] for call in calls)
    report.after.flops = dense * sum(call.flops for call in calls) // full if full else dense
    report.derived_bytes = made.derived.derived_bytes()


def combined(records: Iterable[Record]) -> dict[str, Record]:
    """What each pass did in any of the variants, by its name."""
    merged: dict[str, Record] = {}
    for record in records:
        into = merged.setdefault(record.name, Record(record.name))
        into.skipped = {**record.skipped, **into.skipped}
        for site, done in record.took.items():
            into.took.setdefault(site, done)
    return merged


def _paths(made: StagedModel) -> list[list[str]]:
    return [[path for _, path in block] for block in made.sites]
