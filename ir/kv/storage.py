"""What a pass says of how a cache layer keeps its tokens: which buffers, how a prompt fills them, how later tokens attend.

A :class:`Storage` is the ``store`` of an attention's spec. Its methods are plain torch functions over buffers that they
write in place; the compiler traces them into the graph, and tests run them as they are.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from accelpass.ir.attention import steps
from accelpass.ir.attention.spec import AttentionSpec, Select, Store
from accelpass.ir.derived import StateSpec
from accelpass.ir.kv.banks import RowFormat, Rows

Held = Mapping[str, Tensor]
"""The buffers of one layer by name."""

_MASKS = ("keep", "fill", "add")
_OUTSIDE = ("view", "center", "safe_softmax", "softmax", "drop", "sink")


@dataclass(frozen=True)
class Layout:
    """What a storage has to know of the layer that it serves; ``capacity`` in tokens, ``dtype`` of keys and values."""

    kv_heads: int
    groups: int
    width: int
    value_width: int
    dtype: torch.dtype
    capacity: int


@dataclass
class New:
    """The tokens of one call.

    Attributes:
        q: ``(batch, heads, tokens, d)``; k, v: ``(batch, kv_heads, tokens, d)``.
        count: tokens before them, int64 ``(batch,)``.
        statistics: of the prompt's own attention, for a fill: those that the storage wants.
        given: further tensors that a pass hands to its storage, by name.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    count: Tensor
    statistics: Mapping[str, Tensor] = field(default_factory=dict)
    given: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def total(self) -> Tensor:
        """Tokens after the call, ``(batch,)``."""
        return self.count + self.k.shape[2]

    @property
    def positions(self) -> Tensor:
        """Of the new tokens, int64 ``(batch, kv_heads, tokens)``."""
        index = torch.arange(self.k.shape[2], device=self.count.device)
        rows = self.count.unsqueeze(-1) + index
        return rows.unsqueeze(1).expand(rows.shape[0], self.k.shape[1], rows.shape[1])


class Storage(Store, ABC):
    """How the tokens of a cache layer are kept. Subclasses are frozen dataclasses of JSON values with a ``part`` name."""

    wants: ClassVar[frozenset[str]] = frozenset()
    """Statistics of the prompt's attention that :meth:`fill` reads."""

    @abstractmethod
    def states(self, layout: Layout, format: RowFormat) -> list[StateSpec]:
        """The buffers of one layer, each for one sequence."""

    @abstractmethod
    def fill(self, held: Held, new: New, layout: Layout, format: RowFormat) -> None:
        """Store a prompt in an empty layer. Its attention was the model's own, over all of it."""

    @abstractmethod
    def extend(self, held: Held, new: New, query: Query, layout: Layout, format: RowFormat) -> Tensor:
        """Store tokens after others; their attention ``(batch, heads, tokens, d_v)`` over what is stored and themselves."""


