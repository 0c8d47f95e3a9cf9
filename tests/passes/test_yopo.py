"""YOPO in whole models: ``generate`` answers what the card's plain form answers, and visual tokens really cost less."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import accelpass
from accelpass.ir.attention.spec.spec import AttentionSpec, Step
from accelpass.ir.errors import OptionError, PlanError
from accelpass.passes.core.plan import Plan
from accelpass.passes.visual_tokens.less_work.neighbours import Neighbours, attended
from accelpass.passes.visual_tokens.less_work.yopo import Yopo
from tests.passes.vision_truth import compiled
from tests.passes.visual_truth import IMAGE, asked, generated, llava, pruned_answer
from tests.small_models import relative_error
from tests.sweep import examples, sweep


@pytest.fixture(autouse=True)
def _one_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRANSFORMERS_DISABLE_TORCH_CHECK", "1")


def cut(mask: Tensor, vis: Tensor, high: int, wide: int, window: int, causal: bool) -> Tensor:
    """The card's mask: between visual tokens of one image, nearness takes the place of causality."""
    mask, places = mask.clone(), vis.nonzero()[:, 0].tolist()
    for i, query in enumerate(places):
        for j, key in enumerate(places):
            (a, p), (b, r) = divmod(i, high * wide), divmod(j, high * wide)
            near = a == b and abs(p // wide - r // wide) <= window // 2 and abs(p % wide - r % wide) <= window // 2
            mask[query, key] = near and not (causal and j > i)
    return mask


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, vis: Tensor, silent: list[int], renorm: bool) -> Tensor:
    """The card's: of silent heads, words lose the probability of visual keys, and visual tokens have nothing."""
    scores = (q @ k.mT * q.shape[-1] ** -0.5).masked_fill(~mask, float("-inf"))
    if renorm:
        scores[silent] = scores[silent].masked_fill(vis, float("-inf"))
    paid = scores.softmax(-1).nan_to_num()
    paid[silent] = paid[silent] * (~vis)
    out = paid @ v
    out[silent] = out[silent] * (~vis)[:, None]
    return out


@settings(max_examples=examples(15), deadline=None)
@given(
    images=st.integers(1, 2), high=st.integers(1, 4), wide=st.integers(1, 4), window=st.sampled_from([0, 1, 3, 5, 9]),
    causal=st.booleans(), silent=st.sets(st.integers(0, 3)), renorm=st.booleans(), padded=st.booleans(), seed=st.integers(0, 99),
)  # fmt: skip
def test_the_attention_is_the_cards(images, high, wide, window, causal, silent, renorm, padded, seed):
    torch.manual_seed(seed)
    each = images * high * wide
    tokens = each + 5
    vis = torch.zeros(2, tokens, dtype=torch.bool)
    for text in range(2):  # anywhere among the words but first
        vis[text, 1 + torch.randperm(tokens - 1)[:each]] = True
    q, k, v = torch.randn(2, 4, tokens, 8), torch.randn(2, 2, tokens, 8), torch.randn(2, 2, tokens, 6)
    seen = torch.ones(2, tokens, tokens, dtype=torch.bool).tril()
    if padded:
        seen[1, 1:, 0] = False
    masked = (Step("keep", extra=0, value=float("-inf")), Step("softmax"))
    spec = AttentionSpec(groups=2, scale=8**-0.5, causal=not padded, steps=masked[1 - padded :])
    extras = [seen[:, None]] if padded else []
    order = vis.long().sort(stable=True).indices
    reach = window // 2 if window else None
    select = Neighbours(images, high, wide, reach, causal, tuple(sorted(silent)), renorm)
    rows = [order[:, : tokens - each], order[:, tokens - each :]]
    got = attended(q, k, v, [*extras, *rows], replace(spec, select=select))
    for text in range(2):
        mask = cut(seen[text], vis[text], high, wide, window, causal) if window else seen[text]
        of = [x[text].repeat_interleave(n, 0) for x, n in ((q, 1), (k, 2), (v, 2))]
        want = attend(*of, mask, vis[text], sorted(silent), renorm)
        torch.testing.assert_close(got[text], want, atol=1e-5, rtol=1e-4)


