"""What the caches that a model filled hold: tokens, bytes of each layer, and what keeping everything would take."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from accelpass.api.stateful import caches_of
from accelpass.ir.kv import holdings
from accelpass.view.grouping import runs

if TYPE_CHECKING:
    from accelpass.caches.kv_cache import KVCache, KVLayer


@dataclass(frozen=True)
class LayerBytes:
    """One layer of a cache: bytes of each buffer, their sum, and what a dense layer of this capacity and dtype takes."""

    buffers: dict[str, int]
    bytes: int
    dense_bytes: int


@dataclass(frozen=True)
class CacheReport:
    """One cache.

    Attributes:
        name: as in ``accelpass.state``.
        tokens: of each sequence so far, whether they are kept or not.
        capacity: tokens that a sequence may have.
        bytes: of all that is allocated, scales, scores and positions included.
        dense_bytes: of a cache of the same capacity and dtype that keeps everything.
        ratio: the one by the other: how many times less is held.
    """

    name: str
    tokens: int
    capacity: int
    sequences: int
    bytes: int
    dense_bytes: int
    ratio: float
    layers: tuple[LayerBytes, ...]

    @classmethod
    def of(cls, cache: KVCache, name: str) -> CacheReport:
        layers = tuple(_layer(layer) for layer in cache.layers)
        held, dense = cache.nbytes(), cache.dense_nbytes()
        sequences = cache.layers[0].batch_size
        return cls(name, cache.seen, cache.capacity, sequences, held, dense, dense / held if held else 0.0, layers)


def cache_reports(tensors: Iterable[Tensor]) -> tuple[CacheReport, ...]:
    """Of every live cache that holds tokens which the model with these tensors wrote, oldest first."""
    return tuple(CacheReport.of(cache, f"cache {n}") for n, cache in enumerate(caches_of(tensors)))


def layers_alike(cache: CacheReport) -> list[tuple[str, LayerBytes]]:
    """Layers that hold the same, as ``0..29`` and what one of them holds."""
    groups: dict[tuple[object, ...], list[int]] = {}
    for number, layer in enumerate(cache.layers):
        groups.setdefault((*layer.buffers.items(), layer.dense_bytes), []).append(number)
    return [(", ".join(runs(numbers)), cache.layers[numbers[0]]) for numbers in groups.values()]


def _layer(layer: KVLayer) -> LayerBytes:
    buffers: dict[str, int] = {}
    for name, t in holdings.buffers_of(layer.count):
        buffers[name] = buffers.get(name, 0) + t.numel() * t.element_size()
    return LayerBytes(buffers, sum(buffers.values()), layer.dense_nbytes())
