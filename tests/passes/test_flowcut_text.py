"""FlowCut's second stage in whole models: ``generate`` answers what the model answers if its later layers read what the card's score keeps."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import accelpass
from accelpass.ir.errors import OptionError
from accelpass.passes.visual_tokens.flowcut_text import FlowCutText, _flow
from tests.passes.visual_truth import IMAGE, asked, generated, generates_as_pruned, llava
from tests.small_models import relative_error
from tests.sweep import examples, sweep


@pytest.fixture(autouse=True)
def _one_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRANSFORMERS_DISABLE_TORCH_CHECK", "1")


def card_score(q: Tensor, k: Tensor, v: Tensor, visual: Tensor) -> Tensor:
    """The card's, of one text; heads of keys and values as many as queries have, ``(heads, tokens, d)``."""
    d = q.shape[-1]
    rel = (q[:, -1:] @ k[:, visual].mT / d**0.5).softmax(-1)[:, 0].mean(0)
    sem = (v[:, -1:] @ v[:, visual].mT / d**0.5).softmax(-1)[:, 0].mean(0)
    return (rel / rel.sum() + sem / sem.sum()) * v.mean(0)[visual].abs().sum(-1)


@settings(max_examples=examples(15), deadline=None)
@given(
    texts=st.integers(1, 3), kv_heads=st.integers(1, 2), groups=st.integers(1, 2), before=st.integers(0, 3), each=st.integers(1, 9),
    seed=st.integers(0, 99),
)  # fmt: skip
def test_the_score_is_the_cards(texts: int, kv_heads: int, groups: int, before: int, each: int, seed: int):
    torch.manual_seed(seed)
    tokens = before + each + 2
    q = torch.randn(texts, kv_heads * groups, tokens, 8)
    k, v = torch.randn(2, texts, kv_heads, tokens, 8)
    mask = torch.zeros(texts, tokens, dtype=torch.bool)
    mask[:, before : before + each] = True
    (got,) = _flow(8**-0.5, each, mask, q, k, v)
    for i in range(texts):
        k_all, v_all = (x[i].repeat_interleave(groups, 0) for x in (k, v))
        torch.testing.assert_close(got[i][mask[i]], card_score(q[i], k_all, v_all, mask[i].nonzero()[:, 0]))


def chosen(ids: Tensor, keep: float) -> Any:
    def choose(q: Tensor, k: Tensor, v: Tensor, sees: Tensor) -> Tensor:
        visual = (ids == IMAGE).nonzero()[:, 0]
        best = visual[card_score(q, k, v, visual).topk(int(len(visual) * keep)).indices]
        return torch.cat([(ids != IMAGE).nonzero()[:, 0], best]).sort().values

    return choose


@pytest.mark.slow
@pytest.mark.parametrize(("keep", "layer", "texts", "images"), sweep((0.5, 1, 2, 1), (0.25, 2, 1, 2)))
def test_generate_answers_as_the_pruned_model(keep: float, layer: int, texts: int, images: int):
    generates_as_pruned("flowcut_text", keep, layer, texts, images, chosen)


def test_all_tokens_are_the_dense_model():
    model, question = llava(), asked()
    want, _ = generated(llava(), question)
    got, fast = generated(model, question, {"name": "flowcut_text", "layer": 1, "keep": 1.0})
    assert relative_error(got, want) < 1e-5
    assert "all of its 16 visual tokens go on" in " ".join(
        accelpass.explain(fast).passes["flowcut_text"].skipped.values()
    )


@pytest.mark.parametrize("options", [{"layer": 0}, {"keep": 1.2}])
def test_options(options: dict[str, Any]):
    with pytest.raises(OptionError, match="is not supported; use"):
        FlowCutText(**options)
