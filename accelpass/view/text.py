"""The report in a terminal: about forty lines, however large the model."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence

from rich.console import Console, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from accelpass.caches.cache_report import CacheReport, LayerBytes, layers_alike
from accelpass.view.density_view import Bars
from accelpass.view.grouping import alike, collapse
from accelpass.view.pictures.step_picture import table
from accelpass.view.report import PassReport, Report
from accelpass.view.surviving import SurvivingTokens

WIDTH = 100
LINES = 40
_REASONS = 5
"""Groups of sites shown for each pass and kind; what is left is counted."""
_PLACES = 4
"""Places that chose tokens of which a strip is shown."""
_CACHES, _LAYERS, _BUFFERS = 2, 3, 3
"""Caches, groups of layers of each, and buffers of each group that are shown; what is left is counted."""


def plain(report: Report) -> str:
    """The report as text of :data:`WIDTH` columns, without colour."""
    out = io.StringIO()
    console = Console(file=out, width=WIDTH, color_system=None, force_terminal=False)
    for line in lines(report):
        console.print(line)
    return out.getvalue().rstrip()


def size(count: int) -> str:
    """Bytes as a person says them; decimal, as on a disk's label."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= scale:
            return f"{count / scale:.1f} {unit}"
    return f"{count} B"


def flops(count: int) -> str:
    for unit, scale in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if count >= scale:
            return f"{count / scale:.2f} {unit}FLOP"
    return f"{count} FLOP"


def ratio(before: int, after: int) -> str:
    """`` (2.5x less)``, or nothing where nothing changed to speak of."""
    if not before or not after:
        return ""
    said = f"{max(before, after) / min(before, after):.2f}"
    return "" if said == "1.00" else f" ({said}x {'less' if before > after else 'more'})"


def counts(found: dict[str, int]) -> str:
    return ", ".join(f"{n} {kind.replace('_', ' ')}" for kind, n in found.items()) or "nothing that passes look for"


