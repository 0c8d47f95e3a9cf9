"""LAWCAT's recurrence against oracles from its card, what distillation learns, and its cache of constant size in whole models."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

import accelpass
from accelpass import KVCache
from accelpass.ir.errors import OptionError, PassError
from accelpass.ir.kv.banks import Floats
from accelpass.ir.kv.storage import Layout
from accelpass.passes.core.plan import Plan
from accelpass.passes.kv_cache.learnt.lawcat import LAWCAT, artefact
from accelpass.passes.kv_cache.storage.recurrence import WEIGHTS, Recurrence, attended, convolved, linear_attention
from tests.passes.kv_truth import Oracle, assisted_like_plain, attending, fed
from tests.passes.test_kv_methods import CAPACITY, VOCABULARY, llama, tokens
from tests.passes.test_lazyllm import SIZES
from tests.sweep import examples, sweep

LAYERS = ["model.layers.0.self_attn", "model.layers.1.self_attn"]
FEATURES = 4

# The card's oracle.


def causal_dwconv(x: Tensor, w: Tensor, tail: Tensor | None = None) -> tuple[Tensor, Tensor]:
    r = w.shape[-1] - 1
    b, h, t, d = x.shape
    y = torch.cat([x.new_zeros(b, h, r, d) if tail is None else tail, x], 2)
    out = sum(w[None, :, None, :, j] * y[:, :, r - j : r - j + t] for j in range(r + 1))
    assert isinstance(out, Tensor)
    return out, y[:, :, t:]


def gated_linear(q: Tensor, k: Tensor, v: Tensor, g: Tensor, state: Any = None) -> tuple[Tensor, Any]:
    b, h, t, f = q.shape
    s, z = state or (q.new_zeros(b, h, f, v.shape[-1]), q.new_zeros(b, h, f))
    o = []
    for i in range(t):
        s = g[:, :, i, None, None] * s + k[:, :, i, :, None] * v[:, :, i, None]
        z = g[:, :, i, None] * z + k[:, :, i]
        o.append((q[:, :, i, None] @ s)[:, :, 0] / ((q[:, :, i] * z).sum(-1, True) + 1e-6))
    return torch.stack(o, 2), (s, z)


def phi(x: Tensor, w: Tensor) -> Tensor:
    return torch.cat([(x @ w).softmax(-1), (-(x @ w)).softmax(-1)], -1)


class Linear(Oracle):
    """Keys and values of all tokens so far, a sequence at a time, padding left out, token by token."""

    def __init__(self, plan: Plan) -> None:
        super().__init__()
        self.weights = [{n: plan.tensors[artefact(path, n)] for n in WEIGHTS} for path in LAYERS]

    def attend(self, layer, q, k, v, scale, mask, index):
        layer["q"] = torch.cat([layer["q"], q], 2) if "q" in layer else q
        w, new, groups = self.weights[index], q.shape[2], q.shape[1] // k.shape[1]
        out = torch.zeros(*q.shape[:3], v.shape[3])
        if mask is None:
            mask = torch.ones(len(q), 1, 1, k.shape[2], dtype=torch.bool)
        for b in range(len(q)):
            real = mask.expand(len(q), -1, -1, -1)[b, 0, -1]
            q1, k1, v1 = (x[b : b + 1][:, :, real] for x in (layer["q"], k, v))
            g = torch.sigmoid(torch.einsum("bhtd,hd->bht", k1, w["gate"]) + w["bias"][:, None])
            keys = phi(causal_dwconv(k1, w["conv_k"])[0], w["map_k"])
            queries = phi(causal_dwconv(q1, w["conv_q"])[0], w["map_q"])
            wide = [x.repeat_interleave(groups, 1) for x in (keys, v1, g)]
            made = gated_linear(queries, *wide)[0][0]
            here = real[-new:]
            out[b][:, here] = made[:, made.shape[1] - int(here.sum()) :]
        return out


SHAPES = st.tuples(
    st.integers(1, 2), st.integers(1, 2), st.integers(1, 3), st.integers(1, 150), st.sampled_from([3, 8]),
    st.integers(0, 2**31),
)  # fmt: skip


@settings(max_examples=examples(12), deadline=None)
@given(SHAPES)
def test_chunks_are_the_recurrence(shape):
    """Over several chunks, from a state, and cut in two: as token by token."""
    batch, heads, groups, count, width, seed = shape
    draw = torch.Generator().manual_seed(seed)
    q = torch.rand(batch, heads, groups, count, 6, generator=draw)
    k, v = torch.rand(batch, heads, count, 6, generator=draw), torch.randn(batch, heads, count, width, generator=draw)
    g = torch.rand(batch, heads, count, generator=draw) * 0.5 + 0.5
    wide = [x.repeat_interleave(groups, 1) for x in (k, v, g)]
    want, (s, z) = gated_linear(q.flatten(1, 2), *wide)
    state = torch.zeros(batch, heads, 6, width + 1)
    out, after = linear_attention(q, k, v, g.log(), state)
    assert torch.allclose(out.flatten(1, 2), want, atol=1e-4)
    assert torch.allclose(after, torch.cat([s, z.unsqueeze(-1)], -1)[:, ::groups], atol=1e-3)
    cut = count // 3
    first, between = (
        linear_attention(q[..., :cut, :], k[:, :, :cut], v[:, :, :cut], g[..., :cut].log(), state)
        if cut
        else (None, state)
    )
    rest, end = linear_attention(q[..., cut:, :], k[:, :, cut:], v[:, :, cut:], g[..., cut:].log(), between)
    joined = rest if first is None else torch.cat([first, rest], 3)
    assert torch.allclose(joined, out, atol=1e-4) and torch.allclose(end, after, atol=1e-3)


@settings(max_examples=examples(12), deadline=None)
@given(st.integers(1, 4), st.integers(1, 9), st.integers(1, 5), st.integers(0, 2**31))
def test_the_convolution(taps, first, second, seed):
    draw = torch.Generator().manual_seed(seed)
    x, w = torch.randn(2, 3, first + second, 5, generator=draw), torch.randn(3, 5, taps, generator=draw)
    want, _ = causal_dwconv(x, w)
    _, tail = causal_dwconv(x[:, :, :first], w)
    assert torch.allclose(convolved(x, w, torch.zeros(2, 3, taps - 1, 5)), want, atol=1e-5)
    assert torch.allclose(convolved(x[:, :, first:], w, tail), want[:, :, first:], atol=1e-5)


def random_weights(heads: int, kv_heads: int, width: int, seed: int, features: int = FEATURES) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    sizes = LAWCAT(features=features)._sizes(heads, kv_heads, width)
    made = {
        name: torch.randn(size, generator=draw) * (0.3 if "map" not in name else 1.0) for name, size in sizes.items()
    }
    return made | {"bias": made["bias"] + 2}


@settings(max_examples=examples(8), deadline=None)
@given(st.integers(1, 90), st.integers(0, 30), st.integers(0, 2**31))
def test_outputs_are_mixtures_of_past_values(count, later, seed):
    """No feature is below 0, so that outputs lie within the values; what comes later changes nothing."""
    draw = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(1, n, count + later, 8, generator=draw) for n in (4, 2, 2))
    held = {
        "sum": torch.zeros(1, 2, 2 * FEATURES, 9),
        "last_q": torch.zeros(1, 4, 3, 8),
        "last_k": torch.zeros(1, 2, 3, 8),
    }
    weights = random_weights(4, 2, 8, seed)
    out, _ = attended(weights, q, k, v, held)
    values = v.repeat_interleave(2, 1)
    assert (out <= values.cummax(2).values + 1e-3).all() and (out >= values.cummin(2).values - 1e-3).all()
    alone, _ = attended(weights, *(x[:, :, :count] for x in (q, k, v)), held)
    assert torch.allclose(out[:, :, :count], alone, atol=1e-5)


def plan_of(model: Any, **options: Any) -> Plan:
    found = {
        artefact(path, name): t
        for seed, path in enumerate(LAYERS)
        for name, t in random_weights(4, 2, 16, seed).items()
    }
    return Plan.of(model, [{"name": "lawcat", "features": FEATURES, **options}], found)


def compiled(model: Any, plan: Plan | None, lowering: str = "eager", *passes: Any) -> Any:
    torch._dynamo.reset()
    options: dict[str, Any] = {"lowering": lowering}
    options |= {"plan": plan} if plan is not None else {}
    options |= {"passes": list(passes)} if passes else {}
    return torch.compile(model, backend="accelpass", options=options, fullgraph=True)


@pytest.mark.parametrize("lowering", sweep("eager", "inductor"))
def test_in_a_model(lowering):
    """A prompt with padding, single tokens, a second prompt: two programs, one state."""
    model, pieces = llama(), tokens(2, 20, *[1] * 4, 9, 1, 1)
    padding = torch.ones(2, 20, dtype=torch.long)
    padding[0, :5] = 0
    plan = plan_of(model)
    got = fed(compiled(model, plan, lowering), KVCache(model, CAPACITY, 2), pieces, padding)
    with attending(model, Linear(plan)) as dense:
        want = fed(model, dense, pieces, padding)
    assert float((got - want).abs().max() / want.abs().max()) < 1e-4


@pytest.mark.slow
def test_a_prompt_and_its_tokens_one_by_one_leave_the_same_state():
    model, (ids,) = llama(), tokens(1, 70)
    fast = compiled(model, plan_of(model))
    whole, pieces = KVCache(model, 512), KVCache(model, 512)
    fed(fast, whole, [ids])
    fed(fast, pieces, [ids[:, :60], *ids[:, 60:].split(1, 1)])
    for (_, name, a), (_, _, b) in zip(whole.buffers(), pieces.buffers(), strict=True):
        assert torch.allclose(a, b, atol=1e-3), name
    assert whole.nbytes() < 0.1 * whole.dense_nbytes()


def test_the_size_is_constant():
    sizes = set()
    for capacity in (64, 1 << 20):
        states = Recurrence(FEATURES, 4).states(Layout(2, 2, 16, 16, torch.float32, capacity), Floats())
        sizes.add(sum(math.prod(s.shape) for s in states))
    assert sizes == {2 * (2 * FEATURES * 17) + (4 + 2) * 3 * 16}


@pytest.mark.slow
def test_two_prompts_and_an_assistant():
    model = llama()
    plan = plan_of(model)
    assert assisted_like_plain(model, plan=plan)


@pytest.mark.slow
def test_tokens_cannot_be_taken_back_without_candidates():
    model = llama()
    cache = KVCache(model, 64)
    fed(compiled(model, plan_of(model)), cache, tokens(1, 12, 1))
    with pytest.raises(accelpass.CacheError, match="cannot be cropped"):
        cache.crop(-1)


# What it learns


def sequences(count: int) -> list[Tensor]:
    torch.manual_seed(3)
    return [torch.randint(0, VOCABULARY, (2, 40)) for _ in range(count)]


@pytest.mark.slow
def test_it_imitates_the_model(tmp_path):
    model = llama()
    few, more = (
        accelpass.calibrate(model, sequences(6), [{"name": "lawcat", "features": 8, "epochs": n}], progress=False)
        for n in (1, 12)
    )
    first, last = (p.tensors["lawcat/error"] for p in (few, more))
    assert (last < 0.8 * first).all() and (last > 0).all()
    more.save(tmp_path / "lawcat.json")
    again = Plan.load(tmp_path / "lawcat.json")
    held_back = sequences(6)[-1]
    for plan, perplexity in zip((None, again), again.tensors["lawcat/perplexity"].tolist(), strict=True):
        with torch.no_grad():
            logits = compiled(model, plan)(held_back, past_key_values=KVCache(model, 64, 2), use_cache=True).logits
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), held_back[:, 1:].flatten())
        assert float(loss.exp()) == pytest.approx(perplexity, rel=1e-3), "what runs is what was learnt"


@pytest.mark.slow
def test_the_second_stage_learns_from_the_next_token():
    """Texts that repeat four tokens: projections learn what layers apart did not; without the stage there is nothing of it in the plan."""
    model, text = llama(), torch.tensor([[5, 17, 40, 33]]).repeat(2, 10)
    asked = {"name": "lawcat", "features": 8, "epochs": 1, "tuning": 30, "tuning_rate": 3e-3}
    plan = accelpass.calibrate(model, [text] * 3, [asked], progress=False)
    before, after = plan.tensors["lawcat/perplexity"].tolist()
    assert after < 0.8 * float(plan.tensors["lawcat/first_stage"]) and before > 0
    weight = model.model.layers[0].self_attn.q_proj.weight.detach()
    down, up = (plan.tensors[f"lawcat/model.layers.0.self_attn.q_proj.weight/{n}"] for n in ("down", "up"))
    assert down.shape == (8, weight.shape[1]) and up.shape == (weight.shape[0], 8) and up.abs().max() > 0
    with torch.no_grad():
        fast = compiled(model, plan)
        logits = fast(text, past_key_values=KVCache(model, 64, 2), use_cache=True).logits
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), text[:, 1:].flatten())
        assert float(loss.exp()) == pytest.approx(after, rel=1e-3), "what runs is what was learnt"
        took = accelpass.explain(fast).passes["lawcat"].took
        assert all(done.what.endswith("4 projections tuned") for done in took.values())
        merged = llama()  # the oracle: the same changes in the weights themselves
        for path, w in merged.named_parameters():
            if f"lawcat/{path}/down" in plan.tensors:
                w += 2 * plan.tensors[f"lawcat/{path}/up"] @ plan.tensors[f"lawcat/{path}/down"]
        bare = Plan.of(
            merged, plan.settings, {n: t for n, t in plan.tensors.items() if not n.endswith(("/down", "/up"))}
        )
        same = compiled(merged, bare)(text, past_key_values=KVCache(merged, 64, 2), use_cache=True).logits
        assert torch.allclose(same, logits, atol=1e-3)
    bare = accelpass.calibrate(model, [text] * 2, [{**asked, "tuning": 0}], progress=False)
    assert not any(name.endswith(("/down", "/up")) for name in bare.tensors)


@pytest.mark.slow
def test_what_cannot_be_learnt():
    window = MistralForCausalLM(
        MistralConfig(intermediate_size=48, num_key_value_heads=2, sliding_window=4, **SIZES)
    ).eval()
    with pytest.raises(PassError, match=r"lawcat: model\.layers\.0.*exclude it"):
        accelpass.calibrate(window, [tokens(1, 20)[0] % 60], ["lawcat"], progress=False)
    broken = llama()
    with torch.no_grad():
        broken.model.layers[1].input_layernorm.weight[0] = float("nan")
    with pytest.raises(PassError, match="not finite"):
        accelpass.calibrate(broken, sequences(2), ["lawcat"], progress=False)
    with pytest.raises(PassError, match="found no attention"):
        accelpass.calibrate(llama(), sequences(2), [{"name": "lawcat", "include": ("nowhere",)}], progress=False)


# What is refused


@pytest.mark.slow
def test_a_mask_that_is_not_causal():
    """Image tokens that see each other, as in prefix language models: a mask of the caller's."""
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=48, intermediate_size=64, num_hidden_layers=2, head_dim=16,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128,
    )  # fmt: skip
    torch.manual_seed(0)

    class Prefix(LlamaForCausalLM):
        def forward(self, input_ids=None, token_type_ids=None, **given):  # type: ignore[override]
            both = token_type_ids[:, None, :, None] * token_type_ids[:, None, None, :] == 1
            n = input_ids.shape[1]
            seen = torch.ones(n, n, dtype=torch.bool, device=input_ids.device).tril() | both
            return super().forward(input_ids=input_ids, attention_mask=seen, **given)

    model = Prefix(config).eval()
    fast = compiled(model, plan_of(model))
    for length in (12, 17):  # the second graph is of any number of tokens
        kinds = torch.ones(1, length, dtype=torch.long)
        with torch.no_grad():
            fast(tokens(1, length)[0], token_type_ids=kinds, past_key_values=KVCache(model, 64))
        assert "not causal" in str(accelpass.explain(fast))


