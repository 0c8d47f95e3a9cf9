"""Passes that read a cache in another way, under autocast and with requests that end early: what was before leaves no trace."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from accelpass import CacheError, KVCache
from tests.passes.kv_truth import fed
from tests.passes.test_kv_methods import compiled, llama, tokens
from tests.sweep import sweep

READING: dict[str, dict[str, Any]] = {
    "value_pruning": {"name": "value_pruning", "values": 3},
    "progressive_keys": {"name": "progressive_keys", "threshold": 0.3},
}
NEAR: dict[str, dict[str, Any]] = {
    "value_pruning": {"name": "value_pruning", "values": 31},
    "progressive_keys": {"name": "progressive_keys", "threshold": 2.0},
}


@pytest.mark.parametrize("name", sweep(*READING))
@torch.no_grad()
def test_under_autocast(name):
    """At settings that read all, the numbers are those of the model under autocast; at others, those of the prompt are."""
    model, pieces = llama(layers=1), tokens(1, 12, 1, 1)
    with torch.autocast("cpu", torch.bfloat16):
        dense = fed(model, KVCache(model, 32), pieces)
        near = fed(compiled(model, NEAR[name]), KVCache(model, 32), pieces)
        torch._dynamo.reset()
        cache = KVCache(model, 32)
        some = fed(compiled(model, READING[name]), cache, pieces)
    assert near.dtype == dense.dtype == torch.bfloat16
    assert float((near - dense).abs().max() / dense.abs().max()) < 0.03
    torch.testing.assert_close(some[0], dense[0], atol=0.06, rtol=0.02)  # the prompt's own attention is the model's
    assert some.isfinite().all() and cache.seen == 14


@pytest.mark.parametrize("name", sweep(*READING))
@torch.no_grad()
def test_a_request_that_is_cancelled_leaves_nothing(name):
    """It ends after some tokens, or in a call that does not fit; the cache serves the next one as a new cache does."""
    model = llama(layers=1)
    fast = compiled(model, READING[name])
    first, second = tokens(1, 14, 1, 1, seed=2), tokens(1, 9, 1, 1, 1, seed=3)
    want = fed(fast, KVCache(model, 32), second)
    cache = KVCache(model, 32)
    fed(fast, cache, first)  # and nobody asks for more
    cache.reset()
    assert cache.seen == 0
    assert torch.equal(fed(fast, cache, second[:2]), want[:2])
    held = [(name, tensor.clone()) for _, name, tensor in cache.buffers()]
    with pytest.raises(CacheError, match="do not fit"):
        fed(fast, cache, tokens(1, 25, seed=4))
    assert cache.seen == 10
    assert all(torch.equal(a, b) for (_, a), (*_, b) in zip(held, cache.buffers(), strict=True))
    assert torch.equal(fed(fast, cache, second[2:]), want[2:])
