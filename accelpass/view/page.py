"""The report as one page that needs nothing but itself: no network, no other file."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from accelpass.backends.debug import templates
from accelpass.caches.cache_report import layers_alike
from accelpass.view import text
from accelpass.view.grouping import alike, collapse
from accelpass.view.pictures.picture import draw, kind_of, sayings
from accelpass.view.pictures.step_picture import values
from accelpass.view.report import Report

if TYPE_CHECKING:
    from jinja2 import Environment


@dataclass(frozen=True)
class Decision:
    """Sites of one pass with one outcome and one reason (up to its numbers)."""

    by: str
    took: bool
    reason: str
    said: tuple[str, ...]
    sites: tuple[str, ...]


@dataclass(frozen=True)
class Row:
    """Modules that fared alike.

    ``outcomes``: for each pass (taken, text), or None if it said nothing about them.
    """

    said: tuple[str, ...]
    count: int
    outcomes: tuple[tuple[bool, str] | None, ...]


@dataclass(frozen=True)
class Card:
    """One figure of the summary; ``share`` is what is left of it, for the bar."""

    title: str
    value: str
    before: str
    detail: str
    share: float | None = None


def environment() -> Environment:
    """The templates, with sizes said as in the terminal."""
    env = templates.environment()
    env.filters["size"] = text.size
    env.filters["flops"] = text.flops
    env.filters["counts"] = text.counts
    env.filters["buffers"] = text.buffers_said
    env.filters["ratio"] = text.ratio
    return env


def render(report: Report) -> str:
    """The HTML of a report."""
    return (
        environment()
        .get_template("report.html.j2")
        .render(
            report=report,
            cards=cards(report),
            picture=draw(report),
            rows=rows(report),
            decisions=decisions(report),
            refused=[(why, collapse(places)) for why, places in alike(report.refused)],
            steps=None if report.steps is None else values(report.steps),
            caches=[(cache, text.holds(cache), layers_alike(cache)) for cache in report.caches],
            kinds={name: kind_of(done) for name, done in report.passes.items()},
        )
    )


def cards(report: Report) -> list[Card]:
    """The figures at the top of the page."""
    before, after = report.weight_bytes
    memory = report.memory
    held = memory["own"] + memory["derived"]
    share = report.seconds_in_passes / report.seconds if report.seconds else 0.0
    made = [
        Card(
            "Weights read per forward",
            text.size(after),
            text.size(before),
            text.ratio(before, after).strip(" ()") or "unchanged",
            after / before if before else None,
        )
    ]
    if report.flops is not None:
        first, last = report.flops
        detail = text.ratio(first, last).strip(" ()") or "unchanged"
        made.append(Card("FLOPs per forward", text.flops(last), text.flops(first), detail, last / first))
    given_back = f", {text.size(memory['released'])} given back" if memory["released"] else ""
    detail = f"{text.size(memory['own'])} the model's own, {text.size(memory['derived'])} packed{given_back}"
    made.append(Card("In memory now", text.size(held), "", detail))
    if report.caches:
        held, dense = (sum(sizes) for sizes in zip(*((c.bytes, c.dense_bytes) for c in report.caches), strict=True))
        detail = text.ratio(dense, held).strip(" ()") or "as large as dense ones"
        left = held / dense if dense else None
        made.append(Card("Key/value caches", text.size(held), text.size(dense), detail, left))
    graphs = f"{len(report.graphs)} graph" + ("s" if len(report.graphs) != 1 else "")
    made.append(Card("Compile time", f"{report.seconds:.1f} s", "", f"{share:.0%} of it in passes; {graphs}"))
    return made


def rows(report: Report) -> list[Row]:
    """Passes by sites, with modules that fared alike as one row."""
    told = sayings(report)
    names = list(report.passes)
    # One sentence that holds every pass's, so that modules are alike only if they are for each pass.
    joined = {
        path: "\x1e".join(f"{'+' if by[n][0] else '-'}{by[n][1]}" if n in by else "" for n in names)
        for path, by in told.items()
    }
    made = []
    for sentence, paths in alike(joined):
        parts = sentence.split("\x1e")
        outcomes = tuple((p[0] == "+", p[1:]) if p else None for p in parts)
        made.append(Row(tuple(collapse(paths)), len(paths), outcomes))
    return made


def decisions(report: Report) -> list[Decision]:
    """Every decision of every pass, skips first: they are what a reader comes for."""
    made = []
    for took in (False, True):
        for done in report.passes.values():
            said = {s: d.what for s, d in done.took.items()} if took else done.skipped
            for reason, sites in alike(said):
                made.append(Decision(done.name, took, reason, tuple(collapse(sites)), tuple(sites)))
    return made
