"""The picture of a plan of steps: what each layer does at each step, and below it what each step costs."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console, ConsoleOptions, RenderResult
from rich.text import Text

from accelpass.view.pictures.drawing import INK, SOFT, check_target, figure_class
from accelpass.view.step_plan_view import Look, StepPlanView, labels, looks

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_EDGE, _BAR, _ACCENT = "#c3c8d1", "#8791a1", "#004582"
_RIGHT = 0.935
_LEAST = 0.03
"""Inches of a cell between two lines."""
_NAME = 30
"""Characters of a layer's name that there is room for."""
_LINE, _HEADING = 125, 85
"""Characters across the picture."""
_BLOCKS = " ▁▂▃▄▅▆▇█"


def draw(view: StepPlanView, path: str | Path) -> Path:
    """Write the picture as PNG, or as a page that needs neither matplotlib nor a network.

    Raises:
        AccelpassError: the file cannot be written, or matplotlib is missing for a PNG.
    """
    target = check_target(Path(path))
    if target.suffix.lower() == ".png":
        figure(view).savefig(target, format="png", dpi=150)
    else:
        target.write_text(page(view), encoding="utf-8")
    return target.resolve()


def figure(view: StepPlanView) -> Figure:
    """The picture as a matplotlib figure, bound to no window."""
    shown = looks(view)
    rows = math.ceil(len(shown) / _across(shown))
    tall = min(7.5, max(1.2, 0.2 * len(view.sites)))
    above, gap, below_bars, under = 0.86, 0.2, 1.15, 0.78 + 0.26 * rows
    height = above + tall + gap + below_bars + under
    common, names = labels(view.sites)
    names = [_cut(name, _NAME) for name in names]
    widest = max(len(name) for name in names)
    left = 0.062 + 0.0072 * widest
    fig = figure_class()(figsize=(10, height))
    edges = {"left": left, "right": _RIGHT, "top": 1 - above / height, "bottom": under / height}
    ratio = {"height_ratios": (tall, below_bars), "hspace": 2 * gap / (tall + below_bars)}
    grid = fig.add_gridspec(2, 1, **ratio, **edges)
    cells = fig.add_subplot(grid[0])
    _cells(cells, view, shown, names, 10 * (_RIGHT - left) / view.steps, tall / len(view.sites))
    cells.set_ylabel(common if common else "layer", fontsize=9)
    bars = fig.add_subplot(grid[1], sharex=cells)
    _bars(bars, view)
    fig.align_ylabels()
    edge = min(left, 0.1)
    heading = f"What each layer does at each step{': ' if view.title else ''}{view.title}"
    heading = textwrap.shorten(heading, _HEADING, placeholder=" ...")
    fig.text(edge, 1 - 0.28 / height, heading, fontsize=13, fontweight="bold", color=INK, va="center")
    fig.text(edge, 1 - 0.56 / height, view.said, fontsize=9.5, color=SOFT, va="center")
    _legend(fig, view, shown)
    return fig


def page(view: StepPlanView) -> str:
    """The picture as a page of its own."""
    from accelpass.view.page import environment

    return environment().get_template("step_plan.html.j2").render(**values(view))


def values(view: StepPlanView) -> dict[str, Any]:
    """What the template of the picture reads."""
    shown, counts = looks(view), view.counts()
    common, names = labels(view.sites)
    cells = len(view.sites) * view.steps
    legend = [(action, look, counts[action], counts[action] / cells) for action, look in shown.items()]
    about = {"common": common, "names": names, "ticks": ticks(view.steps, 40), "most": _most(view)}
    return {"view": view, "looks": shown, "legend": legend, **about}


def table(view: StepPlanView) -> Cells:
    """The picture for a terminal: a line for each layer, a coloured cell for each step. Print it with rich."""
    return Cells(view)


def ticks(steps: int, room: int) -> list[int]:
    """Steps to name where ``room`` of them can be: each, every second, fifth, tenth, ..."""
    for scale in (1, 10, 100, 1000):
        for every in (1, 2, 5):
            if steps <= room * every * scale:
                return list(range(0, steps, every * scale))
    return [0]


