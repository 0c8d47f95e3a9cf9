"""GemFilter in whole models: the model reads the chosen tokens, and goes on, as if they had been the prompt."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import accelpass
from accelpass import KVCache
from accelpass.backends.compile.compiler import graphs_of
from accelpass.ir.kv.ops import KV_APPEND
from accelpass.passes.token_pruning.gemfilter import GemFilter
from tests.passes.gemfilter_truth import (
    FAMILIES,
    KEEP,
    LAYER,
    LAYERS,
    NEW,
    answered,
    built,
    chosen,
    compiled,
    gem_select,
    logits,
    prompt_of,
    said,
    steps,
)  # fmt: skip
from tests.sweep import quick, sweep

# --- the choice


@settings(deadline=None, max_examples=60)
@given(
    st.integers(0, 2**31), st.integers(1, 2), st.sampled_from([1, 2, 3]), st.integers(6, 40), st.integers(1, 12),
    st.sampled_from([1, 3, 5]),
)  # fmt: skip
def test_the_choice_is_the_oracles(seed, batch, groups, tokens, keep, pool):
    torch.manual_seed(seed)
    keep = min(keep, tokens - 1)
    # Whole numbers, so that no order of additions changes a sum.
    q = torch.randint(-4, 5, (batch, 2 * groups, 4)).float()
    k = torch.randint(-4, 5, (batch, 2, tokens, 4)).float()
    rows = GemFilter(keep=keep, pool=pool).choose(q, k, torch.ones(batch, tokens, dtype=torch.bool))
    assert torch.equal(rows, gem_select(q, k, keep, pool))
    assert (rows.diff(dim=1) > 0).all()


def test_padding_changes_no_choice_and_is_chosen_last():
    torch.manual_seed(0)
    q, k = torch.randn(1, 4, 8), torch.randn(1, 2, 30, 8)
    alone = GemFilter(keep=6).choose(q, k[:, :, 9:], torch.ones(1, 21, dtype=torch.bool))
    seen = torch.arange(30)[None] >= 9
    assert torch.equal(GemFilter(keep=6).choose(q, k, seen), alone + 9)
    assert set(range(9, 30)) < set(GemFilter(keep=24).choose(q, k, seen)[0].tolist())


def test_both_ends_can_be_forced():
    torch.manual_seed(0)
    q, k = torch.randn(1, 4, 8), torch.randn(1, 2, 30, 8)
    seen = torch.arange(30)[None] >= 4
    rows = GemFilter(keep=6, force_first=2, force_last=3).choose(q, k, seen)[0].tolist()
    assert {4, 5, 27, 28, 29} < set(rows)


def test_the_first_graph_ends_at_the_layer_and_reads_nothing_behind_it():
    model = built()
    ids = prompt_of(1, 30)
    rows, fast = chosen(model, ids), compiled(model)
    logits(fast, KVCache(model, 64), ids)
    nodes = list(graphs_of(model)[0].fn.graph.nodes)
    assert sum("attention" in str(n.target) for n in nodes) == LAYER + LAYERS
    assert not any(n.target is KV_APPEND for n in nodes)
    choice = next(at for at, n in enumerate(nodes) if n.target is torch.ops.aten.topk.default)
    assert sum("attention" in str(n.target) for n in nodes[:choice]) == LAYER
    with torch.no_grad():
        for layer in model.model.layers[LAYER + 1 :]:
            for weight in layer.parameters():
                weight.mul_(-3)
        model.model.layers[LAYER].mlp.up_proj.weight.zero_()
        model.model.layers[LAYER].self_attn.v_proj.weight.zero_()
    logits(fast, KVCache(model, 64), ids)
    assert accelpass.surviving_tokens(fast)[0].kept == tuple(map(tuple, rows.tolist()))


# --- whole models


@pytest.mark.parametrize("family", quick(list(FAMILIES), "llama"))
@pytest.mark.parametrize("tokens", [(20, 17, 40)], ids=str)
def test_generates_as_the_dense_model_does_from_the_chosen_tokens(family, tokens):
    model = built(family)
    dense = copy.deepcopy(model)
    model.compile(
        backend="accelpass",
        options={"lowering": "eager", "passes": [{"name": "gemfilter", "keep": KEEP, "layer": LAYER}]},
    )
    cache = KVCache(model, 24)  # fewer than the prompt has
    for n in tokens:
        cache.reset()
        ids = prompt_of(1, n, seed=n)
        rows = chosen(dense, ids)
        want = answered(dense, ids.gather(1, rows), KVCache(dense, 24))
        got = answered(model, ids, cache)
        assert torch.equal(got[:, n:], want[:, KEEP:])
        (found,) = accelpass.surviving_tokens(model)
        assert found.kept == tuple(map(tuple, rows.tolist())) and found.tokens == n
        assert cache.seen == KEEP + NEW - 1


@pytest.mark.slow
@pytest.mark.parametrize("lowering", sweep("eager", "inductor"))
@pytest.mark.parametrize("family", sweep("llama", "gpt2", "phi3"))
def test_a_plain_loop(family, lowering):
    model = built(family)
    fast, cache = compiled(model, lowering=lowering), KVCache(model, 40)
    for n in (21, 33):  # static, then symbolic
        cache.reset()
        ids = prompt_of(1, n, seed=n)
        rows = chosen(model, ids)
        got = logits(fast, cache, ids, *steps())
        want = logits(model, KVCache(model, 40), ids.gather(1, rows), *steps())
        torch.testing.assert_close(got, want, atol=2e-4, rtol=2e-4)


@pytest.mark.slow
@pytest.mark.parametrize("pads", sweep(3, 14), ids=lambda p: f"{p} of 20 padded")
@pytest.mark.parametrize("family", sweep("llama", "gpt2"))
def test_a_batch_with_left_padding_over_two_turns(family, pads):
    model = built(family)
    dense = copy.deepcopy(model)
    model.compile(
        backend="accelpass",
        options={"lowering": "eager", "passes": [{"name": "gemfilter", "keep": KEEP, "layer": LAYER}]},
    )
    ids, padding = prompt_of(2, 20), torch.ones(2, 20, dtype=torch.long)
    padding[0, :pads] = 0
    rows = chosen(dense, ids, padding)
    cache, other = KVCache(model, 64, 2), KVCache(dense, 64, 2)
    got = answered(model, ids, cache, padding)
    want = answered(dense, ids.gather(1, rows), other, padding.gather(1, rows))
    assert torch.equal(got[:, -NEW:], want[:, -NEW:])
    # The whole conversation again, as chat programs pass it: what was left out is not read a second time.
    more, seen = prompt_of(2, 4, seed=3), torch.ones(2, NEW + 4, dtype=torch.long)
    got = answered(model, torch.cat([got, more], 1), cache, torch.cat([padding, seen], 1))
    want = answered(dense, torch.cat([want, more], 1), other, torch.cat([padding.gather(1, rows), seen], 1))
    assert torch.equal(got[:, -NEW:], want[:, -NEW:])
    assert cache.seen == other.seen


def test_padding_in_a_loop_without_positions():
    model, ids = built(), prompt_of(2, 20)
    padding = torch.ones(2, 20, dtype=torch.long)
    padding[1, :5] = 0
    rows = chosen(model, ids, padding)

    @torch.no_grad()
    def run(fast: Any, ids: Tensor, mask: Tensor) -> Tensor:
        cache, made = KVCache(model, 40, 2), []
        for piece in (ids, *steps(2)):
            mask = mask if piece is ids else torch.cat([mask, torch.ones(2, 1, dtype=torch.long)], 1)
            made.append(fast(piece, attention_mask=mask, past_key_values=cache, logits_to_keep=1).logits)
        return torch.stack(made)

    got, want = run(compiled(model), ids, padding), run(model, ids.gather(1, rows), padding.gather(1, rows))
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("dynamic", sweep(None, True))
def test_a_prompt_of_at_most_keep_tokens_is_dense(dynamic):
    model = built()
    fast = compiled(model, dynamic=dynamic)
    for n in (KEEP, KEEP - 3):
        got = logits(fast, KVCache(model, 40), prompt_of(1, n), *steps())
        torch.testing.assert_close(
            got, logits(model, KVCache(model, 40), prompt_of(1, n), *steps()), atol=1e-5, rtol=1e-5
        )
    assert accelpass.surviving_tokens(fast) == []
    assert any("at most 8 tokens is read as it is" in why for why in said(fast).values())


@pytest.mark.slow
def test_a_short_prompt_after_a_long_one():
    model = built()
    fast, cache = compiled(model), KVCache(model, 40)
    for n in (20, 30, 6, 25, 4):
        cache.reset()
        ids = prompt_of(1, n, seed=n)
        want = logits(model, KVCache(model, 40), ids.gather(1, chosen(model, ids)) if n > KEEP else ids, *steps())
        torch.testing.assert_close(logits(fast, cache, ids, *steps()), want, atol=1e-4, rtol=1e-4)
        assert bool(accelpass.surviving_tokens(fast)) == (n > KEEP)


@pytest.mark.slow
@pytest.mark.parametrize(("dynamic", "graphs"), sweep((None, 3), (True, 2)))
def test_lengths_share_graphs(dynamic, graphs):
    model = built()
    fast, cache = compiled(model, dynamic=dynamic), KVCache(model, 40)
    for n in (20, 24, 31, 19, 70):
        cache.reset()
        logits(fast, cache, prompt_of(1, n), *steps())
    assert len(graphs_of(model)) == graphs


@pytest.mark.slow
def test_without_a_cache():
    model = built()
    fast = compiled(model)
    for n in (20, 26):
        ids = prompt_of(1, n)
        with torch.no_grad():
            got = fast(ids, use_cache=False, logits_to_keep=1).logits
            want = model(ids.gather(1, chosen(model, ids)), use_cache=False, logits_to_keep=1).logits
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


def test_embeddings_in_place_of_tokens():
    model, ids = built(), prompt_of(1, 22)
    fast, rows = compiled(model), chosen(model, ids)
    with torch.no_grad():
        embedded = model.get_input_embeddings()(ids)
        got = fast(inputs_embeds=embedded, past_key_values=KVCache(model, 40), logits_to_keep=1).logits
    torch.testing.assert_close(
        got[None, :, 0], logits(model, KVCache(model, 40), ids.gather(1, rows)), atol=1e-5, rtol=1e-5
    )


@pytest.mark.slow
def test_beams():
    model, ids = built(), prompt_of(1, 20)
    dense, rows = copy.deepcopy(model), chosen(model, ids)
    model.compile(
        backend="accelpass",
        options={"lowering": "eager", "passes": [{"name": "gemfilter", "keep": KEEP, "layer": LAYER}]},
    )
    got = answered(model, ids, KVCache(model, 40, 3), num_beams=3)
    want = answered(dense, ids.gather(1, rows), KVCache(dense, 40, 3), num_beams=3)
    assert torch.equal(got[:, -NEW:], want[:, -NEW:])


def test_the_default_layer_is_the_papers_share_of_the_depth():
    model, ids = built(), prompt_of(1, 20)
    fast = compiled(model, layer=None)
    logits(fast, KVCache(model, 40), ids)
    assert accelpass.surviving_tokens(fast)[0].path == "model.layers.1.self_attn"  # 13 / 32 of 3 layers


# --- together with others


@pytest.mark.slow
@pytest.mark.parametrize(
    "other",
    sweep(
        {"name": "h2o", "budget": 0.3},
        {"name": "int8_weights"},
        {"name": "int4_weights", "group_size": 32},
        {"name": "mikv", "budget": 0.4, "bits": 4},
        {"name": "kv_quant", "bits": 8},
    ),
    ids=lambda p: p["name"],
)
def test_other_passes_rewrite_both_graphs(other):
    model = built()
    fast, plain = (
        compiled(model, other),
        torch.compile(model, backend="accelpass", options={"lowering": "eager", "passes": [other]}),
    )
    cache = KVCache(model, 32)
    for n in (20, 26):
        cache.reset()
        ids = prompt_of(1, n)
        got = logits(fast, cache, ids, *steps())
        rows = torch.tensor(accelpass.surviving_tokens(fast)[0].kept)
        if "weights" not in other["name"]:
            assert torch.equal(rows, chosen(model, ids))
        want = logits(plain, KVCache(model, 32), ids.gather(1, rows), *steps())
        torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)
    assert accelpass.explain(fast).passes[other["name"]].took


@pytest.mark.slow
def test_float_weights_can_be_given_back():
    model = built()
    want = logits(compiled(model, {"name": "int8_weights"}), KVCache(model, 40), prompt_of(1, 20), *steps())
    torch._dynamo.reset()
    model = built()
    passes = [{"name": "gemfilter", "keep": KEEP, "layer": LAYER}, {"name": "int8_weights"}]
    fast = torch.compile(
        model, backend="accelpass", options={"lowering": "eager", "passes": passes, "free_weights": True}
    )
    for _ in range(2):
        torch.testing.assert_close(logits(fast, KVCache(model, 40), prompt_of(1, 20), *steps()), want)
    logits(fast, KVCache(model, 40), prompt_of(1, 27), *steps())
    assert accelpass.explain(fast).memory["released"] > 0


def test_two_models_of_a_class_share_code_and_keep_their_own_choice():
    one, two, ids = built(seed=0), built(seed=7), prompt_of(1, 30)
    want = [chosen(m, ids) for m in (one, two)]
    fast = [compiled(m) for m in (one, two)]
    for f, m in zip(fast, (one, two), strict=True):
        logits(f, KVCache(m, 40), ids)
    assert [torch.tensor(accelpass.surviving_tokens(f)[0].kept).tolist() for f in fast] == [w.tolist() for w in want]