class RowSelect(Select, ABC):
    """Which rows of a full cache one new token attends to. Rows chosen in one layer may serve others.

    Attributes:
        takes, gives: names under which rows come from an earlier layer, and go on to later ones.
    """

    @property
    def takes(self) -> str | None:
        return None

    @property
    def gives(self) -> str | None:
        return None

    @abstractmethod
    def attend(
        self, held: Held, new: New, query: Query, layout: Layout, format: RowFormat, rows: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """The attention of one new token that is stored already, and the rows it gives on.

        Args:
            held: the buffers of :class:`Positions`.
            rows: what it takes.
        """


class Query:
    """The new tokens' side of an attention: queries, and what the model does to scores.

    Scores have the shape ``(batch, kv_heads, groups, tokens, rows)`` and are float32.
    """

    def __init__(self, q: Tensor, extras: Sequence[Tensor], spec: AttentionSpec, layout: Layout) -> None:
        self.spec, self.layout, self.extras = spec, layout, extras
        self.tokens = q.shape[2]
        self.dtype = q.dtype
        self.one = isinstance(self.tokens, int) and self.tokens == 1
        # A single new token sees all that is stored: a causal mask says nothing about it.
        skip = spec.bias == "causal" and self.one
        self._before = [s for s in spec.before if not (skip and s.kind in _MASKS)]
        scaled = q.float() * spec.scale
        if self.one:
            scaled = fence(scaled)
        self.q = scaled.unflatten(1, (-1, spec.groups))

    @staticmethod
    def why_not(spec: AttentionSpec) -> str | None:
        """The reason why an attention cannot be computed from stored rows, or None."""
        outside = [s.kind for s in spec.before if s.kind in _OUTSIDE]
        if outside:
            return f"its scores go through {outside[0]!r}, which needs them all in one piece"
        if spec.after:
            return f"its probabilities go through {spec.after[0].kind!r}"
        return None

    def logits(
        self, format: RowFormat, rows: Rows, at: Tensor | None, valid: Tensor | None, q: Tensor | None = None
    ) -> Tensor:
        """Scores of stored keys, as the model masks and biases them.

        Args:
            at: position of each row, ``(batch, kv_heads, rows)``; None where the row's number is its position.
            valid: which rows hold a token, broadcast to ``(batch, kv_heads, rows)``.
            q: other queries than the model's, shaped as ``self.q``.
        """
        q = self.q if q is None else q
        if self.one:
            scores = format.scores(q.squeeze(3), rows).unsqueeze(3)
        else:
            keys = format.decode(rows, torch.float32)
            scores = torch.matmul(q.flatten(2, 3), keys.transpose(-1, -2)).unflatten(2, (self.spec.groups, -1))
        if self._before:
            moved = [e if at is None else self._taken(e, at) for e in self.extras]
            scores = steps.apply(scores.flatten(1, 2), self._before, moved).unflatten(1, (-1, self.spec.groups)).float()
        if valid is not None:
            scores = scores.masked_fill(valid.logical_not()[:, :, None, None], float("-inf"))
        return scores

    def probabilities(self, *logits: Tensor) -> list[Tensor]:
        """One softmax over all segments; zeros for a query that sees no key at all."""
        top = logits[0].amax(-1, keepdim=True)
        for more in logits[1:]:
            top = torch.maximum(top, more.amax(-1, keepdim=True))
        top = top.clamp_min(torch.finfo(torch.float32).min)  # of a row without keys: -inf - -inf is not a number
        powers = [torch.exp(one - top) for one in logits]
        whole = powers[0].sum(-1, keepdim=True)
        for more in powers[1:]:
            whole = whole + more.sum(-1, keepdim=True)
        share = 1 / whole.clamp_min(torch.finfo(torch.float32).tiny)
        return [fence(one * share) if self.one else one * share for one in powers]

    def output(self, *parts: tuple[RowFormat, Rows, Tensor]) -> Tensor:
        """``(batch, heads, tokens, d_v)``: the sum over segments of (format, value rows, probabilities)."""
        total = None
        for format, rows, weights in parts:
            if self.one:
                one = format.mixed(weights.squeeze(3), rows).unsqueeze(3)
            else:
                values = format.decode(rows, torch.float32)
                one = torch.matmul(weights.flatten(2, 3), values).unflatten(2, (self.spec.groups, -1))
            total = one if total is None else total + one
        assert total is not None
        return total.flatten(1, 2).to(self.dtype)

    def _taken(self, extra: Tensor, at: Tensor) -> Tensor:
        """A mask or bias over positions, for rows at other places: ``(batch, heads, rows of the mask, rows)``."""
        full = extra[(None,) * max(0, 4 - extra.dim())]
        if full.shape[-1] != self.layout.capacity:
            return extra
        batch, kv_heads, _ = at.shape
        groups, height = self.spec.groups, full.shape[2]
        place = at.clamp_min(0).unsqueeze(2)
        if full.shape[1] in (1, kv_heads) and full.shape[1] != kv_heads * groups:
            taken = full.expand(batch, kv_heads, height, full.shape[3]).gather(-1, place.expand(-1, -1, height, -1))
            return taken.unsqueeze(2).expand(-1, -1, groups, -1, -1).flatten(1, 2)
        place = place.unsqueeze(2).expand(-1, -1, groups, -1, -1).flatten(1, 2)
        return full.expand(batch, -1, -1, -1).gather(-1, place.expand(-1, -1, height, -1))


def mass(probabilities: Tensor) -> Tensor:
    """What each row got from all queries and the heads that share it, ``(batch, kv_heads, rows)``."""
    return probabilities.sum((2, 3))


def fence(x: Tensor) -> Tensor:
    """``x`` in memory before a loop reads it many times (see :func:`accelpass.ir.graph.stored`)."""
    if x.is_contiguous() and all(isinstance(n, int) for n in x.shape):
        return torch.as_strided(x, x.shape, x.stride())
    return x


@dataclass(frozen=True)
class Positions(Storage):
    """All tokens, each in the row of its position."""

    part: ClassVar[str] = "positions"

    def states(self, layout: Layout, format: RowFormat) -> list[StateSpec]:
        return [
            *format.states("keys", layout.kv_heads, layout.capacity, layout.width, layout.dtype),
            *format.states("values", layout.kv_heads, layout.capacity, layout.value_width, layout.dtype),
        ]

    def fill(self, held: Held, new: New, layout: Layout, format: RowFormat) -> None:
        at = new.count[0] + torch.arange(new.k.shape[2], device=new.count.device)
        for name, rows in (("keys", new.k), ("values", new.v)):
            for buffer, made in zip(bank(held, name), format.encode(rows), strict=True):
                buffer.index_copy_(2, at, made)

    def extend(self, held: Held, new: New, query: Query, layout: Layout, format: RowFormat) -> Tensor:
        self.fill(held, new, layout, format)
        logits = query.logits(format, bank(held, "keys"), None, self.seen(new, layout) if query.one else None)
        (weights,) = query.probabilities(logits)
        return query.output((format, bank(held, "values"), weights))

    def seen(self, new: New, layout: Layout) -> Tensor:
        """Rows that hold a token once the new ones are stored, ``(batch, 1, capacity)``."""
        return (torch.arange(layout.capacity, device=new.count.device) < new.total.unsqueeze(-1)).unsqueeze(1)


def bank(held: Held, name: str) -> list[Tensor]:
    """The buffers of one bank: ``name`` itself, or ``name.codes``, ``name.step``, ``name.low``."""
    return [t for n, t in held.items() if n == name or n.startswith(name + ".")]
