"""The picture of an image whose patches the language model reads, or not: one row of tiles for each place that chose."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from accelpass.ir.errors import AccelpassError
from accelpass.view.pictures.drawing import INK, check_target, figure_class
from accelpass.view.surviving import SurvivingTokens, surviving_tokens

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from torch import Tensor

_DROPPED = 0.25
"""How much of a dropped patch's brightness is left."""


def draw_patches(fast: Any, images: Tensor, is_patch: Tensor, path: str | Path, sequence: int = 0) -> Path:
    """Write a PNG that shows which patches of a text's images went on at the last prompt; dropped ones are dark.

    Args:
        fast: what ``torch.compile(..., backend="accelpass")`` returned; a pass of visual tokens took it.
        images: what the tower read of the text, in order: ``(tiles, channels, height, width)``, any range of values.
        is_patch: True where a token of the text is a place for a patch, ``(tokens,)``, as ``input_ids[0] == image_token_id``.
        path: ends in ``.png``.
        sequence: which text of the batch.

    Returns:
        Where it is.

    Raises:
        AccelpassError: nothing was dropped at the last prompt, the patches are no square grids of the images, the file cannot be
            written, or matplotlib is missing.
    """
    target = check_target(Path(path), (".png",))
    found = surviving_tokens(fast)
    if not found:
        raise AccelpassError(
            "no token of the last prompt was dropped, so there is nothing to draw; call the model with an image"
        )
    figure(found, images, is_patch, sequence).savefig(target, format="png", dpi=150)
    return target.resolve()


def kept_patches(found: SurvivingTokens, is_patch: Tensor, tiles: int, sequence: int = 0) -> np.ndarray:
    """Which patches went on, ``(tiles, rows, columns)``.

    Raises:
        AccelpassError: see :func:`draw_patches`.
    """
    if len(is_patch) != found.tokens:
        raise AccelpassError(f"the last prompt had {found.tokens} tokens, and is_patch tells of {len(is_patch)}")
    places = is_patch.nonzero().flatten().tolist()
    side = round((len(places) / tiles) ** 0.5) if tiles else 0
    if not places or side * side * tiles != len(places):
        raise AccelpassError(f"{len(places)} places for patches of {tiles} images are no square grids of patches")
    kept = set(found.kept[sequence])
    return np.array([place in kept for place in places]).reshape(tiles, side, side)


def figure(found: list[SurvivingTokens], images: Tensor, is_patch: Tensor, sequence: int = 0) -> Figure:
    """The picture as a matplotlib figure, bound to no window."""
    tiles = len(images)
    fig = figure_class()(figsize=(1.9 * tiles + 0.3, 2.1 * len(found) + 0.3), layout="constrained")
    panels = fig.subplots(len(found), tiles, squeeze=False)
    pictures = images.detach().float().cpu().numpy().transpose(0, 2, 3, 1)
    low, high = pictures.min(), pictures.max()
    pictures = (pictures - low) / max(high - low, 1e-9)
    for row, chose in zip(panels, found, strict=True):
        kept = kept_patches(chose, is_patch, tiles, sequence)
        for tile, (ax, picture, mask) in enumerate(zip(row, pictures, kept, strict=True)):
            rows, columns = (size // side for size, side in zip(picture.shape[:2], mask.shape, strict=True))
            bright = np.where(mask, 1.0, _DROPPED).repeat(rows, 0).repeat(columns, 1)[: len(picture), :, None]
            shown = picture[: bright.shape[0], : bright.shape[1]]
            shown = shown if shown.shape[2] == 3 else shown.mean(2, keepdims=True).repeat(3, 2)
            # Lighter than black even where nothing is, so that dropped patches of a dark image can be seen.
            ax.imshow((0.15 + 0.85 * shown) * bright, vmin=0, vmax=1, interpolation="nearest")
            ax.set_title(
                f"{mask.sum()} of {mask.size}" + (f"   {chose.path}" if not tile else ""),
                fontsize=8,
                color=INK,
                loc="left",
            )
            ax.set_axis_off()
    return fig
