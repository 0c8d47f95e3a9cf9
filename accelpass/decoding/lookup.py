"""Guesses from the text itself: what followed the same words before (prompt lookup)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from accelpass.decoding.driver import Decoder
from accelpass.decoding.interfaces import DecodingError, Drafter, Proposal, Proposer, Request


class PromptLookup(Proposer):
    """What followed the latest earlier occurrence of the text's last ``longest`` tokens, or of fewer, down to ``shortest``.

    Saxena, "Prompt Lookup Decoding", 2023, which takes the first occurrence; the latest is the likelier to go on alike (inferred).
    """

    def __init__(self, longest: int = 3, shortest: int = 1) -> None:
        if not 1 <= shortest <= longest:
            raise DecodingError(f"shortest={shortest}, longest={longest}: numbers of tokens, 1 <= shortest <= longest")
        self.lengths = range(longest, shortest - 1, -1)

    def start(self, request: Request) -> Drafter:
        return _Lookup(self.lengths, request)


class _Lookup(Drafter):
    def __init__(self, lengths: range, request: Request) -> None:
        self.lengths, self.device = lengths, request.ids.device
        self.ends: list[dict[tuple[int, ...], int]] = [{} for _ in range(request.batch)]
        self.known = 0

    def propose(self, text: Sequence[Sequence[int]], most: int) -> Proposal | None:
        # The last token ends no n-gram yet that has a continuation.
        for line, ends in zip(text, self.ends, strict=True):
            for end in range(self.known, len(line) - 1):
                for length in self.lengths:
                    if length <= end + 1:
                        ends[tuple(line[end + 1 - length : end + 1])] = end
        self.known = len(text[0]) - 1
        found = [self._after(line, ends, most) for line, ends in zip(text, self.ends, strict=True)]
        count = max(map(len, found))
        if not count:
            return None
        filled = [(one + [line[-1]] * count)[:count] for one, line in zip(found, text, strict=True)]
        return Proposal(torch.tensor(filled, device=self.device))

    def _after(self, line: Sequence[int], ends: dict[tuple[int, ...], int], most: int) -> list[int]:
        for length in self.lengths:
            end = ends.get(tuple(line[-length:]))
            if end is not None:
                # A text that repeats itself goes on doing so: past its end, what was guessed is read again.
                period, guesses = len(line) - 1 - end, list(line[end + 1 : end + 1 + most])
                while len(guesses) < most:
                    guesses.append(guesses[len(guesses) - period])
                return guesses
        return []


def prompt_lookup(longest: int = 3, shortest: int = 1, **options: Any) -> Decoder:
    """Decode with guesses that are looked up in the text: for summaries, edits and code, which repeat.

    Args:
        longest, shortest: as in :class:`PromptLookup`.
        options: of :class:`~accelpass.decoding.Decoder`.
    """
    return Decoder(PromptLookup(longest, shortest), **options)
