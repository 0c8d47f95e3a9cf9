"""Storage under a budget: a fixed number of slots for each head, and a rule that says whose token leaves.

A method is a subclass: what a token's score is, how many tokens stay, and which may never leave.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, field
from fractions import Fraction
from typing import ClassVar

import torch
from torch import Tensor

from accelpass.ir.attention.spec.spec import AttentionMass, ScoreTap
from accelpass.ir.core.state import StateSpec
from accelpass.ir.kv.banks import EXACT, RowFormat, Rows, buffer, put_rows, taken_rows
from accelpass.ir.kv.storage import Held, Layout, New, Query, Segment, Storage, bank
from accelpass.passes.core.base import Pass
from accelpass.passes.kv_cache.storage.rotation import Tables, keep_tables, rotated, table_states
from accelpass.passes.kv_cache.storage.selection import best_of_all, best_of_each


@dataclass(frozen=True)
class Slots(Storage):
    """At most :meth:`quota` tokens for each head, in slots in no order; each slot knows its token's position.

    Order within a call: store the new tokens, attend over all that is there, update the scores, evict. A token that was
    evicted never returns.

    Attributes:
        answer: tokens after a prompt that are stored before one leaves for each that comes.
        tables: keys are stored as they were before the rotary embedding, and rotated by their place among what is left; what
            the rotation reads (:mod:`.rotation`). None: they keep the rotation of their own position.
        shares: the heads of a layer have one budget together, of which each has at least this share of its even part
            (AdaKV, arXiv 2407.11550). None: each has an even part. What each has is settled when a prompt ends.
    """

    knows_held: ClassVar[bool] = True
    answer: int = field(default=0, kw_only=True)
    tables: Tables | None = field(default=None, kw_only=True)
    shares: float | None = field(default=None, kw_only=True)

    @abstractmethod
    def most(self, capacity: int) -> int:
        """The largest number of tokens that may stay in a layer of this capacity."""

    @abstractmethod
    def quota(self, total: Tensor) -> tuple[Tensor, Tensor]:
        """How many tokens stay after a prompt that ends at ``total`` tokens, and how many of these are the newest."""

    def settled(self, new: New, score: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """The same, for a rule that looks at the scores of all tokens ``(batch, kv_heads, rows)`` as well."""
        return self.quota(new.total)

    @property
    def tap(self) -> ScoreTap:
        """What tokens get of the scores of later queries."""
        return AttentionMass()

    def carried(self, score: Tensor, tokens: int) -> Tensor:
        """What scores are worth once so many tokens have come."""
        return score

    @abstractmethod
    def prompt_score(self, new: New) -> Tensor:
        """Scores of a prompt's tokens, float32 ``(batch, kv_heads, tokens)``."""

    @abstractmethod
    def step_score(self, score: Tensor, mass: Tensor, positions: Tensor) -> Tensor:
        """Scores after a call in which each token got ``mass`` by :attr:`tap`; a new token's score is 0 before it."""

    def rank(self, score: Tensor, positions: Tensor, total: Tensor) -> Tensor:
        """What tokens are compared by, after a call that ends at ``total`` tokens: their score."""
        return score

    def pinned(self, positions: Tensor, total: Tensor, newest: Tensor) -> Tensor:
        """Which tokens may not leave: the newest."""
        return positions >= (total - newest)[:, None, None]

    def slots(self, capacity: int) -> int:
        """Rows of one head: those of its tokens, and one for the token that comes."""
        return min(capacity, self.most(capacity) + self.answer) + 1

    def states(self, layout: Layout, format: RowFormat) -> list[StateSpec]:
        heads, slots = layout.kv_heads, self.slots(layout.capacity)
        banks, rows = (heads, slots) if self.shares is None else (1, heads * slots)
        return [
            *format.states("keys", banks, rows, layout.width, layout.dtype),
            *format.states("values", banks, rows, layout.value_width, layout.dtype),
            buffer("positions", (heads, rows), torch.int32, -1),
            buffer("score", (heads, rows), torch.float32),
            buffer("free", (heads,), torch.int64),
            buffer("quota", (3,), torch.int64),
            *([] if self.shares is None else [buffer("limits", (heads,), torch.int64)]),
        ]

    def shared(self, layout: Layout) -> list[StateSpec]:
        return table_states(self.tables, layout)

    def fill(self, held: Held, new: New, layout: Layout, format: RowFormat) -> None:
        rows = self._encoded(held, new, format)
        self.keep(held, new, rows, new.positions.to(torch.int32), self.prompt_score(new), format)

    def extend(self, held: Held, new: New, query: Query, layout: Layout, format: RowFormat) -> Tensor:
        made, step = self._encoded(held, new, format), new.total - held["quota"][:, 2]
        if query.one:
            slot = held["free"].unsqueeze(-1)
            self._put(held, slot, made)
            put_rows([held["positions"]], slot, [new.positions])
            positions = held["positions"]
            segments = self._segments(held, new, new.total, layout, format)
            done = query.tapped(self.tap, new, step, *segments, *self.elsewhere(held, query))
            here = torch.arange(positions.shape[-1], device=slot.device) == slot
            before = self.carried(held["score"].masked_fill(here, 0.0), 1)
            held["score"].copy_(self.step_score(before, done.mass[0], positions))
            self.leave(held, new, format)
            return done.out
        at, positions = new.positions, held["positions"]
        slots = self._segments(held, new, new.count, layout, format)
        own = Segment(EXACT, [new.k], [new.v], at)
        done = query.tapped(self.tap, new, step, *slots, own, *self.elsewhere(held, query))
        rows = [torch.cat([old, more], 2) for old, more in zip(self._banks(held), made, strict=True)]
        everywhere = torch.cat([positions, at.to(torch.int32)], -1)
        got = torch.cat(done.mass[:2], -1)
        before = torch.cat([self.carried(held["score"], at.shape[-1]), torch.zeros_like(done.mass[1])], -1)
        self.keep(held, new, rows, everywhere, self.step_score(before, got, everywhere), format)
        return done.out

    def elsewhere(self, held: Held, query: Query) -> list[Segment]:
        """Tokens that are kept in other places than slots, and are attended to as well."""
        return []

    def dropped(self, held: Held, new: New, rows: list[Tensor], positions: Tensor, format: RowFormat) -> None:
        """Called with rows (keys, then values, in the slots' format) before some of them leave. Positions below 0 are none."""

    def _encoded(self, held: Held, new: New, format: RowFormat) -> list[Tensor]:
        """The rows of new tokens, keys and then values."""
        keys = new.k
        if self.tables is not None:
            keep_tables(self.tables, held, new)
            keys = new.given["unrotated"].transpose(1, 2)
        return [*format.encode(keys), *format.encode(new.v)]

    def _banks(self, held: Held) -> list[Tensor]:
        """Keys and values as ``(batch, kv_heads, rows, ...)``; of a common budget each head sees all rows."""
        found = [*bank(held, "keys"), *bank(held, "values")]
        if self.shares is None:
            return found
        heads = held["positions"].shape[1]
        return [t.expand(-1, heads, *t.shape[2:]) for t in found]

    def _segments(self, held: Held, new: New, end: Tensor, layout: Layout, format: RowFormat) -> list[Segment]:
        """What is stored, for queries that see ``end`` tokens of the text before or at the first of them."""
        positions = held["positions"].long()
        banks, parts = self._banks(held), len(bank(held, "keys"))
        keys: Rows = banks[:parts]
        values: Rows = banks[parts:]
        if self.tables is None:
            return [Segment(format, keys, values, positions, positions >= 0)]
        # Empty slots come first in the order, so that the last token's place is the last.
        order = positions.argsort(-1).argsort(-1)
        place = (end[:, None, None] - positions.shape[-1] + order).clamp_min(0)
        turned = rotated(self.tables, held, new, format.decode(keys, layout.dtype), place)
        return [Segment(EXACT, [turned], values, positions, positions >= 0, value_format=format)]

    def _put(self, held: Held, slot: Tensor, rows: list[Tensor]) -> None:
        """Write one row of each head to its ``slot`` ``(batch, kv_heads, 1)``."""
        if self.shares is not None:
            slot, rows = slot.transpose(1, 2), [t.transpose(1, 2) for t in rows]
        put_rows([*bank(held, "keys"), *bank(held, "values")], slot, rows)

    def keep(
        self, held: Held, new: New, rows: list[Tensor], positions: Tensor, score: Tensor, format: RowFormat
    ) -> None:
        """Fill the slots with the best of these rows, as many as the quota says; sets the quota."""
        self.dropped(held, new, rows, positions, format)
        heads, columns = held["positions"].shape[1:]
        most = (columns if self.shares is None else columns // heads) - 1
        limit, newest = self.settled(new, score, positions)
        limit = limit.clamp_max(most)
        rank = self.rank(score, positions, new.total)
        first = torch.where(self.pinned(positions, new.total, newest), float("inf"), rank)
        first = first.masked_fill(positions < 0, float("-inf"))
        if self.shares is None:
            kept, where, scores = best_of_each(first, columns, limit, rows, positions, score)
        else:
            kept, where, scores = best_of_all(first, columns, limit, self.shares, rows, positions, score)
            count = (where >= 0).sum(-1)
            spare = (limit * heads - count.sum(-1)).clamp_min(0) // heads
            held["limits"].copy_(count + spare.unsqueeze(-1) + self.answer)
        for stored, one in zip([*bank(held, "keys"), *bank(held, "values")], kept, strict=True):
            stored.copy_(one)
        held["positions"].copy_(where)
        held["score"].copy_(scores)
        held["free"].copy_(self._free(where))
        held["quota"].copy_(torch.stack([(limit + self.answer).clamp_max(most), newest, new.total], -1))

    def _free(self, positions: Tensor) -> Tensor:
        """An empty slot for each head's next token, ``(batch, kv_heads)``: of a common budget another for each."""
        if self.shares is None:
            return positions.argmin(-1)
        return (positions < 0).all(1).float().topk(positions.shape[1], -1).indices

    def leave(self, held: Held, new: New, format: RowFormat) -> None:
        """Free one slot: an empty one while there is room, else that of the token with the lowest score."""
        positions, quota, total = held["positions"], held["quota"], new.total
        empty = positions < 0
        limit = quota[:, 0, None] if self.shares is None else held["limits"]
        full = empty.logical_not().sum(-1, keepdim=True) > limit.unsqueeze(-1)
        rank = self.rank(held["score"], positions, total)
        worth = torch.where(self.pinned(positions, total, quota[:, 1]), float("inf"), rank)
        # With slots of its own, a head that is not full takes an empty one; of a common budget these are given out below.
        least = float("-inf") if self.shares is None else float("inf")
        worth = torch.where(empty, torch.where(full, float("inf"), least), worth)
        slot = worth.argmin(-1)
        chosen = slot.unsqueeze(-1)
        here = torch.arange(positions.shape[-1], device=slot.device) == chosen
        gone = positions.gather(-1, chosen)
        if self.shares is not None:
            here, gone = here & full, gone.masked_fill(full.logical_not(), -1)
        self.dropped(held, new, taken_rows(self._banks(held), chosen), gone, format)
        positions.masked_fill_(here, -1)
        held["free"].copy_(slot if self.shares is None else self._free(positions))


Amount = float | int
"""Of the tokens: a share as a float, a fixed number as an integer."""


def check_budget(p: Pass, budget: float, tokens: int | None = None) -> None:
    """Raise :class:`OptionError` unless the budget of a pass is in (0, 1] and its number of tokens, if any, at least 2."""
    if not 0 < budget <= 1:
        fixed = "; tokens=N keeps a fixed number" if hasattr(p, "tokens") else ""
        raise p.fail("budget", "a share of the prompt above 0, at most 1 (1 keeps everything)" + fixed)
    if tokens is not None and tokens < 2:
        raise p.fail("tokens", "2 or more tokens of each head, whatever the prompt's length")


def check_recent(p: Pass, recent: float) -> None:
    """Raise :class:`OptionError` unless the newest tokens' share of the budget is in [0, 1]."""
    if not 0 <= recent <= 1:
        raise p.fail("recent", "a share of the budget between 0 and 1")


def divided(budget: float, recent: float, tokens: int | None) -> tuple[Amount, Amount]:
    """What is for heavy hitters, and what for the newest tokens: of ``tokens`` if given, else of the share ``budget``."""
    if tokens is None:
        return float(budget * (1 - recent)), float(budget * recent)
    newest = min(max(1, round(tokens * recent)), tokens)
    return tokens - newest, newest


def said(budget: float, tokens: int | None) -> str:
    """A budget in words."""
    return f"{budget:.0%} of the prompt" if tokens is None else "whatever the prompt's length"


def share(total: Tensor, part: Amount) -> Tensor:
    """``int(part * total)`` in integers, so that a half never falls to the wrong side; a fixed number as it is."""
    if isinstance(part, int):
        return torch.full_like(total, part)
    ratio = Fraction(part).limit_denominator(100_000)
    return (total * ratio.numerator) // ratio.denominator
