"""The picture of what becomes of an image's patches in a vision tower: kept, merged or dropped, block by block."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from accelpass.api.lookup import tensors_of
from accelpass.backends.runtime.survivors import Survivors, last_of
from accelpass.ir.errors import AccelpassError
from accelpass.view.pictures.drawing import INK, check_target, figure_class

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from torch import Tensor

_DROPPED = 0.25
"""How much of a dropped patch's brightness is left."""
_MOST = 6
"""Rows of a picture; of more blocks as many are shown, evenly spaced, the last among them."""


def draw_tower(fast: Any, images: Tensor, path: str | Path) -> Path:
    """Write a PNG with a row for each block of a tower behind which patches left or became one, and a column for each image.

    Dropped patches are dark. Merged ones have the mean of their colours and no line between them, as in the paper of token merging.

    Args:
        fast: what ``torch.compile(..., backend="accelpass")`` returned; a pass took its tower (``tome``, ``flowcut``).
        images: what the tower read at the last call: ``(images, channels, height, width)``, any range of values.
        path: ends in ``.png``.

    Returns:
        Where it is.

    Raises:
        AccelpassError: no patch left or was merged at the last call, its images were others, their patches are no square, the file cannot
            be written, or matplotlib is missing.
    """
    target = check_target(Path(path), (".png",))
    found = last_of(tensors_of(fast), patches=True)
    if not found:
        raise AccelpassError(
            "no patch left a vision tower or was merged there at the last call, so there is nothing to draw; a pass such as tome or "
            "flowcut does that, and draw_patches shows which patches the text's model read"
        )
    figure(found, images).savefig(target, format="png", dpi=150)
    return target.resolve()


def painted(image: np.ndarray, place: np.ndarray) -> np.ndarray:
    """An image ``(height, width, channels)`` in 0..1 as its rows show it: patches of one have their mean, those that left are dark.

    Args:
        place: the row of each patch, -1 where it has left, ``(rows, columns)``.
    """
    (rows, columns), shown = place.shape, image.copy()
    high, wide = image.shape[0] // rows, image.shape[1] // columns
    patches = shown[: rows * high, : columns * wide].reshape(rows, high, columns, wide, -1)
    for row, count in zip(*np.unique(place, return_counts=True), strict=True):
        here = place == row
        if row < 0:
            patches[:] = np.where(here[:, None, :, None, None], patches * _DROPPED, patches)
        elif count > 1:
            mean = patches.transpose(0, 2, 1, 3, 4)[here].mean((0, 1, 2))
            patches[:] = np.where(here[:, None, :, None, None], mean, patches)
    shown[: rows * high, : columns * wide] = patches.reshape(rows * high, columns * wide, -1)
    return shown


def figure(found: tuple[Survivors, ...] | list[Survivors], images: Tensor) -> Figure:
    """The picture as a matplotlib figure, bound to no window.

    Raises:
        AccelpassError: see :func:`draw_tower`.
    """
    patches = found[0].kept.shape[1]
    side = round(patches**0.5)
    if len(images) != len(found[0].kept) or side * side != patches:
        raise AccelpassError(
            f"the tower read {len(found[0].kept)} images of {patches} patches, and {len(images)} are given: give those of the last call, "
            "whose patches are a square"
        )
    if len(found) > _MOST:
        found = [found[round(n)] for n in np.linspace(0, len(found) - 1, _MOST)]
    fig = figure_class()(figsize=(1.9 * len(images) + 0.3, 2.1 * len(found) + 0.3), layout="constrained")
    panels = fig.subplots(len(found), len(images), squeeze=False)
    pictures = images.detach().float().cpu().numpy().transpose(0, 2, 3, 1)
    low, high = pictures.min(), pictures.max()
    pictures = 0.15 + 0.85 * (pictures - low) / max(high - low, 1e-9)  # lighter than black: dropped patches can be seen
    pictures = pictures if pictures.shape[3] == 3 else pictures.mean(3, keepdims=True).repeat(3, 3)
    for row, block in zip(panels, found, strict=True):
        places = block.kept.cpu().numpy().reshape(-1, side, side)
        for number, (ax, picture, place) in enumerate(zip(row, pictures, places, strict=True)):
            ax.imshow(painted(picture, place), vmin=0, vmax=1, interpolation="nearest")
            high, wide = (size // side for size in picture.shape[:2])
            for y, x in zip(*np.nonzero(place[1:] != place[:-1]), strict=True):
                ax.plot(
                    [x * wide - 0.5, (x + 1) * wide - 0.5], [(y + 1) * high - 0.5] * 2, color="white", linewidth=0.4
                )
            for y, x in zip(*np.nonzero(place[:, 1:] != place[:, :-1]), strict=True):
                ax.plot(
                    [(x + 1) * wide - 0.5] * 2, [y * high - 0.5, (y + 1) * high - 0.5], color="white", linewidth=0.4
                )
            left = len(np.unique(place[place >= 0]))
            title = f"{left} of {patches}" + (f"   {block.path}" if not number else "")
            ax.set_title(title, fontsize=8, color=INK, loc="left")
            ax.set_axis_off()
    return fig
