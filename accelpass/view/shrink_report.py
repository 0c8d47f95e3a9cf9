"""What became smaller: a table of the weights that passes took rows or columns out of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from accelpass.ir.transform.shrink import Shrunk
from accelpass.view.grouping import collapse


@dataclass(frozen=True)
class ShrinkReport:
    """The weights that have fewer rows or columns now, and the layers that are gone.

    Attributes:
        weights: by pass, what became of each weight; shapes before and after, and bytes.
        gone: by pass, the layers that are not computed, with their weights.
    """

    weights: dict[str, tuple[Shrunk, ...]]
    gone: dict[str, tuple[str, ...]]

    @property
    def bytes(self) -> tuple[int, int]:
        """Of the weights that shrank, before and after; as floats, whatever packs them later."""
        every = [s for found in self.weights.values() for s in found]
        return sum(s.bytes_before for s in every), sum(s.bytes_after for s in every)

    def __str__(self) -> str:
        lines = []
        for name, found in self.weights.items():
            lines.append(name)
            alike: dict[Any, list[Shrunk]] = {}
            for one in found:
                alike.setdefault((one.path.rpartition(".")[0].rpartition(".")[2], one.before, one.after), []).append(
                    one
                )
            for (_, before, after), group in alike.items():
                paths = ", ".join(collapse([one.path for one in group]))
                lines.append(f"  {_shape(before)} -> {_shape(after)}  {paths}")
        for name, layers in self.gone.items():
            lines += [name, f"  left out: {', '.join(collapse(layers))}"]
        before, after = self.bytes
        if before:
            lines.append(f"{before / 1e6:.1f} MB of weights -> {after / 1e6:.1f} MB")
        return "\n".join(lines) or "nothing was made smaller"


def shrink_report(fast: Any) -> ShrinkReport:
    """What passes made smaller in a compiled model that has run.

    Raises:
        AccelpassError: nothing was compiled yet.
    """
    from accelpass import explain
    from accelpass.passes.structure.decoder_blocks import OUT

    passes = explain(fast).passes
    weights = {name: tuple(_found(p.took.values())) for name, p in passes.items()}
    gone = {name: tuple(site for site, done in p.took.items() if done.what == OUT) for name, p in passes.items()}
    return ShrinkReport({n: w for n, w in weights.items() if w}, {n: g for n, g in gone.items() if g})


def _found(took: Any) -> Sequence[Shrunk]:
    return [one for done in took for one in done.shrunk]


def _shape(sizes: Sequence[int]) -> str:
    return "x".join(map(str, sizes))
