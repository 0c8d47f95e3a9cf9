"""SpAtten's cascade of tokens against an eager one that is written from its card."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

import accelpass
from accelpass import KVCache
from accelpass.ir.errors import OptionError
from accelpass.models_zoo import small
from accelpass.passes.token_pruning.spatten import SpAtten, attention_mass
from tests.passes.test_kv_methods import llama, tokens
from tests.sweep import examples, sweep

CAPACITY = 64


def keep_rates(layers: int, final: float, dense: float, least: int = 3) -> list[float]:
    """The card's."""
    first = max(least, math.ceil(dense * layers))
    return [
        1.0 if n < first else max(0.01, 1 + (final - 1) / (layers - first) * (n - first + 1)) for n in range(layers)
    ]


class Oracle:
    """One sequence of a Llama, token by token in dictionaries of positions."""

    def __init__(self, model: Any, keep: float, dense: float = 0.15, first: int = 3) -> None:
        self.model, layers = model, len(model.model.layers)
        self.rates, self.kv, self.seen = keep_rates(layers, keep, dense, first), [{} for _ in range(layers)], 0
        self.alive: list[list[int]] = []

    def step(self, ids: Tensor) -> Tensor:
        """Logits of all tokens of a call; of those that left, made of what they left with."""
        core, n = self.model.model, len(ids)
        x, rows = core.embed_tokens(ids), list(range(self.seen, self.seen + n))
        last, score, is_prompt = x.clone(), torch.zeros(n), not self.seen
        for number, block in enumerate(core.layers):
            attn, normed = block.self_attn, block.input_layernorm(x)
            parts = (attn.q_proj, attn.k_proj, attn.v_proj)
            q, k, v = (p(normed).view(1, len(rows), -1, attn.head_dim).transpose(1, 2) for p in parts)
            q, k = apply_rotary_pos_emb(q, k, *core.rotary_emb(x, torch.tensor(rows)[None]))
            held = self.kv[number]
            held.update({r: (k[0, :, i], v[0, :, i]) for i, r in enumerate(rows)})
            order = sorted(held)
            keys, values = (torch.stack([held[t][i] for t in order], 1) for i in (0, 1))
            groups = q.shape[1] // keys.shape[0]
            scores = q[0] @ keys.repeat_interleave(groups, 0).mT * attn.scaling
            later = torch.tensor(order)[None] > torch.tensor(rows)[:, None]
            weights = scores.masked_fill(later, float("-inf")).softmax(-1)
            mixed = (weights @ values.repeat_interleave(groups, 0)).transpose(0, 1).reshape(len(rows), -1)
            x = x + attn.o_proj(mixed)
            x = x + block.mlp(block.post_attention_layernorm(x))
            last[[r - self.seen for r in rows]] = x
            if is_prompt and number < len(core.layers) - 1:
                score[rows] += weights.sum((0, 1))
                count = min(len(rows), math.ceil(self.rates[number] * n))
                own = score[rows].clone()
                own[-1] = float("inf")
                kept = own.sort(descending=True, stable=True).indices[:count].sort().values
                x, rows = x[kept], [rows[i] for i in kept]
                self.alive.append(rows)
        self.seen += n
        return self.model.lm_head(core.norm(last))


def compiled(model: Any, lowering: str = "eager", *others: Any, **options: Any) -> Any:
    torch._dynamo.reset()
    given = {"passes": [*others, {"name": "spatten", **options}], "lowering": lowering}
    return torch.compile(model, backend="accelpass", options=given)


@pytest.mark.parametrize(("cached", "keep", "batch"), sweep((True, 0.3, 2), (False, 0.05, 2), (False, 0.7, 1), fast=1))
def test_follows_the_oracle(cached: bool, keep: float, batch: int) -> None:
    """Prompts of several lengths, then tokens one by one and three at once; each sequence has a choice of its own."""
    model = llama(layers=4)
    fast = compiled(model, keep=keep, dense=0.0, first=1)
    for n in (20, 9):
        more: dict[str, Any] = {"past_key_values": KVCache(model, CAPACITY, batch)} if cached else {"use_cache": False}
        oracles = [Oracle(model, keep, 0.0, 1) for _ in range(batch)]
        for piece in tokens(batch, n, 1, 3)[: None if cached else 1]:
            with torch.no_grad():
                made = fast(input_ids=piece, **more).logits
                want = torch.stack([o.step(row) for o, row in zip(oracles, piece, strict=True)])
            torch.testing.assert_close(made, want, atol=5e-5, rtol=1e-3)


@settings(max_examples=examples(20), deadline=None)
@given(
    batch=st.integers(1, 2), kv_heads=st.integers(1, 2), groups=st.integers(1, 2), n=st.integers(1, 600),
    causal=st.booleans(), seed=st.integers(0, 99),
)  # fmt: skip
def test_what_tokens_get_is_the_sum_of_probabilities(batch, kv_heads, groups, n, causal, seed) -> None:
    draw = torch.Generator().manual_seed(seed)
    q = torch.randn(batch, kv_heads * groups, n, 4, generator=draw)
    k = torch.randn(batch, kv_heads, n, 4, generator=draw)
    scores = q @ k.repeat_interleave(groups, 1).mT * 0.4
    if causal:
        scores = scores.masked_fill(torch.ones(n, n, dtype=torch.bool).triu(1), -torch.inf)
    torch.testing.assert_close(attention_mass(q, k, 0.4, causal), scores.softmax(-1).sum((1, 2)), atol=1e-4, rtol=1e-4)


