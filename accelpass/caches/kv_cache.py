"""A key/value cache for transformers models whose form the passes of the compiled model decide."""

from __future__ import annotations

import copy
import itertools
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, get_layer_types_and_kwargs

from accelpass.ir.core.state import STATE
from accelpass.ir.errors import CacheError
from accelpass.ir.kv import holdings
from accelpass.ir.kv import ops as _ops  # registers the ops

assert _ops


class KVLayer(CacheLayerMixin):
    """One layer: a counter, which names the layer's storage to a graph, and no tensors of its own.

    Attributes:
        count: tokens held, int64 ``(batch,)``; the same number for each sequence, padding included.
        fresh: nothing is held. A Python value, so that an empty layer is a graph of its own: the prompt then attends to
            itself alone.
        window: how many of the newest tokens the layer's attention sees, as the model's config says; 0 for all.
        record_past: candidates can be taken back.
        token_bytes: what one token of one sequence takes as the model computes it; 0 before the first.
    """

    is_compileable = True
    is_sliding = False
    is_croppable = True

    def __init__(self, capacity: int, batch_size: int, device: torch.device, window: int = 0) -> None:
        super().__init__()
        del self.keys, self.values  # the mixin's, which would be None
        # As text: of two caches' numbers Dynamo would make a symbolic one, and buffers want to know their size.
        self._capacity, self._batch_size, self._window = str(holdings.room_for(capacity)), str(batch_size), str(window)
        self.count = torch.zeros(batch_size, dtype=torch.int64, device=device)
        self.fresh = True
        self.record_past = False
        self.token_bytes = 0
        self.is_initialized = True
        holdings.register(self.count, capacity, _renewing(self))

    def __getattr__(self, name: str) -> Any:
        if name in ("keys", "values"):
            raise AttributeError(
                f"a KVCache has no {name} to read: they may be stored in another form. For cross attention use "
                "transformers.EncoderDecoderCache(accelpass.KVCache(...), transformers.DynamicCache())"
            )
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    @property
    def capacity(self) -> int:
        """Tokens that the layer has room for: what was asked for, rounded up, so that few graphs serve all capacities."""
        return int(self._capacity)

    @property
    def batch_size(self) -> int:
        return int(self._batch_size)

    @property
    def window(self) -> int:
        return int(self._window)

    def dense_nbytes(self) -> int:
        """Bytes of a layer of this capacity and dtype that keeps everything; 0 before the first token."""
        return self.token_bytes * self.capacity * self.batch_size

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to do: what a layer holds is allocated when it is first filled."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Store new keys and values ``(batch, kv_heads, tokens, d)``; returns what attention reads.

        Raises:
            CacheError: another number of sequences, or more tokens than fit.
        """
        if key_states.shape[0] != self.batch_size:
            raise CacheError(
                f"this KVCache is for {self.batch_size} sequences, the call has {key_states.shape[0]}; "
                f"make it with batch_size={key_states.shape[0]}"
            )
        records = key_states.shape[2] > 1 and self.record_past
        torch.ops.accelpass.kv_append(key_states, value_states, self.count, self.capacity, self.window, records, [])
        if self.fresh:
            self.fresh = False
            row = key_states.shape[1] * (key_states.shape[3] + value_states.shape[3])
            self.token_bytes = row * key_states.dtype.itemsize
            return key_states, value_states
        return torch.ops.accelpass.kv_read(self.count, key_states, value_states, self.capacity)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return (query_length, 0) if self.fresh else (self.capacity, 0)

    def get_seq_length(self) -> Any:
        """Tokens read: 0, or a tensor, so that a graph serves every length.

        Of a prompt that was shortened, callers go on counting what was left out; the graph counts what is held.
        """
        if self.fresh or torch.compiler.is_compiling():
            return 0 if self.fresh else self.count[0]
        return self.count[0] + holdings.holding_of(self.count).dropped

    def get_max_length(self) -> int:
        return self.capacity

    def reset(self) -> None:
        holdings.clear(self.count)
        self.fresh = True

    def reorder_cache(self, beam_idx: Tensor) -> None:
        holdings.holding_of(self.count).tail = None
        STATE.reorder(self.count, beam_idx)

    def activate_past_recording(self) -> None:
        """Store candidates so that they can be taken back: the tokens of a call whose logits are asked for, but the first."""
        self.record_past = True

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the newest tokens.

        Raises:
            CacheError: they are not held, are of a prompt that was shortened, or were no candidates of the last call and a pass
                has evicted or rounded for them.
        """
        holding, removed = holdings.holding_of(self.count), abs(tokens_to_remove)
        if not removed or not holding.tokens:
            return
        if _ops.UNEVEN in (holding.form or ()):
            raise CacheError("a KVCache whose layers hold different numbers of tokens cannot be cropped (skip_layers)")
        holding.check_crop(removed)
        holding.crop(self.count, removed)
        if not holding.tokens:
            self.reset()

    def __deepcopy__(self, memo: dict[int, Any]) -> KVLayer:
        """A layer of its own that holds the same: a prompt that is read once can be answered several times."""
        twin = KVLayer(self.capacity, self.batch_size, self.count.device, self.window)
        twin.fresh, twin.token_bytes = self.fresh, self.token_bytes
        holdings.restore(twin.count, holdings.snapshot(self.count, copied=False))
        return twin

    def batch_repeat_interleave(self, repeats: int) -> None:
        raise CacheError(f"a KVCache keeps its batch size; make it with batch_size={self.batch_size * repeats}")

    def batch_select_indices(self, indices: Tensor) -> None:
        raise CacheError("a KVCache keeps its batch size; make one for the sequences that go on")

    def __repr__(self) -> str:
        return f"KVLayer({holdings.holding_of(self.count).tokens} of {self.capacity} tokens)"


