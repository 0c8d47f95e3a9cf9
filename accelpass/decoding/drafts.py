"""Guesses of a smaller model, or of the model itself without some of its layers."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from accelpass.caches.kv_cache import KVCache
from accelpass.decoding.acceptance import drawn
from accelpass.decoding.driver import Decoder
from accelpass.decoding.interfaces import DecodingError, Drafter, Proposal, Proposer, Request
from accelpass.decoding.reader import Reader, gives_back


class DraftModel(Proposer):
    """A model of the same vocabulary writes the guesses, token for token, in a cache of its own.

    Where tokens are drawn, so are the guesses, from logits that went through the same processors: then they are accepted most often.

    Args:
        model: the draft, compiled in place or not; None: the request's own model.
        call: of a model, what is called in its place.
        cache: of a model, tokens and sequences: makes an empty cache that gives tokens back. None: an ``accelpass.KVCache``.
    """

    def __init__(
        self,
        model: Any = None,
        call: Callable[[Any], Any] | None = None,
        cache: Callable[[Any, int, int], Any] | None = None,
    ) -> None:
        self.model, self.call, self.cache = model, call, KVCache if cache is None else cache

    def start(self, request: Request) -> Drafter:
        model = request.model if self.model is None else self.model
        size = model.config.get_text_config(decoder=True).vocab_size
        if size != request.vocabulary:
            raise DecodingError(
                f"the draft {type(model).__name__} has a vocabulary of {size} tokens and the model one of {request.vocabulary}: "
                "its token ids would mean other words. Use a draft with the model's own tokenizer."
            )
        cache = self.cache(model, max(request.max_length + 1, request.capacity), request.batch)
        kwargs = {"attention_mask": request.mask, "position_ids": request.positions, "use_cache": True}
        given = {name: value for name, value in kwargs.items() if value is not None}
        return _Draft(request, Reader(model, cache, given, None if self.call is None else self.call(model)))


_PIECES = (8, 2, 1)
"""Tokens of a call that reads what the draft has missed: a few sizes alone, as each is a graph."""


class _Draft(Drafter):
    """
    Attributes:
        agreed: tokens of the text that the draft has read; behind them it may have read guesses.
        before: the cache before the guesses, where single tokens cannot be taken back; None elsewhere.
    """

    behind = sum(_PIECES)

    def __init__(self, request: Request, reader: Reader) -> None:
        self.request, self.reader = request, reader
        self.device = request.ids.device
        self.agreed = request.ids.shape[1]
        self.before: Any = None

    def propose(self, text: Sequence[Sequence[int]], most: int) -> Proposal | None:
        logits = self.caught_up(text)
        if not gives_back(self.reader.cache):
            self.before = copy.deepcopy(self.reader.cache), self.reader.held
        process, request = self.request.process, self.request
        ids = torch.tensor(text, device=self.device) if process is not None else None
        guesses, probs = [], []
        for number in range(most):
            last = logits[:, -1]
            if process is not None:
                assert ids is not None
                last = process(ids, last.clone())
            if request.samples:
                probs.append(last.softmax(-1))
                token = drawn(probs[-1].unsqueeze(1), request.generator)
            else:
                token = last.argmax(-1, keepdim=True)
            guesses.append(token)
            if number + 1 < most:
                ids = None if ids is None else torch.cat([ids, token], 1)
                logits = self.reader.read(token)
        return Proposal(torch.cat(guesses, 1), torch.stack(probs, 1) if probs else None)

    def caught_up(self, text: Sequence[Sequence[int]]) -> Tensor:
        """Logits after the text, of which some is read already, and after that maybe guesses that were not accepted."""
        length = len(text[0])
        if not self.reader.held:
            start, self.agreed = self.reader.first(self.request.ids), self.request.ids.shape[1]
            if length == self.request.ids.shape[1]:
                return start
        self._forget(min(self.reader.held, self.agreed, length - 1))  # one token at least is read, for its logits
        while self.reader.held < length:
            left = length - self.reader.held
            step = next(size for size in _PIECES if size <= left)
            piece = [line[self.reader.held : self.reader.held + step] for line in text]
            logits = self.reader.read(torch.tensor(piece, device=self.device))
        self.agreed = length
        return logits

    def _forget(self, tokens: int) -> None:
        """Hold the first ``tokens`` alone, or fewer."""
        reader = self.reader
        if self.before is not None and reader.held > tokens:
            reader.cache, reader.held = self.before
            self.before = None
        elif reader.held > tokens:
            reader.keep(tokens)

    def observe(self, verified: Any, accepted: int) -> None:
        """Accepted guesses are text that was read already, but for the last, which was not."""
        self.agreed = min(self.agreed + accepted, self.reader.held)


def draft_model(model: Any, *, cache: Callable[[Any, int, int], Any] | None = None, **options: Any) -> Decoder:
    """Speculative decoding: ``model``, smaller and of the same vocabulary, guesses (arXiv 2211.17192).

    Args:
        cache: see :class:`DraftModel`.
        options: of :class:`~accelpass.decoding.Decoder`.
    """
    return Decoder(DraftModel(model, cache=cache), **options)


def self_draft(layers: Sequence[int], passes: Sequence[Any] = (), *, compile: Any = None, **options: Any) -> Decoder:
    """The model without some of its layers guesses for the model itself (Zhang et al., "Draft & Verify", arXiv 2309.08168).

    Its weights are the model's own. The draft keeps a cache of its own, as the layers above a missing one compute other keys.

    Args:
        layers: numbers of layers that the draft leaves out, from 1 (the pass ``skip_layers``).
        passes: further passes of the draft.
        compile: further options of its compilation, as a dict.
        options: of :class:`~accelpass.decoding.Decoder`.
    """
    settings = {**(compile or {}), "passes": [*passes, {"name": "skip_layers", "layers": list(layers)}]}
    made: weakref.WeakKeyDictionary[Any, Any] = weakref.WeakKeyDictionary()

    def call(model: Any) -> Any:
        if model not in made:
            # Of the function: a model that is compiled in place would be called compiled already.
            made[model] = torch.compile(_without_owner(model), backend="accelpass", options=settings)
        return made[model]

    return Decoder(DraftModel(None, call), **options)


def _without_owner(model: Any) -> Callable[..., Any]:
    """The model's forward pass, which does not keep the model alive."""
    owner = weakref.ref(model)

    def forward(*args: Any, **kwargs: Any) -> Any:
        model = owner()
        assert model is not None
        return model.forward(*args, **kwargs)

    return forward
