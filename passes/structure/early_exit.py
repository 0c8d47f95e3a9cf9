"""Tokens that leave the model early, where the output head is confident already (CALM, arXiv 2207.07061)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from accelpass.ir.analyses.structure.output_head import output_heads
from accelpass.ir.core.program import Program
from accelpass.passes.core.staged import FULL, StagedCall
from accelpass.passes.structure.decoder_blocks import COPY, DecoderBlocks, one_token


@dataclass(frozen=True)
class EarlyExit(DecoderBlocks):
    """After some layers the output head is tried; where it is confident, its answer is the model's.

    Schuster et al., "Confident Adaptive Language Modeling", with the softmax response as measure: the probability of the
    likeliest token less that of the next. The layers above an exit compute keys and values of the state that left, for the tokens
    to come (the paper's state copying), and nothing else. Single tokens leave early, a prompt does not; of a batch all leave
    where the least confident may (inferred). One number is read back at each exit that is tried.

    Attributes:
        threshold: how confident the head must be; at 1 no token leaves.
        layers: numbers of the layers after which the head is tried; empty for the middle and three quarters (inferred: the
            paper tries it after each).
    """

    threshold: float = 0.9
    layers: tuple[int, ...] = ()

    name: ClassVar[str] = "early_exit"
    summary: ClassVar[str] = "tokens whose answer is clear skip the upper layers"
    paper: ClassVar[str] = "CALM, arXiv 2207.07061"
    identity: ClassVar[dict[str, Any] | None] = {"threshold": 1.0}
    claims: ClassVar[dict[str, str]] = {"tokens": "every token is read by all layers up to its exit"}
    instead: ClassVar[str] = COPY

    def __post_init__(self) -> None:
        if not 0 <= self.threshold <= 1:
            raise self.fail("threshold", "a number from 0 to 1")
        if any(b <= a for a, b in zip((-1, *self.layers), self.layers, strict=False)):
            raise self.fail("layers", "ascending numbers of layers, from 0")

    def exits(self, depth: int) -> tuple[int, ...]:
        """The layers after which the head is tried."""
        if self.layers and self.layers[-1] > depth - 2:
            raise self.fail("layers", f"layers before the last; this model has {depth}, so at most {depth - 2}")
        return self.layers or tuple(sorted({n for n in (depth // 2 - 1, 3 * depth // 4 - 1) if 0 <= n < depth - 1}))

    def spared(self, depth: int) -> Iterable[int]:
        exits = self.exits(depth)
        return range(exits[0] + 1, depth) if exits else ()

    def why_not(self, program: Program) -> str | None:
        why = super().why_not(program)
        if why is None and not output_heads(program):
            why = "no output head turns its hidden states into logits"
        if why is None and not one_token(program):
            why = "several tokens at once are computed in full"
        return why

    def run(self, call: StagedCall) -> tuple[Any, ...]:
        exits, results = self.exits(len(call.blocks)), None
        for number in call.blocks:
            call.run(number, FULL if results is None else COPY)
            if results is None and number in exits and self.is_clear(early := call.early(number)):
                results = early
        return call.results() if results is None else results

    def is_clear(self, results: tuple[Any, ...]) -> bool:
        """Whether the logits among a call's results leave no doubt, for every sequence."""
        found = [t for t in results if isinstance(t, Tensor) and t.is_floating_point()]
        logits = max(found, key=lambda t: t.shape[-1])
        first, second = logits.float().softmax(-1).topk(2, -1).values.unbind(-1)
        return bool((first - second).min() > self.threshold)
