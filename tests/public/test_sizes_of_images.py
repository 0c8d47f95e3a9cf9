"""Models that read sizes of images on the host: after ``accelpass.one_graph`` these are constants, and the model is one graph."""

from __future__ import annotations

import copy
import inspect

import pytest
import torch

import accelpass
from tests import vision_models
from tests.passes.test_fastv import attended
from tests.passes.visual_truth import answered, pruned_answer
from tests.small_models import relative_error


@pytest.fixture(autouse=True)
def _counts_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRANSFORMERS_DISABLE_TORCH_CHECK", "1")


def test_a_model_that_was_called_before_answers_the_same():
    """Its tower has hooks of its own by then, and must not get them twice."""
    seen = vision_models.build("Pixtral (LLaVA)")
    with torch.no_grad():
        want = seen.model(**seen.given).logits
        accelpass.one_graph(accelpass.one_graph(seen.model))
        assert torch.equal(seen.model(**seen.given).logits, want)


def test_a_copy_calls_itself_and_the_signature_stays():
    seen = vision_models.build("Pixtral (LLaVA)")
    before = inspect.signature(seen.model.forward)
    copied = copy.deepcopy(accelpass.one_graph(seen.model))
    assert inspect.signature(copied.forward) == inspect.signature(seen.model.forward) == before
    with torch.no_grad():
        want = copied(**seen.given).logits
        seen.model.lm_head.weight.zero_()
        assert torch.equal(copied(**seen.given).logits, want) and want.any()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["Pixtral (LLaVA)", "Qwen2-VL"])
def test_the_model_is_one_graph_for_each_set_of_sizes(name: str):
    seen = vision_models.build(name)
    accelpass.one_graph(seen.model)
    given = dict(seen.given)
    if name == "Qwen2-VL":
        wide = {**given, "image_grid_thw": torch.tensor([[1, 2, 8]])}
    else:
        wide = {**given, "image_sizes": torch.tensor([[18, 24]])}
        places = given["input_ids"] == vision_models.IMAGE
        keep = ~(places & (places.cumsum(1) > 12))
        wide |= {n: given[n][keep][None] for n in ("input_ids", "attention_mask")}
    torch._dynamo.reset()
    fast = torch.compile(seen.model, backend="accelpass", options={"lowering": "eager"}, dynamic=False)
    for graphs, each in [(1, given), (2, wide), (2, given)]:
        with torch.no_grad():
            got = fast(**each).logits
            assert relative_error(got, seen.model(**each).logits) < 1e-4
        assert len(accelpass.explain(fast).graphs) == graphs


@pytest.mark.slow
@pytest.mark.parametrize("name", ["LLaVA-NeXT", "Qwen2.5-VL", "Qwen3-VL"])
def test_a_model_that_counts_on_the_host_is_one_graph(name: str):
    """With numpy, by ``arange`` under a mask, by places that a mask of ids names."""
    seen = vision_models.build(name)
    with torch.no_grad():
        want = seen.model(**seen.given).logits
        torch._dynamo.reset()
        accelpass.one_graph(seen.model)
        fast = torch.compile(seen.model, backend="accelpass", options={"lowering": "eager"}, dynamic=False)
        assert relative_error(fast(**seen.given).logits, want) < 1e-4
    assert len(accelpass.explain(fast).graphs) == 1


@pytest.mark.parametrize("name", ["SmolVLM", pytest.param("Idefics3", marks=pytest.mark.slow)])
@pytest.mark.parametrize("padding", ["none", "some", pytest.param("not told", marks=pytest.mark.slow)])
def test_images_that_fill_up_a_batch_are_not_read(name: str, padding: str):
    """One graph for each number of real images; padding inside an image stays masked."""
    seen = vision_models.build(name)
    ids = seen.given["input_ids"]
    pixels, mask = (
        seen.given["pixel_values"].repeat(2, 1, 1, 1, 1),
        seen.given["pixel_attention_mask"].repeat(2, 1, 1, 1),
    )
    pixels[1, 1] = 0
    if padding == "some":
        mask[0, 0, :, 12:] = 0
    fewer = ids.clone()
    fewer[0, (ids[0] == vision_models.IMAGE).nonzero()[4:, 0]] = 20
    given = {
        **seen.given,
        "input_ids": torch.cat([ids, fewer]),
        "attention_mask": torch.ones(2, ids.shape[1], dtype=torch.long),
        "pixel_values": pixels,
        "pixel_attention_mask": None if padding == "not told" else mask,
    }
    first = [n for n in inspect.signature(type(seen.model).forward).parameters if n != "self"][:2]
    nothing = {**given, "input_ids": fewer[:, :3], "attention_mask": torch.ones(1, 3), "pixel_values": None}
    with torch.no_grad():
        want = seen.model(**given).logits
        torch._dynamo.reset()
        accelpass.one_graph(seen.model)
        assert relative_error(seen.model(**given).logits, want) < 1e-5
        fast = torch.compile(seen.model, backend="accelpass", options={"lowering": "eager"}, dynamic=False)
        assert relative_error(fast(**given).logits, want) < 1e-4
        assert len(accelpass.explain(fast).graphs) == 1
        by_place = {n: x for n, x in given.items() if n not in first}
        assert relative_error(fast(*(given[n] for n in first), **by_place).logits, want) < 1e-4
        fast(**nothing)


