"""The picture of sparse attention: how many of its keys each head of each layer reads, heads by layers."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING

from rich.console import Console, ConsoleOptions, RenderResult
from rich.text import Text

from accelpass.view.step_plan_view import labels

if TYPE_CHECKING:
    from accelpass.passes.core.base import Done

_BLOCKS = "▁▂▃▄▅▆▇█"


@dataclass(frozen=True)
class DensityView:
    """What one pass did to the masks of a model.

    Attributes:
        name: the pass.
        tokens: of the prompt that the figures are for.
        sites: layers, in the model's order.
        densities: of each layer, of each query head: the share of the keys that the prompt's last query reads.
    """

    name: str
    tokens: int
    sites: tuple[str, ...]
    densities: tuple[tuple[float, ...], ...]

    @staticmethod
    def of(name: str, took: Mapping[str, Done]) -> DensityView | None:
        """The view of a pass from what it did; None if that was nothing to masks whose density is known before they run."""
        known = {site: done for site, done in took.items() if done.densities}
        if not known:
            return None
        tokens = max(done.tokens for done in known.values())
        return DensityView(name, tokens, tuple(known), tuple(done.densities for done in known.values()))

    @property
    def mean(self) -> float:
        """Over heads of all layers."""
        each = [share for layer in self.densities for share in layer]
        return sum(each) / len(each)

    @property
    def said(self) -> str:
        return f"the last query of {self.tokens} tokens reads {self.mean:.0%} of the keys, as a mean over heads"

    @property
    def columns(self) -> tuple[str, list[str]]:
        """What the names of all layers have in common, and the rest of each."""
        return labels(self.sites)

    def rows(self) -> list[tuple[str, tuple[float | None, ...]]]:
        """Heads by layers: ``0..2`` for neighbours that are alike in all layers; None where a layer has no such head."""
        most = max(map(len, self.densities))
        every = [tuple(of[head] if head < len(of) else None for of in self.densities) for head in range(most)]
        made = []
        for row, group in groupby(range(most), every.__getitem__):
            heads = list(group)
            made.append((str(heads[0]) if len(heads) == 1 else f"{heads[0]}..{heads[-1]}", row))
        return made


@dataclass(frozen=True)
class Bars:
    """The picture for a terminal: a bar for each head of each layer, as many layers as there is room for, the others below."""

    view: DensityView
    most: int = 12
    """Rows of heads; what is left is counted."""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        common, names = self.view.columns
        rows = self.view.rows()
        yield Text.assemble((f"{self.view.name}: ", "bold"), self.view.said)
        side = max(5, max(len(name) for name, _ in rows))
        room = max(1, options.max_width - side - 1)
        for start in range(0, len(names), room):
            yield from self._band(rows, side, range(start, min(len(names), start + room)))
        where = f"{common}, * from {names[0]} to {names[-1]}" if common else ", ".join(names[:3])
        note = f"{'head':>{side}} by layer: {where}"
        yield Text(note, style="dim", no_wrap=True, overflow="ellipsis")

    def _band(self, rows: list[tuple[str, tuple[float | None, ...]]], side: int, layers: range) -> Iterator[Text]:
        for name, row in rows[: self.most]:
            bars = "".join(_bar(row[layer]) for layer in layers)
            yield Text.assemble((f"{name:>{side}} ", "dim"), (bars, "cyan"), no_wrap=True, overflow="crop")
        if len(rows) > self.most:
            yield Text(f"{'':>{side}} ... and {len(rows) - self.most} rows of heads more", style="dim")


def _bar(share: float | None) -> str:
    return " " if share is None else _BLOCKS[max(0, math.ceil(share * len(_BLOCKS)) - 1)]
