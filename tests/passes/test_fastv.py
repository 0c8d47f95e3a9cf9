"""FastV in whole models: ``generate`` answers what the model answers if its later layers read fewer visual tokens."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import accelpass
from accelpass.ir.errors import OptionError
from accelpass.passes.visual_tokens.fastv import FastV
from tests.passes.visual_truth import IMAGE, answered, asked, generated, generates_as_pruned, llava, pruned_answer
from tests.small_models import relative_error
from tests.sweep import sweep


@pytest.fixture(autouse=True)
def _one_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRANSFORMERS_DISABLE_TORCH_CHECK", "1")


def attended(ids: Tensor, keep: float) -> Any:
    """The paper's choice: all text, and the visual tokens that the last one pays most, the mean over heads."""

    def choose(q: Tensor, k: Tensor, v: Tensor, sees: Tensor) -> Tensor:
        scores = (q[:, -1:] @ k.mT * q.shape[-1] ** -0.5).masked_fill(sees.logical_not(), float("-inf"))
        paid = scores.softmax(-1)[:, 0].mean(0)
        visual = (ids == IMAGE).nonzero()[:, 0]
        best = visual[paid[visual].topk(int(len(visual) * keep)).indices]
        return torch.cat([(ids != IMAGE).nonzero()[:, 0], best]).sort().values

    return choose


@pytest.mark.slow
@pytest.mark.parametrize(
    ("keep", "layer", "texts", "images"), sweep((0.5, 1, 2, 1), (0.25, 2, 1, 2), (0.0, 1, 1, 1), (0.7, 2, 2, 2))
)
def test_generate_answers_as_the_pruned_model(keep: float, layer: int, texts: int, images: int):
    generates_as_pruned("fastv", keep, layer, texts, images, attended)


@pytest.mark.slow
def test_without_a_cache_the_last_logits_are_the_same():
    model, question = llava(), asked()
    want, _ = answered(model, question, {"name": "fastv", "layer": 1})
    with torch.no_grad():
        got = torch.compile(
            model, backend="accelpass", options={"lowering": "eager", "passes": [{"name": "fastv", "layer": 1}]}
        )(**question, use_cache=False).logits
    assert got.shape[1] == question["input_ids"].shape[1]
    assert relative_error(got[:, -1], want[:, 0]) < 1e-4


@pytest.mark.slow
def test_text_alone_and_then_an_image_share_the_compiled_model():
    model, question = llava(), asked()
    words = torch.randint(16, 128, (1, 11))
    alone = {"input_ids": words, "attention_mask": torch.ones_like(words)}
    got, fast = generated(model, alone, {"name": "fastv", "layer": 1})
    everything = lambda q, k, v, sees: torch.arange(11)  # noqa: E731
    assert relative_error(got, pruned_answer(model, alone, 1, everything)) < 1e-4
    skipped = accelpass.explain(fast).passes["fastv"].skipped
    assert "text alone is read as it is" in skipped["image"]
    cache = accelpass.KVCache(model, capacity=96)
    made = model.generate(
        **question,
        past_key_values=cache,
        max_new_tokens=4,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
    )
    want = pruned_answer(model, question, 1, attended(question["input_ids"][0], 0.5))
    assert relative_error(torch.stack(list(made.logits), 1), want) < 1e-4


def test_texts_with_different_numbers_of_images_are_refused_when_they_are_read():
    model, question = llava(), asked(texts=2, images=1)
    ids = question["input_ids"]
    ids[0, 3:11], ids[1, -8:] = 50, IMAGE  # 8 places in one text, 24 in the other
    with pytest.raises(RuntimeError, match="each must have the same number of them"):
        generated(model, question, {"name": "fastv", "layer": 1})


@pytest.mark.parametrize(
    ("options", "why"),
    [({"layer": 3}, "layer=3: the language model has 3 layers"), ({"keep": 1.0}, "all of its 16 visual tokens go on")],
)
def test_what_is_not_taken_is_said(options: dict[str, Any], why: str):
    _, fast = generated(llava(), asked(), {"name": "fastv", **{"layer": 1} | options})
    assert why in " ".join(accelpass.explain(fast).passes["fastv"].skipped.values())


@pytest.mark.parametrize("options", [{"layer": 0}, {"keep": 1.2}])
def test_options(options: dict[str, Any]):
    with pytest.raises(OptionError, match="is not supported; use"):
        FastV(**options)
