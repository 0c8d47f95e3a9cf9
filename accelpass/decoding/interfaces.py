"""What a decoding method is made of: a proposer guesses tokens, the model reads them in one call, an acceptance decides."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from accelpass.ir.errors import AccelpassError

if TYPE_CHECKING:
    from accelpass.decoding.tree import Tree


class DecodingError(AccelpassError, ValueError):
    """A request that this way of decoding cannot answer; says why and what to use."""


@dataclass(frozen=True)
class Request:
    """What a text is asked of.

    Attributes:
        model: the model whose text it is; what is called is compiled, if the user compiled it.
        ids: the prompt ``(batch, tokens)``.
        mask: 1 for tokens, 0 for padding, ``(batch, tokens)``; None without padding.
        positions: of the prompt's tokens, as the model takes them; None if it takes none.
        max_length: tokens that a text may have, prompt included.
        process: what changes the logits of a next token: of ids ``(batch, n)`` and logits ``(batch, vocabulary)``; None: nothing.
        samples: tokens are drawn; otherwise they are the likeliest.
        generator: draws them; None for torch's own.
        trees: the cache can keep some rows of a call, and drop those between.
        capacity: tokens that the cache has room for, 0 for any number; caches of one size share graphs.
    """

    model: Any
    ids: Tensor
    mask: Tensor | None
    positions: Tensor | None
    max_length: int
    process: Callable[[Tensor, Tensor], Tensor] | None = None
    samples: bool = False
    generator: torch.Generator | None = None
    trees: bool = False
    capacity: int = 0

    @property
    def batch(self) -> int:
        return self.ids.shape[0]

    @property
    def vocabulary(self) -> int:
        return int(self.model.config.get_text_config(decoder=True).vocab_size)


@dataclass(frozen=True)
class Proposal:
    """Guesses of the next tokens.

    Attributes:
        tokens: ``(batch, guesses)``; each follows the one before, or in a tree its parent.
        probs: the distribution that each was drawn from, ``(batch, guesses, vocabulary)``; None if they were not drawn.
        tree: how they follow each other; None for a chain.
    """

    tokens: Tensor
    probs: Tensor | None = None
    tree: Tree | None = None

    @staticmethod
    def nothing(ids: Tensor) -> Proposal:
        return Proposal(ids[:, :0])

    @property
    def count(self) -> int:
        return self.tokens.shape[1]

    def cut(self, count: int) -> Proposal:
        """The first ``count`` guesses of a chain."""
        return Proposal(self.tokens[:, :count], None if self.probs is None else self.probs[:, :count])


@dataclass(frozen=True)
class Verified:
    """What the model said to a call's tokens.

    Attributes:
        tokens: new text ``(batch, depth + 1)``, of which the first ``counts + 1`` are valid.
        counts: accepted guesses of each sequence ``(batch,)``.
        rows: which rows of the call the valid tokens follow, ``(batch, depth + 1)``; None for a chain.
        read: the tokens of the call, the last of the text and all guesses, ``(batch, rows)``.
        chosen: what the model would have said after each of them, ``(batch, rows)``.
        logits: after each of them, processed, float32 ``(batch, rows, vocabulary)``.
        hidden: the model's last hidden states of the call's tokens, where the proposer needs them, ``(batch, rows, width)``; of the first
            call, those of the prompt.
        found: ``counts``, ``tokens`` and ``rows`` as columns of one tensor, where they were made as one.
    """

    tokens: Tensor
    counts: Tensor
    rows: Tensor | None
    read: Tensor
    chosen: Tensor
    logits: Tensor
    hidden: Tensor | None = None
    found: Tensor | None = None


class Drafter(ABC):
    """The guesses for one request.

    Attributes:
        guides: it is asked even where no guess fits: its distribution says which token comes next.
        branches: it proposes trees, whose guesses are several of each position.
        behind: tokens that it may have to read before it guesses, in calls of every size that it makes: what ``prepare`` gives it.
    """

    guides = False
    branches = False
    behind = 1

    @abstractmethod
    def propose(self, text: Sequence[Sequence[int]], most: int) -> Proposal | None:
        """At most ``most`` guesses of what follows ``text``, a list of tokens for each sequence; None for none."""

    def observe(self, verified: Verified, accepted: int) -> None:  # noqa: B027 (few need it)
        """What came of a call; ``accepted`` guesses are part of the text of all sequences."""


class Proposer(ABC):
    """A way of guessing; it may remember over requests, and hands out a :class:`Drafter` for each.

    Attributes:
        needs_hidden: its drafters observe the model's last hidden states.
    """

    needs_hidden = False

    @abstractmethod
    def start(self, request: Request) -> Drafter:
        """
        Raises:
            DecodingError: it cannot guess for this request.
        """


class Acceptance(Protocol):
    """Which guesses become text, and what follows them."""

    def __call__(self, read: Tensor, logits: Tensor, proposal: Proposal, request: Request) -> Verified:
        """
        Args:
            read: the last token of the text and the guesses, ``(batch, rows)``.
            logits: after each of them, processed, float32 ``(batch, rows, vocabulary)``.
        """
        ...