def truth(model: Any, ids: Tensor, options: dict[str, Any], silent: dict[int, list[int]]) -> dict[str, Any]:
    """How :func:`pruned_answer` runs layers, and which tokens go on behind them."""
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    layer, window, narrow = (options.get(n, d) for n, d in (("layer", 20), ("window", 5), ("narrow", 2)))

    def run(number: int, block: Any, x: Tensor, mask: Tensor, rotary: Any, at: Tensor) -> Tensor:
        vis = torch.zeros(len(at), dtype=torch.bool)
        vis[: len(ids)] = (ids == IMAGE)[at[at < len(ids)]] if number < layer else False
        a, h = block.self_attn, block.input_layernorm(x)
        q, k, v = (p(h).unflatten(-1, (-1, a.head_dim)).transpose(1, 2) for p in (a.q_proj, a.k_proj, a.v_proj))
        q, k = apply_rotary_pos_emb(q, k, *rotary)
        k, v = (t[0].repeat_interleave(q.shape[1] // k.shape[1], 0) for t in (k, v))
        if window and vis.any():
            mask = cut(mask, vis, 4, 4, window, options.get("causal", False))
        heads = silent.get(number, []) if number < layer else []
        out = attend(q[0], k, v, mask, vis, heads, options.get("renorm", False))
        x = x + a.o_proj(out.transpose(0, 1).flatten(1))
        h, m = block.post_attention_layernorm(x), block.mlp
        full = m(h)
        f = m.gate_proj.weight.shape[0] // narrow
        act = torch.nn.functional.silu(h @ m.gate_proj.weight[:f].T) * (h @ m.up_proj.weight[:f].T)
        return x + torch.where(vis[:, None], act @ m.down_proj.weight[:, :f].T, full)

    def choose(q: Tensor, k: Tensor, v: Tensor, sees: Tensor) -> Tensor:
        return (ids != IMAGE).nonzero()[:, 0]

    return {"layer": layer, "choose": choose, "run": run}


CASES = (
    ({"layer": 2, "window": 3, "narrow": 2, "first": 0}, {0: [1], 1: [0, 3]}, 2, 1),
    (
        {"layer": 2, "window": 3, "narrow": 4, "first": 0, "renorm": True, "causal": True, "grid": (4, 4)},
        {0: [2], 1: [0, 1]},
        1,
        2,
    ),
    ({"layer": 9, "window": 5, "narrow": 1, "first": 1}, {1: [0, 1, 2, 3]}, 1, 1),
    ({"layer": 1, "window": 0, "narrow": 1}, {}, 1, 1),
    ({"layer": 3, "window": 0, "narrow": 3}, {2: [1]}, 1, 1),
)


def votes(silent: dict[int, list[int]]) -> dict[str, Tensor]:
    tables = {f"yopo/votes/model.language_model.layers.{n}.self_attn": torch.full((5,), 10.0) for n in silent}
    for n, heads in silent.items():
        tables[f"yopo/votes/model.language_model.layers.{n}.self_attn"][heads] = 4.0  # not more than 40 of 100
    return tables


@pytest.mark.parametrize(("options", "silent", "texts", "images"), sweep(*CASES))
def test_generate_answers_as_the_cards_model(options, silent, texts, images):
    model, question = llava(), asked(texts, images)
    question["input_ids"][0, :2], question["attention_mask"][0, :2] = 0, 0
    plan = {"plan": Plan.of(model, [], votes(silent))} if silent else {}
    got, fast = generated(model, question, {"name": "yopo", **options}, **plan)
    for i in range(texts):
        one = {
            n: t[i * images : (i + 1) * images] if n == "pixel_values" else t[i : i + 1] for n, t in question.items()
        }
        want = pruned_answer(model, one, **truth(model, one["input_ids"][0], options, silent))
        assert relative_error(got[i], want[0]) < 1e-4
    took = " ".join(done.what for done in accelpass.explain(fast).passes["yopo"].took.values())
    assert (f"a window of {options['window']}" in took) == (options["window"] > 0)
    assert ("heads see words alone" in took) == bool(silent)
    assert ("hidden channels for visual tokens" in took) == (options["narrow"] > 1)
    assert ("0 of 16" in took or "0 of 32" in took) == (options["layer"] < 3)


def dense(model: Any, question: dict[str, Tensor]) -> Tensor:
    return pruned_answer(model, question, 99, None)


@pytest.mark.slow
def test_calibration_finds_the_heads_that_look_at_images():
    model = llava()
    batches = [asked(seed=n) for n in range(2)]
    model(**batches[0], use_cache=False)  # transformers installs hooks at the first call
    made = accelpass.calibrate(model, batches, ["yopo"], progress=False)
    rows = {name: t for name, t in made.tensors.items() if name.startswith("yopo/votes/")}
    found = {name: torch.zeros(5) for name in rows if "language_model" in name}
    assert len(found) == 3
    for question in batches:
        vis = question["input_ids"][0] == IMAGE
        with torch.no_grad():
            model.set_attn_implementation("eager")
            paid = model(**question, output_attentions=True, use_cache=False).attentions
        for name, of_layer in zip(sorted(found), paid, strict=True):
            of_words = of_layer[0][:, ~vis]
            ratio = of_words[..., vis].sum((1, 2)) / of_words[..., ~vis].sum((1, 2))
            found[name] += torch.cat([(ratio > 0.077).float(), torch.ones(1)])
    for name, want in found.items():
        torch.testing.assert_close(rows[name], want)


@pytest.mark.slow
def test_what_is_computed_is_less(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("accelpass.passes.core.options.DEFAULTS", ())  # they would be counted too
    model, question = llava(), asked()
    model(**question, use_cache=False)  # transformers installs hooks at the first call
    plan, spent = Plan.of(model, [], votes({0: [0, 1, 2, 3], 1: [0, 1, 2, 3]})), []
    all_dense: dict[str, Any] = {"layer": 9, "window": 0, "narrow": 1, "first": 0}
    for more, options in ({"narrow": 4}, {}), ({"window": 3}, {}), ({}, {"plan": plan}), ({"layer": 1}, {}):
        fast = compiled(model, [{"name": "yopo", **all_dense, **more}], **options)
        with torch.no_grad():
            fast(**question, use_cache=False, logits_to_keep=1)
        (graph,) = accelpass.explain(fast).graphs
        spent.append(graph.flops)
    tokens, of_mlp = 26, 6 * 32 * 64
    (before,) = {b for b, _ in spent}
    assert spent[0][1] == before - 3 * 16 * (of_mlp - of_mlp // 4)
    pairs = 10 * tokens + 16 * (10 + 3 * 4)  # words see all; visual tokens words, and three rows
    assert spent[1][1] == before - 3 * 4 * 4 * 8 * (tokens * tokens - pairs)
    assert spent[2][1] == before - 2 * 4 * 4 * 8 * (tokens * tokens - 10 * tokens)
    assert spent[3][1] < before


@pytest.mark.slow
def test_at_the_identity_it_is_the_dense_model():
    model, question = llava(), asked()
    got, _ = generated(model, question, {"name": "yopo", **Yopo.identity})
    assert relative_error(got, dense(model, question)) < 1e-4
    wide, _ = generated(model, question, {"name": "yopo", "layer": 9, "window": 99, "causal": True, "narrow": 1})
    assert relative_error(wide, dense(model, question)) < 1e-4


@pytest.mark.slow
def test_text_alone_is_read_as_it_is_and_an_image_afterwards_is_not():
    model, question = llava(), asked()
    ids = torch.randint(16, 128, (1, 11))
    alone, plan = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, Plan.of(model, [], votes({1: [0, 3]}))
    options = {"layer": 2, "window": 3, "narrow": 2, "first": 0}
    got, fast = generated(model, alone, {"name": "yopo", **options}, plan=plan)
    assert relative_error(got, dense(model, alone)) < 1e-4
    assert "text alone" in " ".join(accelpass.explain(fast).passes["yopo"].skipped.values())
    cache = accelpass.KVCache(model, capacity=96)
    made = model.generate(
        **question,
        past_key_values=cache,
        max_new_tokens=4,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
    )
    want = pruned_answer(model, question, **truth(model, question["input_ids"][0], options, {1: [0, 3]}))
    assert relative_error(torch.stack(list(made.logits), 1), want) < 1e-4


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"grid": (3, 5)}, "16 visual tokens of a text are no images of grid=(3, 5)"),
        ({"layer": 9}, "has 3 layers; choose fewer"),
    ],
)
def test_what_is_not_taken_is_said(options: dict[str, Any], why: str):
    _, fast = generated(llava(), asked(), {"name": "yopo", "layer": 1, **options})
    assert why in " ".join(accelpass.explain(fast).passes["yopo"].skipped.values())


