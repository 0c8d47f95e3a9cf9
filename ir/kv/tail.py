"""Tokens that may be taken back: several candidates in one call, each stored as if it had come alone.

A call of a cache that records its past (``Cache.activate_past_recording``, as assisted generation does) may hold candidates:
tokens whose logits are asked for, so that a caller can reject them. A form that evicts or rounds depends on the tokens before,
and so such a call computes all but attention at once, and stores and attends token by token. What was held before the
candidates, and their keys and values, are the layer's tail until the next call: ``crop`` puts the layer back and stores the accepted ones
again.
"""

from __future__ import annotations

import itertools
import threading
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from accelpass.ir.core.graph import known

Step = Callable[..., Sequence[Tensor]]
"""Of queries, keys, values, the counter, masks, rows that are handed on, what a pass gives, and buffers, which it writes: the
attention, and rows to hand on if there are any."""


@dataclass(eq=False)
class Stepper:
    """How layers that are alike take tokens one by one.

    Attributes:
        whole: all steps of a call of known sizes as one graph, with the operands of the op in their order, each contiguous; a
            compiler puts its code in its place. None: sizes are symbolic, and steps run one by one.
        one: takes one token; several: takes tokens that are no candidates.
        capacity: rows of the layer, for masks over positions.
        along: of each tensor that a pass gives, the dimension of tokens; None if it has none.
        rows: shape of the rows that one token hands on to later layers; None without.
        by_position: tokens are taken back by counting fewer, so that nothing from before them is kept.
    """

    one: Step
    several: Step
    capacity: int
    along: tuple[int | None, ...]
    rows: tuple[int, ...] | None
    by_position: bool = False
    whole: Callable[..., Sequence[Tensor]] | None = None
    number: int = field(default_factory=itertools.count().__next__)

    def __post_init__(self) -> None:
        _STEPPERS[self.number] = self


_STEPPERS: weakref.WeakValueDictionary[int, Stepper] = weakref.WeakValueDictionary()


@dataclass
class Tail:
    """The newest tokens of a layer, which may be taken back.

    Attributes:
        before: counter and buffers before them.
        tokens: of the call; first: how many of them are no candidates, and were stored in one piece.
        left: how many have not been taken back.
        operands: queries, keys, values; masks; rows from an earlier layer; what a pass gives.
    """

    stepper: Stepper
    before: list[Tensor]
    tokens: int
    first: int
    left: int
    operands: tuple[Sequence[Tensor], Sequence[Tensor], Sequence[Tensor], Sequence[Tensor]]

    def store(self, count: Tensor, buffers: Sequence[Tensor], tokens: int) -> list[list[Tensor]]:
        """Store the first ``tokens`` of them; the results of each piece."""
        ends = [n for n in (self.first, *range(self.first + 1, tokens + 1)) if n]
        pieces = zip([0, *ends], [min(end, tokens) for end in ends], strict=False)
        return [self._piece(count, buffers, low, high, turn) for turn, (low, high) in enumerate(pieces) if low < high]

    def _piece(self, count: Tensor, buffers: Sequence[Tensor], low: int, high: int, turn: int) -> list[Tensor]:
        own, masks, rows, given = self.operands
        step = self.stepper
        moved = [
            t if d is None else t.narrow(d, low, high - low).contiguous()
            for t, d in zip(given, step.along, strict=True)
        ]
        operands = [
            *(t[:, :, low:high].contiguous() for t in own),
            count,
            *(self._mask(m, low, high).contiguous() for m in masks),
            *(r[turn] for r in rows),
            *moved,
            *buffers,
        ]
        return list((step.one if high - low == 1 else step.several)(*operands))

    def _mask(self, mask: Tensor, low: int, high: int) -> Tensor:
        """A mask or bias of some tokens, over all positions; of an empty cache it is given over the call's own."""
        rows, columns = mask.shape[-2:]
        if 1 < columns < self.stepper.capacity:
            mask = torch.nn.functional.pad(mask, (0, self.stepper.capacity - columns))
        past = rows - self.tokens
        return mask if rows == 1 and self.tokens > 1 else mask[..., past + low : past + high, :]

    def nbytes(self) -> int:
        """Bytes that are held so that tokens can be taken back."""
        return sum(t.numel() * t.element_size() for some in (self.before, *self.operands) for t in some)

    def stepped(self, count: Tensor, buffers: Sequence[Tensor]) -> list[Tensor]:
        """Store all of them: their attention, and the rows that each hands on, if there are any."""
        results = self.store(count, buffers, self.tokens)
        made = [torch.cat([one[0] for one in results], 2)]
        rows = self.stepper.rows
        if rows is not None:  # tokens that are no candidates attend to all, and hand nothing on
            made.append(torch.stack([one[1] if len(one) > 1 else count.new_zeros(rows) for one in results]))
        return made

    def take_back(self, count: Tensor, buffers: Sequence[Tensor], tokens: int) -> None:
        """Put the layer back as it was before the last ``tokens`` of those that are left."""
        self.left -= tokens
        with torch.no_grad():
            for held, was in zip([count, *buffers], self.before, strict=True):
                held.copy_(was)
            self.store(count, buffers, self.left)


