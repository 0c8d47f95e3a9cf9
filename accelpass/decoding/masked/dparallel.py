"""Which masked tokens are certain enough: those of low entropy (dParallel, arXiv 2509.26488)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from accelpass.decoding.interfaces import DecodingError
from accelpass.decoding.masked.loop import MaskedDecoder


def entropy(logits: Tensor) -> Tensor:
    """In nats, of ``(..., vocabulary)``, in float64: with fewer bits other tokens pass the threshold."""
    probs = logits.double().softmax(-1)
    return -(probs * (probs + 1e-12).log()).sum(-1)


@dataclass(frozen=True)
class EntropyThreshold:
    """Tokens whose distribution has an entropy of at most ``threshold`` nats, and always the one of least entropy.

    Attributes:
        threshold: below 0, one token a step; infinity, the whole block at once. The paper's 0.5 is for models that were distilled to be
            certain; without that, text suffers earlier.
        strict: the entropy has to be below the threshold, as Dream's sampler wants it; LLaDA's takes those on it.
    """

    threshold: float = 0.5
    strict: bool = False

    def __post_init__(self) -> None:
        if math.isnan(self.threshold):
            raise DecodingError("threshold=nan: nats, 0.5 in the paper; -1 for one token a step")

    def __call__(self, logits: Tensor, allowed: Tensor) -> Tensor:
        """Which of ``allowed`` ``(batch, rows)`` become text, of logits ``(batch, rows, vocabulary)``; at least one of each line with any."""
        found = entropy(logits).masked_fill(~allowed, math.inf)
        sure = found < self.threshold if self.strict else found <= self.threshold
        least = torch.arange(found.shape[1], device=found.device) == found.argmin(1, keepdim=True)
        return (sure | least) & allowed


def dparallel(
    threshold: float = 0.5, block: int = 32, *, strict: bool = False, shifted: bool = False, cached: bool = False,
    mask_id: int | None = None,
) -> MaskedDecoder:  # fmt: skip
    """Fill a masked language model's text in, as many tokens a step as are certain (Chen et al., "dParallel: Learnable Parallel Decoding
    for dLLMs", ICLR 2026).

    Of LLaDA: as it is. Of Dream: ``strict=True, shifted=True``, a threshold of 0.45 to 0.5.

    Args:
        threshold, strict: as in :class:`EntropyThreshold`.
        block, shifted, cached, mask_id: as in :class:`MaskedDecoder`.
    """
    return MaskedDecoder(EntropyThreshold(threshold, strict), block, shifted=shifted, cached=cached, mask_id=mask_id)
