"""Quality of the digits against FLOPs and time, drawn from what ``benchmarks.run --only digits_steps`` measured.

python -m benchmarks.diffusion_plots --out docs/images/digits-curves.png
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accelpass.view.pictures.drawing import INK, SOFT, check_target, figure_class

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Row = dict[str, Any]
ROOT = Path(__file__).parents[1]
RESULT = ROOT / "benchmarks" / "results" / "digits_steps_cpu.json"
OUT = ROOT / "docs" / "images" / "digits-curves.png"
COSTS = {"attention_flops": "attention FLOPs", "flops": "all FLOPs", "time": "time of the pipeline"}
QUALITIES = {
    "class_accuracy": ("class accuracy, %", 100.0, True),
    "frechet": ("Fréchet distance", 1.0, False),
    "psnr": ("PSNR to dense, dB", 1.0, True),
}
"""How each is called and shown, and whether more is better."""
METHODS = {
    "ditfastattn": ("DiTFastAttn", "#004582", "o"),
    "tokencache": ("TokenCache", "#b3541e", "s"),
    "delta_cache": ("block deltas", "#7a3e8f", "D"),
    "cache-dit": ("cache-dit (its own process)", "#4d7c3a", "^"),
}
DENSE = "inductor"
TARGETS = {"flops": 0.6, "time": 0.7}
LOSS = 0.01
"""What is asked for: at most so much of the dense cost, at most so much class accuracy lost."""
_GRID, _AIM = "#dfe3e9", "#9aa3b0"


def curves(result: dict[str, Any]) -> Figure:
    """Costs across, qualities down; a point for each candidate, a line through those that no other of its method beats."""
    rows: Sequence[Row] = result["rows"]
    (dense,) = [r for r in rows if r["name"] == DENSE]
    fig = figure_class()(figsize=(10.4, 9.0))
    grid = fig.add_gridspec(3, 3, left=0.085, right=0.985, top=0.865, bottom=0.065, wspace=0.08, hspace=0.09)
    first: dict[str, Axes] = {}
    for down, quality in enumerate(QUALITIES):
        for across, cost in enumerate(COSTS):
            sharing = {"sharex": first.get(cost), "sharey": first.get(quality)}
            ax = fig.add_subplot(grid[down, across], **sharing)
            first.setdefault(cost, ax)
            first.setdefault(quality, ax)
            _panel(ax, rows, dense, cost, quality)
            ax.tick_params(labelbottom=down == 2, labelleft=across == 0, labelsize=8.5, colors=SOFT, length=3)
            if down == 2:
                ax.set_xlabel(f"{COSTS[cost]}, dense = 1", fontsize=9.5, color=INK)
            if across == 0:
                ax.set_ylabel(QUALITIES[quality][0], fontsize=9.5, color=INK)
    _heading(fig, result, first["class_accuracy"])
    return fig


def _panel(ax: Axes, rows: Sequence[Row], dense: Row, cost: str, quality: str) -> None:
    _, scale, rising = QUALITIES[quality]
    ax.grid(color=_GRID, linewidth=0.7)
    ax.set_axisbelow(True)
    for edge in ax.spines.values():
        edge.set_color("#c3c8d1")
    if quality != "psnr":
        ax.plot(dense[cost], scale * dense[quality], "*", color=INK, markersize=12, label="dense, Inductor", zorder=4)
    if quality == "class_accuracy":
        ax.axhline(scale * (dense[quality] - LOSS), color=_AIM, linestyle=(0, (4, 3)), linewidth=1)
    if cost in TARGETS:
        ax.axvline(TARGETS[cost], color=_AIM, linestyle=(0, (4, 3)), linewidth=1)
    for method, (label, color, marker) in METHODS.items():
        points = sorted((r[cost], scale * r[quality]) for r in rows if r["name"].startswith(method))
        if not points:
            continue
        ax.plot(*zip(*points, strict=True), marker, color=color, markersize=5.5, label=label, alpha=0.9, zorder=3)
        ax.plot(*zip(*front(points, rising), strict=True), color=color, linewidth=1.4, alpha=0.8, zorder=2)
    ax.set_xlim(0, 1.08)


def front(points: Sequence[tuple[float, float]], rising: bool) -> list[tuple[float, float]]:
    """Points, cheapest first, that are better than every cheaper one."""
    kept: list[tuple[float, float]] = []
    for cost, quality in sorted(points, key=lambda p: (p[0], -p[1] if rising else p[1])):
        if not kept or (quality > kept[-1][1] if rising else quality < kept[-1][1]):
            kept.append((cost, quality))
    return kept


def _heading(fig: Figure, result: dict[str, Any], shown: Axes) -> None:
    said = (
        f"{result['images']} images, {result['steps']} steps of DDIM, guidance {result['guidance']:g}; {result['device']}. "
        "Dashed: what was aimed at."
    )
    fig.text(0.085, 0.967, "Digits: quality against cost", fontsize=13, fontweight="bold", color=INK, va="center")
    fig.text(0.085, 0.939, said, fontsize=9, color=SOFT, va="center")
    handles, names = shown.get_legend_handles_labels()
    options = {"loc": "center left", "ncols": len(names), "frameon": False, "fontsize": 9.5}
    fig.legend(handles, names, bbox_to_anchor=(0.078, 0.903), columnspacing=1.8, handletextpad=0.4, **options)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--result", type=Path, default=RESULT)
    parser.add_argument("--out", type=Path, default=OUT, help="a .png")
    given = parser.parse_args()
    given.out.parent.mkdir(parents=True, exist_ok=True)
    target = check_target(given.out, (".png",))
    curves(json.loads(given.result.read_text())).savefig(target, dpi=130)
    print(target)


if __name__ == "__main__":
    main()
