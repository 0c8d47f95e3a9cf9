"""Storage under a budget: a fixed number of slots for each head, and a rule that says whose token leaves.

A method is a subclass: what a token's score is, how many tokens stay, and which may never leave.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from fractions import Fraction
from typing import ClassVar

import torch
from torch import Tensor

from accelpass.ir.attention.spec.spec import AttentionMass, ScoreTap
from accelpass.ir.core.derived import StateSpec
from accelpass.ir.kv.banks import EXACT, RowFormat, buffer, put_rows, taken_rows
from accelpass.ir.kv.storage import Held, Layout, New, Query, Segment, Storage, bank
from accelpass.passes.core.base import Pass


@dataclass(frozen=True)
class Slots(Storage):
    """At most :meth:`quota` tokens for each head, in slots in no order; each slot knows its token's position.

    Order within a call: store the new tokens, attend over all that is there, update the scores, evict. A token that was
    evicted never returns.
    """

    knows_held: ClassVar[bool] = True

    @abstractmethod
    def most(self, capacity: int) -> int:
        """The largest number of tokens that may stay in a layer of this capacity."""

    @abstractmethod
    def quota(self, total: Tensor) -> tuple[Tensor, Tensor]:
        """How many tokens stay after a prompt that ends at ``total`` tokens, and how many of these are the newest."""

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

    def states(self, layout: Layout, format: RowFormat) -> list[StateSpec]:
        heads, slots = layout.kv_heads, self.most(layout.capacity) + 1
        return [
            *format.states("keys", heads, slots, layout.width, layout.dtype),
            *format.states("values", heads, slots, layout.value_width, layout.dtype),
            buffer("positions", (heads, slots), torch.int32, -1),
            buffer("score", (heads, slots), torch.float32),
            buffer("free", (heads,), torch.int64),
            buffer("quota", (3,), torch.int64),
        ]

    def fill(self, held: Held, new: New, layout: Layout, format: RowFormat) -> None:
        rows = [*format.encode(new.k), *format.encode(new.v)]
        self.keep(held, new, rows, new.positions.to(torch.int32), self.prompt_score(new), format)

    def extend(self, held: Held, new: New, query: Query, layout: Layout, format: RowFormat) -> Tensor:
        keys, values, positions = bank(held, "keys"), bank(held, "values"), held["positions"]
        step = new.total - held["quota"][:, 2]
        if query.one:
            slot = held["free"].unsqueeze(-1)
            put_rows([*keys, *values, positions], slot, [*format.encode(new.k), *format.encode(new.v), new.positions])
            slots = Segment(format, keys, values, positions.long(), positions >= 0)
            done = query.tapped(self.tap, new, step, slots, *self.elsewhere(held, query))
            here = torch.arange(positions.shape[-1], device=slot.device) == slot
            before = self.carried(held["score"].masked_fill(here, 0.0), 1)
            held["score"].copy_(self.step_score(before, done.mass[0], positions))
            self.leave(held, new, format)
            return done.out
        at = new.positions
        slots = Segment(format, keys, values, positions.long(), positions >= 0)
        done = query.tapped(
            self.tap, new, step, slots, Segment(EXACT, [new.k], [new.v], at), *self.elsewhere(held, query)
        )
        rows = [
            torch.cat([old, made], 2)
            for old, made in zip([*keys, *values], [*format.encode(new.k), *format.encode(new.v)], strict=True)
        ]
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

    def keep(
        self, held: Held, new: New, rows: list[Tensor], positions: Tensor, score: Tensor, format: RowFormat
    ) -> None:
        """Fill the slots with the best of these rows, as many as the quota says; sets the quota."""
        self.dropped(held, new, rows, positions, format)
        slots = held["positions"].shape[-1]
        limit, newest = self.quota(new.total)
        limit = limit.clamp_max(slots - 1)
        rank = self.rank(score, positions, new.total)
        first = torch.where(self.pinned(positions, new.total, newest), float("inf"), rank)
        first = first.masked_fill(positions < 0, float("-inf"))
        # There may be fewer rows than slots: more columns that stand for none.
        none = first.new_full((1, 1, 1), float("-inf")).expand(*first.shape[:2], slots)
        best = torch.topk(torch.cat([first, none], -1), slots, -1).indices
        in_use = (torch.arange(slots, device=best.device) < limit[:, None, None]) & (best < first.shape[-1])
        best = best.clamp_max(first.shape[-1] - 1)
        for stored, kept in zip([*bank(held, "keys"), *bank(held, "values")], taken_rows(rows, best), strict=True):
            stored.copy_(kept)
        where = positions.gather(-1, best)
        where = where.masked_fill(in_use.logical_not(), -1)
        held["positions"].copy_(where)
        held["score"].copy_(score.gather(-1, best))
        held["free"].copy_(where.argmin(-1))
        held["quota"].copy_(torch.stack([limit, newest, new.total], -1))

    def leave(self, held: Held, new: New, format: RowFormat) -> None:
        """Free one slot: an empty one while there is room, else that of the token with the lowest score."""
        positions, quota, total = held["positions"], held["quota"], new.total
        empty = positions < 0
        full = (positions >= 0).sum(-1, keepdim=True) > quota[:, 0, None, None]
        rank = self.rank(held["score"], positions, total)
        worth = torch.where(self.pinned(positions, total, quota[:, 1]), float("inf"), rank)
        worth = torch.where(empty, torch.where(full, float("inf"), float("-inf")), worth)
        slot = worth.argmin(-1)
        chosen = slot.unsqueeze(-1)
        rows = taken_rows([*bank(held, "keys"), *bank(held, "values")], chosen)
        self.dropped(held, new, rows, positions.gather(-1, chosen), format)
        held["free"].copy_(slot)
        here = torch.arange(positions.shape[-1], device=slot.device) == chosen
        positions.masked_fill_(here, -1)


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
