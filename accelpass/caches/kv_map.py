"""Which tokens a KVCache keeps while a model answers: a snapshot after each step, to be drawn or counted."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

import accelpass
from accelpass.api.generation import greedy
from accelpass.caches.cache_report import CacheReport
from accelpass.ir.errors import CacheError
from accelpass.ir.kv import holdings
from accelpass.view.grouping import alike, collapse

if TYPE_CHECKING:
    from accelpass.caches.kv_cache import KVCache
    from accelpass.view.report import PassReport

GONE, FEW_BITS, KEPT = 0, 1, 2
"""What became of a token in one head: evicted, kept beside the slots in few bits, kept as the cache's rows are."""

_READS = {
    "tidaldecode": "tidaldecode stores every token. The rows that a sparse layer reads are chosen anew in each call and kept "
    "nowhere, so that they cannot be shown here."
}
"""Passes that choose what is read and not what is kept."""


@dataclass(frozen=True)
class Step:
    """The cache after one call.

    Attributes:
        seen: tokens so far.
        layers: of each chosen layer, what :func:`kept` says.
        counts: of each layer, tokens a head that are (kept, in few bits), as means over heads.
    """

    seen: int
    layers: dict[int, Tensor]
    counts: tuple[tuple[float, float], ...]


@dataclass
class KVMap:
    """Snapshots of one cache, the first after the prompt.

    Attributes:
        layers: those of which each step is kept whole.
        last: of every layer, what :func:`kept` says after the last step.
        passes: name and what was done, of the passes that changed the cache.
        notes: what a reader must know to read the picture right.
    """

    cache: KVCache
    layers: tuple[int, ...]
    steps: list[Step] = field(default_factory=list)
    last: tuple[Tensor, ...] = ()
    passes: dict[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def snap(self) -> None:
        """Look at the cache now."""
        self.last = tuple(kept(self.cache, n) for n in range(len(self.cache.layers)))
        counts = tuple((_a_head(t, KEPT), _a_head(t, FEW_BITS)) for t in self.last)
        self.steps.append(Step(self.cache.seen, {n: self.last[n] for n in self.layers}, counts))

    @property
    def prompt(self) -> int:
        """Tokens of the prompt."""
        return self.steps[0].seen

    @property
    def has_few_bits(self) -> bool:
        """Whether any token was ever kept in few bits beside the slots."""
        return any(few for step in self.steps for _, few in step.counts)

    def sizes(self) -> CacheReport:
        """Bytes that are held, and what a dense cache takes."""
        return CacheReport.of(self.cache, "cache")

    def to_dict(self) -> dict[str, Any]:
        """Plain values: tokens a head that each layer keeps after each step, as means over heads."""
        sizes = self.sizes()
        return {
            "passes": self.passes,
            "prompt_tokens": self.prompt,
            "layers": len(self.last),
            "bytes": sizes.bytes,
            "dense_bytes": sizes.dense_bytes,
            "ratio": sizes.ratio,
            "notes": list(self.notes),
            "steps": [
                {"seen": s.seen, "kept": [k for k, _ in s.counts], "few_bits": [f for _, f in s.counts]}
                for s in self.steps
            ],
        }


def kept(cache: KVCache, layer: int, sequence: int = 0) -> Tensor:
    """What became of each token of one sequence in one layer: uint8 ``(kv_heads, tokens seen)`` on the CPU.

    Raises:
        CacheError: the layer stores rows in an order that it does not tell.
    """
    count = cache.layers[layer].count
    seen = holdings.holding_of(count).tokens
    buffers = {name.removeprefix("kv."): t for name, t in holdings.buffers_of(count)}
    positions = buffers.get("positions")
    if positions is None:
        rows = buffers.get("keys", buffers.get("keys.codes"))
        if rows is None or rows.shape[2] not in (cache.capacity, cache.layers[layer].capacity):
            raise CacheError(
                f"layer {layer} keeps {', '.join(buffers) or 'nothing'}, which does not tell whose rows they are"
            )
        return torch.full((rows.shape[1], seen), KEPT, dtype=torch.uint8)
    at = positions[sequence].cpu().long()
    found = torch.full((at.shape[0], seen), GONE, dtype=torch.uint8)
    retained = buffers.get("is_retained")
    if retained is not None:
        found[retained[sequence, :, :seen].cpu()] = FEW_BITS
    # Empty slots are at -1: one more column takes them, and is dropped.
    marks = torch.zeros(at.shape[0], seen + 1, dtype=torch.bool)
    marks.scatter_(1, torch.where(at < 0, seen, at), True)
    found[marks[:, :seen]] = KEPT
    return found


def pick_layers(count: int, asked: Sequence[int] | None = None) -> tuple[int, ...]:
    """The asked layers, or the first, middle and last of ``count``.

    Raises:
        CacheError: there is no such layer.
    """
    for n in asked or ():
        if not 0 <= n < count:
            raise CacheError(f"there is no layer {n}: the model has {count}, from 0 to {count - 1}")
    return tuple(dict.fromkeys(asked or (0, count // 2, count - 1)))


def record(
    fast: Any,
    input_ids: Tensor,
    cache: KVCache,
    max_new_tokens: int,
    layers: Sequence[int] | None = None,
    on_token: Callable[[int], None] = lambda _: None,
) -> KVMap:
    """Answer greedily, with a snapshot after the prompt and after each token that is fed back.

    Args:
        fast: the compiled model.
        cache: for it and its passes; of a batch, the first sequence is looked at.
        layers: whose snapshots are kept whole; the first, middle and last if None.
        on_token: called with how many tokens exist.
    """
    made = KVMap(cache, pick_layers(len(cache.layers), layers))

    def after(number: int) -> None:
        made.snap()
        on_token(number)

    greedy(fast, input_ids, cache, max_new_tokens, on_token=after)
    changed = {n: p for n, p in accelpass.explain(fast).passes.items() if p.phase == "cache"}
    made.passes = {name: _done(p) for name, p in changed.items()}
    made.notes = tuple(_notes(made, changed))
    return made


def _notes(made: KVMap, passes: dict[str, PassReport]) -> list[str]:
    notes = [_READS[name] for name in passes if name in _READS]
    if not notes and all(bool((t == KEPT).all()) for t in made.last):
        notes.append("Every token is kept in every head; a pass may still have changed how its rows are written.")
    return notes


def _done(p: PassReport) -> str:
    """What a pass did, layers that fared alike together, and how many it left alone."""
    said = alike({site: done.what for site, done in p.took.items()})
    parts = [what if len(said) == 1 else f"{', '.join(collapse(sites))}: {what}" for what, sites in said]
    if p.skipped:
        parts.append(f"left alone: {', '.join(collapse(p.skipped))}")
    return "; ".join(parts)


def _a_head(kept: Tensor, level: int) -> float:
    return round(float((kept == level).sum()) / kept.shape[0], 3)
