"""SpAtten's cascade of heads against an eager one that is written from its card, with masks in the place of smaller products."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

import accelpass
from accelpass import KVCache
from accelpass.ir.errors import OptionError
from accelpass.models_zoo import small
from accelpass.passes.pruning.head_cascade import HeadCascade
from tests.sweep import examples


def llama(layers: int = 4, heads: int = 6, kv_heads: int = 6) -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=48, intermediate_size=56, num_hidden_layers=layers, head_dim=8,
        num_attention_heads=heads, num_key_value_heads=kv_heads, max_position_embeddings=64, initializer_range=0.3,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def compiled(model: Any, *others: Any, lowering: str = "eager", **options: Any) -> Any:
    torch._dynamo.reset()
    given = {"passes": [*others, {"name": "head_cascade", **options}], "lowering": lowering}
    return torch.compile(model, backend="accelpass", options=given)


def cascade_heads(E: Tensor, s: Tensor, alive: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The card's; scores and masks are of groups of heads that share keys ``(batch, kv_heads)``."""
    s = s + E.float().abs().sum((2, 3)).unflatten(1, (s.shape[1], -1)).sum(-1)
    best = s.masked_fill(~alive, -1).sort(dim=1, descending=True, stable=True).indices[:, :k]
    return s, torch.zeros_like(alive).scatter_(1, best, True) & alive


def oracle(model: Any, ids: Tensor, keep: float, dense: float) -> tuple[Tensor, list[set[int]]]:
    """Logits of one sequence, and the heads of each layer, or their groups."""
    core, count = model.model, len(model.model.layers)
    first, size = math.ceil(dense * count), model.config.num_key_value_heads
    x, s, alive = core.embed_tokens(ids), torch.zeros(1, size), torch.ones(1, size, dtype=torch.bool)
    tables, had = core.rotary_emb(x, torch.arange(ids.shape[1])[None]), []
    for number, block in enumerate(core.layers):
        attn, normed = block.self_attn, block.input_layernorm(x)
        q, k, v = (
            p(normed).view(1, ids.shape[1], -1, 8).transpose(1, 2) for p in (attn.q_proj, attn.k_proj, attn.v_proj)
        )
        q, k = apply_rotary_pos_emb(q, k, *tables)
        groups = q.shape[1] // size
        scores = q @ k.repeat_interleave(groups, 1).mT * attn.scaling
        later = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
        E = scores.masked_fill(later, -torch.inf).softmax(-1) @ v.repeat_interleave(groups, 1)
        E = E * alive.repeat_interleave(groups, 1)[..., None, None]
        had.append({int(h) for h in alive[0].nonzero()})
        x = x + attn.o_proj(E.transpose(1, 2).flatten(2))
        x = x + block.mlp(block.post_attention_layernorm(x))
        rate = 1.0 if number < first else 1 + (keep - 1) / (count - first) * (number - first + 1)
        s, alive = cascade_heads(E, s, alive, max(1, math.ceil(rate * size)))
    return model.lm_head(core.norm(x)), had


def drawn(batch: int, n: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 64, (batch, n), generator=torch.Generator().manual_seed(seed))


@settings(max_examples=examples(2), deadline=None)
@given(
    shape=st.sampled_from([(6, 6), (8, 4)]), layers=st.integers(2, 3), n=st.integers(2, 20),
    keep=st.sampled_from([0.1, 0.4, 0.8]), dense=st.sampled_from([0.0, 0.3]), seed=st.integers(0, 99),
)  # fmt: skip
@torch.no_grad()
def test_follows_the_oracle(shape, layers, n, keep, dense, seed) -> None:
    """Each call chooses anew; heads that share keys go together."""
    model = llama(layers, *shape)
    fast = compiled(model, keep=keep, dense=dense)
    for ids in (drawn(1, n, seed), drawn(1, n, seed + 1)):
        want, had = oracle(model, ids, keep, dense)
        torch.testing.assert_close(fast(input_ids=ids, use_cache=False).logits, want, atol=1e-4, rtol=1e-3)
        assert all(a >= b for a, b in itertools.pairwise(had))


