"""The picture of a model's blocks: where each weight and each site is, and the colour of what was done there."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from accelpass.view.grouping import expand
from accelpass.view.report import PassReport, Report

WIDTH = 1000
_LABEL = 190
_ROW = 20
_HEAD = 26
_GAP = 18
_LAYER = re.compile(r"^(.*?)\.(\d+)\.(.+)$")
_INNER = re.compile(r"(?<=\.)\d+(?=\.|$)|\[\d+\]")

STATES = {
    "int8": "int8",
    "int4": "int4",
    "packed": "other packed form",
    "attention": "attention or cache",
    "rewritten": "rewritten",
    "fused": "fused with its neighbours",
    "kernel": "another kernel",
    "skipped": "skipped, with a reason",
    "untouched": "untouched",
}
"""Colour -> what it means, strongest first: a site that several passes took has the colour of the first."""


@dataclass(frozen=True)
class Box:
    """A site or several (experts) drawn as one. ``fused`` adds a stripe to the colour of something stronger."""

    x: float
    y: float
    width: float
    height: float
    state: str
    fused: bool
    tip: str
    label: str = ""


@dataclass(frozen=True)
class Label:
    x: float
    y: float
    text: str
    anchor: str = "start"
    kind: str = "site"


@dataclass(frozen=True)
class Frame:
    """The outline of one layer."""

    x: float
    y: float
    width: float
    height: float


@dataclass(frozen=True)
class Picture:
    width: int
    height: float
    boxes: tuple[Box, ...]
    labels: tuple[Label, ...]
    frames: tuple[Frame, ...]
    legend: tuple[tuple[str, str, int], ...]
    """(state, meaning, how many sites)"""


def draw(report: Report) -> Picture:
    """Modules in the model's order: stacks of equal layers as columns, everything else as boxes between them."""
    said = sayings(report)
    states = {path: _state(said.get(path, {}), report.passes) for path in (*report.modules, *said)}
    boxes: list[Box] = []
    labels: list[Label] = []
    frames: list[Frame] = []
    y = 4.0
    for stack, paths in _sections(states):
        if stack is None:
            y = _loose(paths, states, said, boxes, y)
        else:
            y = _stack(stack, paths, states, said, boxes, labels, frames, y)
        y += _GAP
    count = Counter(state for state, _ in states.values())
    legend = tuple((s, meaning, count[s]) for s, meaning in STATES.items() if count[s])
    return Picture(WIDTH, max(1.0, y - _GAP + 4), tuple(boxes), tuple(labels), tuple(frames), legend)


def sayings(report: Report) -> dict[str, dict[str, tuple[bool, str]]]:
    """Module path -> pass -> (taken, what was done or why not); a site of several modules is told at each."""
    said: dict[str, dict[str, tuple[bool, str]]] = {}
    for name, done in report.passes.items():
        for site, why in done.skipped.items():
            for path in expand(site):
                said.setdefault(path, {})[name] = (False, why)
        for site, took in done.took.items():
            for path in expand(site):
                said.setdefault(path, {})[name] = (True, took.what)
    said.pop("(model)", None)
    return said


def kind_of(done: PassReport) -> str:
    """The colour of what a pass does."""
    if done.phase == "weights":
        first = done.name.split("_")[0]
        return first if first in ("int8", "int4") else "packed"
    return {"attention": "attention", "cache": "attention", "fusion": "fused", "kernels": "kernel"}.get(
        done.phase, "rewritten"
    )


def _state(told: Mapping[str, tuple[bool, str]], passes: Mapping[str, PassReport]) -> tuple[str, bool]:
    """(colour, whether it was also fused)."""
    kinds = {kind_of(passes[name]) for name, (took, _) in told.items() if took}
    strongest = next((s for s in STATES if s in kinds), "skipped" if told else "untouched")
    return strongest, "fused" in kinds and strongest != "fused"


def _sections(states: Mapping[str, object]) -> list[tuple[str | None, list[str]]]:
    """Runs of paths: (prefix of a stack of layers, its paths) or (None, paths outside of any).

    Sites that no module carries (a product inside an attention) come after the modules, hence the second pass.
    """
    stacks: dict[str, list[str]] = {}
    order: list[tuple[str | None, list[str]]] = []
    for path in states:
        match = _LAYER.match(path)
        if match and match[1] in stacks:
            stacks[match[1]].append(path)
        elif match:
            stacks[match[1]] = [path]
            order.append((match[1], stacks[match[1]]))
        elif order and order[-1][0] is None:
            order[-1][1].append(path)
        else:
            order.append((None, [path]))
    return order


def _loose(
    paths: Sequence[str],
    states: Mapping[str, tuple[str, bool]],
    said: Mapping[str, dict[str, tuple[bool, str]]],
    boxes: list[Box],
    y: float,
) -> float:
    x = 0.0
    for path in paths:
        width = min(float(WIDTH), 8.0 * len(path) + 24)
        if x and x + width > WIDTH:
            x, y = 0.0, y + 36
        state, fused = states[path]
        boxes.append(Box(x, y, width, 28, state, fused, _tip([path], said), path))
        x += width + 8
    return y + 28


def _stack(
    prefix: str,
    paths: Sequence[str],
    states: Mapping[str, tuple[str, bool]],
    said: Mapping[str, dict[str, tuple[bool, str]]],
    boxes: list[Box],
    labels: list[Label],
    frames: list[Frame],
    y: float,
) -> float:
    cells: dict[str, dict[int, list[str]]] = {}
    for path in paths:
        match = _LAYER.match(path)
        assert match is not None
        # Experts of one layer are one box: 64 rows of them would say no more.
        row = _INNER.sub("*", match[3])
        cells.setdefault(row, {}).setdefault(int(match[2]), []).append(path)
    layers = sorted({n for row in cells.values() for n in row})
    pitch = min(130.0, (WIDTH - _LABEL) / max(1, len(layers)))
    width = pitch - (4 if pitch > 16 else 1)
    labels.append(Label(0, y + 13, f"{prefix}  ×{len(layers)}", kind="stack"))
    every = max(1, round(22 / pitch + 0.49))
    top = y + _HEAD
    for column, layer in enumerate(layers):
        x = _LABEL + column * pitch
        frames.append(Frame(x - 1.5, top - 3, width + 3, len(cells) * _ROW + 3))
        if column % every == 0:
            labels.append(Label(x + width / 2, y + 16, str(layer), "middle", "index"))
    for number, (row, per_layer) in enumerate(cells.items()):
        labels.append(Label(_LABEL - 12, top + number * _ROW + 12, _shortened(row), "end"))
        for column, layer in enumerate(layers):
            if layer in per_layer:
                held = per_layer[layer]
                state = Counter(states[p][0] for p in held).most_common(1)[0][0]
                fused = all(states[p][1] for p in held)
                x = _LABEL + column * pitch
                boxes.append(Box(x, top + number * _ROW, width, _ROW - 3, state, fused, _tip(held, said)))
    return top + len(cells) * _ROW


def _tip(paths: Sequence[str], said: Mapping[str, dict[str, tuple[bool, str]]]) -> str:
    head = paths[0] if len(paths) == 1 else f"{paths[0]} and {len(paths) - 1} more like it"
    told = said.get(paths[0], {})
    return "\n".join([head, *(f"{'✓' if took else '–'} {name}: {what}" for name, (took, what) in told.items())]) + (
        "" if told else "\nno pass had anything to do here"
    )


def _shortened(row: str, limit: int = 25) -> str:
    return row if len(row) <= limit else "…" + row[1 - limit :]