@pytest.mark.slow
def test_a_mask_that_a_caller_made():
    """As generate hands one to a compiled model: looked at when it is there, in prompts and after them."""
    model = llama()
    plan, (ids, more) = plan_of(model), tokens(2, 12, 5)
    fast = compiled(model, plan)
    padding = torch.ones(2, 12, dtype=torch.bool)
    padding[0, :4] = False
    seen = torch.ones(12, 12, dtype=torch.bool).tril() & padding[:, None, None]
    whole = seen | ~seen.any(-1, keepdim=True)  # softmax over nothing is NaN
    with attending(model, Linear(plan)) as dense:
        want = fed(model, dense, [ids], padding.long())[0]
    for mask in (seen, whole):
        with torch.no_grad():
            given = {"attention_mask": mask, "position_ids": (padding.cumsum(-1) - 1).clamp_min(0)}
            got = fast(ids, past_key_values=KVCache(model, 64, 2), **given).logits[:, -1]
        assert torch.allclose(got, want, atol=1e-4)
    every, window = torch.ones(2, 1, 12, 12, dtype=torch.bool), torch.ones(12, 12, dtype=torch.bool).triu(-4).tril()
    packed = torch.block_diag(torch.ones(7, 7), torch.ones(5, 5)).tril().bool()
    for mask in (every, seen | every.triu(9), window.expand_as(every), packed.expand_as(every)):
        with pytest.raises(Exception, match="not causal"), torch.no_grad():
            fast(ids, attention_mask=mask, past_key_values=KVCache(model, 64, 2))
    cache = KVCache(model, 64, 2)
    with torch.no_grad():
        fast(ids, past_key_values=cache)
        behind = torch.ones(2, 1, 5, 64, dtype=torch.bool).tril(12)
        fast(more, attention_mask=behind, past_key_values=cache)
        with pytest.raises(Exception, match="not causal"):
            fast(more, attention_mask=torch.ones_like(behind).tril(14), past_key_values=cache)


