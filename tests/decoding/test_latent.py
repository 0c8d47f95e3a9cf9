"""A decode step that is given its last hidden state, against reading everything anew; and the report on loops."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache

from accelpass import KVCache
from accelpass.decoding import DecodingError
from accelpass.decoding.latent import Thinker, recurrence
from accelpass.models_zoo import small
from tests.decoding.test_exact import GREEDY, prompt
from tests.passes.test_kv_methods import llama
from tests.public.test_kv_cache import settled


def anew(model, ids, thoughts, tokens):
    """The card's feedback without a cache: all inputs are read again at each step."""
    inputs = model.get_input_embeddings()(ids)
    for _ in range(thoughts):
        state = model(inputs_embeds=inputs, output_hidden_states=True, use_cache=False).hidden_states[-1][:, -1:]
        inputs = torch.cat([inputs, state], 1)
    for _ in range(tokens):
        token = model(inputs_embeds=inputs, use_cache=False).logits[:, -1:].argmax(-1)
        ids, inputs = torch.cat([ids, token], 1), torch.cat([inputs, model.get_input_embeddings()(token)], 1)
    return ids


@pytest.mark.parametrize("thoughts", [0, 1, 5])
def test_thoughts_are_inputs(thoughts):
    model, ids = settled(llama()), prompt(2)
    with torch.no_grad():
        want = anew(model, ids, thoughts, 8)
    for cache in (KVCache(model, 48, 2), DynamicCache()):
        assert torch.equal(Thinker(model)(ids, cache, thoughts, 8), want)
        assert int(cache.get_seq_length()) == 20 + thoughts + 7
    if not thoughts:
        assert torch.equal(
            want, model.generate(ids, attention_mask=torch.ones_like(ids), **{**GREEDY, "max_new_tokens": 8})
        )


@pytest.mark.slow
def test_thoughts_and_tokens_are_one_compiled_step():
    model, ids = settled(llama(layers=1)), prompt(2)
    fast = torch.compile(model, backend="accelpass", options={"lowering": "eager", "passes": ["kv_quant"]})
    thinker, cache = Thinker(model, fast), KVCache(model, 48, 2)
    first = thinker(ids, cache, 1, 2)
    with torch._dynamo.config.patch(error_on_recompile=True):
        cache.reset()
        again = thinker(ids, cache, 6, 5)
    assert first.shape == (2, 22) and again.shape == (2, 25)


def test_thinking_ends_where_thoughts_repeat_and_texts_at_their_end():
    model, ids = settled(llama()), prompt(2)
    free = Thinker(model)
    text = free(ids, KVCache(model, 64, 2), 12, 8)
    assert free.thoughts == 12
    still = settled(llama())
    with torch.no_grad():  # layers that add nothing: a state's norm is itself
        still.model.norm.weight.fill_(1)
        for layer in still.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
    short = Thinker(still, exit_eps=0.01)
    short(ids, KVCache(still, 64, 2), 12, 2)
    assert short.thoughts == 1
    end = int(text[0, 22])
    ended = free(ids, KVCache(model, 64, 2), 12, 8, eos=end)
    for line, plain in zip(ended, text, strict=True):
        at = (plain[20:] == end).nonzero()
        stop = 21 + int(at[0]) if len(at) else text.shape[1]
        assert torch.equal(line[:stop], plain[: min(stop, ended.shape[1])]) and (line[stop:] == end).all()


def test_refused():
    model, ids = settled(llama()), prompt()
    with pytest.raises(DecodingError, match="it must be empty, with room for 29"):
        Thinker(model)(ids, KVCache(model, 16), 4, 6)
    cache = KVCache(model, 64)
    Thinker(model)(ids, cache, 0, 2)
    with pytest.raises(DecodingError, match="the cache holds 21 tokens"):
        Thinker(model)(ids, cache, 0, 2)
    with pytest.raises(DecodingError, match="thoughts=-1"):
        Thinker(model)(ids, KVCache(model, 64), -1, 2)
    with pytest.raises(DecodingError, match="exit_eps=1"):
        Thinker(model, exit_eps=1.0)
    with pytest.raises(DecodingError, match="Linear is no causal decoder"):
        Thinker(torch.nn.Linear(2, 2))
    with torch.no_grad():
        model.model.norm.weight[0] = float("nan")
    with pytest.raises(DecodingError, match="thought 1 is not a number"):
        Thinker(model)(ids, KVCache(model, 64), 2, 2)


def test_loops_are_reported():
    (loop,) = recurrence(small.recurrent(), torch.randint(0, 128, (1, 5)))
    assert loop.trips == 6 and "6 trips" in str(loop) and "again.weight" in loop.parameters
    assert recurrence(small.tiny_lm(), torch.randint(0, 128, (1, 5))) == []