def _renewing(layer: KVLayer) -> Callable[[], None]:
    """Makes the layer fresh. It is kept as long as the layer's counter lives, so it must not keep the layer."""
    alive = weakref.ref(layer)

    def renew() -> None:
        found = alive()
        if found is not None:
            found.fresh = True

    return renew


_CACHES: weakref.WeakSet[KVCache] = weakref.WeakSet()
_NUMBERS = itertools.count()


def live_caches() -> list[KVCache]:
    """Every cache that something still holds, oldest first."""
    return sorted(_CACHES, key=lambda cache: cache.number)


class KVCache(Cache):
    """Keys and values of a decoder model, for ``model.generate(..., past_key_values=cache)`` or a loop of one's own.

    Without a KV pass it keeps everything, exactly. Compiled with passes such as ``h2o``, it holds what these keep; dense keys
    and values are then never allocated. It is used from its beginning, or goes on where the last call ended.

    Args:
        model: the model, or its config.
        capacity: tokens, prompt and answer together, that a sequence may have.
        batch_size: sequences; with beams, sequences times beams.
        device: where the model is; taken from the model if it is given.

    Raises:
        CacheError: a capacity or batch size below 1, or a model without a decoder's cache.
    """

    def __init__(
        self, model: Any, capacity: int, batch_size: int = 1, device: torch.device | str | None = None
    ) -> None:
        config = getattr(model, "config", model)
        if capacity < 1 or batch_size < 1:
            raise CacheError(f"capacity={capacity}, batch_size={batch_size}: both are at least 1")
        if device is None:
            weight = next(model.parameters(), None) if isinstance(model, torch.nn.Module) else None
            device = weight.device if weight is not None else "cpu"
        text = config.get_text_config(decoder=True)
        kinds = set(getattr(text, "layer_types", None) or ())
        other = sorted(kinds - {"full_attention", "sliding_attention", "chunked_attention"})
        if other:
            raise CacheError(
                f"{type(config).__name__} has layers of kind {', '.join(other)}, which keep no keys and values; use the "
                "model's own cache"
            )
        if isinstance(model, torch.nn.Module) and not _decodes(model):
            raise CacheError(f"{type(model).__name__} generates nothing, and so has no key/value cache")
        _, settings = get_layer_types_and_kwargs(text)
        windows = [one.get("sliding_window") or 0 for one in settings]
        super().__init__(layers=[KVLayer(capacity, batch_size, torch.device(device), w) for w in windows])
        self.capacity = capacity
        self.number = next(_NUMBERS)
        _CACHES.add(self)

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the newest tokens of each sequence; all layers do, or none.

        Raises:
            CacheError: see :meth:`KVLayer.crop`.
        """
        for holding in (holdings.holding_of(layer.count) for layer in self.layers):
            if holding.tokens:
                holding.check_crop(abs(tokens_to_remove))
        super().crop(tokens_to_remove)

    def snapshot(self) -> CacheSnapshot:
        """A copy of all that is held: a prompt that many requests begin with is read once, and :meth:`restore` goes back to its end."""
        return CacheSnapshot([(holdings.snapshot(one.count), one.fresh, one.token_bytes) for one in self.layers])

    def restore(self, saved: CacheSnapshot) -> None:
        """Hold what a snapshot of this cache does, or one of a cache of the same model, capacity and batch size.

        Raises:
            CacheError: it is of a cache of another size; nothing is changed.
        """
        sizes = [(holdings.holding_of(one.count).room, one.batch_size) for one in self.layers]
        theirs = [(held.holding.room, len(held.count)) for held, _, _ in saved.layers]
        if sizes != theirs:
            raise CacheError(
                f"the snapshot is of a cache of {_sizes(theirs)}, this one has {_sizes(sizes)}; make it with the same model, capacity "
                "and batch_size"
            )
        for layer, (held, fresh, token_bytes) in zip(self.layers, saved.layers, strict=True):
            holdings.restore(layer.count, held)
            layer.fresh, layer.token_bytes = fresh, token_bytes

    def counted(self, counts: Sequence[Tensor], fresh: bool) -> KVCache:
        """The same cache with other counters, for a graph that is traced: it is neither listed nor does it hold anything."""
        twin = copy.copy(self)
        twin.layers = [copy.copy(layer) for layer in self.layers]
        for layer, count in zip(twin.layers, counts, strict=True):
            layer.count, layer.fresh = count, fresh
        return twin

    def nbytes(self) -> int:
        """Bytes of all that is stored: scales, scores and positions, and what candidates of the last call need, included."""
        tails = (holdings.holding_of(layer.count).tail for layer in self.layers)
        held = sum(t.numel() * t.element_size() for _, _, t in self.buffers())
        return held + sum(tail.nbytes() for tail in tails if tail is not None)

    def dense_nbytes(self) -> int:
        """Bytes of a cache of this capacity and dtype that keeps everything; 0 before the first token."""
        return sum(layer.dense_nbytes() for layer in self.layers)

    def buffers(self) -> list[tuple[int, str, Tensor]]:
        """Layer, name and tensor of everything that is stored."""
        return [(i, n, t) for i, layer in enumerate(self.layers) for n, t in holdings.buffers_of(layer.count)]

    @property
    def seen(self) -> int:
        """Tokens of each sequence so far."""
        return max(holdings.holding_of(layer.count).tokens for layer in self.layers)

    def __repr__(self) -> str:
        return (
            f"KVCache({len(self.layers)} layers, {self.seen} of {self.capacity} tokens, {self.nbytes() / 1e6:.1f} MB)"
        )


@dataclass(frozen=True, eq=False)
class CacheSnapshot:
    """What a :class:`KVCache` held: of each layer the snapshot, whether it was empty, and the bytes of a token."""

    layers: Sequence[tuple[holdings.LayerSnapshot, bool, int]]

    def nbytes(self) -> int:
        """Bytes of the copies."""
        return sum(held.slots.nbytes() for held, _, _ in self.layers)


def _sizes(layers: Sequence[tuple[int, int]]) -> str:
    room, batch = layers[0]
    return f"{len(layers)} layers, {room} rows and {batch} sequences"


def _decodes(model: torch.nn.Module) -> bool:
    """Whether the model, or the one that it wraps, is a decoder."""
    inner: Any = getattr(model, "_orig_mod", model)
    config = inner.config.get_text_config(decoder=True)
    generates = getattr(inner, "can_generate", None)
    return bool(generates and generates()) or getattr(config, "is_decoder", False) or hasattr(config, "rope_parameters")
