"""What every picture of ours needs: a file that can be written, matplotlib without a window, and two inks."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from accelpass.ir.errors import AccelpassError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SUFFIXES = (".png", ".html")
INK, SOFT = "#1a1f2b", "#616b7c"


class MissingExtra(AccelpassError):
    """A picture needs matplotlib, which is not installed."""


def check_target(path: Path, suffixes: Sequence[str] = SUFFIXES) -> Path:
    """The file to write, refused now if it could not be written after minutes of work.

    Raises:
        AccelpassError: another suffix, no such folder, or matplotlib is missing for a ``.png``.
    """
    target = path.expanduser()
    if target.suffix.lower() not in suffixes:
        raise AccelpassError(f"{path}: a picture is written as {' or '.join(suffixes)}")
    if not target.parent.is_dir():
        raise AccelpassError(f"{path}: there is no folder {target.parent}; make it first")
    if target.suffix.lower() == ".png":
        figure_class()
    return target


def figure_class() -> type[Figure]:
    """matplotlib's figure without pyplot, which would choose a window system for the whole process."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as cause:
        raise MissingExtra(f"a picture needs matplotlib ({cause}); pip install 'accelpass[plot]'") from None
    assert FigureCanvasAgg  # what a figure draws on if nothing else is asked for
    return Figure
