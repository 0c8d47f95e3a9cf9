"""FastV: behind the second layer half of the visual tokens are enough (arXiv 2403.06764)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from accelpass.ir.core.program import Program
from accelpass.passes.token_pruning.choice import importance_in
from accelpass.passes.visual_tokens.inside import VisualShare


@dataclass(frozen=True)
class FastV(VisualShare):
    """Behind layer ``layer``, the visual tokens go on to which the last token pays most there.

    Chen et al., "An Image is Worth 1/2 Tokens After Layer 2: Plug-and-Play Inference Acceleration for Large Vision-Language
    Models", section 4. A token's score is its probability in the last query's attention of layer ``layer`` (counted from 1), the
    mean over heads: one row of queries, computed beside the fused attention. Tokens keep their positions. Later tokens are
    all read; each text of a batch has its own choice (inferred).

    Attributes:
        layer: how many layers read all tokens (K of the paper).
        keep: share of visual tokens that goes on (1 - R of the paper).
    """

    keep: float = 0.5

    name: ClassVar[str] = "fastv"
    summary: ClassVar[str] = (
        "behind its first layers a language model reads the visual tokens that the last token looks at"
    )
    paper: ClassVar[str] = "FastV, arXiv 2403.06764"

    def score(self, program: Program, attention: fx.Node, before: fx.Node) -> fx.Node:
        return importance_in(program, attention, before)
