"""Guesses that are what the model said of them a step ago (Jacobi decoding, and speculative Jacobi decoding)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F

from accelpass.decoding.driver import Decoder
from accelpass.decoding.interfaces import DecodingError, Drafter, Proposal, Proposer, Request, Verified

Fill = Literal["repeat", "random"]


class Jacobi(Proposer):
    """A window of future tokens, all of which the model computes anew at each step from those of the step before.

    Likeliest tokens: Jacobi decoding (Santilli et al., "Accelerating Transformer Inference for Translation via Parallel Decoding", arXiv
    2305.10427). Drawn tokens: speculative Jacobi decoding (Teng et al., arXiv 2410.01699): a guess keeps the distribution that it was drawn
    from a step ago, and is accepted as a draft of it.

    Args:
        fill: what stands where the window has no guess yet: its last token again (``"repeat"``), or ``"random"`` tokens.
    """

    def __init__(self, fill: Fill = "repeat") -> None:
        if fill not in ("repeat", "random"):
            raise DecodingError(f"fill={fill!r}; use 'repeat' or 'random'")
        self.fill: Fill = fill

    def start(self, request: Request) -> Drafter:
        return _Window(self.fill, request)


class _Window(Drafter):
    def __init__(self, fill: Fill, request: Request) -> None:
        self.fill, self.request = fill, request
        self.left = Proposal.nothing(request.ids)

    def propose(self, text: Sequence[Sequence[int]], most: int) -> Proposal | None:
        request, guesses, probs = self.request, self.left.tokens[:, :most], self.left.probs
        missing = most - guesses.shape[1]
        if missing:
            if self.fill == "repeat":
                last = torch.tensor([[line[-1]] for line in text], device=guesses.device)
                more = (guesses[:, -1:] if guesses.shape[1] else last).expand(-1, missing)
            else:
                more = torch.randint(
                    request.vocabulary, (request.batch, missing), device=guesses.device, generator=request.generator
                )
            guesses = torch.cat([guesses, more], 1)
        if not request.samples:
            return Proposal(guesses)
        sure = F.one_hot(guesses, request.vocabulary).float()  # a guess that was not drawn has all the probability
        return Proposal(guesses, sure if probs is None else torch.cat([probs[:, :most], sure[:, probs.shape[1] :]], 1))

    def observe(self, verified: Verified, accepted: int) -> None:
        left = verified.tokens[:, accepted + 1 :]
        if not self.request.samples:
            self.left = Proposal(left)
            return
        # A text that accepted more than its neighbours has tokens here that were not drawn from the last distributions alone.
        number = torch.arange(accepted + 1, verified.tokens.shape[1], device=left.device)
        fresh = (number > verified.counts[:, None]).unsqueeze(-1)
        sure = F.one_hot(left, self.request.vocabulary).float()
        self.left = Proposal(left, torch.where(fresh, verified.logits[:, accepted + 1 :].softmax(-1), sure))


def jacobi(window: int = 8, fill: Fill = "repeat", **options: Any) -> Decoder:
    """Decode a window of tokens at a time, without a draft: each step computes all of them from those of the step before.

    Args:
        window: rows of a call: the last token of the text and ``window - 1`` guesses.
        fill: as in :class:`Jacobi`.
        options: of :class:`~accelpass.decoding.Decoder`.
    """
    return Decoder(Jacobi(fill), sizes=options.pop("sizes", (1, window)), **options)
