"""FlowCut: which patches are left is what the card's plain form leaves, run layer by layer; the language model goes on from there."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import accelpass
from accelpass.backends.staged.repetition import _where_sizes_pass
from accelpass.ir.analyses.structure.cost import at_compiled_sizes, total
from accelpass.ir.analyses.structure.vision import vision
from accelpass.ir.core.graph import value
from accelpass.ir.errors import OptionError, PlanError
from accelpass.passes.core.plan import Plan
from accelpass.passes.visual_tokens.flowcut import FlowCut, _flow, _Units
from tests.ir.test_shrink import captured
from tests.passes import vision_truth
from tests.passes.visual_truth import IMAGE, answer, answered, answered_by, asked, llava
from tests.small_models import relative_error
from tests.sweep import examples, sweep

TOWER = "model.vision_tower.encoder.layers"


@pytest.fixture(autouse=True)
def _one_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRANSFORMERS_DISABLE_TORCH_CHECK", "1")


def card_score(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """The card's, of ``(B, H, N + 1, d)``; token 0 is the class token."""
    cls = ((q[:, :, :1] @ k.mT) * q.shape[-1] ** -0.5).softmax(-1)[:, :, 0, 1:].mean(1)
    sem = (v[:, :, :1] @ v.mT).softmax(-1)[:, :, 0, 1:].mean(1)
    vn = v.mean(1)[:, 1:].abs().sum(-1)
    return (cls / cls.sum(-1, True) + sem / sem.sum(-1, True)) * vn, cls


def card_keep(n: int, h: float, rpl: int, target: int) -> int:
    """How many patches go on, of ``n``; ``target`` counts the class token."""
    if rpl == 0:
        return target - 1
    r = round((n - (target - 1)) / rpl**0.5 * (1 - h**2))
    return max(n + 1 - r, target) - 1


@settings(max_examples=examples(40), deadline=None)
@given(
    patches=st.integers(1, 600), keep=st.floats(0.01, 1), entropies=st.lists(st.floats(0, 1), min_size=1, max_size=24)
)
def test_the_schedule_is_the_cards(patches: int, keep: float, entropies: list[float]):
    select_layer, n, want = len(entropies) - 1, patches, {}
    target = max(1, int(patches * keep)) + 1
    for idx in range(select_layer):
        rpl = select_layer - idx - 1
        if rpl % 2 == 0 and n + 1 > target:
            left = card_keep(n, entropies[idx], rpl, target)
            if left < n:
                want[idx] = n = left
    got = FlowCut(keep=keep).schedule(patches, entropies)
    assert got == want
    if select_layer and target <= patches:
        assert list(got.values())[-1] == target - 1
    assert list(got.values()) == sorted(got.values(), reverse=True)


@settings(max_examples=examples(10), deadline=None)
@given(images=st.integers(1, 3), heads=st.integers(1, 3), patches=st.integers(1, 9), seed=st.integers(0, 99))
def test_scores_are_the_cards(images: int, heads: int, patches: int, seed: int):
    torch.manual_seed(seed)
    q, k, v = torch.randn(3, images, heads, patches + 1, 4)
    want, _ = card_score(q, k, v)
    (got,) = _flow(1, 0.5, 1, q, k, v)
    torch.testing.assert_close(got, want)
    (both,) = _flow(1, 0.5, 1, q, k, v, torch.ones_like(want))
    torch.testing.assert_close(both, 0.5 + 0.5 * want)
    (without,) = _flow(0, 0.5, 1, q, k, v)  # the authors' rule for towers without a class token
    paid = ((q.mean(2, True) @ k.mT) * 0.5).softmax(-1)[:, :, 0].mean(1)
    torch.testing.assert_close(without, paid * v.mean(1).abs().sum(-1))