def test_rates_are_the_cards() -> None:
    assert HeadCascade(keep=0.5).rates(4) == [1.0, 1.0, 0.75, 0.5]
    assert HeadCascade(keep=1.0).rates(3) == [1.0] * 3


@torch.no_grad()
def test_products_are_saved() -> None:
    """Later layers multiply the rows of those heads alone that are left."""
    model, ids = llama(), drawn(1, 12)
    fast = compiled(model, keep=0.4, dense=0.0)
    fast(input_ids=ids, use_cache=False)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True) as seen:
        fast(input_ids=ids, use_cache=False)
    wide = [e.input_shapes[1][0] for e in seen.events() if e.name == "aten::linear" and e.input_shapes[1][1] == 48]
    _, had = oracle(model, ids, 0.4, 0.0)
    want = [8 * len(heads) for heads in had for _ in "qkv"]
    found = [n for n in wide if n not in (56, 64, 48)]
    assert found == [n for n in want if n != 48] and found


@torch.no_grad()
def test_sequences_of_a_call_choose_together() -> None:
    model = llama(2)
    fast, both = compiled(model, keep=0.2, dense=0.0), drawn(2, 10)
    alone = fast(input_ids=both[:1], use_cache=False).logits
    twice = fast(input_ids=both[:1].repeat(2, 1), use_cache=False).logits
    torch.testing.assert_close(twice, alone.repeat(2, 1, 1), atol=1e-4, rtol=1e-3)
    assert fast(input_ids=both, use_cache=False).logits.isfinite().all()


@torch.no_grad()
def test_an_encoder_and_rounded_weights() -> None:
    """Weights that are cut as the graph runs are no weights that can be packed; those before the first cut are."""
    model = small.encoder(0)
    ids = torch.randint(1, 40, (2, 21), generator=torch.Generator().manual_seed(0))
    fast = compiled(model, "int8_weights", keep=0.1, dense=0.0)
    made, dense = fast(input_ids=ids).last_hidden_state, model(input_ids=ids).last_hidden_state
    assert made.isfinite().all() and not torch.allclose(made, dense, atol=1e-3)
    report = accelpass.explain(fast)
    assert report.passes["head_cascade"].took and report.passes["int8_weights"].took


@torch.no_grad()
def test_keeping_all_is_dense() -> None:
    model, ids = llama(2), drawn(1, 12)
    fast = compiled(model, keep=1.0)
    torch.testing.assert_close(
        fast(input_ids=ids, use_cache=False).logits, model(input_ids=ids, use_cache=False).logits, atol=1e-5, rtol=1e-4
    )


@contextmanager
def with_heads(model: Any, had: list[set[int]]) -> Iterator[None]:
    """Each layer of the model has these heads alone, or their groups."""
    size, hooks = model.config.num_key_value_heads, []
    for block, heads in zip(model.model.layers, had, strict=True):
        kept = torch.tensor([float(h in heads) for h in range(size)]).repeat_interleave(
            block.self_attn.o_proj.in_features // size
        )
        hooks.append(block.self_attn.o_proj.register_forward_pre_hook(lambda _, given, kept=kept: (given[0] * kept,)))
    yield
    for hook in hooks:
        hook.remove()


@pytest.mark.parametrize("shape", [pytest.param((6, 6), marks=pytest.mark.slow), (8, 4)])
@torch.no_grad()
def test_the_prompt_chooses_for_what_comes_after_it(shape) -> None:
    """One token, then several; the cache has each layer's own heads, and a new prompt chooses anew."""
    model = llama(4, *shape)
    fast, cache = compiled(model, keep=0.2, dense=0.0), KVCache(model, 32)
    for seed in (0, 1):
        cache.reset()
        ids = drawn(1, 14, seed)
        want, had = oracle(model, ids[:, :10], 0.2, 0.0)
        with with_heads(model, had):
            whole = model(input_ids=ids, use_cache=False).logits
        parts = [fast(input_ids=p, past_key_values=cache).logits for p in ids.split([10, 1, 3], 1)]
        torch.testing.assert_close(parts[0], want, atol=1e-4, rtol=1e-3)
        torch.testing.assert_close(torch.cat(parts, 1), whole, atol=1e-4, rtol=1e-3)
    rows = sum(len(heads) for heads in had) * 32 * (8 + 8) * 4
    assert rows <= cache.nbytes() < rows + 512 and len({len(heads) for heads in had}) > 1


