"""The picture of what a KVCache keeps: token positions by steps for some layers, and by layers at the end."""

from __future__ import annotations

import base64
import io
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from accelpass.caches.cache_report import layers_alike
from accelpass.caches.kv_map import FEW_BITS, GONE, KEPT, KVMap
from accelpass.ir.errors import AccelpassError
from accelpass.view import text
from accelpass.view.pictures import drawing
from accelpass.view.pictures.drawing import INK, SOFT, figure_class

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from torch import Tensor

# Told apart by lightness alone, so that no kind of colour vision, nor a grey print, mixes them up.
_COLOURS = {KEPT: (0.00, 0.27, 0.51), FEW_BITS: (0.97, 0.77, 0.43), GONE: (0.89, 0.89, 0.89)}
_WORDS = {KEPT: "kept", FEW_BITS: "in few bits", GONE: "evicted"}
_LINE = 125
"""Characters across the picture."""


def check_target(path: Path) -> Path:
    """As :func:`accelpass.view.pictures.drawing.check_target`; here the page too holds a picture that matplotlib draws."""
    target = drawing.check_target(path)
    figure_class()
    return target


def draw(made: KVMap, path: str | Path, title: str = "", head: int | None = None) -> Path:
    """Write the picture as PNG, or as a page that holds it and the figures.

    Args:
        title: whose cache it is.
        head: one key/value head; otherwise colours tell how many of a layer's heads keep a token.

    Raises:
        AccelpassError: the file cannot be written, matplotlib is missing, or there is no such head.
    """
    target = check_target(Path(path))
    heads = min(t.shape[0] for t in made.last)
    if head is not None and not 0 <= head < heads:
        raise AccelpassError(f"there is no key/value head {head}: a layer has {heads}, from 0 to {heads - 1}")
    buffer = io.BytesIO()
    figure(made, title, head).savefig(buffer, format="png", dpi=150)
    if target.suffix.lower() == ".png":
        target.write_bytes(buffer.getvalue())
    else:
        target.write_text(_page(made, title, buffer.getvalue()), encoding="utf-8")
    return target.resolve()


def figure(made: KVMap, title: str = "", head: int | None = None) -> Figure:
    """The picture as a matplotlib figure, bound to no window."""
    layers, steps, width = made.layers, len(made.steps), made.steps[-1].seen
    said = _subtitles(made)
    tall = [min(2.2, max(1.0, 0.06 * steps))] * len(layers) + [min(3.2, max(1.0, 0.1 * len(made.last)))]
    above, below, gap = 0.95 + 0.21 * len(said), 0.95, 0.42
    height = above + sum(tall) + gap * (len(tall) - 1) + below
    fig = figure_class()(figsize=(10, height))
    between = gap * len(tall) / sum(tall)
    edges = {"left": 0.085, "right": 0.975, "top": 1 - above / height, "bottom": below / height}
    grid = fig.add_gridspec(len(tall), 1, height_ratios=tall, hspace=between, **edges)
    first: Axes | None = None
    for row, layer in enumerate(layers):
        ax = fig.add_subplot(grid[row], sharex=first)
        first = first or ax
        image = np.ones((steps, width, 3))
        for y, step in enumerate(made.steps):
            image[y, : step.seen] = _rgb(step.layers[layer], head)
        ax.imshow(image, aspect="auto", interpolation="nearest")
        ax.set_ylabel("step (0: prompt)", fontsize=9)
        _finish(ax, made, f"layer {layer}", _ending(made, layer, head))
        ax.tick_params(labelbottom=False)
    ax = fig.add_subplot(grid[len(layers)], sharex=first)
    ax.imshow(np.stack([_rgb(t, head) for t in made.last]), aspect="auto", interpolation="nearest")
    ax.set_ylabel("layer", fontsize=9)
    ax.set_xlabel("position of the token", fontsize=9)
    _finish(ax, made, f"all {len(made.last)} layers after the last step", "")
    if first is not None and width > made.prompt:
        _name_sides(first, made.prompt - 0.5)
    whose = "" if head is None else f", key/value head {head}"
    names = " + ".join(made.passes) or "no pass"
    heading = f"What the key/value cache keeps: {title + ', ' if title else ''}{names}{whose}"
    fig.text(0.085, 1 - 0.28 / height, heading, fontsize=13, fontweight="bold", color=INK, va="center")
    for number, line in enumerate(said):
        fig.text(0.085, 1 - (0.54 + 0.21 * number) / height, line, fontsize=9.5, color=SOFT, va="center")
    _legend(fig, made, head)
    return fig


