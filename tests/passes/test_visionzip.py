"""What a language model reads of an image with VisionZip is what its card's plain form gives, and it goes on from there."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import accelpass
from accelpass.passes.visual_tokens.visionzip import VisionZip, zipped
from tests.passes.visual_truth import IMAGE, PATCHES, answer, answered, asked, generated, llava, seen
from tests.small_models import relative_error
from tests.sweep import examples, sweep


@pytest.fixture(autouse=True)
def _one_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRANSFORMERS_DISABLE_TORCH_CHECK", "1")


def zip_image(
    x: Tensor, keys: Tensor, scores: Tensor, first: int, dominant: int, contextual: int
) -> tuple[Tensor, Tensor]:
    """One image, after the authors' code: tokens ``(dominant + contextual, channels)``, and their places among the patches.

    The class token is one of the dominant ones; ``scores`` are of patches.
    """
    top = scores.topk(dominant - bool(first)).indices.sort().values
    patches, metric = x[first:], F.normalize(keys[:, first:].mean(0), dim=-1)
    rest = [i for i in range(len(patches)) if i not in top.tolist()]
    at = list(range(0, len(rest), max(1, len(rest) // contextual)))[:contextual] if contextual else []
    targets = [rest[i] for i in at]
    groups: dict[int, list[int]] = {t: [] for t in targets}
    for i in rest:
        if i not in groups and targets:
            groups[targets[int((metric[targets] @ metric[i]).argmax())]].append(i)
    merged = [patches[t] + (patches[g].mean(0) if g else 0) for t, g in groups.items()]
    tokens = torch.stack([*x[:1][: bool(first)], *patches[top], *merged])
    places = [*top.tolist(), *targets]
    places += [next(i for i in range(len(patches)) if i not in places)] if first else []
    return tokens, torch.tensor(sorted(places))


@settings(max_examples=examples(20), deadline=None)
@given(
    images=st.integers(1, 3), patches=st.integers(2, 20), first=st.integers(0, 2), kept=st.integers(1, 19),
    contextual=st.integers(0, 6), seed=st.integers(0, 999),
)  # fmt: skip
def test_tokens_are_the_papers(images: int, patches: int, first: int, kept: int, contextual: int, seed: int):
    kept = min(kept, patches - 1)
    contextual = min(contextual, kept - 1)
    torch.manual_seed(seed)
    x, keys = torch.randn(images, first + patches, 6), torch.randn(images, 2, first + patches, 4)
    scores = torch.rand(images, patches)
    tokens, places = zipped(first, kept - contextual, contextual, x, keys, scores)
    for i in range(images):
        want, at = zip_image(x[i], keys[i], scores[i], first, kept - contextual, contextual)
        torch.testing.assert_close(tokens[i], want)
        assert torch.equal(places.view(images, -1)[i], at + i * patches)


@pytest.mark.slow
@pytest.mark.parametrize("texts", sweep(2, 1))
def test_the_language_model_goes_on_from_the_tokens_that_are_left(texts: int):
    model, question = llava(), asked(texts)
    got, fast = answered(model, question, {"name": "visionzip", "keep": 0.5, "contextual": 0.3})
    dominant, contextual = VisionZip(keep=0.5, contextual=0.3).counts(PATCHES)
    assert (dominant, contextual) == (6, 2)
    q, k, _, x = seen(model, question["pixel_values"])[2]
    scores = (q[:, :, :1] @ k.mT * q.shape[-1] ** -0.5).softmax(-1)[:, :, 0, 1:].sum(1)
    for i in range(texts):
        one = {name: t[i : i + 1] for name, t in question.items()}
        tokens, places = zip_image(x[i], k[i], scores[i], 1, dominant, contextual)
        stays = one["input_ids"][0] != IMAGE
        stays[stays.logical_not().nonzero()[places, 0]] = True
        with torch.no_grad():
            features = model.model.multi_modal_projector(tokens)
        assert relative_error(got[i], answer(model, one, features, stays)[0]) < 1e-4
    took = accelpass.explain(fast).passes["visionzip"].took
    assert took["model.vision_tower.encoder.layers"].what == f"{8 * texts} of {16 * texts} visual tokens are read"


@pytest.mark.slow
def test_generate_runs_tower_and_text_as_one_graph(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("TRANSFORMERS_DISABLE_TORCH_CHECK")
    question, zipped_to_half = asked(2), {"name": "visionzip", "keep": 0.5, "contextual": 0.3}
    want, _ = answered(accelpass.one_graph(llava()), question, zipped_to_half)
    got, fast = generated(accelpass.one_graph(llava()), question, zipped_to_half)
    torch.testing.assert_close(got, want)
    took = accelpass.explain(fast).passes["visionzip"].took
    assert took["model.vision_tower.encoder.layers"].what == "16 of 32 visual tokens are read"
    few = question | {
        "input_ids": question["input_ids"][:, 1:].clone(),
        "attention_mask": question["attention_mask"][:, 1:],
    }
    few["input_ids"][:, 2] = 20  # a place for a patch is gone
    with pytest.raises(RuntimeError, match="one place for each of their patches"):
        generated(fast, few, zipped_to_half)


@pytest.mark.slow
def test_generate_alone_says_what_to_call(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("TRANSFORMERS_DISABLE_TORCH_CHECK")
    _, fast = generated(llava(), asked(), {"name": "visionzip"})
    assert "accelpass.one_graph(model)" in str(accelpass.explain(fast).passes["visionzip"].skipped.values())
    with pytest.raises(accelpass.AccelpassError, match="Linear is no model of transformers that reads images"):
        accelpass.one_graph(torch.nn.Linear(2, 2))


def test_all_tokens_are_the_dense_model():
    model, question = llava(), asked()
    got, fast = answered(model, question, {"name": "visionzip", "keep": 1.0})
    with torch.no_grad():
        features = model.model.get_image_features(question["pixel_values"]).pooler_output[0]
    want = answer(model, question, features, torch.ones_like(question["input_ids"][0], dtype=torch.bool))
    assert relative_error(got, want) < 1e-4
    assert "all of its 16 patches are read" in accelpass.explain(fast).passes["visionzip"].skipped["image"]
