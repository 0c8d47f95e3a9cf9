"""What a KVCache holds is listed with the model's state, emptied by reset, told by the report, and freed with the cache."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import pytest
import torch

import accelpass
from accelpass.api.generation import cache_for, greedy
from accelpass.ir.kv import holdings
from accelpass.view.report import Report
from tests.public.conftest import LAYERS, tiny_llama

CAPACITY, PROMPT, STEPS = 24, 10, 4
SEEN = PROMPT + STEPS - 1
KV_HEADS, WIDTH = 2, 16
DENSE_LAYER = 2 * KV_HEADS * WIDTH * CAPACITY * 4
IDS = torch.arange(PROMPT)[None]


def filled(model: Any, *passes: Any) -> tuple[Any, Any, list[int]]:
    """The model compiled with these passes, a cache that it has filled, and its answer."""
    fast = accelpass.compile(model, list(passes), lowering="eager")
    cache = accelpass.KVCache(model, CAPACITY)
    return fast, cache, greedy(fast, IDS, cache, STEPS).tokens


@pytest.fixture(scope="module")
def mixed() -> tuple[Any, Any, Report]:
    """A compiled model, its cache, of which one layer is evicted from and the other also quantized, and the report.

    Only to look at: each test begins without compiled graphs, so that a further call would compile anew.
    """
    fast, cache, _ = filled(tiny_llama(), "h2o", {"name": "kv_quant", "exclude": ["*.0.*"]})
    return fast, cache, accelpass.explain(fast)


def test_state_lists_each_buffer_of_each_layer(mixed: tuple[Any, Any, Report]) -> None:
    fast, cache, _ = mixed
    listed = accelpass.state(fast)
    assert [(s.owner, s.name, s.shape, s.dtype) for s in listed] == [
        (f"cache 0, layer {i}", name, tuple(t.shape), t.dtype) for i, name, t in cache.buffers()
    ]
    assert {"kv.keys", "kv.keys.codes", "kv.positions", "kv.score"} <= {s.name for s in listed}
    assert sum(s.bytes for s in listed) == cache.nbytes()
    assert {s.lifetime for s in listed} == {"sequence"}


def test_report_has_the_bytes_of_each_layer(mixed: tuple[Any, Any, Report]) -> None:
    _, cache, report = mixed
    (held,) = report.caches
    assert (held.name, held.tokens, held.capacity, held.sequences) == ("cache 0", SEEN, CAPACITY, 1)
    assert held.bytes == cache.nbytes() == sum(layer.bytes for layer in held.layers)
    assert held.dense_bytes == DENSE_LAYER * LAYERS
    assert held.ratio == held.dense_bytes / held.bytes > 4
    for index, layer in enumerate(held.layers):
        assert layer.buffers == {n: t.numel() * t.element_size() for i, n, t in cache.buffers() if i == index}
        assert (layer.bytes, layer.dense_bytes) == (sum(layer.buffers.values()), DENSE_LAYER)
    assert report.to_dict()["caches"][0]["layers"][1]["buffers"]["kv.keys.codes"] == 5 * KV_HEADS * WIDTH // 2
    assert report.memory["derived"] == 0, "state is not packed weights"


def test_report_shows_the_caches(mixed: tuple[Any, Any, Report], tmp_path: Path) -> None:
    report = mixed[2]
    text = str(report)
    assert f"cache 0  {SEEN} of {CAPACITY} tokens" in text
    assert "keys 640 B" in text and "keys.codes" in text, "layers that differ have lines of their own"
    assert len(text.splitlines()) <= 45 and max(map(len, text.splitlines())) <= 100
    page = report.to_html(tmp_path / "r.html").read_text()
    assert "Key/value caches" in page and "keys.codes" in page


def test_reset_empties_the_caches_of_this_model_alone(mixed: tuple[Any, Any, Report]) -> None:
    gc.collect()
    others = len(holdings.holdings())
    model = tiny_llama()
    fast, cache, first = filled(model, "h2o")
    second = accelpass.KVCache(model, CAPACITY)
    greedy(fast, IDS, second, 1)
    assert {s.owner.split(",")[0] for s in accelpass.state(fast)} == {"cache 0", "cache 1"}
    assert [(c.name, c.tokens) for c in accelpass.explain(fast).caches] == [("cache 0", SEEN), ("cache 1", PROMPT)]
    assert sum(s.bytes for s in accelpass.state(mixed[0])) == mixed[1].nbytes(), "another model's are not listed"

    accelpass.reset(fast)
    assert (cache.seen, second.seen, mixed[1].seen) == (0, 0, SEEN)
    assert all(layer.fresh and not layer.count.any() for layer in cache.layers)
    assert all((t == (-1 if name == "kv.positions" else 0)).all() for _, name, t in cache.buffers())
    assert accelpass.state(fast) == []
    assert accelpass.explain(fast).caches == ()
    assert greedy(fast, IDS, cache, STEPS).tokens == first

    del cache, second
    gc.collect()
    assert len(holdings.holdings()) == others, "a cache that nobody holds is gone"
    assert accelpass.state(fast) == []


def test_a_dense_cache_counts_each_sequence() -> None:
    model = tiny_llama()
    fast = accelpass.compile(model, [], lowering="eager")
    cache = accelpass.KVCache(model, CAPACITY, batch_size=2)
    with torch.no_grad():
        fast(input_ids=IDS.expand(2, -1), past_key_values=cache)
    (held,) = accelpass.explain(fast).caches
    assert held.sequences == 2
    assert held.bytes == held.dense_bytes == 2 * DENSE_LAYER * LAYERS


@pytest.mark.parametrize(
    ("passes", "kind"),
    [([], "StaticCache"), (["h2o"], "KVCache"), (["kv_quant"], "KVCache"), (["pbs_attn"], "KVCache")],
)
def test_cache_for_is_one_in_which_the_passes_take_effect(passes: list[str], kind: str) -> None:
    assert type(cache_for(tiny_llama(), 8, {"passes": passes})).__name__ == kind