@pytest.mark.parametrize("padding", [0, 4])
@torch.no_grad()
def test_beams_go_on_with_the_heads_of_their_prompt(padding) -> None:
    model, ids = llama(), drawn(1, 9)
    _, had = oracle(model, ids, 0.3, 0.0)
    padded = torch.cat([drawn(1, padding, 3), ids], 1)
    mask = torch.cat([torch.zeros(1, padding, dtype=torch.long), torch.ones_like(ids)], 1)
    given: dict[str, Any] = {"num_beams": 3, "max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    with with_heads(model, had):
        want = model.generate(padded, attention_mask=mask, **given)
    torch._dynamo.reset()
    passes = [{"name": "head_cascade", "keep": 0.3, "dense": 0.0}]
    model.compile(backend="accelpass", options={"passes": passes, "lowering": "eager"})
    assert torch.equal(
        model.generate(padded, attention_mask=mask, **given, past_key_values=KVCache(model, 32, 3)), want
    )


SLOW = [
    "cskv", {"name": "tidaldecode", "budget": 4, "first": 0, "reselect": 1}, {"name": "lazyllm", "keep": (0.5,)},
]  # fmt: skip


@pytest.mark.parametrize(
    "other", [{"name": "spatten", "keep": 0.5, "first": 0, "dense": 0.0}, "int8_weights",
              *(pytest.param(o, marks=pytest.mark.slow) for o in SLOW)], ids=str,
)  # fmt: skip
@torch.no_grad()
def test_beside_what_else_reads_keys(other) -> None:
    """Layers of fewer heads, whose projections are computed, are read or left out by name in both graphs of a text."""
    model, ids = llama(4, 8, 4), drawn(1, 12)
    fast, cache = compiled(model, other, keep=0.2, dense=0.0), KVCache(model, 32)
    for part in ids.split([10, 1, 1], 1):
        assert fast(input_ids=part, past_key_values=cache, logits_to_keep=1).logits.isfinite().all()
    assert len(accelpass.explain(fast).passes["head_cascade"].took) == 4


@torch.no_grad()
def test_padding_counts_as_nothing() -> None:
    """A sequence and what stands in front of it choose the heads that it chooses alone."""
    model, ids = llama(), drawn(1, 12)
    padded, mask = torch.cat([drawn(1, 5, 3), ids], 1), torch.tensor([[0] * 5 + [1] * 12])
    fast = compiled(model, keep=0.2, dense=0.0)
    got = fast(input_ids=padded, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp_min(0), use_cache=False)
    want, _ = oracle(model, ids, 0.2, 0.0)
    torch.testing.assert_close(got.logits[:, 5:], want, atol=1e-4, rtol=1e-3)
    assert len(accelpass.explain(fast).passes["head_cascade"].took) == 4


@pytest.mark.slow
@torch.no_grad()
def test_inductor_gives_the_same() -> None:
    model, ids = llama(), drawn(1, 14)
    eager, fast = (
        compiled(model, keep=0.3, dense=0.0, lowering=how)(input_ids=ids, use_cache=False).logits
        for how in ("eager", "inductor")
    )
    torch.testing.assert_close(fast, eager, atol=1e-4, rtol=1e-3)


def test_options() -> None:
    for wrong in ({"keep": 0.0}, {"keep": 1.2}, {"dense": -0.1}, {"dense": float("nan")}):
        with pytest.raises(OptionError):
            HeadCascade(**wrong)