@pytest.mark.slow
def test_texts_with_different_numbers_of_visual_tokens_are_refused_when_they_are_read():
    question = asked(texts=2)
    question["input_ids"][0, 3:11], question["input_ids"][1, -8:] = 50, IMAGE
    with pytest.raises(RuntimeError, match="each must have the same number of them"):
        generated(llava(), question, {"name": "yopo", "layer": 9})


def test_a_plan_of_another_model_is_refused():
    model = llava()
    for wrong in (torch.ones(3), torch.full((5,), float("nan"))):
        plan = Plan.of(model, [], {"yopo/votes/model.language_model.layers.1.self_attn": wrong})
        with pytest.raises(Exception, match="this model has 4 heads") as caught:
            generated(model, asked(), {"name": "yopo", "first": 0}, plan=plan)
        assert isinstance(getattr(caught.value, "inner_exception", caught.value), PlanError)


@pytest.mark.parametrize(
    "options",
    [
        {"layer": 0},
        {"window": 4},
        {"window": -1},
        {"narrow": 0},
        {"grid": (0, 2)},
        {"first": -1},
        {"votes": 1.5},
        {"threshold": -1.0},
    ],
)
def test_options(options: dict[str, Any]):
    with pytest.raises(OptionError, match="is not supported; use"):
        Yopo(**options)
