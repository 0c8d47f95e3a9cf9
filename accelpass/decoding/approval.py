"""Reverse speculative decoding: a small student approves or rewrites a large teacher's tokens (arXiv 2509.22230). Not a speed-up."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from accelpass.decoding.drafts import DraftModel, _Draft
from accelpass.decoding.driver import Decoder
from accelpass.decoding.interfaces import DecodingError, Drafter, Proposal, Proposer, Request, Verified


@dataclass(frozen=True)
class Advice(Proposal):
    """No guess, and the teacher's distribution of the next token ``(batch, vocabulary)``."""

    teacher: Tensor | None = None


class Teacher(Proposer):
    """A model that reads the same text and tells its distribution of the next token."""

    def __init__(self, model: Any, cache: Callable[[Any, int, int], Any] | None = None) -> None:
        self.reads = DraftModel(model, cache=cache)

    def start(self, request: Request) -> Drafter:
        draft = self.reads.start(request)
        assert isinstance(draft, _Draft)
        return _Advisor(draft)


class _Advisor(Drafter):
    guides = True

    def __init__(self, draft: _Draft) -> None:
        self.draft = draft

    def propose(self, text: Sequence[Sequence[int]], most: int) -> Proposal:
        last, ids = self.draft.caught_up(text)[:, -1], self.draft.request.ids
        process = self.draft.request.process
        if process is not None:
            last = process(torch.tensor(text, device=ids.device), last.clone())
        return Advice(ids[:, :0], teacher=last.softmax(-1))


@dataclass(frozen=True)
class Approval:
    """The teacher's token if it is probable enough under the student, or else the student's own.

    Attributes:
        threshold: the least probability under the student.
        pool: both draw from their likeliest tokens, so many, renormalised.
        trials: how often the teacher draws before the student does.
        match: which token ids mean the same to both, bool ``(vocabulary,)``; None: all.
    """

    threshold: float = 0.01
    pool: int = 20
    trials: int = 5
    match: Tensor | None = None

    def __post_init__(self) -> None:
        if self.pool < 1 or self.trials < 1 or self.threshold < 0:
            raise DecodingError(
                f"threshold={self.threshold}, pool={self.pool}, trials={self.trials}: at least 0, 1 and 1 (the paper's: 0.01, 20, 5)"
            )

    def __call__(self, read: Tensor, logits: Tensor, proposal: Proposal, request: Request) -> Verified:
        if not isinstance(proposal, Advice) or proposal.teacher is None:
            raise DecodingError("this acceptance needs a teacher: use accelpass.decoding.rsd(teacher)")
        token = self.approved(proposal.teacher, logits[:, -1].softmax(-1), request.generator)
        return Verified(token, torch.zeros_like(token[:, 0]), None, read, token, logits)

    def approved(self, teacher: Tensor, student: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """One token ``(batch, 1)`` from probabilities ``(batch, vocabulary)``; the card's step, for a batch."""
        pool = min(self.pool, student.shape[-1])
        own, own_ids = student.topk(pool, -1)
        allowed = torch.zeros_like(student, dtype=torch.bool).scatter(-1, own_ids, own >= self.threshold)
        weights, ids = teacher.topk(pool, -1)
        if self.match is not None:
            weights = weights * self.match.to(ids.device)[ids]
        shared = weights.sum(-1, keepdim=True) > 0
        picks = torch.multinomial(torch.where(shared, weights, 1.0), self.trials, True, generator=generator)
        tried = ids.gather(-1, picks)
        approved = allowed.gather(-1, tried) & shared
        first = approved.long().argmax(-1, keepdim=True)  # the first that is
        fallback = own_ids.gather(-1, torch.multinomial(own, 1, generator=generator))
        return torch.where(approved.any(-1, keepdim=True), tried.gather(-1, first), fallback)


def rsd(
    teacher: Any, threshold: float = 0.01, pool: int = 20, trials: int = 5, match: Tensor | None = None,
    *, cache: Callable[[Any, int, int], Any] | None = None, **options: Any,
) -> Decoder:  # fmt: skip
    """Write texts that a student can learn: ``student.generate(..., custom_generate=rsd(teacher), do_sample=True)``.

    Each token is drawn by the teacher and kept if the student, whose ``generate`` it is, finds it probable enough; else the student
    writes it. The text follows neither model's distribution. Both read each token: this makes data, and costs time. What
    ``generate`` says of temperatures and the like holds for both before the threshold is applied.

    Args:
        threshold, pool, trials, match: as in :class:`Approval`.
        cache: makes the teacher's cache, see :class:`~accelpass.decoding.DraftModel`.
        options: of :class:`~accelpass.decoding.Decoder`.
    """
    approval = Approval(threshold, pool, trials, match)
    return Decoder(Teacher(teacher, cache), approval, sizes=(1,), adaptive=False, **options)
