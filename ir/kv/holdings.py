"""What each cache layer holds, known on the host: how many tokens, in which form, and of which model."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from accelpass.ir.core.state import STATE, Snapshot
from accelpass.ir.errors import CacheError
from accelpass.ir.kv.tail import Tail
from accelpass.ir.torch_private import has_stopped_compiling

_LIMIT = (
    " Dynamo has compiled some function as often as it may and runs it uncompiled now, without the passes: raise "
    "torch._dynamo.config.recompile_limit before the first call."
)


def room_for(capacity: int) -> int:
    """The rows that a cache layer of this capacity has: rounded up to a sixteenth of the power of two above it, at least to 8.

    Rows are part of a graph, so a server whose requests all ask for another capacity would have a graph for each. With sixteen
    sizes an octave there are few, and the rows that are never used, which attention reads all the same, stay below 7 %.
    """
    step = max(8, 1 << max((capacity - 1).bit_length() - 5, 0))
    return -(-capacity // step) * step


@dataclass
class Holding:
    """One layer of one cache.

    Attributes:
        capacity: tokens that it may hold; ``room``, the rows that it has for them.
        tokens: how many it has seen.
        form: how they are stored, in which dtype, for how many heads of which widths; None while it is empty.
        model: a tensor of the model that filled it.
        dropped: tokens of the prompt that were left out; ``kept`` are the first ones that are held, if any were left out.
        empty: puts the layer's owner back to its start.
        tail: the newest tokens, if the last call stored them so that they can be taken back; buffers: what they are stored in.
        by_position: each token has a row of its own, so that any of the newest can be forgotten.
        by_mask: several tokens at once see what their mask says, each as if it had come alone.
        method, site: who keeps the tokens, and where, for messages.
    """

    capacity: int
    room: int
    tokens: int = 0
    form: Any = None
    model: weakref.ref[Tensor] | None = None
    dropped: int = 0
    kept: int = 0
    empty: Callable[[], None] | None = field(default=None, repr=False)
    tail: Tail | None = field(default=None, repr=False)
    buffers: Sequence[Tensor] = field(default=(), repr=False)
    by_position: bool = True
    by_mask: bool = True
    method: str = "the model"
    site: str = ""

    def check(self, tokens: int, form: Any, model: Tensor | None, fresh: bool) -> None:
        """Refuse a call before it writes anything.

        Raises:
            CacheError: the tokens do not fit, or the cache holds what another model or other passes wrote.
        """
        if self.tokens + tokens > self.capacity:
            held = f" after the {self.tokens} that it holds" if self.tokens else ""
            raise CacheError(
                f"{tokens} tokens do not fit into a KVCache of capacity {self.capacity}{held}; nothing was written. "
                f"Use accelpass.KVCache(model, capacity={self.tokens + tokens}) or more, or cache.reset()."
            )
        if fresh and self.tokens:
            raise CacheError("this cache is not empty, but is used as if it were; call cache.reset() on it")
        if not self.tokens:
            return
        if self.form is not None and form != self.form:
            raise CacheError(
                f"this KVCache holds {self.tokens} tokens as {_shown(self.form)}; this call stores {_shown(form)}. Use one "
                "model, dtype and set of KV passes for all calls on a cache, or call cache.reset() in between."
                + (_LIMIT if has_stopped_compiling() else "")
            )
        before = self.model() if self.model is not None else None
        if model is not None and before is not None and before is not model:
            raise CacheError("this KVCache was filled by another model; call cache.reset(), or make one for each model")

    def add(self, tokens: int, form: Any, model: Tensor | None) -> None:
        """Note what a call has written."""
        self.tokens += tokens
        self.form = form
        if model is not None:
            self.model = weakref.ref(model)

    def forget(self) -> None:
        self.tokens, self.form, self.model, self.dropped, self.kept = 0, None, None, 0, 0
        self.tail, self.buffers, self.by_position, self.by_mask = None, (), True, True

    def check_crop(self, tokens: int) -> None:
        """Refuse to take back so many of the newest tokens, before anything is changed.

        Raises:
            CacheError: they are not held, or what was evicted or rounded for them cannot be taken back.
        """
        if tokens > self.tokens:
            raise CacheError(
                f"cannot remove {tokens} tokens: {self.tokens} are held; take back fewer, or empty the cache with cache.reset()"
            )
        if self.tokens - tokens < self.kept:
            raise CacheError(
                f"{self.dropped} tokens of the prompt were left out, so it cannot be cropped; cache.reset() empties the cache"
            )
        left = 0 if self.tail is None else self.tail.left
        if not self.by_position and tokens > left:
            raise CacheError(
                f"{self.method} at {self.site or 'a layer'} cannot be cropped by {tokens} tokens: what it evicted or rounded for "
                f"them is gone. {f'The {left} candidates of the last call' if left else 'Only candidates of the last call'} can "
                "be taken back: call cache.activate_past_recording() before the model, and ask for their logits in one call, as "
                "assisted generation does; or copy.deepcopy(cache) before tokens that may be taken back."
            )

    def crop(self, count: Tensor, tokens: int) -> None:
        """Take back so many of the newest tokens of the layer with this counter; see :meth:`check_crop`."""
        self.tokens -= tokens
        if self.by_position:
            count.sub_(tokens)
        else:
            assert self.tail is not None
            self.tail.take_back(count, self.buffers, tokens)


def _shown(form: Any) -> str:
    return " ".join(map(str, form)) if isinstance(form, tuple) else str(form)


_HOLDINGS: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def register(count: Tensor, capacity: int, empty: Callable[[], None] | None = None) -> Holding:
    """Make ``count`` (int64, one number a sequence) the counter of a cache layer."""
    _HOLDINGS[count] = holding = Holding(capacity, room_for(capacity), empty=empty)
    return holding


def holding_of(count: Tensor) -> Holding:
    """What the layer with this counter holds.

    Raises:
        CacheError: the tensor is no counter of a cache that is alive.
    """
    found = _HOLDINGS.get(count)
    if found is None:
        raise CacheError("kv_append and kv_read take the counter of an accelpass.KVCache; this tensor is none")
    return found


def holdings() -> list[tuple[Tensor, Holding]]:
    """Counter and holding of every cache layer alive."""
    return list(_HOLDINGS.items())


def buffers_of(count: Tensor) -> list[tuple[str, Tensor]]:
    """Name and tensor of everything that is stored for the layer with this counter."""
    return [(slot.spec.name, slot.tensor) for _, slot in STATE.of([count])]


@dataclass(frozen=True, eq=False)
class LayerSnapshot:
    """What one layer held: its counter, what the host knows of it, and all its slots."""

    count: Tensor
    holding: Holding
    slots: Snapshot


def snapshot(count: Tensor, copied: bool = True) -> LayerSnapshot:
    """What the layer with this counter holds, candidates of the last call accepted; ``copied``: see :meth:`.StateStore.snapshot`."""
    return LayerSnapshot(count.clone(), replace(holding_of(count)), STATE.snapshot(count, copied))


def restore(count: Tensor, saved: LayerSnapshot) -> None:
    """Let a layer, of the same cache or of another of its size, hold what ``saved`` does."""
    with torch.no_grad():
        count.copy_(saved.count)
    STATE.restore(count, saved.slots)
    mine, its = saved.holding, holding_of(count)
    its.tokens, its.form, its.model = mine.tokens, mine.form, mine.model
    its.dropped, its.kept, its.tail, its.buffers = mine.dropped, mine.kept, None, ()
    its.by_position, its.by_mask, its.method, its.site = mine.by_position, mine.by_mask, mine.method, mine.site


def clear(count: Tensor) -> None:
    """Empty the layer: counters and buffers as they were at the start."""
    with torch.no_grad():
        count.zero_()
    STATE.reset(count)
    holding_of(count).forget()
