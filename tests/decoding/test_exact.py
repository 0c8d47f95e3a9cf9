"""Texts that are decoded several tokens a step are those of plain decoding, whatever guesses and whatever keeps the keys and values."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import DynamicCache, StoppingCriteriaList

from accelpass import KVCache, decoding
from tests.passes.test_kv_methods import llama, tokens
from tests.public.test_kv_cache import settled
from tests.sweep import quick, sweep

GREEDY = {"max_new_tokens": 20, "do_sample": False}
CACHES: dict[str, list[Any]] = {
    "dense": [],
    "h2o": [{"name": "h2o", "budget": 0.4}],
    "mikv": [{"name": "mikv", "budget": 0.4, "bits": 4}],
    "kv_quant": [{"name": "kv_quant", "bits": 4}],
    "tidaldecode": [{"name": "tidaldecode", "budget": 5, "first": 0, "reselect": 5}],
    "cskv": [{"name": "cskv", "keep_k": 0.5, "keep_v": 0.5, "window": 3}],
    "h2o, packed head": [{"name": "h2o", "budget": 0.4}, "int8_weights"],
}


def near(model: Any) -> Any:
    """A draft that is right now and then."""
    draft = settled(llama())
    with torch.no_grad():
        draft.lm_head.weight.add_(0.05 * torch.randn_like(draft.lm_head.weight))
    return draft


FEW: dict[str, Any] = {"sizes": (1, 4), "adaptive": False}
DECODERS = {
    "prompt_lookup": lambda model: decoding.prompt_lookup(**FEW),
    "draft_model": lambda model: decoding.draft_model(near(model), **FEW),
    "self_draft": lambda model: decoding.self_draft([1], compile={"lowering": "eager"}, **FEW),
    "token_recycling": lambda model: decoding.token_recycling(80, sizes=(1, 4, 81), adaptive=False),
    "jacobi": lambda model: decoding.jacobi(4, adaptive=False),
    "adaptive": lambda model: decoding.token_recycling(3),
}


def prompt(batch: int = 1) -> torch.Tensor:
    ids = tokens(batch, 9)[0]
    return torch.cat([ids, ids, ids[:, :2]], 1)


SOME = [("dense", ("token_recycling", "draft_model"), 1), ("h2o", ("prompt_lookup",), 1)]
"""Caches, decoders, and layers of the model: each is compiled for each size."""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("cache", "names", "layers"), sweep(*SOME, *((cache, tuple(DECODERS), 2) for cache in CACHES), fast=2)
)
def test_greedy_texts_are_those_of_plain_decoding(cache, names, layers):
    model = settled(llama(layers=layers))
    model.compile(backend="accelpass", options={"lowering": "eager", "passes": CACHES[cache]})
    want = model.generate(prompt(), past_key_values=KVCache(model, 160), **GREEDY)
    for name in names:
        decoder, held = DECODERS[name](model), KVCache(model, 160)
        for _ in range(2):  # the second request begins with what was learnt
            held.reset()
            got = model.generate(prompt(), past_key_values=held, custom_generate=decoder, **GREEDY)
            assert torch.equal(got, want), name
            assert held.seen == want.shape[1] - 1
        assert decoder.statistics.tokens == 19


def test_guesses_can_be_taken_back_where_a_pass_has_packed_the_head():
    model = settled(llama(layers=1))
    model.compile(backend="accelpass", options={"lowering": "eager", "passes": CACHES["h2o, packed head"]})
    want = model.generate(prompt(), past_key_values=KVCache(model, 160), **GREEDY)
    decoder = DECODERS["prompt_lookup"](model)
    got = model.generate(prompt(), past_key_values=KVCache(model, 160), custom_generate=decoder, **GREEDY)
    assert torch.equal(got, want) and decoder.statistics.tokens_per_call > 1


@pytest.mark.parametrize("name", quick(list(DECODERS), "draft_model", "token_recycling", "jacobi"))
def test_with_the_cache_of_transformers(name):
    model = settled(llama())
    want = model.generate(prompt(), **GREEDY)
    decoder = DECODERS[name](model)
    for _ in range(2):
        got = model.generate(prompt(), past_key_values=DynamicCache(), custom_generate=decoder, **GREEDY)
        assert torch.equal(got, want)


def test_guesses_save_calls():
    """A text that a second request asks for again is known to the successors; a draft that is the model is always right."""
    model = settled(llama())
    recycling = decoding.token_recycling(80, adaptive=False)
    calls = []
    for _ in range(2):
        model.generate(prompt(), past_key_values=KVCache(model, 160), custom_generate=recycling, **GREEDY)
        calls.append(recycling.statistics.calls)
    assert calls[1] < calls[0] < 20
    itself = decoding.draft_model(model, sizes=(1, 4), adaptive=False)
    model.generate(prompt(), past_key_values=KVCache(model, 48), custom_generate=itself, **GREEDY)
    assert itself.statistics.tokens_per_call > 2.5


@pytest.mark.parametrize("name", ["prompt_lookup", "draft_model", "token_recycling", "jacobi"])
def test_a_batch_with_left_padding(name):
    model = settled(llama())
    ids, mask = prompt(3), torch.ones(3, 20, dtype=torch.int64)
    mask[1, :5] = 0
    want = model.generate(ids, attention_mask=mask, past_key_values=KVCache(model, 160, 3), **GREEDY)
    got = model.generate(
        ids,
        attention_mask=mask,
        past_key_values=KVCache(model, 160, 3),
        custom_generate=DECODERS[name](model),
        **GREEDY,
    )
    assert torch.equal(got, want)


def test_left_padding_under_a_tree():
    model = settled(llama())
    mask = torch.ones(1, 20, dtype=torch.int64)
    mask[0, :5] = 0
    want = model.generate(prompt(), attention_mask=mask, past_key_values=KVCache(model, 160), **GREEDY)
    decoder = decoding.token_recycling(adaptive=False)
    for _ in range(2):
        cache = KVCache(model, 320)
        got = model.generate(prompt(), attention_mask=mask, past_key_values=cache, custom_generate=decoder, **GREEDY)
        assert torch.equal(got, want)
    assert decoder.statistics.rows.get(81)


@pytest.mark.parametrize("name", ["prompt_lookup", "draft_model", "token_recycling", "jacobi"])
def test_logits_processors_see_the_text_before_each_position(name):
    model = settled(llama())
    settings = {**GREEDY, "repetition_penalty": 1.4, "no_repeat_ngram_size": 3, "min_new_tokens": 4}
    want = model.generate(prompt(), past_key_values=KVCache(model, 160), **settings)
    got = model.generate(
        prompt(), past_key_values=KVCache(model, 160), custom_generate=DECODERS[name](model), **settings
    )
    assert torch.equal(got, want)
    assert not torch.equal(want, model.generate(prompt(), **GREEDY))


@pytest.mark.parametrize("name", ["prompt_lookup", "token_recycling"])
def test_texts_end_where_plain_ones_do(name):
    """At the end token in the middle of accepted guesses, at stopping criteria, and one text before another."""
    model = settled(llama())
    plain = model.generate(prompt(2), past_key_values=KVCache(model, 160, 2), **GREEDY)
    end = int(plain[0, 24])
    settings = {**GREEDY, "eos_token_id": end, "pad_token_id": 0}
    for ids, batch in ((prompt(2), 2), (prompt(2)[:1], 1)):
        want = model.generate(ids, past_key_values=KVCache(model, 160, batch), **settings)
        cache = KVCache(model, 160, batch)
        got = model.generate(ids, past_key_values=cache, custom_generate=DECODERS[name](model), **settings)
        assert torch.equal(got, want)
        assert cache.seen == want.shape[1] - 1

    def at_23(ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        return torch.full((len(ids),), ids.shape[1] >= 23)

    got = model.generate(
        prompt(), past_key_values=KVCache(model, 160), custom_generate=DECODERS[name](model),
        stopping_criteria=StoppingCriteriaList([at_23]), **GREEDY,
    )  # fmt: skip
    assert torch.equal(got, model.generate(prompt(), **GREEDY)[:, :23])


def test_a_streamer_sees_tokens_in_order():
    class Kept:
        def __init__(self) -> None:
            self.pieces: list[torch.Tensor] = []
            self.ended = False

        def put(self, value: torch.Tensor) -> None:
            self.pieces.append(value)

        def end(self) -> None:
            self.ended = True

    model, streamer = settled(llama()), Kept()
    decoder = decoding.draft_model(model, adaptive=False, streamer=streamer)
    want = model.generate(prompt(), past_key_values=KVCache(model, 48), custom_generate=decoder, **GREEDY)
    assert streamer.ended
    assert torch.equal(streamer.pieces[0], prompt())
    assert torch.equal(torch.cat(streamer.pieces[1:]), want[0, 20:])


@pytest.mark.slow
def test_a_loop_of_ones_own():
    """After it was prepared nothing is compiled for a step, however many texts and guesses there are."""
    model = settled(llama(layers=1))
    want = model.generate(prompt(), **GREEDY)
    fast = torch.compile(model, backend="accelpass", options={"lowering": "eager"})
    decoder, cache = decoding.prompt_lookup(**FEW), KVCache(model, 48)
    decoder.prepare(model, cache, call=fast)
    made = list(decoder.steps(model, prompt(), cache, 20, call=fast))  # compiles for prompts of any length
    assert torch.equal(torch.cat([prompt(), *made], 1), want)
    end = int(want[0, 24])
    first = int((want[0, 20:] == end).nonzero()[0])
    with torch._dynamo.config.patch(error_on_recompile=True):
        for length in (18, 13):
            cache.reset()
            list(decoder.steps(model, prompt()[:, :length], cache, 12, call=fast))
        cache.reset()
        ended = torch.cat(list(decoder.steps(model, prompt(), cache, 20, call=fast, eos=[end])), 1)
    assert torch.equal(ended, want[:, 20 : 21 + first])


def test_further_prompts_go_on():
    model = settled(llama())
    caches, decoder = (KVCache(model, 80), KVCache(model, 80)), decoding.prompt_lookup(**FEW)
    ids = prompt()
    for _ in range(2):
        want = model.generate(ids, past_key_values=caches[0], **GREEDY)
        got = model.generate(ids, past_key_values=caches[1], custom_generate=decoder, **GREEDY)
        assert torch.equal(got, want)
        ids = torch.cat([want, prompt()[:, :5]], 1)
    kept = model.generate(
        prompt(), past_key_values=DynamicCache(), custom_generate=decoder, return_dict_in_generate=True, **GREEDY
    )
    assert torch.equal(kept.sequences, want[:, :40])