def whole_of(stepper: Stepper, tokens: int, candidates: int, parts: Sequence[int]) -> Step:
    """All steps of a call, as a function of the op's operands in their order.

    Args:
        parts: how many masks, rows and given tensors there are.
    """

    def run(q: Tensor, k: Tensor, v: Tensor, count: Tensor, *more: Tensor) -> list[Tensor]:
        groups, start = [], 0
        for number in parts:
            groups.append(more[start : start + number])
            start += number
        masks, rows, given = groups
        tail = Tail(stepper, [], tokens, tokens - candidates, tokens, ((q, k, v), masks, rows, given))
        return tail.stepped(count, more[start:])

    return run


class _Made(threading.local):
    """Tails of the call that this thread is running, in the order of layers."""

    def __init__(self) -> None:
        self.tails: list[Tail] = []


_MADE = _Made()


def made_tails() -> list[Tail]:
    """The tails of the call that has just ended; they are handed out once."""
    found, _MADE.tails = _MADE.tails, []
    return found


@torch.library.custom_op("accelpass::kv_steps", mutates_args=("buffers",))
def kv_steps(
    stepper: int,
    candidates: int,
    own: Sequence[Tensor],
    count: Tensor,
    masks: Sequence[Tensor],
    rows: Sequence[Tensor],
    given: Sequence[Tensor],
    buffers: Sequence[Tensor],
) -> tuple[Tensor, Tensor, Tensor]:
    """Store new tokens, the last ``candidates`` one by one; their attention, the rows that each hands on (none: empty), and the counter.

    The graph writes the counter back: Inductor (torch 2.13) puts what was computed of an operand, tokens' positions of the counter,
    behind a call that writes to it.

    Args:
        stepper: the number of a :class:`Stepper`.
        own: queries, keys and values ``(batch, heads, tokens, d)``.
        rows: what an earlier layer handed on, the first dimension is that of pieces.
    """
    found, tokens, count = _STEPPERS[stepper], own[1].shape[2], count.clone()
    # Copies: the tail outlives the call, whose memory a compiler uses again.
    kept = tuple([t.clone(memory_format=torch.contiguous_format) for t in some] for some in (own, masks, rows, given))
    before = [] if found.by_position else [t.clone() for t in (count, *buffers)]
    tail = Tail(found, before, tokens, tokens - candidates, tokens, kept)  # type: ignore[arg-type]
    if found.whole is None:
        made = tail.stepped(count, buffers)
    else:
        made = list(found.whole(*kept[0], count, *kept[1], *kept[2], *kept[3], *buffers))
    _MADE.tails.append(tail)
    return made[0], made[1] if len(made) > 1 else count.new_empty(0), count


@kv_steps.register_fake
def _(
    stepper: int,
    candidates: int,
    own: Sequence[Tensor],
    count: Tensor,
    masks: Sequence[Tensor],
    rows: Sequence[Tensor],
    given: Sequence[Tensor],
    buffers: Sequence[Tensor],
) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = own
    out = v.new_empty((*q.shape[:-1], v.shape[-1]))
    found = _STEPPERS[stepper].rows
    pieces = candidates if known(k.shape[2] == candidates) else candidates + 1
    return out, count.new_empty(0 if found is None else (pieces, *found)), torch.empty_like(count)


KV_STEPS = torch.ops.accelpass.kv_steps.default
