"""Keyformer: key tokens by a second softmax with Gumbel noise and a rising temperature (arXiv 2403.09054, MLSys 2024)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from accelpass.ir.attention.spec.spec import Places, ScoreTap
from accelpass.passes.kv_cache.budget import Evicting
from accelpass.passes.kv_cache.storage.lots import gumbel


@dataclass(frozen=True)
class NoisyMass(ScoreTap):
    """What ``softmax((scores + noise) / temperature)`` gives each key; the temperature rises with each token after the prompt.

    Noise is drawn for each query head and pair of positions (``seed``), the same in every layer and sequence (inferred), so that
    neither blocks nor batches change it. None without a seed.
    """

    part: ClassVar[str] = "noisy_mass"
    start: float
    end: float
    horizon: int
    seed: int | None

    def __call__(self, scores: Tensor, at: Places) -> Tensor:
        step = torch.as_tensor(at.step, device=scores.device).reshape(-1, 1, 1, 1, 1)
        temperature = self.start + step * ((self.end - self.start) / self.horizon)
        if self.seed is not None:
            scores = scores + self._noise(scores, at, self.seed)
        return torch.nan_to_num((scores / temperature).softmax(-1)).sum((2, 3))

    def _noise(self, scores: Tensor, at: Places, seed: int) -> Tensor:
        kv_heads, groups = scores.shape[1:3]
        head = torch.arange(kv_heads * groups, device=scores.device).view(kv_heads, groups, 1, 1) + at.head * groups
        return gumbel(at.queries[:, None], head, at.keys.clamp_min(0)[..., None, None, :] + seed * 1_000_003)


@dataclass(frozen=True)
class Keyformer(Evicting):
    """Evict all but recent tokens and key tokens, those of the largest noisy and tempered softmax.

    Dropping keys makes the probabilities of the others too large. Gumbel noise on the scores and a temperature above 1 make the
    ranking less sure of itself; the temperature goes from ``start`` to ``end`` over an answer. Attention itself is the ordinary
    softmax over what is left. This is the paper's rule: in the authors' code no token ever becomes a key token while decoding,
    because one that leaves the recent ones is dropped.

    Attributes:
        budget: share of the prompt that is kept; 1 keeps everything. The authors' 60 %.
        recent: share of the budget for the newest tokens; the authors' 30 %.
        answer: tokens of an answer, over which the temperature goes from ``start`` to ``end``; and, with
            ``evicts="after the prompt"``, for which the cache has room.
        start, end: temperatures.
        seed: of the noise; None for none. Without noise and at temperature 1 it is H2O.

    Raises:
        OptionError: a temperature of 0 or less, a negative seed, or another option out of range.
    """

    name: ClassVar[str] = "keyformer"
    summary: ClassVar[str] = "as h2o, by a second softmax with Gumbel noise and a rising temperature"
    paper: ClassVar[str] = "Keyformer, arXiv 2403.09054"
    identity: ClassVar[dict[str, Any] | None] = {"budget": 1.0}
    budget: float = 0.6
    recent: float = 0.3
    start: float = 1.0
    end: float = 2.0
    seed: int | None = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("start", "end"):
            if getattr(self, name) <= 0:
                raise self.fail(name, "a temperature above 0")
        if self.seed is not None and self.seed < 0:
            raise self.fail("seed", "0 or more, or None for no noise")

    @property
    def tap(self) -> ScoreTap:
        return NoisyMass(self.start, self.end, self.answer, self.seed)
