"""Keys and values of all tokens of a text, some of which are computed anew: a cache for models that read in both directions."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin


class _RowLayer(CacheLayerMixin):
    """Keys and values ``(batch, kv_heads, tokens, d)`` of one layer; the first call fills them, later ones replace rows."""

    is_sliding = False
    is_compileable = False

    def __init__(self, cache: RowCache) -> None:
        super().__init__()
        self.cache = cache

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.keys, self.values = key_states, value_states
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """What attention reads: all rows, those of this call among them."""
        at = self.cache.rows
        if at is None:
            self.lazy_initialization(key_states, value_states)
        else:
            assert self.keys is not None and self.values is not None
            self.keys = self.keys.index_copy(2, at, key_states)
            self.values = self.values.index_copy(2, at, value_states)
        assert self.keys is not None and self.values is not None
        return self.keys, self.values

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return (query_length if self.keys is None else self.keys.shape[2]), 0

    def get_seq_length(self) -> int:
        """0: no row comes after those that are held."""
        return 0

    def get_max_length(self) -> int:
        return -1


class RowCache(Cache):
    """Frozen keys and values of a text ("dual cache" of Fast-dLLM, arXiv 2505.22618): a call replaces those of its own rows.

    Attributes:
        rows: places of the call's tokens in the text ``(tokens,)``; None: the call is of the whole text.
    """

    def __init__(self) -> None:
        super().__init__(layers=[])
        self.rows: Tensor | None = None

    @property
    def filled(self) -> bool:
        return bool(self.layers)

    def at(self, rows: Tensor | None) -> None:
        self.rows = rows

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        while len(self.layers) <= layer_idx:
            self.layers.append(_RowLayer(self))
        layer: Any = self.layers[layer_idx]
        made: tuple[Tensor, Tensor] = layer.update(key_states, value_states)
        return made