@pytest.mark.slow
@pytest.mark.parametrize("keep", [0.5, 0.25])
def test_pixtral_answers_as_the_pruned_model(keep: float):
    """A tower with rotary positions and a mask of images, and sizes that are constants."""
    seen = vision_models.build("Pixtral (LLaVA)")
    question = {n: seen.given[n] for n in ("input_ids", "attention_mask", "pixel_values", "image_sizes")}
    want = pruned_answer(seen.model, question, 1, attended(question["input_ids"][0], keep))
    got, fast = answered(accelpass.one_graph(seen.model), question, {"name": "fastv", "layer": 1, "keep": keep})
    assert relative_error(got, want) < 1e-4
    took = {done.what for done in accelpass.explain(fast).passes["fastv"].took.values()}
    assert f"{int(16 * keep)} of 16 visual tokens go on to 2 layers" in took


@pytest.mark.slow
@pytest.mark.parametrize("name", ["Qwen2-VL", "Qwen2.5-VL", "Qwen3-VL"])
def test_qwen_answers_as_the_pruned_model(name: str):
    """Positions of three axes go on with the tokens that stay, and what is added to their places behind a layer."""
    seen = vision_models.build(name)
    model, given = accelpass.one_graph(seen.model), seen.given
    ids, places = given["input_ids"], given["position_ids"]
    options = {"lowering": "eager", "passes": [{"name": "fastv", "layer": 1, "keep": 0.5}]}
    torch._dynamo.reset()
    fast = torch.compile(model, backend="accelpass", options=options, dynamic=False)
    plain = copy.deepcopy(model)
    plain.set_attn_implementation("eager")
    text = plain.model.language_model
    with torch.no_grad():
        got = fast(**given).logits
        x, there = text.embed_tokens(ids), ids == vision_models.IMAGE
        features = plain.model.get_image_features(given["pixel_values"], given["image_grid_thw"])
        x[there] = torch.cat(list(features.pooler_output))
        more = [torch.zeros_like(x) for _ in text.layers]
        for added, inner in zip(more, getattr(features, "deepstack_features", []), strict=False):
            added[there] = torch.cat(list(inner))
        cos, sin = text.rotary_emb(x, places)
        whole = torch.full((ids.shape[1],) * 2, float("-inf")).triu(1)[None, None]
        paid: list[torch.Tensor] = []
        keep = text.layers[0].self_attn.register_forward_hook(lambda module, args, out: paid.append(out[1]))
        x = text.layers[0](x, attention_mask=whole, position_embeddings=(cos, sin))
        keep.remove()
        x = (x[0] if isinstance(x, tuple) else x) + more[0]
        visual = (ids[0] == vision_models.IMAGE).nonzero()[:, 0]
        best = visual[paid[0][0].mean(0)[-1, visual].topk(2).indices]
        rows = torch.cat([(ids[0] != vision_models.IMAGE).nonzero()[:, 0], best]).sort().values
        x, mask = x[:, rows], whole[:, :, rows][..., rows]
        for layer, added in zip(text.layers[1:], more[1:], strict=True):
            x = layer(x, attention_mask=mask, position_embeddings=(cos[..., rows, :], sin[..., rows, :]))
            x = (x[0] if isinstance(x, tuple) else x) + added[:, rows]
        want = plain.lm_head(text.norm(x[:, -1:]))
    assert relative_error(got, want) < 1e-4
    took = {done.what for done in accelpass.explain(fast).passes["fastv"].took.values()}
    assert "2 of 4 visual tokens go on to 2 layers" in took
