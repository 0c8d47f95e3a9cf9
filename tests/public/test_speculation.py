"""Candidates in a KVCache: assisted generation gives what the same cache gives without, and what is rejected leaves no trace."""

from __future__ import annotations

import copy

import pytest
import torch

from accelpass import CacheError, KVCache
from accelpass.ir.torch_private import mark_static
from tests.passes.kv_truth import fed
from tests.passes.test_kv_methods import compiled, llama, tokens
from tests.public.test_kv_cache import settled

H2O = {"name": "h2o", "budget": 0.4}
METHODS = {
    "dense": [],
    "h2o": [H2O],
    "a2sf": [{"name": "a2sf", "budget": 0.4, "evicts": "after the prompt", "answer": 3}],
    "keyformer": [{"name": "keyformer", "budget": 0.4, "answer": 8}],
    "h2o, wrapped": [{**H2O, "window": 3, "kernel": 3, "heads": "adaptive", "positions": "cache", "pyramid": 4.0}],
    "zipvl": [{"name": "zipvl", "threshold": 0.5, "newest": 3, "last": 4}],
    "kv_window": [{"name": "kv_window", "budget": 0.4, "sinks": 1}],
    "mikv": [{"name": "mikv", "budget": 0.4, "bits": 4}],
    "kv_quant": [{"name": "kv_quant", "bits": 4}],
    "h2o, rounded": [H2O, {"name": "kv_quant", "bits": 4}],
    "cskv": [{"name": "cskv", "keep_k": 0.5, "keep_v": 0.5, "window": 3}],
    "cskv, rounded": [{"name": "cskv", "keep_k": 0.5, "keep_v": 0.5, "window": 32, "bits": 4}],
    "tidaldecode": [{"name": "tidaldecode", "budget": 5, "first": 0, "reselect": 5}],
    "tokenselect": [{"name": "tokenselect", "budget": 4, "sinks": 1, "newest": 3, "reuse": 0.6}],
    "sink_window": [{"name": "sink_window", "density": 0.4, "sinks": 2, "block": 2, "reserve": 0}],
    "moa": [{"name": "moa", "alpha": 2.0, "beta": 0.2, "sinks": 2, "block": 2, "reserve": 0}],
}
SETTINGS = {"max_new_tokens": 14, "do_sample": False}


QUICK = ("h2o",)


@pytest.mark.parametrize("which", [m if m in QUICK else pytest.param(m, marks=pytest.mark.slow) for m in METHODS])
def test_assisted_generation_is_greedy(which):
    """With tokens looked up in the prompt, so that the first call has candidates already, and some are accepted."""
    model = settled(llama())
    ids = tokens(1, 9)[0]
    ids = torch.cat([ids, ids, ids[:, :2]], 1)
    model.compile(backend="accelpass", options={"lowering": "eager", "passes": METHODS[which]})
    want = model.generate(ids, past_key_values=KVCache(model, 48), **SETTINGS)
    cache = KVCache(model, 48)
    assert torch.equal(model.generate(ids, past_key_values=cache, prompt_lookup_num_tokens=3, **SETTINGS), want)
    assert cache.seen == want.shape[1] - 1


@pytest.mark.slow
@pytest.mark.parametrize("which", [pytest.param(m, marks=pytest.mark.slow) if m != "h2o" else m for m in METHODS])
def test_an_assistant_that_is_often_wrong(which):
    model, assistant = settled(llama()), settled(llama())
    with torch.no_grad():
        assistant.lm_head.weight.add_(0.05 * torch.randn_like(assistant.lm_head.weight))
    ids = tokens(1, 20)[0]
    model.compile(backend="accelpass", options={"lowering": "eager", "passes": METHODS[which]})
    want = model.generate(ids, past_key_values=KVCache(model, 48), **SETTINGS)
    got = model.generate(ids, past_key_values=KVCache(model, 48), assistant_model=assistant, **SETTINGS)
    assert torch.equal(got, want)


@pytest.mark.slow
@torch.no_grad()
def test_candidates_that_are_taken_back_leave_no_trace():
    """Any number of them, in one go or bit by bit; the next token, and all that is stored, are as if they had never come."""
    model = llama()
    fast, cache = compiled(model, H2O), KVCache(model, 40)
    prompt, first, guesses, last = tokens(1, 12, 1, 3, 1)
    alone = KVCache(model, 40)
    wanted = [fed(fast, alone, [piece]) for piece in (prompt, first, guesses[:, :1], last)]
    cache.activate_past_recording()
    fed(fast, cache, [prompt])
    logits = fast(input_ids=torch.cat([first, guesses], 1), past_key_values=cache).logits
    torch.testing.assert_close(logits[:, :2], torch.stack([wanted[1][0], wanted[2][0]], 1))
    cache.crop(-1)
    cache.crop(-1)
    assert cache.seen == 14
    torch.testing.assert_close(fed(fast, cache, [last]), wanted[3])
    for (*_, mine), (*_, other) in zip(cache.buffers(), alone.buffers(), strict=True):
        torch.testing.assert_close(mine, other)


@pytest.mark.slow
@torch.no_grad()
def test_a_crop_beyond_what_can_be_taken_back_changes_nothing():
    model = llama()
    fast, cache = compiled(model, H2O), KVCache(model, 40)
    cache.activate_past_recording()
    fed(fast, cache, tokens(1, 12, 1, 3))
    with pytest.raises(
        CacheError, match=r"h2o at model\.layers\.0\.self_attn cannot be cropped.*The 3 candidates.*deepcopy"
    ):
        cache.crop(-4)
    cache.crop(-2)
    twin = copy.deepcopy(cache)
    assert cache.seen == twin.seen == 14
    with pytest.raises(CacheError, match="Only candidates of the last call"):
        twin.crop(-1)
    with pytest.raises(CacheError, match="14 are held"):
        cache.crop(-15)


@pytest.mark.slow
def test_candidates_in_compiled_code():
    model = settled(llama())
    ids = torch.cat([tokens(1, 9)[0]] * 2, 1)
    model.compile(backend="accelpass", options={"passes": [H2O]})
    want = model.generate(ids, past_key_values=KVCache(model, 48), **SETTINGS)
    got = model.generate(ids, past_key_values=KVCache(model, 48), prompt_lookup_num_tokens=3, **SETTINGS)
    assert torch.equal(got, want)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["h2o", "mikv", "kv_quant"])
@torch.no_grad()
def test_candidates_in_compiled_code_are_single_tokens_to_the_last_bit(name):
    """What is stored in few bits, or evicted, would amplify the least difference; positions come from the cache's counter."""
    passes = ["int8_weights", *METHODS[name]]
    fast = compiled(llama(layers=2), *passes, lowering="inductor")
    prompt, *pieces = tokens(1, 20, *[4] * 6)
    alone, several = KVCache(fast, 48), KVCache(fast, 48)
    several.activate_past_recording()
    for cache in (alone, several):
        fed(fast, cache, [prompt])
    for piece in pieces:
        singles = [fast(input_ids=one.clone(), past_key_values=alone).logits for one in piece.split(1, 1)]
        mark_static(piece)  # as decoders do: products of a length that is not known are others
        made = fast(input_ids=piece, past_key_values=several).logits
        torch.testing.assert_close(made, torch.cat(singles, 1), atol=5e-4, rtol=1e-3)
        if name != "h2o":  # which may contract products and sums in one of the two
            assert torch.equal(made, torch.cat(singles, 1))
