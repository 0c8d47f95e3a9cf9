"""Local value pruning against the probabilities written out, in single layers and in a model with a cache."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import accelpass
from accelpass import KVCache
from accelpass.ir.attention import AttentionSpec
from accelpass.ir.errors import OptionError
from accelpass.ir.kv.banks import Floats, Quantized
from accelpass.ir.kv.storage import Layout, New, Positions, Query
from accelpass.passes.kv_cache.reading.value_pruning import LikeliestValues, ValuePruning
from tests.passes.kv_truth import fed
from tests.passes.test_kv_methods import compiled, llama, tokens
from tests.sweep import examples


def oracle(q: Tensor, k: Tensor, v: Tensor, scale: float, count: int) -> Tensor:
    """One token's: ``q (heads, d)``, keys and values ``(kv_heads, n, d)``. The rest of the softmax is dropped, not shared out."""
    heads, groups, made = len(q), len(q) // len(k), []
    probs = torch.stack([(k[h // groups] @ q[h] * scale).softmax(-1) for h in range(heads)])
    for h in range(heads):
        group = probs[h // groups * groups : (h // groups + 1) * groups].sum(0)
        kept = group.sort(descending=True, stable=True).indices[:count]
        made.append(probs[h, kept] @ v[h // groups, kept])
    return torch.stack(made)


@settings(max_examples=examples(15), deadline=None)
@given(
    st.integers(1, 2),
    st.sampled_from([1, 3]),
    st.integers(1, 30),
    st.integers(1, 40),
    st.booleans(),
    st.integers(0, 2**31),
)
def test_it_reads_what_the_oracle_reads(batch, groups, held_tokens, count, rounded, seed):
    random, capacity, width = torch.Generator().manual_seed(seed), 32, 16
    format = Quantized(8, 2) if rounded else Floats()
    layout, store = Layout(2, groups, width, width, torch.float32, capacity), Positions()
    start = torch.zeros(batch, dtype=torch.int64)
    held = {s.name.removeprefix("kv."): s.start(start) for s in store.states(layout, format)}
    k, v = (torch.randn(batch, 2, held_tokens + 1, width, generator=random) for _ in "kv")
    q = torch.randn(batch, 2 * groups, 1, width, generator=random)
    store.fill(held, New(q, k[:, :, :-1], v[:, :, :-1], start), layout, format)
    new = New(q, k[:, :, -1:], v[:, :, -1:], start + held_tokens)
    store.fill(held, new, layout, format)
    query = Query(q, [], AttentionSpec(groups=groups, scale=0.3), layout)
    got, _ = LikeliestValues(count).attend(held, new, query, layout, format, None)
    for b in range(batch):
        want = oracle(q[b, :, 0], k[b], v[b], 0.3, count)
        torch.testing.assert_close(got[b, :, 0], want, atol=0.05 if rounded else 1e-4, rtol=1e-3)


def test_few_values_are_gathered_in_a_model():
    """The graph of single tokens holds so many rows of values, and all read is the dense model."""
    model, pieces = llama(layers=1), tokens(1, 12, 1, 1)
    dense = fed(model, KVCache(model, 32), pieces)
    every = fed(compiled(model, {"name": "value_pruning", "values": 31}), KVCache(model, 32), pieces)
    torch.testing.assert_close(every, dense, atol=1e-4, rtol=1e-3)
    fast = compiled(model, {"name": "value_pruning", "values": 3})
    few = fed(fast, KVCache(model, 32), pieces)
    assert not torch.allclose(few[-1], dense[-1], atol=1e-3)
    took = accelpass.explain(fast).passes["value_pruning"].took
    assert any("read 3 of 32 values, a prompt all" in done.what for done in took.values())


def test_refused():
    with pytest.raises(OptionError, match="1 or more"):
        ValuePruning(values=0)
    model = llama(layers=1)
    fast = compiled(model, {"name": "value_pruning"})
    fed(fast, KVCache(model, 32), tokens(1, 5, 1))
    skipped = accelpass.explain(fast).passes["value_pruning"].skipped
    assert any("no more than values=307" in why for why in skipped.values())
