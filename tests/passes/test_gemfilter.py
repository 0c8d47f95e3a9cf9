"""GemFilter in whole models: the model reads the chosen tokens, and goes on, as if they had been the prompt."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import (
    AttentionInterface,
    BertConfig,
    BertModel,
    BloomConfig,
    BloomForCausalLM,
    DynamicCache,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    StaticCache,
)  # fmt: skip
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask

import accelpass
from accelpass import CacheError, KVCache, OptionError, PassError
from accelpass.backends.compiler import graphs_of
from accelpass.ir.kv.ops import KV_APPEND
from accelpass.passes.token_pruning.gemfilter import GemFilter

VOCABULARY, LAYERS, KEEP, LAYER, NEW = 96, 3, 8, 1, 5
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "initializer_range": 0.3,
    "bos_token_id": 1,
    "pad_token_id": 0,
    "eos_token_id": None,
}
DECODER = {
    **SIZES, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": LAYERS, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256,
}  # fmt: skip
FAMILIES: dict[str, Any] = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**DECODER)),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(**SIZES, n_embd=32, n_layer=LAYERS, n_head=4, n_positions=128)),
    "phi3": lambda: Phi3ForCausalLM(Phi3Config(**DECODER)),
}


def built(family: str = "llama", seed: int = 0) -> Any:
    torch.manual_seed(seed)
    return FAMILIES[family]().eval()


def compiled(model: Any, *others: Any, lowering: str = "eager", dynamic: bool | None = None, **options: Any) -> Any:
    passes = [{"name": "gemfilter", "keep": KEEP, "layer": LAYER, **options}, *others]
    return torch.compile(model, backend="accelpass", options={"lowering": lowering, "passes": passes}, dynamic=dynamic)


def prompt_of(batch: int, tokens: int, seed: int = 1) -> Tensor:
    torch.manual_seed(seed)
    return torch.randint(2, VOCABULARY, (batch, tokens))


def gem_select(q_last: Tensor, keys: Tensor, k: int, ker: int = 5) -> Tensor:
    """The method card's oracle."""
    b, h, d = q_last.shape
    hkv, n = keys.shape[1], keys.shape[2]
    if n <= k:
        return torch.arange(n).expand(b, n)
    s = torch.einsum("bhgd,bhnd->bn", q_last.view(b, hkv, h // hkv, d), keys).float()
    s = F.avg_pool1d(s[:, None], ker, 1, ker // 2)[:, 0]
    return s.topk(k, -1).indices.sort(-1).values


@contextmanager
def spied(model: Any, layer: int) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Queries and keys of a layer, as an attention of transformers gets them."""
    seen: list[tuple[Tensor, Tensor]] = []

    def attend(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kwargs: Any) -> Any:
        if module.layer_idx == layer:
            seen.append((query, key))
        return sdpa_attention_forward(module, query, key, value, mask, **kwargs)

    AttentionInterface.register("spy", attend)
    ALL_MASK_ATTENTION_FUNCTIONS.register("spy", sdpa_mask)
    before = model.config._attn_implementation
    model.set_attn_implementation("spy")
    yield seen
    model.set_attn_implementation(before)


@torch.no_grad()
def chosen(model: Any, ids: Tensor, padding: Tensor | None = None, layer: int = LAYER, keep: int = KEEP) -> Tensor:
    """The oracle's choice; of a padded batch, each sequence by itself."""
    rows = []
    for i, row in enumerate(ids):
        start = 0 if padding is None else int((padding[i] == 0).sum())
        with spied(model, layer) as seen:
            model(row[None, start:])
        q, k = seen[0]
        found = gem_select(q[:, :, -1], k, keep)[0] + start
        # Fewer tokens than are kept: padding fills up, in front.
        missing = keep - len(found)
        rows.append(torch.cat([torch.arange(start - missing, start), found]))
    return torch.stack(rows)


def answered(model: Any, ids: Tensor, cache: Any, padding: Tensor | None = None, **given: Any) -> Tensor:
    mask = torch.ones_like(ids) if padding is None else padding
    given = {"max_new_tokens": NEW, "do_sample": False, **given}
    return model.generate(ids, attention_mask=mask, past_key_values=cache, **given)


@torch.no_grad()
def logits(fast: Any, cache: Any, *pieces: Tensor) -> Tensor:
    return torch.stack([fast(p, past_key_values=cache, logits_to_keep=1).logits[:, -1] for p in pieces])


def steps(batch: int = 1, count: int = 4) -> list[Tensor]:
    return list(prompt_of(batch, count, seed=5).split(1, 1))


def said(fast: Any) -> dict[str, str]:
    return accelpass.explain(fast).passes["gemfilter"].skipped


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
    first = graphs_of(model)[0].prompt.first
    nodes = list(first.fn.graph.nodes)
    assert sum("attention" in str(n.target) for n in nodes) == LAYER
    assert not any(n.target is KV_APPEND for n in nodes)
    with torch.no_grad():
        for layer in model.model.layers[LAYER + 1 :]:
            for weight in layer.parameters():
                weight.mul_(-3)
        model.model.layers[LAYER].mlp.up_proj.weight.zero_()
        model.model.layers[LAYER].self_attn.v_proj.weight.zero_()
    logits(fast, KVCache(model, 64), ids)
    assert accelpass.surviving_tokens(fast)[0].kept == tuple(map(tuple, rows.tolist()))


# --- whole models


@pytest.mark.parametrize("family", FAMILIES)
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


@pytest.mark.parametrize("lowering", ["eager", "inductor"])
@pytest.mark.parametrize("family", ["llama", pytest.param("gpt2", marks=pytest.mark.slow), "phi3"])
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


@pytest.mark.parametrize("pads", [3, 14], ids=lambda p: f"{p} of 20 padded")
@pytest.mark.parametrize("family", ["llama", pytest.param("gpt2", marks=pytest.mark.slow)])
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


@pytest.mark.parametrize("dynamic", [None, True])
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


def test_a_short_prompt_after_a_long_one():
    model = built()
    fast, cache = compiled(model), KVCache(model, 40)
    for n in (20, 30, 6, 25, 4):
        cache.reset()
        ids = prompt_of(1, n, seed=n)
        want = logits(model, KVCache(model, 40), ids.gather(1, chosen(model, ids)) if n > KEEP else ids, *steps())
        torch.testing.assert_close(logits(fast, cache, ids, *steps()), want, atol=1e-4, rtol=1e-4)
        assert bool(accelpass.surviving_tokens(fast)) == (n > KEEP)


@pytest.mark.parametrize(("dynamic", "graphs"), [(None, 3), (True, 2)])
def test_lengths_share_graphs(dynamic, graphs):
    model = built()
    fast, cache = compiled(model, dynamic=dynamic), KVCache(model, 40)
    for n in (20, 24, 31, 19, 70):
        cache.reset()
        logits(fast, cache, prompt_of(1, n), *steps())
    assert len(graphs_of(model)) == graphs


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


@pytest.mark.parametrize(
    "other",
    [
        {"name": "int8_weights"},
        {"name": "int4_weights", "group_size": 32},
        {"name": "h2o", "budget": 0.3},
        {"name": "mikv", "budget": 0.4, "bits": 4},
        {"name": "kv_quant", "bits": 8},
    ],
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


# --- the cache


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


# --- what is said of it


def test_the_report_draws_what_went_on():
    model, ids = built(), prompt_of(2, 40)
    fast = compiled(model)
    logits(fast, KVCache(model, 64, 2), ids)
    report = accelpass.explain(fast)
    (one,) = report.survivors
    assert one.path == f"model.layers.{LAYER}.self_attn" and len(one.kept) == 2
    assert f"8 of 40 by {one.path}" in str(report) and f"|{one.strip(72)}|" in str(report)
    assert sum(share > 0 for share in one.shares(40)) == KEEP and sum(one.shares(40, 1)) == KEEP
    assert len(one.strip(10)) == 10 and len(one.strip(400)) == 40
    assert report.flops is not None and report.flops[1] < report.flops[0]
    assert report.to_dict()["survivors"][0]["tokens"] == 40


def test_the_page_draws_it_too(tmp_path):
    model = built()
    fast = compiled(model)
    logits(fast, KVCache(model, 64), prompt_of(1, 40))
    page = accelpass.explain(fast).to_html(tmp_path / "r.html").read_text()
    assert "Tokens of the last prompt that went on" in page and "8 of 40 tokens kept" in page


def test_over_the_text():
    class Words:
        def decode(self, ids: list[int]) -> str:
            return " ".join(f"w{i}" for i in ids)

    ids = torch.arange(10)[None]
    found = accelpass.SurvivingTokens("x", 10, ((0, 1, 5, 9),))
    assert found.over(Words(), ids) == "w0 w1 ... w5 ... w9"
    assert accelpass.SurvivingTokens("x", 10, ((2, 3),)).over(Words(), ids) == "... w2 w3 ..."
    with pytest.raises(ValueError, match="had 10 tokens"):
        found.over(Words(), ids[:, :9])
