"""A step whose model, mask, processors, acceptance and next token are one graph: the texts of the loop that does it piece by piece."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DynamicCache
from transformers.generation.logits_process import (
    LogitsProcessorList,
    MinPLogitsWarper,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from accelpass import KVCache, decoding
from accelpass.backends import compiled_graphs
from accelpass.decoding import DecodingError, Guidance, Proposal
from accelpass.decoding.acceptance import Uniforms, drawn, judged
from accelpass.decoding.one_graph import Processors
from accelpass.decoding.one_graph.step import _seen_by
from accelpass.decoding.recycling import TokenRecycling
from tests.decoding.test_exact import GREEDY, near, prompt
from tests.passes.test_kv_methods import llama
from tests.public.test_kv_cache import settled
from tests.sweep import examples

EAGER: dict[str, Any] = {"lowering": "eager", "passes": []}


@settings(max_examples=examples(25), deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 3), st.integers(1, 5), st.booleans())
def test_processors_are_those_of_transformers(seed, batch, rows, branches):
    """Each row by itself, with the text and the guesses before it, as transformers would see it."""
    torch.manual_seed(seed)
    pick = torch.rand(5)
    theirs = [
        RepetitionPenaltyLogitsProcessor(1.0 + float(pick[0])),
        TemperatureLogitsWarper(0.5 + float(pick[1])),
        TopKLogitsWarper(1 + int(pick[2] * 14), min_tokens_to_keep=1 + seed % 3),
        TopPLogitsWarper(0.05 + 0.9 * float(pick[3]), min_tokens_to_keep=1 + seed % 2),
        MinPLogitsWarper(float(pick[4]) * 0.8),
    ]
    theirs = [p for n, p in enumerate(theirs) if seed >> n & 1]
    text, read, logits = (
        torch.randint(0, 12, (batch, 4)),
        torch.randint(0, 12, (batch, rows)),
        torch.randn(batch, rows, 12),
    )
    tree = TokenRecycling(rows - 1).tree(rows - 1) if branches and rows > 1 else None
    seen = torch.zeros(batch, 12, dtype=torch.bool).scatter_(1, text, True)
    got = Processors.of(theirs)(logits, _seen_by(seen, read, tree))
    for row in range(rows):
        path = list(range(row + 1)) if tree is None else tree.paths[row, : int(tree.depths[row]) + 1].tolist()
        want = LogitsProcessorList(theirs)(torch.cat([text, read[:, path]], 1), logits[:, row].clone())
        torch.testing.assert_close(got[:, row], want)


@settings(max_examples=examples(20), deadline=None)
@given(st.integers(0, 10**6), st.integers(2, 40))
def test_numbers_drawn_before_choose_as_often_as_the_distribution_says(seed, size):
    torch.manual_seed(seed)
    probs = torch.rand(size) * (torch.rand(size) < 0.7)
    probs[seed % size] += 0.1
    grid = (torch.arange(4000) + 0.5) / 4000
    counts = torch.bincount(drawn(probs.expand(1, 4000, size), grid[None])[0], minlength=size)
    torch.testing.assert_close(counts / 4000, probs / probs.sum(), atol=6e-4, rtol=0)
    ends = drawn(probs.expand(1, 2, size), torch.tensor([[0.0, 1 - 2**-24]]))[0]
    assert (probs[ends] > 0).all()


def test_speculative_sampling_with_numbers_drawn_before():
    """20,000 texts of one guess and the token after it: p of the first, whatever q."""
    torch.manual_seed(0)
    draws, p, q = 20_000, torch.randn(2, 5), torch.randn(5).softmax(-1)
    guess = torch.multinomial(q, draws, True)
    read, logits = torch.stack([torch.zeros_like(guess), guess], 1), p.expand(draws, 2, 5)
    uniforms = Uniforms(*torch.rand(3, draws, 2))
    found = judged(read, logits, Proposal(guess[:, None], q.expand(draws, 1, 5)), True, uniforms)
    share = torch.bincount(found.tokens[:, 0], minlength=5) / draws
    assert (share - p[0].softmax(-1)).abs().max() < 0.015
    after = found.tokens[found.counts == 1][:, 1]
    assert (torch.bincount(after, minlength=5) / len(after) - p[1].softmax(-1)).abs().max() < 0.02
    assert abs(float((found.counts == 1).float().mean()) - float(torch.minimum(p[0].softmax(-1), q).sum())) < 0.015


DECODERS = {
    "prompt_lookup": lambda **more: decoding.prompt_lookup(sizes=(1, 4), adaptive=False, **more),
    "token_recycling": lambda **more: decoding.token_recycling(7, sizes=(1, 8), adaptive=False, **more),
}


@pytest.mark.parametrize("name", DECODERS)
def test_texts_are_those_of_plain_decoding(name):
    """With a penalty for what the text has, in two requests; one graph for the prompt and one for each size, and no more."""
    model = settled(llama(layers=1))
    how = {**GREEDY, "repetition_penalty": 1.3}
    want = model.generate(prompt(), past_key_values=KVCache(model, 64), **how)
    decoder, before = DECODERS[name](one_graph=EAGER), len(compiled_graphs())
    torch._dynamo.reset()
    for _ in range(2):
        got = model.generate(prompt(), past_key_values=KVCache(model, 64), custom_generate=decoder, **how)
        assert torch.equal(got, want)
    made = compiled_graphs()[before:] if before else compiled_graphs()
    assert len(made) <= 3 and len(decoder.statistics.rows) <= 2
    assert max(decoder.statistics.rows) > 1


@pytest.mark.slow
@pytest.mark.parametrize("passes", [[], [{"name": "h2o", "budget": 0.4}], [{"name": "kv_quant", "bits": 4}]])
def test_with_caches_that_evict_or_round(passes):
    model = settled(llama())
    fast = settled(llama())
    fast.compile(backend="accelpass", options={"lowering": "eager", "passes": passes})
    want = fast.generate(prompt(), past_key_values=KVCache(fast, 160), **GREEDY)
    for decoder in (
        decoding.draft_model(near(model), sizes=(1, 4), adaptive=False, one_graph={**EAGER, "passes": passes}),
        DECODERS["token_recycling"](one_graph={**EAGER, "passes": passes}),
    ):
        got = model.generate(prompt(), past_key_values=KVCache(model, 160), custom_generate=decoder, **GREEDY)
        assert torch.equal(got, want)
        assert max(decoder.statistics.rows) > 1 and decoder.statistics.tokens == 19


@pytest.mark.slow
def test_a_batch_with_padding_drawn_and_prepared():
    """Left padding under a mask, several texts; drawn ones repeat with their generator; after prepare() nothing is compiled for a step."""
    model = settled(llama(layers=1))
    ids, mask = prompt(2), torch.ones(2, 20, dtype=torch.int64)
    mask[1, :5] = 0
    want = model.generate(ids, attention_mask=mask, past_key_values=KVCache(model, 64, 2), **GREEDY)
    decoder = DECODERS["prompt_lookup"](one_graph=EAGER)
    got = model.generate(
        ids, attention_mask=mask, past_key_values=KVCache(model, 64, 2), custom_generate=decoder, **GREEDY
    )
    assert torch.equal(got, want)
    texts = []
    for seed in (1, 1, 2):
        drawer = DECODERS["prompt_lookup"](one_graph=EAGER, generator=torch.Generator().manual_seed(seed))
        how = {"do_sample": True, "top_k": 9, "top_p": 0.95, "temperature": 0.8, "max_new_tokens": 12}
        texts.append(model.generate(ids, past_key_values=KVCache(model, 64, 2), custom_generate=drawer, **how))
    assert torch.equal(texts[0], texts[1]) and not torch.equal(texts[0], texts[2])
    cache, single = KVCache(model, 64), DECODERS["token_recycling"](one_graph=EAGER)
    single.prepare(model, cache)
    list(single.steps(model, prompt(), cache, 3))  # a prompt of any length
    cache.reset()
    with torch._dynamo.config.patch(error_on_recompile=True):
        plain = torch.cat(list(single.steps(model, prompt()[:, :18], cache, 12)), 1)
    assert torch.equal(plain, model.generate(prompt()[:, :18], do_sample=False, max_new_tokens=12)[:, 18:])


def test_refused():
    model = settled(llama(layers=1))
    decoder = DECODERS["prompt_lookup"](one_graph=EAGER)
    with pytest.raises(
        DecodingError, match="NoRepeatNGramLogitsProcessor cannot be part of a step's graph: it looks at more"
    ):
        model.generate(
            prompt(), past_key_values=KVCache(model, 64), custom_generate=decoder, no_repeat_ngram_size=3, **GREEDY
        )
    with pytest.raises(DecodingError, match="looks at more than a token's logits"):
        Processors.of([RepetitionPenaltyLogitsProcessor(1.2, prompt_ignore_length=3)])
    with pytest.raises(DecodingError, match="function cannot be part"):
        Processors.of(lambda ids, scores: scores)
    with pytest.raises(DecodingError, match="NoRepeatNGram"):
        Processors.of([NoRepeatNGramLogitsProcessor(2)])
    with pytest.raises(DecodingError, match=r"a DynamicCache grows with the text.*use accelpass\.KVCache"):
        model.generate(prompt(), past_key_values=DynamicCache(), custom_generate=decoder, **GREEDY)
    with pytest.raises(DecodingError, match="the exact acceptance, without guidance"):
        decoding.prompt_lookup(one_graph=EAGER, guidance=Guidance(2.0, torch.zeros(1, dtype=torch.int64)))
    with pytest.raises(DecodingError, match="the exact acceptance"):
        decoding.Decoder(decoding.PromptLookup(), decoding.Approval(), one_graph=EAGER)
