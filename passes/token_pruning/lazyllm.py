"""LazyLLM: tokens that matter little to the next one wait at a block until a later step asks for them (arXiv 2407.14057)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from accelpass.passes.token_pruning.base import TokenPruning


@dataclass(frozen=True)
class LazyLLM(TokenPruning):
    """Drop tokens after some blocks, by the attention that the last token pays them there; later steps may take them up again.

    The score of a token is its probability in the last query's attention at the pruning block, the mean over heads
    (section 3.2). A step starts with all tokens of the context wanted. At each pruning block the share ``keep`` of those
    still wanted goes on, the last token always (it is one of them: inferred). A dropped token leaves its hidden state
    behind; a later step that wants it computes it from there, in this stretch of blocks alone, so that each token passes
    each block at most once. Prompts and single tokens alike; each sequence of a batch has its own choice (inferred), where
    padding counts as tokens of no score (inferred).

    With an ``accelpass.KVCache``. Without one the prompt alone is pruned, and what was dropped leaves the model with the
    hidden state that it had last.

    Attributes:
        keep: at each pruning block the share of tokens that goes on. The paper gives no numbers for all models; these cut
            the work of a prompt to somewhat less than half (inferred).
        layers: the blocks after which tokens are dropped, from 0; as many as ``keep``. Empty: spread evenly (inferred).

    Raises:
        OptionError: a share outside (0, 1], blocks that are not ascending, or not as many as shares.
    """

    name: ClassVar[str] = "lazyllm"
    summary: ClassVar[str] = (
        "drop tokens between blocks by the last token's attention; later steps may take them up again"
    )
    paper: ClassVar[str] = "LazyLLM, arXiv 2407.14057"
    identity: ClassVar[dict[str, Any] | None] = {"keep": (1.0, 1.0)}
    keep: tuple[float, ...] = (0.5, 0.5, 0.5)
    layers: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not self.keep or not all(0 < share <= 1 for share in self.keep):
            raise self.fail("keep", "shares above 0, at most 1, one for each pruning block (1 drops nothing)")
        if self.layers and len(self.layers) != len(self.keep):
            raise self.fail("layers", f"as many blocks as keep has shares ({len(self.keep)})")
        if any(b <= a for a, b in zip((-1, *self.layers), self.layers, strict=False)):
            raise self.fail("layers", "ascending numbers of blocks, from 0")

    def prunes(self, layers: int) -> dict[int, float]:
        if self.layers and self.layers[-1] > layers - 2:
            raise self.fail("layers", f"blocks before the last; this model has {layers}, so at most {layers - 2}")
        count = len(self.keep)
        spread = [round(layers * (i + 1) / (count + 1)) - 1 for i in range(count)]
        made = dict(zip(self.layers or spread, self.keep, strict=True))
        return {at: share for at, share in sorted(made.items()) if 0 <= at < layers - 1}

    def told(self, stretch: int, stretches: int) -> str:
        if stretch == 0:
            return "all tokens"
        return f"{self.keep[min(stretch, len(self.keep)) - 1]:.0%} of the tokens of the blocks before"
