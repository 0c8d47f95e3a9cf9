"""The next token from logits: the likeliest, or one drawn after temperature, top-k and top-p, as transformers does it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from accelpass.backends.package.errors import PackageError


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen.

    Attributes:
        do_sample: draw; otherwise the likeliest.
        temperature: divides the logits.
        top_k: so many likeliest tokens are left to draw from; 0 for all.
        top_p: of those, the fewest likeliest whose probabilities sum to this much.

    Raises:
        PackageError: a number out of range.
    """

    do_sample: bool = False
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise PackageError(
                f"temperature={self.temperature}; it is above 0 (do_sample=False takes the likeliest token)"
            )
        if self.top_k < 0 or not 0 < self.top_p <= 1:
            raise PackageError(f"top_k={self.top_k}, top_p={self.top_p}; top_k is 0 (all) or more, top_p in (0, 1]")

    def choose(self, logits: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """One token for each row of ``logits`` ``(batch, vocabulary)``: int64 ``(batch,)``."""
        if not self.do_sample:
            return logits.argmax(-1)
        scores = self.kept(logits.float() / self.temperature)
        return torch.multinomial(scores.softmax(-1), 1, generator=generator)[:, 0]

    def kept(self, scores: Tensor) -> Tensor:
        """``scores`` with those that are not drawn at minus infinity; equal ones of the last that is drawn stay for top-k."""
        if self.top_k:
            last = scores.topk(min(self.top_k, scores.shape[-1])).values[:, -1:]
            scores = scores.masked_fill(scores < last, -torch.inf)
        if self.top_p < 1:
            ordered, at = scores.sort(descending=True)
            before = ordered.softmax(-1).cumsum(-1) - ordered.softmax(-1)
            dropped = torch.zeros_like(scores, dtype=torch.bool).scatter(-1, at, before >= self.top_p)
            scores = scores.masked_fill(dropped, -torch.inf)
        return scores