@settings(max_examples=examples(20), deadline=None)
@given(
    first=st.integers(0, 1), units=st.integers(3, 6), each=st.integers(2, 3), left=st.integers(2, 6), goal=st.integers(1, 6),
    entropy=st.booleans(), seed=st.integers(0, 99),
)  # fmt: skip
def test_patches_of_one_visual_token_go_together(first, units, each, left, goal, entropy, seed) -> None:
    """By the sum of their scores, among those that are left; how many is counted in visual tokens."""
    left, goal = min(left, units), min(goal, left, units)
    draw = torch.Generator().manual_seed(seed)
    of_patch = torch.arange(units).repeat_interleave(each)[torch.randperm(units * each, generator=draw)]
    ids = torch.stack(
        [torch.isin(of_patch, torch.randperm(units, generator=draw)[:left]).nonzero()[:, 0] for _ in range(2)]
    )
    score = torch.rand(ids.shape, generator=draw)
    q, k = torch.randn(2, 2, 1, first + ids.shape[1], 4, generator=draw)
    rows = torch.cat([torch.arange(first).expand(2, -1), ids + first], 1)
    of = _Units(first, units, each, tuple(of_patch.tolist()))
    if entropy:
        keys = (q[:, :, :1] if first else q.mean(2, True)) @ k.mT * 0.5
        p = keys.softmax(-1)[:, :, 0, first:].mean(1)
        p = p / p.sum(-1, True)
        h = (-(p * p.log()).sum(-1) / math.log(p.shape[1])).min()
        want = max(goal, left - round(float((left - goal) / 2**0.5 * (1 - h**2))))
        chosen, scores = of.own_choice(goal, 2, 0.5, score, q, k, rows)
    else:
        want = goal
        chosen, scores = of.choice(goal, score, q, k, rows)
    for image in range(2):
        unit = of_patch[ids[image]]
        sums = torch.zeros(units).index_add(0, unit, score[image])
        best = sums[unit.unique()].topk(want).indices
        kept = torch.isin(unit, unit.unique()[best]).nonzero()[:, 0]
        assert chosen[image].tolist() == [*range(first), *(kept + first).tolist()]
        assert torch.equal(scores[image], score[image, kept])


@torch.no_grad()
def run_tower(
    model: Any, pixels: Tensor, goes_on: Callable[[int, int, Tensor], int]
) -> tuple[Tensor, Tensor, list[int]]:
    """The card's loop over the layers of the tower, for images of one call.

    Args:
        goes_on: how many patches do behind a layer, of its number, how many more it is to the last pruning, and what the class token
            pays ``(images, patches)``.

    Returns:
        What is left ``(images, kept, channels)``, which patches these are ``(images, kept)``, and how many went on where some left.
    """
    tower = model.model.vision_tower
    x = tower(pixels, output_hidden_states=True).hidden_states[0]
    ids, cum, counts = torch.arange(x.shape[1] - 1).expand(x.shape[0], -1), None, []
    layers = tower.encoder.layers[:-1]
    for number, layer in enumerate(layers):
        h, a = layer.layer_norm1(x), layer.self_attn
        q, k, v = (p(h).unflatten(-1, (a.num_heads, -1)).transpose(1, 2) for p in (a.q_proj, a.k_proj, a.v_proj))
        score, cls = card_score(q, k, v)
        cum = score if cum is None else 0.5 * cum + 0.5 * score
        x = layer(x, attention_mask=None)
        x = x[0] if isinstance(x, tuple) else x
        left = goes_on(number, len(layers) - 2 - number, cls)
        if left < cls.shape[1]:
            rows = cum.topk(left, -1).indices.sort(-1).values
            cum, ids = cum.gather(1, rows), ids.gather(1, rows)
            rows = torch.cat([torch.zeros(x.shape[0], 1, dtype=torch.long), rows + 1], 1)
            x = x.gather(1, rows.unsqueeze(-1).expand(-1, -1, x.shape[-1]))
            counts.append(left)
    return x[:, 1:], ids, counts


def by_own_entropies(target: int) -> Callable[[int, int, Tensor], int]:
    """The card's rule for the images of one call; ``target`` counts the class token."""

    def goes_on(number: int, more: int, cls: Tensor) -> int:
        n, p = cls.shape[-1], cls / cls.sum(-1, True)
        if more < 0 or more % 2 or n + 1 <= target:
            return n
        entropies = -(p * p.log()).sum(-1) / math.log(n)
        return min(card_keep(n, float(h), more, target) for h in entropies)

    return goes_on