def test_rates_are_the_cards_and_sets_are_nested() -> None:
    for layers in (3, 4, 5, 12, 30):
        for keep in (0.01, 0.4, 1.0):
            want = keep_rates(layers, keep, 0.15)
            assert SpAtten(keep=keep).rates(layers) == {n: r for n, r in enumerate(want[:-1]) if r < 1}
    oracle = Oracle(llama(layers=6), 0.3)
    with torch.no_grad():
        oracle.step(tokens(1, 24)[0][0])
    assert [len(a) for a in oracle.alive] == [
        24,
        24,
        24,
        math.ceil(oracle.rates[3] * 24),
        math.ceil(oracle.rates[4] * 24),
    ]
    assert all(set(a) >= set(b) for a, b in zip(oracle.alive, oracle.alive[1:], strict=False))


def test_one_kept_of_all_is_dense_and_fewer_run_after_rounded_weights() -> None:
    model, ids = llama(layers=3, head_dim=32), tokens(2, 20)[0]
    with torch.no_grad():
        dense = model(input_ids=ids, use_cache=False).logits
        made = compiled(model, keep=1.0, first=1)(input_ids=ids, use_cache=False).logits
        torch.testing.assert_close(made, dense, atol=1e-5, rtol=1e-4)
        both = compiled(model, "eager", "int8_weights", keep=0.1, first=1)
        few = both(input_ids=ids, use_cache=False).logits
    assert few.isfinite().all() and not torch.allclose(few, dense, atol=0.05)
    report = accelpass.explain(both)
    assert report.passes["int8_weights"].took and report.passes["spatten"].took


@pytest.mark.slow
def test_inductor_gives_the_same() -> None:
    model, ids = llama(layers=3), tokens(2, 20)[0]
    with torch.no_grad():
        eager, fast = (
            compiled(model, how, keep=0.3, first=1)(input_ids=ids, use_cache=False).logits
            for how in ("eager", "inductor")
        )
    torch.testing.assert_close(fast, eager, atol=1e-4, rtol=1e-3)


def test_products_are_saved() -> None:
    """Later layers' MLPs run on as many rows as are left."""
    model, ids = llama(layers=4), tokens(1, 24)[0]
    fast = compiled(model, keep=0.25, first=1)
    with torch.no_grad():
        fast(input_ids=ids, use_cache=False)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True) as seen:
            fast(input_ids=ids, use_cache=False)
    wide = [model.config.intermediate_size, model.config.hidden_size]
    shapes = [event.input_shapes for event in seen.events() if event.name == "aten::mm"]
    down = [rows[0] for rows, weight, *_ in shapes if weight == wide and rows[1] == wide[0]]
    rates = keep_rates(4, 0.25, 0.15, 1)
    assert {*down} == {24, *(math.ceil(r * 24) for r in rates[1:3])}


def test_an_encoder_keeps_its_first_token() -> None:
    model = small.encoder(0)
    ids = torch.randint(1, 40, (2, 21), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        dense = model(input_ids=ids).last_hidden_state
        fast = compiled(model, keep=0.1, dense=0.0, first=0)
        made = fast(input_ids=ids).last_hidden_state
    assert not torch.allclose(made, dense, atol=1e-3)
    assert accelpass.explain(fast).passes["spatten"].took


def test_padding_is_refused_and_the_cache_still_serves() -> None:
    model, mask = llama(layers=3), torch.ones(2, 12, dtype=torch.long)
    mask[1, :4] = 0
    cache, ids = KVCache(model, CAPACITY, 2), tokens(2, 12)[0]
    fast = compiled(model, keep=0.3, first=1)
    with torch.no_grad():
        made = fast(input_ids=ids, attention_mask=mask, past_key_values=cache).logits
        dense = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    torch.testing.assert_close(made[:, -1], dense[:, -1], atol=5e-5, rtol=1e-3)
    assert "its mask may hide padding" in str(accelpass.explain(fast).passes["spatten"].skipped)


@pytest.mark.parametrize(
    "options", [{"keep": 0}, {"keep": 1.5}, {"dense": -0.1}, {"first": -1}, {"keep": float("nan")}]
)
def test_options(options: dict[str, float]) -> None:
    with pytest.raises(OptionError, match=next(iter(options))):
        SpAtten(**options)


def test_a_file_is_refused_by_name(tmp_path: Any) -> None:
    model, given = small.decoder(0), {"input_ids": tokens(1, 12)[0], "use_cache": False}
    asked = {"name": "spatten", "first": 0, "dense": 0.0}
    with pytest.raises(accelpass.AccelpassError, match="'spatten'"):
        accelpass.export_onnx(model, (), tmp_path / "m.onnx", kwargs=given, passes=[asked])
