"""The picture of bits by layer: what a search gave each weight of a model."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from accelpass.api.calibration.bit_search import BitSearch
from accelpass.ir.errors import AccelpassError
from accelpass.passes.core.plan import Plan
from accelpass.passes.quantization.mixed_precision import CHOICES, FLOAT
from accelpass.view.grouping import layered
from accelpass.view.pictures.drawing import INK, SOFT, check_target, figure_class

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

_BITS = {"int8": 8, "int4": 4, "int3": 3, "fp8": 8, "mxfp4": 4, "nvfp4": 4, FLOAT: 16}


def draw_bits(found: Plan | BitSearch, path: str | Path, title: str = "") -> Path:
    """Write a picture of the format of each weight, layers from top to bottom, and what they are for from left to right.

    Args:
        found: a plan of ``mixed_precision``, or what ``search_bits`` found.
        path: a ``.png`` file.
        title: whose weights they are.

    Raises:
        AccelpassError: nothing was chosen, the file cannot be written, or matplotlib is missing.
    """
    target = check_target(Path(path), (".png",))
    figure(choices_of(found), title).savefig(target, dpi=150)
    return target.resolve()


def choices_of(found: Plan | BitSearch) -> dict[str, str]:
    """The name of what each weight has, by the path of its module.

    Raises:
        AccelpassError: nothing was chosen.
    """
    if isinstance(found, BitSearch):
        return {path: f"{bits} bits" for path, bits in found.bits.items()}
    parts = (name.split("/") for name in found.tensors if name.startswith("mixed_precision/"))
    chosen = {
        path.removesuffix(".weight"): CHOICES[int(found.tensors[f"mixed_precision/{path}/choice"])]
        for _, path, kind in parts
        if kind == "choice"
    }
    if not chosen:
        raise AccelpassError(
            "the plan has no choice of mixed_precision: calibrate with it, or draw what search_bits found"
        )
    return chosen


def figure(chosen: Mapping[str, str], title: str = "") -> Figure:
    """The picture as a matplotlib figure, bound to no window."""
    cells = {path: layered(path) for path in chosen}
    rows, columns = (list(dict.fromkeys(cell[i] for cell in cells.values())) for i in (0, 1))
    names = sorted(set(chosen.values()), key=lambda n: (_bits(n), n))
    colours = {name: _colour(i, len(names)) for i, name in enumerate(names)}
    wide = 2.2 + 0.42 * len(columns) + 1.6
    tall = 1.9 + 0.07 * max(map(len, columns)) + max(1.0, 0.2 * len(rows))
    fig = figure_class()(figsize=(wide, tall))
    below = (0.5 + 0.08 * max(map(len, columns))) / tall
    ax = fig.add_axes((1.6 / wide, below, 0.42 * len(columns) / wide, 1 - 0.7 / tall - below))
    for path, (row, column) in cells.items():
        at = columns.index(column) - 0.5, rows.index(row) - 0.5
        ax.add_patch(_square(at, colours[chosen[path]]))
    ax.set_xlim(-0.5, len(columns) - 0.5)
    ax.set_ylim(len(rows) - 0.5, -0.5)
    step = max(1, math.ceil(len(rows) / 32))
    ax.set_yticks(range(0, len(rows), step), rows[::step], fontsize=7, color=SOFT)
    ax.set_xticks(range(len(columns)), columns, rotation=90, fontsize=7, color=SOFT)
    ax.tick_params(length=0)
    for side in ax.spines.values():
        side.set_visible(False)
    counts = {name: sum(c == name for c in chosen.values()) for name in names}
    handles = [_square((0, 0), colours[name]) for name in names]
    words = [f"{name} ({counts[name]})" for name in names]
    fig.legend(handles, words, loc="upper right", fontsize=7, frameon=False)
    heading = "How each weight is stored" + (f": {title}" if title else "")
    fig.text(0.02, 1 - 0.3 / tall, heading, fontsize=10, fontweight="bold", color=INK, va="center")
    return fig


def _bits(name: str) -> float:
    """By which formats are ordered."""
    return _BITS[name] if name in _BITS else float(name.split()[0])


def _colour(place: int, of: int) -> tuple[float, float, float]:
    """From light to dark, so that no kind of colour vision mixes them up."""
    share = place / max(1, of - 1)
    light, dark = (0.97, 0.84, 0.60), (0.00, 0.22, 0.45)
    return tuple(a + share * (b - a) for a, b in zip(light, dark, strict=True))  # type: ignore[return-value]


def _square(at: tuple[float, float], colour: tuple[float, float, float]) -> Rectangle:
    from matplotlib.patches import Rectangle

    return Rectangle(at, 1, 1, facecolor=colour, edgecolor="white", linewidth=1)
