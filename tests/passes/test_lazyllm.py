"""LazyLLM in whole models against its eager oracle, and at the setting where it must equal the dense model."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PhiConfig,
    PhiForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    StaticCache,
)

import accelpass
from accelpass import KVCache
from accelpass.backends.compile.compiler import graphs_of
from accelpass.ir.errors import CacheError, OptionError, SpecConflict
from accelpass.passes.core.plan import Plan
from accelpass.passes.token_pruning.choice import best, kept
from accelpass.passes.token_pruning.lazyllm import LazyLLM
from tests.passes.lazy_oracle import LazyOracle
from tests.sweep import examples, sweep

VOCABULARY, CAPACITY = 64, 64
SIZES: dict[str, Any] = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4}


def llama(seed: int = 0, layers: int = 5, kv_heads: int = 2) -> Any:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=kv_heads, max_position_embeddings=128, initializer_range=0.25,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def compiled(model: Any, keep: dict[int, float], *more: Any, lowering: str = "eager", **options: Any) -> Any:
    lazy = {"name": "lazyllm", "keep": list(keep.values()), "layers": list(keep)}
    return torch.compile(model, backend="accelpass", options={"passes": [lazy, *more], "lowering": lowering, **options})


def ids(count: int, batch: int = 1, seed: int = 1) -> torch.Tensor:
    return torch.randint(0, VOCABULARY, (batch, count), generator=torch.Generator().manual_seed(seed))


def pieces(lengths: list[int]) -> list[slice]:
    ends = [sum(lengths[: i + 1]) for i in range(len(lengths))]
    return [slice(end - n, end) for n, end in zip(lengths, ends, strict=True)]


def errors(fast: Any, model: Any, keep: dict[int, float], lengths: list[int], seed: int = 1) -> list[float]:
    """Of the last logits of each call, relative; the survivors of each call are compared as well."""
    given, cache, oracle = ids(sum(lengths), seed=seed), KVCache(model, CAPACITY), LazyOracle(model, keep)
    found = []
    with torch.no_grad():
        for piece in pieces(lengths):
            got = fast(given[:, piece], past_key_values=cache).logits[0, -1]
            want = oracle.step(given[0, piece])
            found.append(float((got - want).abs().max() / want.abs().max()))
    return found


@settings(max_examples=examples(2), deadline=None)
@given(
    seed=st.integers(0, 99),
    kv_heads=st.sampled_from([1, 2, 4]),
    prompt=st.integers(2, 30),
    after=st.lists(st.sampled_from([1, 1, 1, 4]), min_size=1, max_size=5),
    keep=st.dictionaries(st.integers(0, 3), st.sampled_from([0.05, 0.3, 0.5, 0.77, 1.0]), min_size=1, max_size=3),
)
def test_equals_the_oracle(seed, kv_heads, prompt, after, keep):
    torch._dynamo.reset()  # for each example
    keep, model = dict(sorted(keep.items())), llama(seed, kv_heads=kv_heads)
    assert max(errors(compiled(model, keep), model, keep, [prompt, *after], seed)) < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize(
    ("layers", "keep", "after", "graphs"),
    [
        (2, {0: 0.6}, [1, 1], 2),  # a prompt of the first length, of any; single tokens
        pytest.param(5, {0: 0.6, 1: 0.7, 3: 0.5}, [1, 1, 1, 5, 1], 4, marks=pytest.mark.slow),  # and a further turn
    ],
    ids=["tokens", "turns"],
)
def test_compiled_by_inductor_for_prompts_of_any_length(layers, keep, after, graphs):
    model = llama(layers=layers)
    fast = compiled(model, keep, lowering="inductor")
    for prompt in (9, 24) if graphs > 2 else (9,):
        assert max(errors(fast, model, keep, [prompt, *after])) < 1e-4
    assert len(graphs_of(model)) == graphs


@pytest.mark.slow
def test_tokens_come_back_and_each_passes_a_block_once():
    model, keep = llama(), {0: 0.5, 2: 0.5}
    oracle, given = LazyOracle(model, keep), ids(40)
    oracle.step(given[0, :24])
    after_prompt = oracle.computed
    assert after_prompt < 5 * 24  # the prompt's own tokens were not all computed
    for t in range(24, 40):
        oracle.step(given[0, t : t + 1])
    assert after_prompt + 5 * 16 - oracle.computed < 5 * 16  # more than the new tokens alone would take ...
    assert oracle.computed <= 5 * 40  # ... and never more than the dense model
    assert max(errors(compiled(model, keep), model, keep, [24, *[1] * 16])) < 1e-4


def test_survivors_are_those_of_the_oracle_nested_and_with_the_last_token():
    model, keep = llama(), {0: 0.6, 2: 0.5}
    fast, oracle, cache, given = compiled(model, keep), LazyOracle(model, keep), KVCache(model, CAPACITY), ids(23)
    with torch.no_grad():
        for piece in pieces([20, 1, 1, 1]):
            fast(given[:, piece], past_key_values=cache)
            oracle.step(given[0, piece])
            found = accelpass.surviving_tokens(fast)
            assert [list(one.kept[0]) for one in found] == list(oracle.survivors.values())
            first, second = ({*one.kept[0]} for one in found)
            assert second <= first and piece.stop - 1 in second


@pytest.mark.slow
@pytest.mark.parametrize("lowering", sweep("eager", "inductor"))
def test_each_sequence_of_a_batch_has_its_own_choice(lowering):
    model, keep = llama(layers=4), {0: 0.5, 2: 0.6}
    given, cache = ids(22, 3), KVCache(model, CAPACITY, 3)
    fast, oracles = compiled(model, keep, lowering=lowering), [LazyOracle(model, keep) for _ in range(3)]
    with torch.no_grad():
        for piece in pieces([16, 1, 1, 4]):
            got = fast(given[:, piece], past_key_values=cache).logits[:, -1]
            want = torch.stack([o.step(row) for o, row in zip(oracles, given[:, piece], strict=True)])
            assert torch.allclose(got, want, rtol=1e-4, atol=1e-4)
    assert accelpass.explain(fast).passes["lazyllm"].took


FAMILIES = {
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=4, n_head=4, n_positions=64)),
    "phi": lambda: PhiForCausalLM(PhiConfig(intermediate_size=48, **SIZES)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(intermediate_size=48, num_key_value_heads=2, head_dim=16, **SIZES)),
}


@pytest.mark.parametrize("family", sweep("gpt2", "phi", "qwen3"))
def test_equals_dense_where_it_must(family):
    torch.manual_seed(0)
    model = FAMILIES[family]().eval()
    fast = compiled(model, {0: 1.0, 2: 1.0})
    mask = torch.ones(2, 20, dtype=torch.long)
    mask[0, :5] = 0
    given, cache, dense = ids(20, 2), KVCache(model, CAPACITY, 2), KVCache(model, CAPACITY, 2)
    with torch.no_grad():
        for piece in pieces([15, 1, 3, 1]):
            now = {"input_ids": given[:, piece], "attention_mask": mask[:, : piece.stop]}
            got = fast(**now, past_key_values=cache).logits[:, -1]
            want = model(**now, past_key_values=dense).logits[:, -1]
            assert torch.allclose(got, want, rtol=1e-4, atol=1e-4)
    took = accelpass.explain(fast).passes["lazyllm"].took
    assert len(took) >= 3


def test_generate_token_for_token_at_keep_1():
    model = llama()
    given = ids(12, 2)
    fast = compiled(model, {1: 1.0})
    asked = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    mask = torch.ones_like(given)
    mask[1, :4] = 0
    got = fast.generate(given, attention_mask=mask, past_key_values=KVCache(model, CAPACITY, 2), **asked)
    assert got.tolist() == model.generate(given, attention_mask=mask, **asked).tolist()


@pytest.mark.slow
def test_without_a_cache_dropped_tokens_leave_with_the_state_that_they_had():
    model, keep = llama(), {0: 0.5, 2: 0.5}
    given = ids(21)
    with torch.no_grad():
        got = compiled(model, keep)(given, use_cache=False).logits
        oracle = LazyOracle(model, keep)
        assert torch.allclose(got[0, -1], oracle.step(given[0]), rtol=1e-4, atol=1e-4)
        assert got.shape == (1, 21, VOCABULARY)
        dropped = next(iter(set(range(21)) - set(oracle.survivors[0])))
        left = model.lm_head(model.model.norm(oracle.aux[0][dropped]))
        assert torch.allclose(got[0, dropped], left, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_no_later_token_changes_an_earlier_one():
    """Which tokens are computed is the last token's choice; what is computed of one depends on those before it alone."""
    model, keep = llama(), {0: 0.5}
    fast, given = compiled(model, keep), ids(20)
    with torch.no_grad():
        before = fast(given, use_cache=False).logits
        survivors = accelpass.surviving_tokens(fast)[0].kept[0]
        at = survivors[-2]
        changed = given.clone()
        changed[0, at] = (changed[0, at] + 1) % VOCABULARY
        after = fast(changed, use_cache=False).logits
        then = accelpass.surviving_tokens(fast)[0].kept[0]
    # Dropped tokens went through the first block only, with all tokens; none sees a later one.
    dropped = [t for t in range(at) if t not in survivors and t not in then]
    assert dropped and torch.allclose(before[0, dropped], after[0, dropped], rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    "weights",
    sweep("int8_weights", {"name": "int4_weights", "group_size": 32}),
    ids=str,
)
def test_packed_weights(weights):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=64, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, initializer_range=0.2,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    given, keep = ids(22), {0: 0.6, 1: 0.6}
    both, packed = (
        compiled(model, keep, weights),
        torch.compile(model, backend="accelpass", options={"passes": [weights], "lowering": "eager"}),
    )
    dense = compiled(model, {0: 1.0, 1: 1.0}, weights)
    with torch.no_grad():
        outs = []
        for fast in (both, packed, dense):
            torch._dynamo.reset()  # three sets of options for one model's code are more than Dynamo compiles
            cache = KVCache(model, CAPACITY)
            outs.append(
                torch.cat([fast(given[:, p], past_key_values=cache).logits[:, -1:] for p in pieces([18, 1, 1])])
            )
    assert torch.isfinite(outs[0]).all() and not torch.allclose(outs[0], outs[1], rtol=1e-3, atol=1e-3)
    assert torch.allclose(outs[1], outs[2], rtol=1e-4, atol=1e-4)  # all tokens kept: packed weights alone
    assert torch.isfinite(outs[0]).all()


