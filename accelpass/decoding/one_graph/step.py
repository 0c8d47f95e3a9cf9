"""One call of the model and all that follows from its logits, compiled as one graph: what the host reads is a few numbers."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from accelpass.decoding.acceptance import Uniforms, judged
from accelpass.decoding.interfaces import DecodingError, Proposal, Request, Verified
from accelpass.decoding.one_graph.processors import Processors
from accelpass.decoding.reader import Reader, tree_mask
from accelpass.decoding.tree import Tree
from accelpass.ir.torch_private import mark_static


class Step:
    """Reads guesses and verifies them: mask of a tree, model, logits processors, acceptance, next token.

    Random numbers are drawn outside, three for each row, so that a generator of the user's draws them.

    Args:
        options: of ``torch.compile(..., backend="accelpass")``, for the steps and for the prompt.
        sources: compiled functions by model, which outlive a request.

    Raises:
        DecodingError: a cache whose size changes with the text, another acceptance than the exact one, guidance, or a logits processor
            that a graph cannot hold.
    """

    def __init__(
        self, request: Request, reader: Reader, options: Mapping[str, Any], sources: weakref.WeakKeyDictionary[Any, Any]
    ) -> None:
        if not reader.is_static:
            raise DecodingError(
                f"one_graph: a {type(reader.cache).__name__} grows with the text, and so would the graph; use accelpass.KVCache"
            )
        self.request, self.reader = request, reader
        self.processors = Processors.of(request.process)
        made = sources.setdefault(request.model, {})
        settings = self.processors, request.samples, reader.asks_hidden
        if settings not in made:
            made[settings] = torch.compile(_whole(request.model, *settings), backend="accelpass", options=dict(options))
        if "prompt" not in made:
            made["prompt"] = torch.compile(_forward(request.model), backend="accelpass", options=dict(options))
        self.run, reader.call = made[settings], made["prompt"]
        self.seen: Tensor | None = None
        self.known = 0

    def __call__(self, read: Tensor, proposal: Proposal, text: Tensor) -> Verified:
        """
        Args:
            read: the last token of the text and the guesses, ``(batch, rows)``.
            text: all tokens before ``read``, ``(batch, tokens)``.
        """
        request, tree = self.request, None if proposal.tree is None else proposal.tree.on(read.device)
        inputs, shown = self.reader.prepared(read, tree, masked=False)
        draws = None
        if request.samples:
            draws = torch.rand((3, *read.shape), device=read.device, generator=request.generator)
        if self.processors.looks_back:
            self._look(text)
        rows = None if tree is None else (tree.parents, tree.ranks, tree.depths, tree.ancestors, tree.paths)
        for tensor in (read, draws, self.seen, proposal.probs, *(rows or ()), *(shown or ())):
            if tensor is not None:
                mark_static(tensor)
        found, chosen, logits, hidden = self.run(inputs, shown, read, rows, proposal.probs, draws, self.seen)
        self.reader.hidden = hidden
        width = found.shape[1] - 1 if tree is None else (found.shape[1] - 1) // 2
        rows_of = None if tree is None else found[:, 1 + width :]
        return Verified(found[:, 1 : 1 + width], found[:, 0], rows_of, read, chosen, logits, hidden, found)

    def _look(self, text: Tensor) -> None:
        """Note which tokens the text has: those that came since the last call."""
        if self.seen is None:
            size = (text.shape[0], self.request.vocabulary)
            self.seen = torch.zeros(size, dtype=torch.bool, device=text.device)
        self.seen.scatter_(1, text[:, self.known :], True)
        self.known = text.shape[1]


def _whole(model: Any, processors: Processors, samples: bool, hidden: bool) -> Callable[..., Any]:
    """The function that is compiled; it does not keep the model alive."""
    owner = weakref.ref(model)

    def step(
        inputs: dict[str, Any],
        shown: tuple[Tensor, Tensor | None] | None,
        read: Tensor,
        rows: tuple[Tensor, ...] | None,
        probs: Tensor | None,
        draws: Tensor | None,
        seen: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        tree = None if rows is None else Tree(*rows)
        model = owner()
        assert model is not None
        if tree is not None and shown is not None:
            width = inputs["past_key_values"].layers[0].capacity
            inputs = {**inputs, "attention_mask": tree_mask(model, tree, *shown, width, read.shape[0])}
        more = {"output_hidden_states": True} if hidden else {}
        made = model.forward(**inputs, return_dict=True, **more)
        logits = made.logits[:, -read.shape[1] :].float()
        if seen is not None:
            logits = processors(logits, _seen_by(seen, read, tree))
        else:
            logits = processors(logits, None)
        uniforms = None if draws is None else Uniforms(*draws.unbind(0))
        found = judged(read, logits, Proposal(read[:, 1:], probs, tree), samples, uniforms)
        parts = [found.counts[:, None], found.tokens, *([] if found.rows is None else [found.rows])]
        return torch.cat(parts, 1), found.chosen, logits, made.hidden_states[-1] if hidden else None

    return step


def _forward(model: Any) -> Callable[..., Any]:
    """The model's forward pass, which does not keep the model alive, and is not what the model may have been compiled to in place."""
    owner = weakref.ref(model)

    def forward(**inputs: Any) -> Any:
        model = owner()
        assert model is not None
        return model.forward(**inputs)

    return forward


def _seen_by(seen: Tensor, read: Tensor, tree: Tree | None) -> Tensor:
    """Which tokens stand in the text ``(batch, vocabulary)`` or among the guesses up to each row, ``(batch, rows, vocabulary)``."""
    own = torch.nn.functional.one_hot(read, seen.shape[-1])
    reached = own.cumsum(1) if tree is None else torch.einsum("rs,bsv->brv", tree.ancestors.to(own.dtype), own)
    return seen.unsqueeze(1) | (reached > 0)