@pytest.mark.slow
@pytest.mark.parametrize(("keep", "texts", "images"), sweep((0.4, 1, 2), (0.2, 2, 1)))
def test_the_language_model_goes_on_from_the_patches_that_are_left(keep: float, texts: int, images: int):
    model, question = llava(), asked(texts, images)
    plan = Plan.of(model, [], {f"flowcut/entropy/{TOWER}": torch.tensor([0.5, 0.7, 0.9])})
    got, fast = answered(model, question, {"name": "flowcut", "keep": keep}, plan=plan)
    counts = FlowCut(keep=keep).schedule(16, [0.5, 0.7, 0.9])
    for i in range(texts):
        pixels = question["pixel_values"][i * images : (i + 1) * images]
        one = {name: t[i : i + 1] for name, t in question.items()}
        stays = one["input_ids"][0] != IMAGE
        places, made = stays.logical_not().nonzero()[:, 0], []
        for image in range(images):
            known = lambda number, more, cls: counts.get(number, cls.shape[1])  # noqa: E731
            left, ids, _ = run_tower(model, pixels[image : image + 1], known)
            stays[places[image * 16 + ids[0]]] = True
            made.append(left[0])
        with torch.no_grad():
            features = model.model.multi_modal_projector(torch.cat(made))
        assert relative_error(got[i], answer(model, one, features, stays)[0]) < 1e-4
    took = accelpass.explain(fast).passes["flowcut"].took[TOWER].what
    assert took == f"{int(16 * keep) * texts * images} of {16 * texts * images} visual tokens are read"


@pytest.mark.slow
def test_a_plan_has_the_entropies_of_the_images():
    model, question = llava(), asked()
    model(**question, use_cache=False)  # transformers installs hooks at the first call
    plan = accelpass.calibrate(model, [question], [{"name": "flowcut", "keep": 0.25}], progress=False)
    (found,) = (t for name, t in plan.tensors.items() if name == f"flowcut/entropy/{TOWER}")
    tower, want = model.model.vision_tower, []
    with torch.no_grad():
        streams = tower(question["pixel_values"], output_hidden_states=True).hidden_states
        for x, layer in zip(streams, tower.encoder.layers[:3], strict=False):
            h, a = layer.layer_norm1(x), layer.self_attn
            q, k, v = (p(h).unflatten(-1, (a.num_heads, -1)).transpose(1, 2) for p in (a.q_proj, a.k_proj, a.v_proj))
            p = card_score(q, k, v)[1]
            p = p / p.sum()
            want.append(-(p * p.log()).sum() / math.log(16))
    torch.testing.assert_close(found, torch.stack(want))


def test_the_tower_computes_less_than_the_dense_one():
    tower = vision_truth.tower(side=6, layers=7)
    program, _ = captured(tower, torch.randn(1, 3, 24, 24))
    (found,) = program.analysis(vision).towers
    before = total(program).flops
    left = FlowCut(keep=0.25, entropy=0.8).leave(program, found, next(iter(program.graph.find_nodes(op="output"))))
    assert value(left.places).shape == (9,) and value(left.stream).shape == (1, 9, 16)
    (output,) = program.graph.find_nodes(op="output")
    output.args = ((left.stream,),)
    program.graph.eliminate_dead_code()
    program.changed()
    assert total(program).flops < 0.8 * before


def test_what_is_reported_of_sizes_from_run_time_is_the_most_they_can_be():
    program, _ = captured(vision_truth.tower(side=6, layers=7), torch.randn(2, 3, 24, 24))
    (found,) = program.analysis(vision).towers
    (output,) = program.graph.find_nodes(op="output")
    before = total(program).flops
    left = FlowCut(keep=0.25).leave(program, found, output)
    assert value(left.places).shape == (18,) and value(left.stream).shape == (2, 9, 16)
    output.args = ((left.stream,),)
    program.graph.eliminate_dead_code()
    program.changed()
    assert 0 < at_compiled_sizes(program, total(program).flops) < before


