"""Guesses that are what the model said of them a step ago (Jacobi decoding, and speculative Jacobi decoding)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

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
        return Window(self.fill, request)


class Window(Drafter):
    """The guesses that are left of the step before, and what stands where there are none yet."""

    def __init__(self, fill: Fill, request: Request) -> None:
        self.fill, self.request = fill, request
        self.left = Proposal.nothing(request.ids)

    def propose(self, text: Sequence[Sequence[int]], most: int) -> Proposal | None:
        request, guesses, probs = self.request, self.left.tokens[:, :most], self.left.probs
        missing = most - guesses.shape[1]
        if missing:
            guesses = torch.cat([guesses, self.initial(text, guesses, missing)], 1)
        if not request.samples:
            return Proposal(guesses)
        sure = F.one_hot(guesses, request.vocabulary).float()  # a guess that was not drawn has all the probability
        return Proposal(guesses, sure if probs is None else torch.cat([probs[:, :most], sure[:, probs.shape[1] :]], 1))

    def initial(self, text: Sequence[Sequence[int]], guesses: Tensor, missing: int) -> Tensor:
        """Tokens ``(batch, missing)`` to begin with, after ``guesses``."""
        if self.fill == "repeat":
            last = torch.tensor([[line[-1]] for line in text], device=guesses.device)
            return (guesses[:, -1:] if guesses.shape[1] else last).expand(-1, missing)
        return self.any_tokens(0, self.request.vocabulary, missing)

    def any_tokens(self, low: int, high: int, count: int) -> Tensor:
        """``(batch, count)`` of low to high - 1."""
        request = self.request
        return torch.randint(low, high, (request.batch, count), device=request.ids.device, generator=request.generator)

    def observe(self, verified: Verified, accepted: int) -> None:
        left = verified.tokens[:, accepted + 1 :]
        # Where a neighbour in the batch accepted fewer, guesses that this text accepted are here as well. With the token that follows
        # them they have the distribution after their rows, as fresh draws have; the next call computes the same one and accepts them.
        probs = verified.logits[:, accepted + 1 :].softmax(-1) if self.request.samples else None
        self.left = Proposal(left, probs)


def jacobi(window: int = 8, fill: Fill = "repeat", **options: Any) -> Decoder:
    """Decode a window of tokens at a time, without a draft: each step computes all of them from those of the step before.

    Args:
        window: rows of a call: the last token of the text and ``window - 1`` guesses.
        fill: as in :class:`Jacobi`.
        options: of :class:`~accelpass.decoding.Decoder`.
    """
    return Decoder(Jacobi(fill), sizes=options.pop("sizes", (1, window)), **options)