@pytest.mark.slow
def test_the_same_graphs_with_other_weights():
    """Two instances, a weight that is written in place, and float weights that are given back."""
    models, given = [llama(seed, layers=3) for seed in (0, 5)], ids(30)

    def answers(model: Any, fast: Any = None, **options: Any) -> tuple[torch.Tensor, Any]:
        fast = compiled(model, {0: 0.6, 1: 0.6}, "int8_weights", **options) if fast is None else fast
        cache = KVCache(model, CAPACITY)
        with torch.no_grad():
            made = [fast(given[:, p], past_key_values=cache).logits[:, -1] for p in pieces([18, 1, 1, 3, 1])]
        return torch.cat(made), fast

    def alone(model: Any, **options: Any) -> torch.Tensor:
        torch._dynamo.reset()
        made, _ = answers(copy.deepcopy(model), **options)
        torch._dynamo.reset()
        return made

    want = [alone(model) for model in models]
    assert torch.equal(alone(models[0], free_weights=True), want[0])
    got, fasts = zip(*map(answers, models), strict=True)
    assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])
    with torch.no_grad():
        models[1].model.layers[1].mlp.up_proj.weight.copy_(models[0].model.layers[1].mlp.up_proj.weight)
    after, _ = answers(models[1], fasts[1])
    assert not torch.equal(after, want[1]) and torch.equal(after, alone(models[1]))