def _subtitles(made: KVMap) -> list[str]:
    """Figures, what each pass did, and notes, in lines that fit."""
    sizes = made.sizes()
    held = f"{text.size(sizes.bytes)} allocated, dense {text.size(sizes.dense_bytes)}"
    counts = f"{made.prompt} tokens of prompt, {len(made.steps)} generated; {held}"
    passes = [textwrap.shorten(f"{name}: {what}", _LINE, placeholder=" ...") for name, what in made.passes.items()]
    notes = [line for note in made.notes for line in textwrap.wrap(note, _LINE)]
    return [counts + text.ratio(sizes.dense_bytes, sizes.bytes), *passes, *notes]


def _rgb(kept: Tensor, head: int | None) -> Any:
    """One colour a token: those of what became of it, mixed by the share of heads."""
    levels = (kept if head is None else kept[head : head + 1]).numpy()
    return sum((levels == level).mean(0)[:, None] * np.array(colour) for level, colour in _COLOURS.items())


def _finish(ax: Axes, made: KVMap, title: str, ending: str) -> None:
    from matplotlib.ticker import MaxNLocator

    ax.set_title(title, loc="left", fontsize=10, fontweight="bold", color=INK)
    ax.set_title(ending, loc="right", fontsize=9, color=SOFT)
    ax.xaxis.set_major_locator(MaxNLocator(nbins=12, integer=True))
    ax.yaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    ax.tick_params(labelsize=8, colors=SOFT)
    for edge in ax.spines.values():
        edge.set_color("#c3c8d1")
    if made.steps[-1].seen > made.prompt:
        # On white, so that it shows on dark tokens too.
        ax.axvline(made.prompt - 0.5, color="white", linewidth=2.6)
        ax.axvline(made.prompt - 0.5, color=INK, linestyle=(0, (4, 2)), linewidth=1.2)


def _name_sides(ax: Axes, boundary: float) -> None:
    """Say above the first panel on which side of the line the prompt is."""
    for word, aside, side in (("prompt ◂", -4, "right"), ("▸ answer", 4, "left")):
        ax.annotate(
            word,
            (boundary, 1),
            (aside, 18),
            ha=side,
            xycoords=("data", "axes fraction"),
            textcoords="offset points",
            fontsize=9,
            color=INK,
        )


def _ending(made: KVMap, layer: int, head: int | None) -> str:
    levels = made.last[layer] if head is None else made.last[layer][head : head + 1]
    kept, few = (float((levels == level).sum()) / len(levels) for level in (KEPT, FEW_BITS))
    whose = "a head" if head is None else f"head {head}"
    how = f"{kept:.4g} in full and {few:.4g} in few bits, of" if made.has_few_bits else f"{kept:.4g} of"
    return f"at the end {whose} keeps {how} {levels.shape[1]} tokens"


def _legend(fig: Figure, made: KVMap, head: int | None) -> None:
    from matplotlib.patches import Patch

    other = FEW_BITS if made.has_few_bits else GONE
    whole = "in full" if made.has_few_bits else _WORDS[KEPT]
    heads = made.last[0].shape[0] if head is None else 1
    shown = range(heads, -1, -1) if heads <= 4 else (heads, heads // 2, 0)
    handles = []
    for number in shown:
        share = number / heads
        mixed = [share * a + (1 - share) * b for a, b in zip(_COLOURS[KEPT], _COLOURS[other], strict=True)]
        if heads == 1:
            said = whole if number else _WORDS[other]
        else:
            said = f"{whole}: {number} of {heads} heads" if number else f"{_WORDS[other]}: all heads"
        handles.append(Patch(facecolor=mixed, edgecolor="#9aa2b1", linewidth=0.5, label=said))
    if other != GONE and any(bool((t == GONE).any()) for t in made.last):
        handles.append(Patch(facecolor=_COLOURS[GONE], edgecolor="#9aa2b1", linewidth=0.5, label=_WORDS[GONE]))
    handles.append(Patch(facecolor="white", edgecolor="#9aa2b1", linewidth=0.5, label="not there yet"))
    fig.legend(handles=handles, loc="lower center", ncols=len(handles), fontsize=9, frameon=False, handlelength=1.4)


def _page(made: KVMap, title: str, png: bytes) -> str:
    from accelpass.view.page import environment

    image = base64.b64encode(png).decode()
    sizes = made.sizes()
    template = environment().get_template("kv_map.html.j2")
    return template.render(made=made, title=title, sizes=sizes, layers=layers_alike(sizes), image=image)
