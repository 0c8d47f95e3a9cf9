"""What a compressed cache is asked: to go on with prose, and to find a pass key in it.

Only tokens and logits are known here, so that the cache of another library, in another process, is asked the same.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

Row = dict[str, Any]

ANSWER = 8
"""Tokens in which the key has to come."""

# Plain text, and a number with this name: the dense model misses keys at 2k tokens in the chat template, and more at 4k when
# it is called a pass key, than it does here.
KEY = "\n\nThe secret number is {key}. Remember it. {key} is the secret number.\n\n"
QUESTION = "\n\nWhat is the secret number? The secret number is"


class Reader(Protocol):
    """A model with a cache of its own."""

    def prompt(self, ids: Tensor) -> Tensor:
        """Empty the cache and read a prompt ``(1, tokens)``; logits of the token after it."""

    def step(self, token: int) -> Tensor:
        """Read one token more; logits of the token after it."""


@dataclass(frozen=True)
class Sizes:
    """What is asked: how many windows of prose of which length, and at how many depths pass keys in contexts of which length.

    Attributes:
        late: for as many keys of each length, at most, the question comes when the context is stored.
    """

    windows: dict[int, int] = field(default_factory=lambda: {2048: 3, 4096: 2})
    scored: int = 512
    keys: dict[int, int] = field(default_factory=lambda: dict.fromkeys((1024, 2048, 4096), 10))
    late: int = 10

    @property
    def longest(self) -> int:
        return max(*self.windows, *self.keys)

    @property
    def capacity(self) -> int:
        """Tokens of one cache that serves all of it, so that each graph is compiled once."""
        return self.longest + 64

    @property
    def units(self) -> int:
        """Steps of a progress bar."""
        return sum(self.windows.values()) + sum(n + min(n, self.late) for n in self.keys.values())


PRESSES = ("Random", "StreamingLLM", "ObservedAttention", "SnapKV")
"""Of the other library; named here, where neither library is imported."""
DENSE_PEER = "kvpress, dense"


def peers(share: str) -> tuple[str, ...]:
    """Rows of the other library where so much of the cache is left, such as ``"20 %"``."""
    return tuple(f"kvpress {press}, {share}" for press in PRESSES)


PEERS = (DENSE_PEER, *peers("20 %"))
EVICTION_PEERS = (*peers("20 %"), *peers("10 %"))
SIZES: dict[str, Sizes] = {
    "all": Sizes(),
    "short": Sizes(windows={2048: 2, 4096: 1}, keys={1024: 10, 2048: 10}),
    "quick": Sizes(windows={1024: 1}, scored=128, keys={1024: 2}),
    "eviction": Sizes(windows={2048: 3}, keys={1024: 10}),
    "quick eviction": Sizes(windows={1024: 1}, scored=64, keys={1024: 1}),
}
"""By name, for the other library's process too."""


@dataclass(frozen=True)
class Passkey:
    """A key in prose: the prompt without the question, the question, and the key."""

    context: Tensor
    question: Tensor
    key: str


class Tasks:
    """All that is asked, in tokens."""

    def __init__(self, tokenizer: Any, sizes: Sizes) -> None:
        self.tokenizer, self.sizes = tokenizer, sizes
        self.text = self._tokens(prose())

    def ask(self, reader: Reader, advance: Callable[[str], None]) -> Row:
        """Perplexity for each length of window, and how many keys were found for each length of context.

        Args:
            advance: called after each window and each key, with what was done.
        """
        row: Row = {}
        for length in self.sizes.windows:
            row[f"perplexity {_k(length)}"] = round(self._perplexity(reader, length, advance), 3)
        for late in (False, True):
            for length, keys in self.sizes.keys.items():
                found, of = 0, min(keys, self.sizes.late) if late else keys
                for number in range(of):
                    found += self._found(reader, self.passkey(length, number, of), late)
                    advance(f"pass key at {_k(length)}")
                name = f"asked later {_k(length)}" if late else f"found {_k(length)}"
                row[name] = f"{found}/{of}"
        return row

    def windows(self, length: int) -> list[Tensor]:
        """Windows of prose, evenly over the text."""
        count = self.sizes.windows[length]
        apart = (len(self.text) - length) // count
        return [self.text[i * apart : i * apart + length] for i in range(count)]

    def passkey(self, length: int, number: int, of: int) -> Passkey:
        """The key in depth ``number`` of ``of``; with the question, ``length`` tokens."""
        key = str(random.Random(f"{length} {number}").randint(10_000, 99_999))
        said, question = self._tokens(KEY.format(key=key)), self._tokens(QUESTION)
        room = length - len(said) - len(question)
        before = room * number // of
        context = torch.cat([self.text[:before], said, self.text[before:room]])
        return Passkey(context, question, key)

    def needles(self, length: int, count: int, question: bool = True) -> list[dict[str, Tensor]]:
        """Texts with a question and its answer for calibration, with keys and prose that no task has; the key has labels, and the
        ``question``; ``needle`` is where the text says the key."""
        made = []
        for number in range(count):
            key = str(random.Random(f"needle {length} {number}").randint(10_000, 99_999))
            said, answer = self._tokens(KEY.format(key=key)), self._tokens(QUESTION + f" {key}")
            room = length - len(said) - len(answer)
            text = self.text[len(self.text) - room * (number + 1) : len(self.text) - room * number]
            before = room * number // count
            ids = torch.cat([text[:before], said, text[before:], answer])
            labels = ids.clone()
            unlabelled = 0 if question else len(self._tokens(QUESTION))
            labels[: length - len(answer) + unlabelled] = -100
            needle = torch.zeros_like(ids, dtype=torch.bool)
            needle[before : before + len(said)] = True
            made.append({"input_ids": ids[None], "labels": labels[None], "needle": needle[None]})
        return made

    def endings(self, length: int, count: int, scored: int = 32) -> list[dict[str, Tensor]]:
        """Prose of which the last tokens have labels, for calibration; none that a task or a needle has."""
        made = []
        for number in range(count, 2 * count):
            ids = self.text[len(self.text) - length * (number + 1) : len(self.text) - length * number]
            labels = ids.clone()
            labels[:-scored] = -100
            made.append({"input_ids": ids[None], "labels": labels[None]})
        return made

    def _perplexity(self, reader: Reader, length: int, advance: Callable[[str], None]) -> float:
        total, count = 0.0, 0
        for window in self.windows(length):
            prompt, rest = window[: -self.sizes.scored], window[-self.sizes.scored :]
            logits = reader.prompt(prompt[None])
            for token, following in zip(rest, [*rest[1:], None], strict=True):
                total += float(F.cross_entropy(logits.float(), token))
                if following is not None:
                    logits = reader.step(int(token))
            count += len(rest)
            advance(f"prose of {_k(length)}")
        return math.exp(total / count)

    def _found(self, reader: Reader, task: Passkey, late: bool) -> bool:
        """Whether the key is in a greedy answer; ``late``: the question comes token by token, when the context is stored."""
        if late:
            logits = reader.prompt(task.context[None])
            for token in task.question:
                logits = reader.step(int(token))
        else:
            logits = reader.prompt(torch.cat([task.context, task.question])[None])
        answer = [int(logits.argmax())]
        while len(answer) < ANSWER:
            answer.append(int(reader.step(answer[-1]).argmax()))
        return task.key in self.tokenizer.decode(answer)

    def _tokens(self, text: str) -> Tensor:
        return self.tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids[0]


def prose() -> str:
    """Python's own reference text, which every CPython ships."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics[key] for key in sorted(topics))


def _k(length: int) -> str:
    return f"{length // 1024}k"
