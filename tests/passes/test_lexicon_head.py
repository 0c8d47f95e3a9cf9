"""The largest score of each word without the scores of all tokens, against the method card's oracle."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import accelpass
from accelpass.ir.errors import OptionError
from accelpass.ir.linear import largest
from accelpass.models_zoo import small
from accelpass.passes.core.registry import make
from tests.small_models import relative_error
from tests.sweep import examples

IDS = torch.tensor([[5, 9, 2, 7, 1, 3], [4, 8, 6, 0, 0, 0]])


class Head(nn.Module):
    """A head, and one of the ways in which its maximum over tokens is written."""

    def __init__(self, way: str, words: int = 50, width: int = 8, bias: bool = True) -> None:
        super().__init__()
        self.way, self.linear = way, nn.Linear(width, words, bias=bias)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        scores = self.linear(x)
        match self.way:
            case "lexlip":
                return torch.log1p(torch.relu(scores + (1 - mask[..., None]) * -1e6).amax(1))
            case "splade":
                return torch.max(torch.log(1 + torch.relu(scores)) * mask[..., None], dim=1).values
            case "filled":
                return scores.masked_fill(mask[..., None] == 0, float("-inf")).amax(1, keepdim=True).sigmoid()
            case "both":
                best = torch.relu(scores).max(1)
                return best.values + best.indices
            case "mean":
                return torch.relu(scores).amax(1) + scores.mean(1)
        return (torch.relu(scores) * torch.arange(scores.shape[-1])).amax(1)


def compiled(model: Any, *passes: Any, **options: Any) -> Any:
    torch._dynamo.reset()
    return torch.compile(model, backend="accelpass", options={"passes": list(passes), "lowering": "eager", **options})


def lexicon(h: Tensor, weight: Tensor, bias: Tensor, mask: Tensor) -> Tensor:
    """As the card has it."""
    scores = h @ weight.T + bias + (1 - mask[..., None]) * -1e6
    return torch.log1p(torch.relu(scores).amax(1))


@settings(max_examples=examples(5), deadline=None)
@given(
    way=st.sampled_from(["lexlip", "splade", "filled"]),
    tile=st.integers(1, 400),
    words=st.integers(2, 70),
    bias=st.booleans(),
)
def test_maxima_are_those_of_all_scores(way: str, tile: int, words: int, bias: bool):
    torch.manual_seed(words)
    model, x = Head(way, words, bias=bias).eval(), torch.randn(3, 10, 8)
    mask = (torch.arange(10) < torch.tensor([[10], [4], [7]])).float()
    before, largest.TILE = largest.TILE, tile
    try:
        with torch.no_grad():
            fast = compiled(model, "lexicon_head")
            found = fast(x, mask)
            assert relative_error(found, model(x, mask)) < 1e-5
            if way == "lexlip" and bias:
                assert relative_error(found, lexicon(x, model.linear.weight, model.linear.bias, mask)) < 1e-5
            hidden = x.clone()
            hidden[1, 4:] = 99.0
            assert torch.equal(fast(hidden, mask)[1], found[1]), "padding is invisible"
    finally:
        largest.TILE = before
    assert "linear" in accelpass.explain(fast).passes["lexicon_head"].took


def test_the_largest_weights_of_a_text_are_kept():
    model = small.lexicon(0)
    with torch.no_grad():
        dense, found = model(IDS), compiled(model, {"name": "lexicon_head", "topk": 5})(IDS)
        values, at = dense.topk(5, -1)
        assert relative_error(found, torch.zeros_like(dense).scatter(1, at, values)) < 1e-5
        assert ((dense @ dense.T) - (found @ found.T)).min() > -1e-4, "a score never grows"
        fast = compiled(model, {"name": "lexicon_head", "topk": 10_000})
        assert relative_error(fast(IDS), dense) < 1e-6
    assert accelpass.explain(fast).passes["lexicon_head"].took["lm_head"].what.startswith("128 words; 0.0 MB")


def test_a_packed_head_and_other_lengths():
    model = small.lexicon(0)
    fast = compiled(model, "lexicon_head", "int8_weights")
    alone = compiled(model, "int8_weights")
    with torch.no_grad():
        for ids in (IDS, IDS[:, :4], torch.arange(1, 22).view(3, 7)):
            assert relative_error(fast(ids), alone(ids)) < 1e-5
    report = accelpass.explain(fast)
    assert "lm_head" in report.passes["lexicon_head"].took and "lm_head" in report.passes["int8_weights"].took


@pytest.mark.slow
def test_a_bert_with_a_pooled_head():
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4, initializer_range=0.3
    )  # fmt: skip

    class Texts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bert = transformers.BertForMaskedLM(config)

        def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
            scores = self.bert(input_ids=ids, attention_mask=mask).logits
            return torch.log1p(torch.relu(scores).masked_fill(mask[..., None] == 0, 0.0).amax(1))

    torch.manual_seed(0)
    model, mask = Texts().eval(), (IDS != 0).long()
    fast = compiled(model, "lexicon_head")
    with torch.no_grad():
        assert relative_error(fast(IDS, mask), model(IDS, mask)) < 1e-5
    assert accelpass.explain(fast).passes["lexicon_head"].took


def test_scores_of_all_tokens_are_never_there():
    """At LexLIP's size of 64 texts of 40 tokens and 30,522 words, on tensors without values: none is 1/20 of all scores."""
    with torch.device("meta"):
        model = Head("lexlip", 30522, 768).eval()
    from torch.utils._python_dispatch import TorchDispatchMode

    seen: list[int] = []

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            made = func(*args, **(kwargs or {}))
            if isinstance(made, Tensor) and not func.is_view:
                seen.append(made.numel() * made.element_size())
            return made

    x, mask = torch.randn(64, 40, 768, device="meta"), torch.ones(64, 40, device="meta")
    steps = '[["relu", "default", [{"value": 0}], {}]]'
    with torch.no_grad(), Sizes():
        largest.linear_max._init_fn(x, [model.linear.weight], model.linear.bias, "", [], steps, [1], False)
    assert max(seen) <= 64 * 40 * 30522 * 4 / 20 and len(seen) > 50
    seen.clear()
    with torch.no_grad(), Sizes():
        model(x, mask)
    assert max(seen) == 64 * 40 * 30522 * 4


