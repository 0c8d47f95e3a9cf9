"""Spans: the mask is the card's, and a cache of rings holds the first tokens and the newest, whatever comes when."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from accelpass.ir.attention import AttentionSpec
from accelpass.ir.attention.spec.block_select import listed_mask
from accelpass.ir.kv.banks import Floats, Quantized, RowFormat
from accelpass.passes.sparse_attention.span_cache import SpanRings
from accelpass.passes.sparse_attention.spans import EVERYTHING, HeadSpans, density
from tests.passes import kv_truth
from tests.passes.span_truth import Spans, cache_size, moa_mask, ring_slot
from tests.passes.test_kv_storage import Layer

RULE = st.tuples(st.sampled_from([-16, -8, -4, 0, 4, 8, 24]), st.sampled_from([0, 0.125, 0.25, 0.5, 0.75, 1])).map(
    lambda rule: (float(rule[0]), float(rule[1]))
)


@settings(max_examples=60, deadline=None)
@given(st.lists(RULE, min_size=1, max_size=4), st.integers(1, 70), st.sampled_from([0, 1, 2]), st.sampled_from([4, 8]))
def test_the_mask_is_the_cards(rules, tokens, sinks, block):
    select = HeadSpans(tuple(rules), sinks * block, block)
    q, k = torch.zeros(1, len(rules), tokens, 2), torch.zeros(1, 1, tokens, 2)
    causal = torch.ones(tokens, tokens, dtype=torch.bool).tril()
    got = (select.mask(q, k, AttentionSpec(causal=True)) & causal).expand(1, len(rules), -1, -1)[0]
    listed = listed_mask(select.blocks(q, k, AttentionSpec(causal=True)), len(rules), tokens, tokens) & causal
    assert torch.equal(listed.expand(1, len(rules), -1, -1)[0], got)
    alpha, beta = torch.tensor(rules).unbind(-1)
    want = moa_mask(alpha, beta, tokens, sinks * block, block)
    assert torch.equal(got, want)
    for head, rule in enumerate(rules):
        widest = int(want[head].sum(-1).max())
        share = density(rule, tokens, sinks * block, block) * -(-tokens // block)
        assert share - 1 <= widest / block <= share


def test_rules_for_other_heads_are_refused():
    with pytest.raises(ValueError, match="rules for 2 heads, the attention has 3"):
        HeadSpans((EVERYTHING, (0.0, 0.5))).mask(torch.zeros(1, 3, 8, 2), torch.zeros(1, 1, 8, 2), AttentionSpec())


PIECES = st.tuples(
    st.integers(1, 3), st.sampled_from([1, 2]), st.integers(1, 60),
    st.lists(st.sampled_from([1, 1, 1, 1, 7, 30]), max_size=14), st.integers(0, 2**31),
)  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(PIECES, RULE, RULE, st.sampled_from([0, 1]), st.sampled_from([0, 8]))
def test_the_cache_is_the_cards(pieces, first, second, sinks, reserve):
    batch, groups, prompt, more, seed = pieces
    storage = SpanRings((first, second), 4 * sinks, 4, reserve)
    layer = Layer(storage, Floats(), batch, groups, 8, prompt + sum(more) + 3, seed)
    oracle = Spans([first, second], 4 * sinks, 4, reserve, layer.layout.capacity)
    remembered: dict[str, Any] = {}
    for tokens in (prompt, *more):
        q, out = layer.feed(tokens)
        want = oracle.attend(remembered, q, layer.k, layer.v, layer.scale, None, 0)
        if layer.k.shape[2] > prompt:  # the prompt's own attention is not the cache's
            assert torch.allclose(out, want, atol=2e-4), f"after {layer.k.shape[2]} tokens"
        assert_holds(layer, remembered)


def assert_holds(layer: Layer, remembered: dict[str, Any]) -> None:
    """Positions are those of the oracle, and each slot has the rows of the position that it says."""
    total, storage = layer.k.shape[2], layer.storage
    assert isinstance(storage, SpanRings)
    positions = layer.held["positions"]
    for number, (_, heads) in enumerate(storage.banks(layer.layout)):
        for place, head in enumerate(heads):
            size = int(layer.held["size"][0, number])
            assert size == remembered["size"][head]
            stored = positions[0, head]
            slots = (stored >= 0).nonzero()[:, 0]
            assert sorted(stored[slots].tolist()) == sorted(remembered["kept"][head])
            keys = layer.held[f"keys{number}"][:, place, slots]
            assert torch.equal(keys, layer.k[:, head, stored[slots].long()])
            for slot in slots.tolist():
                assert ring_slot(int(stored[slot]), size, storage.sinks) == slot
            assert len(slots) <= min(size, total)


@settings(max_examples=30, deadline=None)
@given(RULE, st.integers(1, 60), st.integers(0, 40), st.sampled_from([0, 8]))
def test_the_ring_holds_sinks_and_the_newest(rule, prompt, answer, reserve):
    storage = SpanRings((rule,), 4, 4, reserve)
    layer = Layer(storage, Floats(), 1, 1, 8, prompt + answer + 2, 0)
    for tokens in (prompt, *[1] * answer):
        layer.feed(tokens)
    size, total = cache_size(rule, prompt, layer.layout.capacity - prompt, 4, 4, reserve), prompt + answer
    held = layer.held["positions"][0, 0]
    want = {t for t in range(total) if t < 4 or t >= total - (size - 4)}
    assert set(held[held >= 0].tolist()) == want
    assert layer.held["keys0"].shape[2] == storage.most(rule, layer.layout.capacity) <= layer.layout.capacity


@settings(max_examples=15, deadline=None)
@given(PIECES, RULE, st.sampled_from([4, 8]))
def test_rows_in_few_bits(pieces, rule, bits):
    """Rounding is of rows, wherever they are moved to."""
    batch, groups, prompt, more, seed = pieces
    capacity = prompt + sum(more) + 3
    formats: list[RowFormat] = [Floats(), Quantized(bits)]
    layers = [Layer(SpanRings((rule, EVERYTHING), 4, 4, 8), f, batch, groups, 16, capacity, seed) for f in formats]
    for tokens in (prompt, *more):
        for layer in layers:
            layer.feed(tokens)
        exact, rounded = (layer.held for layer in layers)
        assert torch.equal(exact["positions"], rounded["positions"])
        for number, (_, heads) in enumerate(layers[0].storage.banks(layers[0].layout)):
            rows = [rounded[f"keys{number}.{part}"] for part in ("codes", "step", "low")]
            back = formats[1].decode(rows, torch.float32)
            there = exact["positions"][:, heads, : back.shape[2]] >= 0
            want = kv_truth.quant_rows(exact[f"keys{number}"], bits, 8)
            assert torch.allclose(back[there], want[there], atol=1e-5)
