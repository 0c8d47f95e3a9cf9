"""Layers that are left out: always the same ones, or more of them the later a token stands (SkipDecode, arXiv 2307.02628)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

from accelpass.ir.core.program import Program
from accelpass.ir.kv.ops import UNEVEN
from accelpass.passes.core.staged import FULL, StagedCall
from accelpass.passes.structure.decoder_blocks import OUT, DecoderBlocks


@dataclass(frozen=True)
class SkipLayers(DecoderBlocks):
    """Leave layers out, in prompt and answer alike (``layers``), or of a token by its position (``least``).

    By position, after Del Corro et al., "SkipDecode": all sequences of a batch run the same layers, the number of which falls
    linearly with the position from all to ``least``. The first ``warm_up`` layers always run, then the uppermost; what is between
    is left out and keeps no keys and values of the token. A later token runs no layer that an earlier one did not, so none is ever
    missing. A prompt runs all layers (inferred), and positions count from its first token; several tokens at once, a
    further prompt, run what the first of them may. A model that was not trained for it answers worse.

    Attributes:
        layers: numbers of layers that are always left out, from 1: the first tells how many tokens the cache holds.
        least: how many layers run at ``horizon`` and later; None leaves none out by position.
        warm_up: lower layers that always run, at least 1.
        start: the position up to which all layers run.
        horizon: the position from which on ``least`` layers run.
    """

    layers: tuple[int, ...] = ()
    least: int | None = None
    warm_up: int = 1
    start: int = 0
    horizon: int = 1024

    name: ClassVar[str] = "skip_layers"
    summary: ClassVar[str] = "leave layers out, always or more of them at later tokens"
    paper: ClassVar[str] = "SkipDecode, arXiv 2307.02628"
    identity: ClassVar[dict[str, Any] | None] = {"layers": (), "least": None}

    def __post_init__(self) -> None:
        if any(number < 1 for number in self.layers):
            raise self.fail("layers", "numbers of layers from 1; layer 0 counts the tokens of the cache")
        if self.layers and self.least is not None:
            raise self.fail("least", "None with layers=..., or leave layers out")
        if self.warm_up < 1:
            raise self.fail("warm_up", "a number of layers, at least 1")
        if self.least is not None and self.least < self.warm_up:
            raise self.fail("least", f"at least warm_up={self.warm_up} layers")
        if not 0 <= self.start < self.horizon:
            raise self.fail("start", f"a position from 0, below horizon={self.horizon}")

    @property
    def cache_mark(self) -> str:
        return UNEVEN if self.least is not None else ""

    def fixed(self, program: Program) -> bool:
        return self.least is None

    def spared(self, depth: int) -> Iterable[int]:
        if self.layers and max(self.layers) >= depth:
            raise self.fail("layers", f"numbers below {depth}, the model's number of layers")
        return self.layers if self.least is None else self.skipped(depth, self.horizon)

    def skipped(self, depth: int, position: int) -> range:
        """The layers that a token at this position leaves out."""
        least = depth if self.least is None else min(self.least, depth)
        share = min(max(position - self.start, 0) / (self.horizon - self.start), 1.0)
        return range(self.warm_up, depth - round(depth - (depth - least) * share) + self.warm_up)

    def run(self, call: StagedCall) -> tuple[Any, ...]:
        skipped = self.skipped(len(call.blocks), call.held)
        for number in call.blocks:
            call.run(number, OUT if number in skipped else FULL)
        return call.results()
