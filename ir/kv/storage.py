"""What a pass says of how a cache layer keeps its tokens: which buffers, how a prompt fills them, how later tokens attend.

A :class:`Storage` is the ``store`` of an attention's spec. Its methods are plain torch functions over buffers that they
write in place; the compiler traces them into the graph, and tests run them as they are.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from accelpass.ir.attention.lowering.one_row import materialise, unnormalised_softmax
from accelpass.ir.attention.spec import steps
from accelpass.ir.attention.spec.block_select import MASKS
from accelpass.ir.attention.spec.spec import AttentionMass, AttentionSpec, Places, ScoreTap, Select, Store
from accelpass.ir.core.state import StateSpec
from accelpass.ir.kv.banks import EXACT, RowFormat, Rows, ValueFormat, taken_rows

Held = Mapping[str, Tensor]
"""The buffers of one layer by name."""

_HIDDEN = -1e4  # an additive mask hides a key with at most this
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
        functions: what a pass hands to its storage to call, by name.
        leads: the layer is the first of its storage in this call; it writes what all layers share.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    count: Tensor
    statistics: Mapping[str, Tensor] = field(default_factory=dict)
    given: Mapping[str, Tensor] = field(default_factory=dict)
    functions: Mapping[str, Callable[..., Tensor]] = field(default_factory=dict)
    leads: bool = True

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

    @property
    def wants(self) -> frozenset[str]:
        """Statistics of the prompt's attention that :meth:`fill` reads: keys of score taps, or ``lse``."""
        return frozenset()

    knows_held: ClassVar[bool] = False
    """From a single token, :meth:`extend` itself hides rows that hold none; then a mask that says no more is left out."""

    computes_prompts: ClassVar[bool] = False
    """A prompt's attention is :meth:`extend`'s too, of an empty layer, in the place of the model's own."""

    by_position: ClassVar[bool] = False
    """Each token has a row of its own, by its position: the newest are taken back by counting fewer."""

    @abstractmethod
    def states(self, layout: Layout, format: RowFormat) -> list[StateSpec]:
        """The buffers of one layer, each for one sequence."""

    def shared(self, layout: Layout) -> list[StateSpec]:
        """Buffers that all layers of this storage have in common; they live with the first."""
        return []

    def advance(self, new: New) -> Tensor | int:
        """How far a call moves the layer's counter: by its tokens."""
        return new.k.shape[2]

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

    def states(self, layout: Layout) -> list[StateSpec]:
        """Buffers of its own in each layer; :meth:`attend` finds them among those of the cache."""
        return []

    @abstractmethod
    def attend(
        self, held: Held, new: New, query: Query, layout: Layout, format: RowFormat, rows: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """The attention of one new token that is stored already, and the rows it gives on.

        Rows that hold no token are hidden here, as :meth:`Positions.segment` does: masks that say no more are left out.

        Args:
            held: the buffers of :class:`Positions`, and its own.
            rows: what it takes.
        """


@dataclass(frozen=True)
class Segment:
    """Stored rows that one attention reads.

    Attributes:
        at: position of each row, ``(batch, kv_heads, rows)``; None where the row's number is its position.
        valid: which rows hold a token, broadcast to ``(batch, kv_heads, rows)``; or, of several queries, which rows each
            may read, ``(batch, kv_heads, tokens, rows)``.
        q: other queries than the model's, shaped as ``Query.q``.
        rows: which rows are read at all, ``(batch, kv_heads, n)``; then ``at`` and ``valid`` are of these.
        value_format: the format of values, if it is not that of keys.
    """

    format: RowFormat
    keys: Rows
    values: Rows
    at: Tensor | None = None
    valid: Tensor | None = None
    q: Tensor | None = None
    rows: Tensor | None = None
    value_format: ValueFormat | None = None

    def chosen(self, bank: Rows) -> Rows:
        """The rows of ``bank`` that are read; chosen ones are copied, so that the loops over them look up no places."""
        return bank if self.rows is None else [materialise(rows) for rows in taken_rows(bank, self.rows)]


class Attended(NamedTuple):
    """``(batch, heads, tokens, d_v)``, and what was asked for of each segment."""

    out: Tensor
    mass: list[Tensor]
    logits: list[Tensor]


Kernel = Callable[["Query", Sequence[Segment], Sequence[str]], Attended]
KERNELS: dict[str, Kernel] = {}
"""By device: what computes the attention of one new token in place of loops for the compiler."""


class Query:
    """The new tokens' side of an attention: queries, and what the model does to scores.

    Scores have the shape ``(batch, kv_heads, groups, tokens, rows)`` and are float32.
    """

    def __init__(self, q: Tensor, extras: Sequence[Tensor], spec: AttentionSpec, layout: Layout) -> None:
        self.spec, self.layout, self.extras = spec, layout, extras
        self.dtype, self._given = q.dtype, q
        self.one = isinstance(q.shape[2], int) and q.shape[2] == 1
        # A single new token sees all that is stored: a causal mask says nothing about it.
        skip = spec.bias == "causal" and self.one
        self._before = [s for s in spec.before if not (skip and s.kind in MASKS)]
        scaled = q.float() * spec.scale
        if self.one:
            scaled = materialise(scaled)
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

    def last(self) -> Query:
        """The last of several tokens by itself."""
        extras = steps.of_last(self.extras, self._given.shape[2])
        return Query(self._given[:, :, -1:], extras, self.spec, self.layout)

    def heads(self, chosen: Sequence[int]) -> Query:
        """The side of some key/value heads alone, for rows that are stored apart; ``chosen`` ascends."""
        part = copy.copy(self)
        part.q = of_heads(self.q, chosen)
        part.layout = replace(self.layout, kv_heads=len(chosen))
        all_heads = self.layout.kv_heads * self.spec.groups
        query_heads = [h * self.spec.groups + g for h in chosen for g in range(self.spec.groups)]
        part._given = of_heads(self._given, query_heads)
        part.extras = [
            of_heads(e, query_heads, -3)
            if e.dim() > 2 and e.shape[-3] == all_heads
            else (of_heads(e, chosen, -3) if e.dim() > 2 and e.shape[-3] == self.layout.kv_heads else e)
            for e in self.extras
        ]
        return part

    def logits(self, segment: Segment) -> Tensor:
        """Scores of a segment's keys, as the model masks and biases them."""
        q = self.q if segment.q is None else segment.q
        keys = segment.chosen(segment.keys)
        if self.one:
            scores = segment.format.scores(q.squeeze(3), keys).unsqueeze(3)
        else:
            wide = segment.format.decode(keys, torch.float32)
            scores = torch.matmul(q.flatten(2, 3), wide.transpose(-1, -2)).unflatten(2, (self.spec.groups, -1))
        if self._before:
            stepped = steps.apply(scores.flatten(1, 2), self._before, self._moved(segment))
            scores = stepped.unflatten(1, (-1, self.spec.groups)).float()
        if segment.valid is not None:
            hidden = segment.valid.logical_not().unsqueeze(2)
            scores = scores.masked_fill(hidden if hidden.dim() == 5 else hidden.unsqueeze(3), float("-inf"))
        return scores

    def tapped(self, tap: ScoreTap, new: New, step: Tensor, *segments: Segment) -> Attended:
        """As :meth:`attend`, with what ``tap`` gives each row in the place of its probabilities, ``step`` tokens after the prompt."""
        if isinstance(tap, AttentionMass) or (self.one and tap.is_mass_of_one):
            return self.attend(*segments, want=("mass",))
        logits = [self.logits(s) for s in segments]
        own = (torch.arange(one.shape[-1], device=one.device).expand(*one.shape[:2], -1) for one in logits)
        places = [s.at if s.at is not None else place for s, place in zip(segments, own, strict=True)]
        got = tap(torch.cat(logits, -1), Places(new.positions[0, 0], torch.cat(places, -1), new.total, step))
        return self.attend(*segments)._replace(mass=list(got.split([one.shape[-1] for one in logits], -1)))

    def attend(self, *segments: Segment, want: Sequence[str] = ()) -> Attended:
        """One softmax over all segments' rows.

        Args:
            want: ``mass``, what each row got of the probability of all queries and heads that share it; ``logits``, its
                scores, summed over those. Each ``(batch, kv_heads, rows)``, float32, a tensor for each segment.
        """
        kernel = KERNELS.get(self.q.device.type) if self.one else None
        plain = all(s.value_format is None for s in segments) and all(s.kind in MASKS for s in self._before)
        if kernel is not None and plain:
            return kernel(self, segments, want)
        logits = [self.logits(s) for s in segments]
        weights, share = unnormalised_softmax(logits)
        out = None
        for segment, weight in zip(segments, weights, strict=True):
            values, format = segment.chosen(segment.values), segment.value_format or segment.format
            if self.one:
                part = format.mixed(weight.squeeze(3), values).unsqueeze(3)
            else:
                wide = format.decode(values, torch.float32)
                part = torch.matmul(weight.flatten(2, 3), wide).unflatten(2, (self.spec.groups, -1))
            out = part if out is None else out + part
        assert out is not None
        mass = [(w * share).sum((2, 3)) for w in weights] if "mass" in want else []
        summed = [one.sum((2, 3)) for one in logits] if "logits" in want else []
        return Attended((out * share).flatten(1, 2).to(self.dtype), mass, summed)

    def bias(self, segment: Segment) -> Tensor | None:
        """What the model adds to the scores of a segment's rows, ``(batch, heads, rows)``; None if nothing. One token alone."""
        if not self._before:
            return None
        batch, kv_heads, rows = segment.chosen(segment.keys)[0].shape[:3]
        zeros = self.q.new_zeros((batch, kv_heads * self.spec.groups, 1, rows))
        return steps.apply(zeros, self._before, self._moved(segment)).squeeze(2)

    def real(self, new: New) -> Tensor | None:
        """Which of a call's tokens are no padding, ``(batch, tokens)``: those that its last one may see; None if no mask tells."""
        one = self if self.one else self.last()
        kept = [s for s in one._before if s.kind in MASKS]
        if not kept:
            return None
        last = copy.copy(one)
        last._before = kept
        bias = last.bias(Segment(EXACT, [new.k], [new.v], new.positions))
        assert bias is not None
        return (bias > _HIDDEN).any(1)

    def sees(self, new: New) -> Tensor | None:
        """Which of a call's tokens each of them sees, ``(batch, heads, tokens, tokens)``; None if no mask tells. One row a token."""
        kept = [s for s in self._before if s.kind in MASKS]
        if not kept:
            return None
        tokens = new.k.shape[2]
        zeros = self.q.new_zeros(()).expand(new.k.shape[0], new.k.shape[1] * self.spec.groups, tokens, tokens)
        return steps.apply(zeros, kept, self._moved(Segment(EXACT, [new.k], [new.v], new.positions))) > _HIDDEN

    def _moved(self, segment: Segment) -> list[Tensor]:
        return [e if segment.at is None else self._taken(e, segment.at) for e in self.extras]

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


def of_heads(x: Tensor, chosen: Sequence[int], dim: int = 1) -> Tensor:
    """Some of ``x`` along the dimension of heads, in runs: an index would be a tensor to copy to the device."""
    starts = [i for i, h in enumerate(chosen) if i == 0 or h != chosen[i - 1] + 1]
    ends = [*starts[1:], len(chosen)]
    runs = [x.narrow(dim, chosen[a], b - a) for a, b in zip(starts, ends, strict=True)]
    if len(runs) == 1:
        return x if runs[0].shape[dim] == x.shape[dim] else runs[0]
    return torch.cat(runs, dim)


@dataclass(frozen=True)
class Positions(Storage):
    """All tokens, each in the row of its position."""

    part: ClassVar[str] = "positions"
    knows_held: ClassVar[bool] = True
    by_position: ClassVar[bool] = True

    def states(self, layout: Layout, format: RowFormat) -> list[StateSpec]:
        return [
            *format.states("keys", layout.kv_heads, layout.capacity, layout.width, layout.dtype),
            *format.states("values", layout.kv_heads, layout.capacity, layout.value_width, layout.dtype),
        ]

    def fill(self, held: Held, new: New, layout: Layout, format: RowFormat) -> None:
        at = new.count[0] + torch.arange(new.k.shape[2], device=new.count.device)
        for name, rows in (("keys", new.k), ("values", new.v)):
            for buffer, made in zip(bank(held, name), format.encode(rows), strict=True):
                buffer.index_copy_(2, at, made.to(buffer.dtype))

    def extend(self, held: Held, new: New, query: Query, layout: Layout, format: RowFormat) -> Tensor:
        self.fill(held, new, layout, format)
        return query.attend(self.segment(held, new, query, layout, format)).out

    def segment(self, held: Held, new: New, query: Query, layout: Layout, format: RowFormat) -> Segment:
        """All rows; of several new tokens the model's own mask says what each may see."""
        valid = self.seen(new, layout) if query.one else None
        return Segment(format, bank(held, "keys"), bank(held, "values"), valid=valid)

    def seen(self, new: New, layout: Layout) -> Tensor:
        """Rows that hold a token once the new ones are stored, ``(batch, 1, capacity)``."""
        return (torch.arange(layout.capacity, device=new.count.device) < new.total.unsqueeze(-1)).unsqueeze(1)


def bank(held: Held, name: str) -> list[Tensor]:
    """The buffers of one bank: ``name`` itself, or ``name.codes``, ``name.step``, ``name.low``."""
    return [t for n, t in held.items() if n == name or n.startswith(name + ".")]
