"""What GemFilter does to a cache, and what it does not take, with the reason."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertModel,
    BloomConfig,
    BloomForCausalLM,
    DynamicCache,
    MistralConfig,
    MistralForCausalLM,
    StaticCache,
)  # fmt: skip

from accelpass import CacheError, KVCache, OptionError, PassError
from accelpass.passes.token_pruning.gemfilter import GemFilter
from tests.passes.gemfilter_truth import (
    DECODER,
    KEEP,
    SIZES,
    VOCABULARY,
    built,
    compiled,
    logits,
    prompt_of,
    said,
    steps,
)  # fmt: skip

# --- the cache


@pytest.mark.slow
def test_capacity_is_that_of_the_kept_tokens():
    model, ids = built(), prompt_of(1, 30)
    fast, small = compiled(model), KVCache(model, KEEP - 1)
    with pytest.raises(CacheError, match="8 tokens do not fit"):
        logits(fast, small, ids)
    assert small.seen == 0
    cache = KVCache(model, KEEP + 2)
    logits(fast, cache, ids, *steps(count=2))
    with pytest.raises(CacheError, match="do not fit"):
        logits(fast, cache, *steps(count=1))


def test_a_shortened_cache_is_for_the_model_that_shortened_it():
    model, ids = built(), prompt_of(1, 30)
    cache = KVCache(model, 40)
    logits(compiled(model), cache, ids)
    with pytest.raises(CacheError, match="gemfilter"):
        logits(
            torch.compile(model, backend="accelpass", options={"lowering": "eager", "passes": []}),
            cache,
            *steps(count=1),
        )
    cache.reset()
    assert cache.get_seq_length() == 0
    torch.testing.assert_close(logits(model, cache, ids), logits(model, KVCache(model, 40), ids))


def test_a_prompt_that_is_read_once_is_answered_twice():
    model, ids = built(), prompt_of(1, 30)
    fast, cache = compiled(model), KVCache(model, 40)
    logits(fast, cache, ids)
    twin = copy.deepcopy(cache)
    assert cache.get_seq_length() == twin.get_seq_length() == 30
    torch.testing.assert_close(logits(fast, cache, *steps()), logits(fast, twin, *steps()))


def test_later_tokens_can_be_taken_back_and_the_prompt_cannot():
    model, ids = built(), prompt_of(1, 30)
    fast, cache = compiled(model), KVCache(model, 40)
    want = logits(fast, cache, ids, *steps())
    cache.crop(-4)
    torch.testing.assert_close(logits(fast, cache, *steps()), want[1:])
    with pytest.raises(CacheError, match="22 tokens of the prompt were left out"):
        cache.crop(-5)


# --- what is refused


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"keep": 0}, "keep=0"),
        ({"pool": 4}, "an odd number"),
        ({"layer": -1}, "layer=-1"),
        ({"force_last": -1}, "force_last=-1"),
        ({"keep": 4, "force_first": 3, "force_last": 2}, "at most keep=4"),
        ({"kept": 4}, "did you mean 'keep'"),
    ],
    ids=str,
)
def test_options(options, why):
    with pytest.raises(OptionError, match=why):
        GemFilter.from_options(options)


@pytest.mark.parametrize("other", ["delta_cache", "ditfastattn"])
def test_step_passes_are_refused_by_name(other):
    with pytest.raises(Exception, match=f"gemfilter cannot be used with {other}"):
        logits(compiled(built(), other), KVCache(built(), 40), prompt_of(1, 20))


def refusal(model: nn.Module, *args: Any, options: dict[str, Any] | None = None, **given: Any) -> str:
    """Why a prompt was not filtered; the result is the dense one."""
    fast = compiled(model, **(options or {}))
    with torch.no_grad():
        got, want = (f(*copy.deepcopy(args), **copy.deepcopy(given)) for f in (fast, model))
    for a, b in ((got, want),) if isinstance(got, Tensor) else ((got[0], want[0]),):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
    (why,) = said(fast).values()
    return why


def test_outputs_of_dropped_tokens_are_refused():
    assert "a row for each token" in refusal(built(), prompt_of(1, 20), use_cache=False)


def test_other_caches_are_refused():
    model, ids = built(), prompt_of(1, 20)
    assert "KVCache" in refusal(model, ids, past_key_values=DynamicCache(config=model.config), logits_to_keep=1)
    torch._dynamo.reset()
    cache = StaticCache(config=model.config, max_cache_len=40)
    cache.early_initialization(1, 2, 8, torch.float32, torch.device("cpu"))
    assert "KVCache" in refusal(model, ids, past_key_values=cache, logits_to_keep=1)


def test_a_layer_that_is_not_there():
    assert "layer=3: the model has 3 attentions" in refusal(
        built(), prompt_of(1, 20), options={"layer": 3}, use_cache=False, logits_to_keep=1
    )


def test_a_layer_that_sees_a_window():
    torch.manual_seed(0)
    model = MistralForCausalLM(MistralConfig(**DECODER, sliding_window=6)).eval()
    fast = compiled(model)
    logits(fast, KVCache(model, 40), prompt_of(1, 20))
    assert "sees its last 6 tokens alone" in "".join(said(fast).values())


def test_models_in_which_the_last_token_says_nothing():
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}

    class First(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bert = BertModel(BertConfig(**sizes, vocab_size=VOCABULARY))

        def forward(self, ids: Tensor) -> Tensor:
            return self.bert(ids).last_hidden_state[:, -1]

    assert "no attention is known to be causal" in refusal(First().eval(), prompt_of(1, 20))


def test_a_model_without_attention():
    class Bag(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.out = nn.Embedding(VOCABULARY, 16), nn.Linear(16, 16)

        def forward(self, ids: Tensor) -> Tensor:
            return self.out(self.embed(ids)).mean(1)

    assert "no self-attention was recognised" in refusal(Bag().eval(), prompt_of(1, 20))


def test_alibi():
    torch.manual_seed(0)
    model = BloomForCausalLM(BloomConfig(**SIZES, hidden_size=32, n_layer=2, n_head=4)).eval()
    why = refusal(model, prompt_of(1, 20), use_cache=False, logits_to_keep=1)
    assert "ALiBi" in why or "causal" in why


def test_training():
    model = built()
    with pytest.raises(Exception, match="gemfilter: there is no gradient") as caught:
        compiled(model)(prompt_of(1, 20), use_cache=False, logits_to_keep=1)
    assert isinstance(caught.value, PassError) or isinstance(getattr(caught.value, "inner_exception", None), PassError)