def test_a_graph_is_not_cut_where_a_size_from_run_time_would_cross():
    program, _ = captured(vision_truth.tower(side=6, layers=7), torch.randn(2, 3, 24, 24))
    (found,) = program.analysis(vision).towers
    FlowCut(keep=0.25).leave(program, found, next(iter(program.graph.find_nodes(op="output"))))
    calls = [n for n in program.graph.nodes if n.op == "call_function"]
    place, closed = {n: i for i, n in enumerate(calls)}, _where_sizes_pass(calls)
    assert 0 < len(closed) < len(calls)
    for cut in set(range(1, len(calls))) - closed:
        crossing = [n for n in calls[:cut] if any(place.get(u, len(calls)) >= cut for u in n.users)]
        assert all(isinstance(value(n), Tensor) and all(isinstance(s, int) for s in value(n).shape) for n in crossing)


@pytest.mark.slow
def test_a_tower_without_a_class_token_lets_go_of_patches_too():
    from transformers import LlavaConfig, LlavaForConditionalGeneration, SiglipVisionConfig

    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4}
    of_clip, question = llava(), asked()
    config = LlavaConfig(
        vision_config=SiglipVisionConfig(**sizes, image_size=24, patch_size=6),
        text_config=of_clip.config.text_config,
        image_token_id=IMAGE,
        vision_feature_select_strategy="full",
    )
    _, fast = answered(LlavaForConditionalGeneration(config).eval(), question, {"name": "flowcut", "keep": 0.25})
    took = [done.what for done in accelpass.explain(fast).passes["flowcut"].took.values()]
    assert "4 of 16 visual tokens are read" in took


@pytest.mark.parametrize(
    ("options", "entropies", "why"),
    [
        ({"keep": 1.0}, None, "all of its 16 patches are read"),
        ({}, [0.5, 0.5], "this tower has 3"),
        ({}, [0.5, 0.5, math.nan], "from 0 to 1"),
    ],
)
def test_what_is_not_taken_is_said(options: dict[str, Any], entropies: list[float] | None, why: str):
    model, question = llava(), asked()
    if entropies is not None:
        plan = Plan.of(model, [], {f"flowcut/entropy/{TOWER}": torch.tensor(entropies)})
        with pytest.raises(Exception, match=why) as caught:
            answered(model, question, {"name": "flowcut", **options}, plan=plan)
        assert isinstance(getattr(caught.value, "inner_exception", caught.value), PlanError)
        return
    _, fast = answered(model, question, {"name": "flowcut", **options})
    assert why in accelpass.explain(fast).passes["flowcut"].skipped["image"]


@pytest.mark.parametrize("options", [{"keep": 0.0}, {"keep": 1.5}, {"entropy": -0.1}])
def test_options(options: dict[str, Any]):
    with pytest.raises(OptionError, match="is not supported; use"):
        FlowCut(**options)


@pytest.mark.parametrize("lowering", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_each_calls_own_entropies_say_how_many_go_on_in_one_graph(lowering: str):
    model, question, seen = llava(num_hidden_layers=7), asked(2, 1), set()
    entry = {"name": "flowcut", "keep": 0.25}
    for layer in model.model.vision_tower.encoder.layers:  # else attention is spread evenly, and none leave
        torch.nn.init.normal_(layer.self_attn.q_proj.weight, std=3.0)
    got, fast = answered(model, question, entry, lowering=lowering)
    for part in (24, 6, 0):  # of the images something is seen on
        pixels = question["pixel_values"].clone()
        pixels[..., part:, :] = 0
        one_call = {**question, "pixel_values": pixels}
        got = answered_by(fast, model, one_call)
        left, ids, counts = run_tower(model, one_call["pixel_values"], by_own_entropies(16 // 4 + 1))
        seen.add(tuple(counts))
        stays = one_call["input_ids"] != IMAGE
        for i in range(2):
            places = stays[i].logical_not().nonzero()[:, 0]
            stays[i, places[ids[i]]] = True
            with torch.no_grad():
                features = model.model.multi_modal_projector(left[i])
            one = {name: t[i : i + 1] for name, t in one_call.items()}
            assert relative_error(got[i], answer(model, one, features, stays[i])[0]) < 1e-4
    assert len(seen) > 1
    broken = answered_by(fast, model, {**question, "pixel_values": torch.full_like(question["pixel_values"], math.nan)})
    assert broken.isnan().all(), "an image of NaN is seen in the answer, and stops nothing"
    assert len(accelpass.explain(fast).graphs) == 2
