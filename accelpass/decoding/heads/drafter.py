"""Guesses of multi-token prediction modules: verified, or taken as they are in the order of a schedule (VITA-Audio)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from accelpass.decoding.acceptance import drawn, exact
from accelpass.decoding.driver import Decoder
from accelpass.decoding.heads.modules import MTPHeads
from accelpass.decoding.interfaces import DecodingError, Drafter, Proposal, Proposer, Request, Verified


class MultiToken(Proposer):
    """Each module guesses the token after the one that the module before it guessed, without the model.

    Args:
        heads: the modules.
        schedule: steps of the model (``M``) and of modules (``m``), again and again: ``"Mmmm"`` has three guesses in every call. None: all
            modules after each step.
        begin: the same, once, before the schedule.
    """

    needs_hidden = True

    def __init__(self, heads: MTPHeads, schedule: str | None = None, begin: str = "") -> None:
        self.heads = heads
        self.schedule = _counts("M" + "m" * heads.depth if schedule is None else schedule, heads.depth)
        self.begin = _counts(begin, heads.depth) if begin else []

    @property
    def sizes(self) -> tuple[int, ...]:
        """Rows of the model's calls."""
        return tuple(sorted({1, *(1 + count for count in (*self.schedule, *self.begin))}))

    def start(self, request: Request) -> Drafter:
        self.heads.check(request.model)
        return _Modules(self, request)


def _counts(schedule: str, depth: int) -> list[int]:
    """How many steps of modules follow each step of the model."""
    counts = [len(part) for part in schedule.split("M")[1:]]
    if set(schedule) - set("Mm") or not schedule.startswith("M") or max(counts) > depth:
        raise DecodingError(
            f"schedule {schedule!r}: M for a step of the model, then at most {depth} times m, as many as there are modules; "
            f"for example {'M' + 'm' * depth!r}"
        )
    return counts


class _Modules(Drafter):
    """
    Attributes:
        hidden: the model's last states ``(batch, rows, width)`` of the rows from ``held``.
        held: rows whose keys and values all modules have, of tokens that are text.
        first: number in the text of the first row, where the cache held a beginning that was not read again.
        steps: of the model, so far.
    """

    def __init__(self, method: MultiToken, request: Request) -> None:
        from transformers import DynamicCache

        self.method, self.heads, self.request = method, method.heads, request
        self.cache: Any = DynamicCache()
        self.hidden: Tensor | None = None
        self.held = self.first = self.steps = 0

    def propose(self, text: Sequence[Sequence[int]], most: int) -> Proposal | None:
        method, request = self.method, self.request
        begin, turn = method.begin, self.steps
        count = begin[turn] if turn < len(begin) else method.schedule[(turn - len(begin)) % len(method.schedule)]
        count = min(count, most)
        self.steps += 1
        if not count:
            return None
        assert self.hidden is not None
        tokens = torch.tensor([line[self.first :] for line in text], device=request.ids.device)
        mask = None if request.mask is None else _longer(request.mask[:, self.first :], tokens.shape[1])
        # Rows that modules computed with guesses are computed again, with what became of them.
        if self.held < self.cache.get_seq_length():
            self.cache.crop(self.held - self.cache.get_seq_length())
        states, ids, probs = self.hidden, tokens, []
        seen = torch.tensor(text, device=request.ids.device) if request.process is not None else None
        for number in range(count):
            read = ids[:, self.held + number + 1 :]
            states = self.heads.rows(number, read, states, self.held, self.cache, mask)
            last = self.heads.logits(number, states[:, -1:])[:, 0]
            if seen is not None and request.process is not None:
                last = request.process(seen, last)
            if request.samples:
                probs.append(last.softmax(-1))
                token = drawn(probs[-1].unsqueeze(1), request.generator)
            else:
                token = last.argmax(-1, keepdim=True)
            ids = torch.cat([ids, token], 1)
            seen = None if seen is None else torch.cat([seen, token], 1)
        # The last module that ran has rows of text alone up to here; those that did not run have fewer.
        kept = max(self.held, tokens.shape[1] - self.heads.depth) if count == self.heads.depth else self.held
        self.hidden, self.held = self.hidden[:, kept - self.held :], kept
        return Proposal(ids[:, tokens.shape[1] :], torch.stack(probs, 1) if probs else None)

    def observe(self, verified: Verified, accepted: int) -> None:
        assert verified.hidden is not None
        if self.hidden is None:  # of the prompt, or of what the cache did not hold of it
            self.hidden, self.first = verified.hidden, self.request.ids.shape[1] - verified.hidden.shape[1]
        else:
            self.hidden = torch.cat([self.hidden, verified.hidden[:, : accepted + 1]], 1)


def _longer(mask: Tensor, tokens: int) -> Tensor:
    missing = tokens - mask.shape[1]
    return torch.cat([mask, mask.new_ones(len(mask), missing)], 1) if missing > 0 else mask


def unverified(read: Tensor, logits: Tensor, proposal: Proposal, request: Request) -> Verified:
    """All guesses become text, and the model says what follows the last: not the model's own text."""
    last = logits[:, -1:]
    chosen = drawn(last.softmax(-1), request.generator) if request.samples else last.argmax(-1)
    counts = torch.full_like(read[:, 0], read.shape[1] - 1)
    tokens = torch.cat([read[:, 1:], chosen], 1)
    return Verified(tokens, counts, None, read, tokens, logits)


def mtp_heads(
    heads: MTPHeads, schedule: str | None = None, begin: str = "", *, verify: bool = True, **options: Any
) -> Decoder:
    """Decode with multi-token prediction modules, which :func:`~accelpass.decoding.heads.distil` trains.

    Args:
        heads, schedule, begin: as in :class:`MultiToken`.
        verify: the text is the model's own, and modules guess. False: as in VITA-Audio, what modules say is the text, without loss for those
            that were trained with the model (audio tokens), and with loss elsewhere.
        options: of :class:`~accelpass.decoding.Decoder`.
    """
    method = MultiToken(heads, schedule, begin)
    settings: dict[str, Any] = {"sizes": method.sizes, **({} if verify else {"adaptive": False}), **options}
    return Decoder(method, exact if verify else unverified, **settings)