@pytest.mark.slow
def test_padding_at_any_length():
    model, plan = llama(), plan_of(llama())
    fast = compiled(model, plan)
    for length, padded in ((14, 3), (19, 6), (23, 0)):
        (ids,) = tokens(2, length, seed=length)
        padding = torch.ones(2, length, dtype=torch.long)
        padding[0, :padded] = 0
        got = fed(fast, KVCache(model, CAPACITY, 2), [ids, ids[:, :1]], padding)
        with attending(model, Linear(plan)) as dense:
            want = fed(model, dense, [ids, ids[:, :1]], padding)
        assert float((got - want).abs().max() / want.abs().max()) < 1e-4


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"features": 0}, "1 or more"),
        ({"taps": 0}, "1 or more"),
        ({"epochs": 0}, "1 or more"),
        ({"rate": 0.0}, "above 0"),
    ],
)
def test_options_out_of_range(options, said):
    with pytest.raises(OptionError, match=said):
        LAWCAT(**options)


def test_plans_that_do_not_fit():
    model = llama()
    with pytest.raises(Exception, match="lawcat needs weights"):
        fed(compiled(model, None, "eager", "lawcat"), KVCache(model, CAPACITY), tokens(1, 9))
    other = {"name": "lawcat", "features": 8}
    with pytest.raises(Exception, match="calibrate again with what you use"):
        fed(compiled(model, plan_of(model), "eager", other), KVCache(model, CAPACITY), tokens(1, 9))
    stranger = llama(groups=1)
    with pytest.raises(Exception, match="belongs to another model"):
        fed(compiled(stranger, plan_of(model)), KVCache(stranger, CAPACITY), tokens(1, 9))
    plan = plan_of(model)
    for name in WEIGHTS:
        del plan.tensors[artefact(LAYERS[1], name)]
    fast = compiled(model, plan)
    fed(fast, KVCache(model, CAPACITY), tokens(1, 9, 1))
    assert "no calibration saw it" in str(accelpass.explain(fast))