@pytest.mark.slow
def test_onnx_computes_parts_of_the_vocabulary(tmp_path: Any):
    runtime = pytest.importorskip("onnxruntime")
    model = small.lexicon(0)
    accelpass.export_onnx(model, (IDS,), tmp_path / "m.onnx", passes=["lexicon_head"])
    session = runtime.InferenceSession(str(tmp_path / "m.onnx"), providers=["CPUExecutionProvider"])
    (made,) = session.run(None, {session.get_inputs()[0].name: IDS.numpy()})
    with torch.no_grad():
        assert relative_error(torch.from_numpy(made), model(IDS)) < 1e-5


@pytest.mark.parametrize(
    ("way", "said"),
    [
        ("both", "positions of the maxima are read"),
        ("mean", "scores of all tokens are read by"),
        ("words", "a value for each word"),
    ],
)
def test_heads_that_are_left_as_they_are(way: str, said: str):
    torch.manual_seed(0)
    model, x, mask = Head(way).eval(), torch.randn(2, 5, 8), torch.ones(2, 5)
    fast = compiled(model, "lexicon_head")
    with torch.no_grad():
        assert relative_error(fast(x, mask), model(x, mask)) < 1e-6
    assert said in accelpass.explain(fast).passes["lexicon_head"].skipped["linear"]


def test_a_model_without_such_a_head_says_so():
    fast = compiled(small.tiny_lm(), "lexicon_head")
    with torch.no_grad():
        fast(IDS)
    assert "only read for their maximum" in str(accelpass.explain(fast).passes["lexicon_head"].skipped)


def test_options_are_checked():
    with pytest.raises(OptionError, match="topk=0"):
        make({"name": "lexicon_head", "topk": 0})