def lines(report: Report, width: int = WIDTH) -> Iterator[RenderableType]:
    """The lines, one renderable each, for a terminal of ``width`` columns."""
    yield Text.assemble((report.model, "bold"), f": {counts(report.found)}; {len(report.graphs)} graph(s)")
    before, after = report.weight_bytes
    yield _figure("weights read", f"{size(before)} -> {size(after)}{ratio(before, after)}")
    if report.flops is not None:
        yield _figure("FLOPs", f"{flops(report.flops[0])} -> {flops(report.flops[1])}{ratio(*report.flops)}")
    held = f"{size(report.memory['own'])} of the model + {size(report.memory['derived'])} packed"
    if report.memory["released"]:
        held += f"; {size(report.memory['released'])} given back"
    yield _figure("in memory", held)
    share = report.seconds_in_passes / report.seconds if report.seconds else 0.0
    parts, different = (sum(g.parts[i] for g in report.graphs) for i in (0, 1))
    shared = f"; {parts} parts, {different} of them different" if parts else ""
    yield _figure("compile time", f"{report.seconds:.1f} s, {share:.0%} of it in passes{shared}")
    used = 8 + len(report.notes) + 2 * len(report.survivors[:_PLACES]) + len(report.caches[:_CACHES]) * (_LAYERS + 2)
    room = max(2, min(_REASONS, (LINES - used) // max(1, len(report.passes)) - 2))
    for done in report.passes.values():
        yield from _pass(done, room, width)
    if not report.passes:
        yield Text("no pass ran", style="dim")
    yield from _refused(report.refused, room, width)
    if report.steps is not None:
        yield _figure("steps", report.steps.said)
        yield table(report.steps)
    yield from _survivors(report.survivors, width)

    for view in report.densities:
        yield Padding(Bars(view), (0, 0, 0, 2))
    for cache in report.caches[:_CACHES]:
        yield from _cache(cache)
    if len(report.caches) > _CACHES:
        yield Text(f"    ... and {len(report.caches) - _CACHES} more caches; see .caches", style="dim")
    for note in report.notes:
        yield Text.assemble(("note  ", "yellow"), note)


def holds(cache: CacheReport) -> str:
    """How full a cache is, and how large."""
    many = f" in each of {cache.sequences} sequences" if cache.sequences > 1 else ""
    dense = f", dense {size(cache.dense_bytes)}{ratio(cache.dense_bytes, cache.bytes)}" if cache.dense_bytes else ""
    return f"{cache.tokens} of {cache.capacity} tokens{many}; {size(cache.bytes)}{dense}"


def buffers_said(layer: LayerBytes, limit: int | None = None) -> str:
    """The buffers of a layer, largest first, of which at most ``limit`` by name."""
    largest = sorted(layer.buffers.items(), key=lambda item: -item[1])
    said = ", ".join(f"{name.removeprefix('kv.')} {size(count)}" for name, count in largest[:limit])
    left = len(largest) - len(largest[:limit])
    return f"{said}, {left} more" if left else said


def sites_said(sites: list[str], limit: int = 60) -> str:
    """The sites collapsed, cut at ``limit`` characters, with their count."""
    said = ", ".join(collapse(sites))
    if len(said) > limit:
        said = said[: limit - 3] + "..."
    return f"{said} ×{len(sites)}" if len(sites) > 1 else said


def _pass(done: PassReport, room: int, width: int) -> Iterator[Text]:
    before = sum(d.bytes_before for d in done.took.values())
    after = sum(d.bytes_after for d in done.took.values())
    saved = f", {size(before)} -> {size(after)}" if before else ""
    moved = "" if done.difference is None or not done.took else f", changed the outputs by {done.difference:.1e}"
    head = f"  took {len(done.took)}, skipped {len(done.skipped)}{saved}{moved}"
    yield Text.assemble((done.name, "bold cyan"), head)
    shown = {site: d.what for site, d in done.took.items()}
    for mark, style, groups in (("+", "green", alike(shown)), ("-", "yellow", alike(done.skipped))):
        for reason, sites in groups[:room]:
            yield _group(mark, style, sites, reason, width)
        left = sum(len(sites) for _, sites in groups[room:])
        if left:
            what = "took" if mark == "+" else "skipped"
            yield Text(f"    ... and {left} more; see .passes[{done.name!r}].{what}", style="dim")


def _refused(refused: dict[str, str], room: int, width: int) -> Iterator[Text]:
    """What no pass sees, because it is not taken for an attention."""
    if not refused:
        return
    yield Text.assemble(("attention left as the model wrote it", "bold cyan"), f"  {len(refused)}, which no pass sees")
    groups = alike(refused)
    for why, sites in groups[:room]:
        yield _group("-", "yellow", sites, why, width)
    if left := sum(len(sites) for _, sites in groups[room:]):
        yield Text(f"    ... and {left} more; see .refused", style="dim")


def _cache(cache: CacheReport) -> Iterator[RenderableType]:
    yield Text.assemble((cache.name, "bold cyan"), f"  {holds(cache)}")
    groups = layers_alike(cache)
    table = Table("layers", "bytes of one", "dense", "of these", box=None, padding=(0, 2, 0, 0), header_style="dim")
    for said, layer in groups[:_LAYERS]:
        table.add_row(said, size(layer.bytes), size(layer.dense_bytes), buffers_said(layer, _BUFFERS))
    if len(groups) > _LAYERS:
        table.add_row(f"... and {len(groups) - _LAYERS} groups more")
    for column in table.columns:
        column.no_wrap, column.overflow = True, "ellipsis"
    yield Padding(table, (0, 0, 0, 4), expand=False)


def _survivors(found: Sequence[SurvivingTokens], width: int) -> Iterator[Text]:
    """The first sequence of the last prompt, a line for each place that chose."""
    for one in found[:_PLACES]:
        yield _figure("tokens kept", f"{len(one.kept[0])} of {one.tokens} by {one.path}")
        yield Text(f"    |{one.strip(min(72, width - 6))}|", style="cyan", no_wrap=True)
    if len(found) > _PLACES:
        yield Text(f"    ... and {len(found) - _PLACES} places more; see .survivors", style="dim")


def _group(mark: str, style: str, sites: list[str], reason: str, width: int) -> Text:
    room = width - 12 - len(reason)
    line = Text.assemble((f"  {mark} ", style), sites_said(sites, max(36, min(60, room))), ("  ", ""), (reason, "dim"))
    # One line each, so that the whole fits; the full sentence is in the data and on the page.
    line.no_wrap, line.overflow = True, "ellipsis"
    return line


def _figure(name: str, value: str) -> Text:
    return Text.assemble((f"  {name:<13}", "dim"), value)
