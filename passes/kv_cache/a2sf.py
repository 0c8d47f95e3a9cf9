"""A2SF: accumulated attention in which what older queries gave is forgotten (arXiv 2407.20485)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from accelpass.ir.attention.spec.spec import Places, ScoreTap
from accelpass.passes.kv_cache.budget import Evicting


@dataclass(frozen=True)
class ForgettingMass(ScoreTap):
    """The probability that each key got, that of a query ``n`` tokens before the last one multiplied by ``factor ** n``."""

    part: ClassVar[str] = "forgetting_mass"
    factor: float

    @property
    def decay(self) -> float:
        return self.factor

    @property
    def is_mass_of_one(self) -> bool:
        return True

    def __call__(self, scores: Tensor, at: Places) -> Tensor:
        worth = self.factor ** (at.end - 1 - at.queries).float()
        return torch.einsum("bhgqk,q->bhk", torch.nan_to_num(scores.softmax(-1)), worth)


@dataclass(frozen=True)
class A2SF(Evicting):
    """Evict all but recent tokens and those of the largest accumulated attention, with a forgetting factor.

    In H2O's sum of attention an old token has had more queries than a young one. Here a query's attention is worth less with every
    token after it, ``A <- factor * A + P``, so that both are compared over the same few queries. Of the authors' two versions the
    one that evicts while it decodes is the default; ``evicts="after the prompt"`` with ``factor=0.95`` is the later one. The first
    keeps 128 tokens of each kind beside the sinks: ``tokens=256, recent=0.5``.

    Attributes:
        factor: what attention is worth one token later. 1 is H2O; 0 ranks by the last query alone. 0.2 is the authors'
            for decoding.

    Raises:
        OptionError: a factor outside [0, 1], or another option out of range.
    """

    name: ClassVar[str] = "a2sf"
    summary: ClassVar[str] = "as h2o, with attention of older queries forgotten; young tokens are not at a disadvantage"
    paper: ClassVar[str] = "A2SF, arXiv 2407.20485"
    identity: ClassVar[dict[str, Any] | None] = {"budget": 1.0}
    factor: float = 0.2

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.factor <= 1:
            raise self.fail("factor", "a number between 0 (the last query alone) and 1 (h2o)")

    @property
    def tap(self) -> ScoreTap:
        return ForgettingMass(self.factor)
