"""Speculative Jacobi decoding of images: a window of pixels or patches at a time, drawn as one by one (SJD, arXiv 2410.01699)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from accelpass.decoding.acceptance import drawn
from accelpass.decoding.driver import Decoder
from accelpass.decoding.guidance import Guidance
from accelpass.decoding.interfaces import DecodingError, Drafter, Proposal, Proposer, Request, Verified
from accelpass.decoding.windows.jacobi import Window

Initial = Literal["random", "repeat", "sample"]


class SpeculativeJacobi(Proposer):
    """Teng et al., "Accelerating Auto-regressive Text-to-Image Generation with Training-free Speculative Jacobi Decoding", ICLR 2025.

    A guess keeps the distribution that the step before drew it from, and is accepted with probability min(1, p / q); the token after
    the last accepted one is drawn from max(p - q, 0), as in speculative sampling. So an image has the distribution that one drawn token by
    token has. (The released code puts max(p - q, 0) through the logits processors once more; here p and q went through them.)

    Args:
        initial: tokens that stand where the window has no guess yet: ``"random"`` ones, those of the adjacent position (``"repeat"``), or
            tokens drawn anew from its distribution (``"sample"``); until there is such a position, random ones (inferred).
        row: tokens of an image's row: the adjacent position is the one above. None: the one to the left.
        tokens: the image's part of the vocabulary, first and last + 1, for random ones. None: all.
        interval: the new tokens, first and last + 1, that are an image, counted from the prompt's end; outside, tokens come one by one.
    """

    def __init__(
        self,
        initial: Initial = "random",
        row: int | None = None,
        tokens: tuple[int, int] | None = None,
        interval: tuple[int, int] | None = None,
    ) -> None:
        if initial not in ("random", "repeat", "sample"):
            raise DecodingError(f"initial={initial!r}; use 'random', 'repeat' or 'sample'")
        if row is not None and row < 1:
            raise DecodingError(
                f"row={row}: tokens of a row of the image, at least 1; None for the position to the left"
            )
        for name, pair in (("tokens", tokens), ("interval", interval)):
            if pair is not None and not 0 <= pair[0] < pair[1]:
                raise DecodingError(f"{name}={pair}: the first, and the last + 1, from 0")
        self.initial: Initial = initial
        self.reach, self.tokens, self.interval = row or 1, tokens, interval or (0, 1 << 30)

    def start(self, request: Request) -> Drafter:
        if self.tokens is not None and self.tokens[1] > request.vocabulary:
            raise DecodingError(
                f"tokens={self.tokens}, and the model has a vocabulary of {request.vocabulary}; give the image's part of it"
            )
        return _ImageWindow(self, request)


class _ImageWindow(Window):
    """
    Attributes:
        drawn_from: distributions of the text's last tokens ``(batch, at most reach, vocabulary)``, where initial tokens need them.
    """

    def __init__(self, method: SpeculativeJacobi, request: Request) -> None:
        super().__init__("random", request)
        self.method = method
        self.begin, self.end = (request.ids.shape[1] + number for number in method.interval)
        self.drawn_from = torch.zeros((request.batch, 0, request.vocabulary), device=request.ids.device)

    def propose(self, text: Sequence[Sequence[int]], most: int) -> Proposal | None:
        # A window's first guess is the text's next token, number len(text).
        most = min(most, self.end - len(text[0]))
        return super().propose(text, most) if len(text[0]) >= self.begin and most > 0 else None

    def initial(self, text: Sequence[Sequence[int]], guesses: Tensor, missing: int) -> Tensor:
        method, reach = self.method, self.method.reach
        low, high = method.tokens or (0, self.request.vocabulary)
        if method.initial == "random" or len(text[0]) - self.begin + guesses.shape[1] < reach:
            return self.any_tokens(low, high, missing)
        # What is filled in repeats with the period `reach`.
        ahead = torch.arange(missing, device=guesses.device) % reach - reach
        if method.initial == "repeat" or not self.request.samples:
            last = torch.tensor([line[-reach:] for line in text], device=guesses.device)
            known = torch.cat([last, guesses], 1)
            return known[:, known.shape[1] + ahead]
        probs = self.drawn_from if self.left.probs is None else torch.cat([self.drawn_from, self.left.probs], 1)
        return drawn(probs[:, probs.shape[1] + ahead], self.request.generator)

    def observe(self, verified: Verified, accepted: int) -> None:
        super().observe(verified, accepted)
        if self.method.initial == "sample":
            new = verified.logits[:, : accepted + 1].softmax(-1)
            self.drawn_from = torch.cat([self.drawn_from, new], 1)[:, -self.method.reach :]


def sjd(
    window: int = 16,
    guidance: Guidance | None = None,
    initial: Initial = "random",
    row: int | None = None,
    tokens: tuple[int, int] | None = None,
    interval: tuple[int, int] | None = None,
    **options: object,
) -> Decoder:
    """Draw an image's tokens a window at a time: ``model.generate(..., do_sample=True, custom_generate=sjd(...))``.

    Args:
        window: rows of a call: the last token and ``window - 1`` guesses; the paper's 16.
        guidance: the paper's scale is 3; the cache then has two sequences for each image.
        initial, row, tokens, interval: as in :class:`SpeculativeJacobi`.
        options: of :class:`~accelpass.decoding.Decoder`. By default every call has a whole window (``adaptive=False``): sizes chosen by the
            clock would draw other images each time.
    """
    if window < 1:
        raise DecodingError(f"window={window}: rows of a call, at least 1; 1 draws token by token, the paper's is 16")
    method = SpeculativeJacobi(initial, row, tokens, interval)
    settings = {"sizes": (1, window), "adaptive": False, "guidance": guidance, **options}
    return Decoder(method, **settings)  # type: ignore[arg-type]