@dataclass(frozen=True)
class Cells:
    """What :func:`table` gives to rich: as many steps side by side as the terminal is wide for, the others below."""

    view: StepPlanView

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        view, shown = self.view, looks(self.view)
        common, names = labels(view.sites)
        side = min(max(5, max(len(name) for name in names)), max(5, options.max_width // 3))
        room = max(1, options.max_width - side - 1)
        wide = 2 if 2 * view.steps <= room else 1
        yield Text.assemble((view.title, "bold"), ": " if view.title else "", view.said)
        if common:
            yield Text(f"layers: {common}", style="dim")
        for start in range(0, view.steps, room // wide):
            yield from self._band(shown, names, side, wide, range(start, min(view.steps, start + room // wide)))
        # Lines are filled here, since rich would break one between a mark and its word.
        legend = Text("")
        for action, count in view.counts().items():
            look = shown[action]
            entry = Text.assemble((f" {look.mark} ", f"{look.ink} on {look.colour}"), f" {action} ×{count}")
            if len(legend) and len(legend) + 3 + len(entry) > options.max_width:
                yield legend
                legend = Text("")
            legend.append_text(Text("   " if len(legend) else "")).append_text(entry)
        yield legend

    def _band(self, shown: dict[str, Look], names: list[str], side: int, wide: int, steps: range) -> Iterator[Text]:
        view, named = self.view, ticks(len(steps), len(steps) * wide // 5)
        ruler = [" "] * (len(steps) * wide + 4)
        for at in named:
            said = str(steps[at])
            ruler[at * wide : at * wide + len(said)] = said
        yield _line(Text.assemble((f"{'step':>{side}} ", "dim"), ("".join(ruler).rstrip(), "dim")))
        for site, name in enumerate(names):
            line = Text(f"{_cut(name, side):>{side}} ")
            for step in steps:
                look = shown[view.actions[step][site]]
                line.append(look.mark.ljust(wide), style=f"{look.ink} on {look.colour}")
            yield _line(line)
        most = _most(view)
        # A step that costs anything has a bar, be it the lowest.
        levels = [math.ceil(view.flops[step] / most * (len(_BLOCKS) - 1)) for step in steps]
        bars = "".join(_BLOCKS[level] * wide for level in levels)
        yield _line(Text.assemble((f"{'FLOPs':>{side}} ", "dim"), bars))


def _line(text: Text) -> Text:
    text.no_wrap, text.overflow = True, "crop"
    return text


def _cut(name: str, width: int) -> str:
    return name if len(name) <= width else "…" + name[1 - width :]


def _most(view: StepPlanView) -> float:
    """Top of the axis of FLOPs: dense steps, or what is more than those."""
    return max(1.0, *view.flops)


def _cells(ax: Axes, view: StepPlanView, shown: dict[str, Look], names: list[str], wide: float, tall: float) -> None:
    from matplotlib.colors import to_rgb

    image = [[to_rgb(shown[taken[site]].colour) for taken in view.actions] for site in range(len(view.sites))]
    ax.imshow(image, aspect="auto", interpolation="nearest")
    # White lines part the cells, unless they would leave nothing of them.
    for count, size, line in ((view.steps, wide, ax.axvline), (len(view.sites), tall, ax.axhline)):
        for number in range(1, count if size > _LEAST else 0):
            line(number - 0.5, color="white", linewidth=1.0 if size > 4 * _LEAST else 0.4)
    if min(wide, tall) >= 0.13:
        for step, taken in enumerate(view.actions):
            for site, action in enumerate(taken):
                look = shown[action]
                ax.text(
                    step, site, look.mark, color=look.ink, fontsize=7, ha="center", va="center_baseline", alpha=0.85
                )
    every = ticks(len(names), max(1, int(tall * len(names) / 0.15)))
    ax.set_yticks(every, [names[n] for n in every])
    ax.tick_params(labelbottom=False, bottom=False, left=False, labelsize=8, colors=SOFT)
    for edge in ax.spines.values():
        edge.set_visible(False)


def _bars(ax: Axes, view: StepPlanView) -> None:
    ax.bar(range(view.steps), view.flops, width=0.86, color=_BAR)
    ax.axhline(1, color=INK, linestyle=(0, (4, 2)), linewidth=1.1)
    ax.axhline(view.share, color=_ACCENT, linewidth=1.4)
    top = 1.12 * _most(view)
    ax.set_ylim(0, top)
    said = [(view.share, f"mean\n{view.share:.1%}", _ACCENT)]
    # One word where two would lie over each other.
    if abs(1 - view.share) > 0.2 * top:
        said.append((1.0, "dense", INK))
    for level, words, colour in said:
        ax.annotate(
            words,
            (1, level),
            (5, 0),
            xycoords=("axes fraction", "data"),
            textcoords="offset points",
            va="center",
            fontsize=8.5,
            color=colour,
        )
    named = ticks(view.steps, 18)
    ax.set_xticks(named, [f"{step}\n{view.timesteps[step]:.4g}" for step in named])
    ax.set_yticks([0, 0.5, 1], ["0", "50%", "100%"])
    ax.set_ylabel("FLOPs, of dense", fontsize=9)
    ax.set_xlabel("step, and the timestep that it is called with", fontsize=9)
    ax.tick_params(labelsize=8, colors=SOFT)
    for name, edge in ax.spines.items():
        edge.set_visible(name in ("left", "bottom"))
        edge.set_color(_EDGE)


def _legend(fig: Figure, view: StepPlanView, shown: dict[str, Look]) -> None:
    from matplotlib.patches import Patch

    total = len(view.sites) * view.steps
    handles = [
        Patch(
            facecolor=look.colour,
            edgecolor="#9aa2b1",
            linewidth=0.5,
            label=f"{look.mark}  {action}: {count / total:.0%}",
        )
        for (action, look), count in zip(shown.items(), view.counts().values(), strict=True)
    ]
    fig.legend(handles=handles, loc="lower center", ncols=_across(shown), fontsize=9, frameon=False, handlelength=1.4)


def _across(shown: dict[str, Look]) -> int:
    """Actions of the legend side by side."""
    return max(1, min(len(shown), _LINE // (12 + max(len(action) for action in shown))))
