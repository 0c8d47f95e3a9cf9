"""A sheet of digits: samples of the model, a row for each class, beside real mosaics that it was not trained on.

python -m benchmarks.digits_sheet --out docs/images/digits.png
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from accelpass.models_zoo import digits
from accelpass.view.pictures.drawing import INK, SOFT, check_target, figure_class
from benchmarks.digits_quality import labels_of, reals

if TYPE_CHECKING:
    from matplotlib.figure import Figure

OUT = Path(__file__).parents[1] / "docs" / "images" / "digits.png"
_CELL, _SPACE, _GAP = 0.82, 0.07, 0.34
"""Inches: an image, the space between two, and that between made and real ones."""
_LEFT, _TOP, _EDGE = 0.42, 0.86, 0.14


def sheet(made: Tensor, real: Tensor, subtitle: str = "") -> Figure:
    """The picture of images in 0..1, both ``[10 n, 1, 32, 32]`` class by class."""
    ours, theirs = len(made) // digits.CLASSES, len(real) // digits.CLASSES
    pitch = _CELL + _SPACE
    width = _LEFT + pitch * (ours + theirs) - 2 * _SPACE + _GAP + _EDGE
    height = _TOP + pitch * digits.CLASSES - _SPACE + _EDGE
    fig = figure_class()(figsize=(width, height))
    blocks = ((made, ours, _LEFT, "samples"), (real, theirs, _LEFT + pitch * ours - _SPACE + _GAP, "real, held out"))
    for images, count, left, title in blocks:
        fig.text(left / width, 1 - (_TOP - 0.12) / height, title, fontsize=10, fontweight="bold", color=INK)
        for number, image in enumerate(images):
            row, column = divmod(number, count)
            x, y = left + pitch * column, height - _TOP - pitch * row - _CELL
            ax = fig.add_axes((x / width, y / height, _CELL / width, _CELL / height))
            # Dark on light, as ink is; what lies between two pixels is interpolated, since each is seven dots wide.
            ax.imshow(image[0].numpy(), cmap="gray_r", vmin=0, vmax=1, interpolation="bicubic")
            ax.set_xticks([])
            ax.set_yticks([])
            for edge in ax.spines.values():
                edge.set_color("#c3c8d1")
            if number % count == 0 and images is made:
                ax.set_ylabel(str(row), rotation=0, fontsize=12, color=INK, ha="right", va="center", labelpad=6)
    fig.text(_LEFT / width, 1 - 0.3 / height, "Digits", fontsize=13, fontweight="bold", color=INK, va="center")
    fig.text((_LEFT + 0.72) / width, 1 - 0.31 / height, subtitle, fontsize=9.5, color=SOFT, va="center")
    return fig


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=OUT, help="a .png")
    parser.add_argument("--per-class", type=int, default=6, help="samples of each class")
    parser.add_argument("--real", type=int, default=3, help="real mosaics of each class")
    parser.add_argument("--steps", type=int, default=50, help="of DDIM")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    given.out.parent.mkdir(parents=True, exist_ok=True)
    target = check_target(given.out, (".png",))
    torch.set_grad_enabled(False)
    labels = labels_of(given.per_class).tolist()
    made = digits.sample(digits.pipeline(), labels, given.steps, given.seed)
    subtitle = f"a row for each class; {given.steps} steps of DDIM, guidance {digits.GUIDANCE:g}, seed {given.seed}"
    sheet(made, reals(held_out=True, per_class=given.real), subtitle).savefig(target, dpi=130)
    print(target)


if __name__ == "__main__":
    main()
