"""Checks around each call of a graph that uses a KVCache, on the host: nothing is written that would not fit."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from accelpass.ir.core.graph import size_among, value
from accelpass.ir.core.state import STATE, StateSpec
from accelpass.ir.core.tensors import FromInputs
from accelpass.ir.errors import GraphError
from accelpass.ir.kv.holdings import Holding, holding_of
from accelpass.ir.kv.lower import CacheUse
from accelpass.ir.kv.tail import Stepper, made_tails

Tokens = Callable[[Sequence[Any]], int]


@dataclass(frozen=True)
class Kept:
    """How one layer keeps its tokens.

    Attributes:
        buffers: positions among the call's arguments of what its states live with, and the states.
    """

    method: str
    site: str
    by_position: bool
    by_mask: bool
    stepper: Stepper | None
    buffers: tuple[tuple[int, StateSpec], ...]

    @staticmethod
    def of(use: CacheUse, tensors: FromInputs) -> Kept:
        buffers = tuple((tensors.position(anchor), spec) for anchor, spec in use.buffers)
        return Kept(use.method, use.site, use.by_position, use.by_mask, use.stepper, buffers)

    def tensors(self, args: Sequence[Any]) -> list[Tensor]:
        """The buffers of a call."""
        return [STATE.slot(args[position], spec).tensor for position, spec in self.buffers]


@dataclass(frozen=True)
class CacheCalls:
    """What a graph does to caches at each call.

    Attributes:
        counts: of each layer, the position of its counter among the call's arguments, and how it is stored.
        tokens: how many tokens a call adds.
        is_prompt: the graph is for empty caches.
        model: the position of one of the model's own tensors, or None.
        layers: how each keeps its tokens.
        text: how many tokens the caller gives, of which a pass stores some alone.
    """

    counts: tuple[tuple[int, tuple[str, ...]], ...]
    tokens: Tokens
    is_prompt: bool
    model: int | None
    layers: tuple[Kept, ...]
    text: Tokens | None = None

    @staticmethod
    def of(
        uses: Sequence[CacheUse], tensors: FromInputs, marks: Sequence[str] = (), text: Sequence[Any] = ()
    ) -> CacheCalls:
        """
        Args:
            marks: names of passes without which a cache that they filled cannot be gone on with.
            text: how many tokens the caller gives, if that is known.
        """
        counts = tuple((tensors.position(u.count), (*u.form, *marks)) for u in uses)
        layers = tuple(Kept.of(use, tensors) for use in uses)
        given = tokens_of(text[0], tensors) if text else None
        tokens, model = tokens_of(uses[0].tokens, tensors), tensors.model(uses[0].site)
        return CacheCalls(counts, tokens, uses[0].is_prompt, model, layers, given)

    def check(self, args: Sequence[Any]) -> list[Holding]:
        """What the layers hold before the call.

        Raises:
            CacheError: they do not fit, or the cache holds what another model or other passes wrote.
        """
        tokens, model = self.tokens(args), self._owner(args)
        holdings = [holding_of(args[position]) for position, _ in self.counts]
        for layer, (holding, (_, form)) in enumerate(zip(holdings, self.counts, strict=True)):
            # The forms of layers may differ; all else is the same for each.
            if layer == 0 or (holding.tokens and holding.form != form):
                holding.check(tokens, form, model, self.is_prompt)
        for holding in holdings:
            holding.tail = None  # what has not been taken back by now is accepted
        made_tails()  # of a call that failed
        return holdings

    def note(self, args: Sequence[Any], holdings: Sequence[Holding]) -> None:
        """Remember what the call has stored."""
        tokens, model = self.tokens(args), self._owner(args)
        tails, left_out = iter(made_tails()), 0 if self.text is None else self.text(args) - tokens
        for holding, (_, form), layer in zip(holdings, self.counts, self.layers, strict=True):
            holding.add(tokens, form, model)
            if left_out:
                holding.dropped, holding.kept = left_out, tokens
            holding.method, holding.site = layer.method, layer.site
            holding.by_position, holding.by_mask = layer.by_position, layer.by_mask
            if layer.stepper is not None:
                holding.tail, holding.buffers = next(tails), layer.tensors(args)

    def _owner(self, args: Sequence[Any]) -> Tensor | None:
        return None if self.model is None else args[self.model]


def tokens_of(number: int | torch.SymInt, tensors: FromInputs) -> Tokens:
    """How many tokens a call adds, told from its arguments."""
    if isinstance(number, int):
        return lambda args: number
    found = size_among(tensors.inputs_nodes, number)
    if found is None:
        return _computed(number, tensors)
    position, dim = tensors.position(tensors.inputs_nodes[found[0]]), found[1]
    if dim is None:
        return lambda args: int(args[position])
    return lambda args: int(args[position].shape[dim])


def _computed(number: torch.SymInt, tensors: FromInputs) -> Tokens:
    """A number that is computed from one size of an input: a text without the tokens that are left out of it."""
    expression = number.node.expr
    for node in tensors.inputs_nodes:
        held = value(node)
        sizes = [held] if isinstance(held, torch.SymInt) else list(held.shape) if isinstance(held, Tensor) else []
        for size in sizes:
            if isinstance(size, torch.SymInt) and expression.free_symbols == {size.node.expr}:
                read, symbol = tokens_of(size, tensors), size.node.expr
                return lambda args: int(expression.subs(symbol, read(args)))
    raise GraphError(f"no input of the graph says how many tokens ({number}) it appends to the cache")