@pytest.mark.slow
def test_rows_in_few_bits():
    model, given = llama(), ids(22)
    quant = {"name": "kv_quant", "bits": 8}
    both = compiled(model, {0: 1.0, 2: 1.0}, quant)
    alone = torch.compile(model, backend="accelpass", options={"passes": [quant], "lowering": "eager"})
    with torch.no_grad():
        a, b = (
            torch.cat([f(given[:, p], past_key_values=c).logits[:, -1] for p in pieces([18, 1, 1, 1, 1])])
            for f, c in ((both, KVCache(model, CAPACITY)), (alone, KVCache(model, CAPACITY)))
        )
    assert torch.allclose(a, b, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("other", sweep("h2o", "tidaldecode", "mikv", "kv_window", fast=2))
def test_other_stores_are_refused_by_name(other):
    model = llama()
    with pytest.raises(Exception, match=f"(?s)lazyllm.*{other}|{other}.*lazyllm") as caught, torch.no_grad():
        compiled(model, {0: 0.5}, other)(ids(12), past_key_values=KVCache(model, CAPACITY))
    assert isinstance(caught.value.__cause__ or caught.value, SpecConflict | Exception)


@pytest.mark.parametrize(
    "options",
    [
        {"keep": []},
        {"keep": [0.0]},
        {"keep": [1.2]},
        {"keep": [0.5, 0.5], "layers": [1]},
        {"keep": [0.5, 0.5], "layers": [2, 1]},
        {"keep": [0.5], "layers": [-2]},
        {"keep": ["much"]},
    ],
    ids=str,
)
def test_bad_options(options):
    with pytest.raises(OptionError, match="lazyllm"):
        LazyLLM.from_options(options)


def test_a_block_that_the_model_does_not_have():
    with pytest.raises(Exception, match="has 5, so at most 3"), torch.no_grad():
        compiled(llama(), {4: 0.5})(ids(9), use_cache=False)


def test_a_plan_of_another_model_is_refused():
    plan = Plan.of(llama(kv_heads=4), ["lazyllm"])
    with (
        pytest.raises(Exception, match=r"k_proj.*belongs to another model|belongs to another model.*k_proj"),
        torch.no_grad(),
    ):
        compiled(llama(), {0: 0.5}, plan=plan)(ids(9), use_cache=False)


def skipped(model: Any, **call: Any) -> str:
    fast = compiled(model, {0: 0.5})
    with torch.no_grad():
        got, want = fast(**call)[0], model(**call)[0]
    assert torch.allclose(got, want, rtol=1e-4, atol=1e-4)
    found = accelpass.explain(fast).passes["lazyllm"]
    assert not found.took
    return " ".join(found.skipped.values())


def test_a_model_that_is_not_causal_is_left_alone():
    model = BertModel(BertConfig(intermediate_size=48, **SIZES)).eval()
    assert "not causal" in skipped(model, input_ids=ids(9))


def test_sliding_windows_are_left_alone():
    config = MistralConfig(intermediate_size=48, num_key_value_heads=2, sliding_window=4, **SIZES)
    model = MistralForCausalLM(config).eval()
    assert "window" in skipped(model, input_ids=ids(9), use_cache=False)


def test_one_token_without_a_cache_is_left_alone():
    assert "nothing to drop" in skipped(llama(), input_ids=ids(1), use_cache=False)


def test_a_cache_of_another_kind_is_named_with_the_remedy():
    model = llama()
    cache = StaticCache(config=model.config, max_cache_len=32)
    fast = compiled(model, {0: 0.5})
    with torch.no_grad():
        got = fast(ids(9), past_key_values=cache).logits
        assert torch.allclose(got, model(ids(9)).logits, rtol=1e-4, atol=1e-4)
    assert "accelpass.KVCache(model" in accelpass.explain(fast).passes["lazyllm"].skipped["model"]


@pytest.mark.slow
def test_a_cache_that_another_set_of_passes_filled():
    model = llama()
    cache = KVCache(model, CAPACITY)
    with torch.no_grad():
        model(ids(9), past_key_values=cache)
        with pytest.raises(CacheError, match="reset"):
            compiled(model, {0: 0.5})(ids(1), past_key_values=cache)
        cache.reset()
        assert max(errors(compiled(model, {0: 0.5}), model, {0: 0.5}, [9, 1, 1])) < 1e-4


@pytest.mark.slow
def test_a_prompt_that_does_not_fit_changes_nothing():
    model = llama()
    fast, cache, given = compiled(model, {0: 0.5}), KVCache(model, 16), ids(30)
    with torch.no_grad():
        first = fast(given[:, :12], past_key_values=cache).logits
        with pytest.raises(CacheError, match="do not fit"):
            fast(given[:, 12:20], past_key_values=cache)
        again = fast(given[:, 12:13], past_key_values=cache).logits
        cache.reset()
        assert torch.equal(fast(given[:, :12], past_key_values=cache).logits, first)
        assert torch.equal(fast(given[:, 12:13], past_key_values=cache).logits, again)


@given(st.integers(1, 40), st.floats(0.01, 1))
def test_the_last_token_goes_on(tokens, share):
    score = torch.rand(2, tokens, generator=torch.Generator().manual_seed(tokens))
    chosen = best(score, kept(tokens, share))
    assert chosen.shape[1] == max(1, int(share * tokens))
    assert (chosen[:, -1] == tokens - 1).all() and (chosen.diff() > 0).all()
