"""Fewer words: the kept ones have the model's logits, the others none."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import accelpass
from accelpass.ir.errors import OptionError
from accelpass.models_zoo import small
from accelpass.passes.core.registry import make
from tests.small_models import relative_error, tiny_lm
from tests.sweep import examples


class Untied(nn.Module):
    """An embedding and a head of their own, with a bias."""

    def __init__(self, words: int = 40, width: int = 16) -> None:
        super().__init__()
        self.embed, self.mlp, self.head = nn.Embedding(words, width), small.Mlp(width, 24), nn.Linear(width, words)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.mlp(self.embed(ids)))


def compiled(model: Any, *passes: Any, **options: Any) -> Any:
    torch._dynamo.reset()
    return torch.compile(model, backend="accelpass", options={"passes": list(passes), "lowering": "eager", **options})


@settings(max_examples=examples(4), deadline=None)
@given(data=st.data(), tied=st.booleans(), seed=st.integers(0, 5))
def test_kept_words_have_the_models_logits(data: Any, tied: bool, seed: int):
    torch.manual_seed(seed)
    model, words = (tiny_lm(seed), 128) if tied else (Untied().eval(), 40)
    keep = data.draw(st.lists(st.integers(0, words - 1), min_size=1, max_size=words - 1, unique=True))
    ids = torch.tensor(keep)[torch.randint(0, len(keep), (2, 5))]
    fast = compiled(model, {"name": "vocabulary_prune", "keep": keep})
    with torch.no_grad():
        found, want = fast(ids), model(ids)
    assert relative_error(found[..., keep], want[..., keep]) < 1e-5
    gone = [n for n in range(words) if n not in keep]
    assert found.shape == want.shape and bool((found[..., gone] == float("-inf")).all())


def test_bytes_and_products_go_and_weights_are_followed():
    model, keep = tiny_lm(0), list(range(0, 128, 4))
    ids = torch.tensor([[4, 8, 120]])
    fast = compiled(model, {"name": "vocabulary_prune", "keep": keep})
    with torch.no_grad():
        fast(ids)
        model.load_state_dict(tiny_lm(1).state_dict())
        assert relative_error(fast(ids)[..., keep], tiny_lm(1)(ids)[..., keep]) < 1e-5
    report = accelpass.shrink_report(fast)
    assert report.bytes == (128 * 64 * 4, 32 * 64 * 4), "one weight for embedding and head"
    before, after = accelpass.explain(fast).flops or (0, 0)
    assert before - after == 2 * 3 * 64 * (128 - 32)


def test_a_token_that_is_gone_is_an_error_or_is_read_as_another():
    model, keep = tiny_lm(0), [1, 2, 3]
    strict = compiled(model, {"name": "vocabulary_prune", "keep": keep})
    with torch.no_grad():
        with pytest.raises(IndexError):
            strict(torch.tensor([[1, 9]]))
        lenient = compiled(model, {"name": "vocabulary_prune", "keep": keep, "unknown": 3})
        found = lenient(torch.tensor([[1, 9, 2]]))
        assert relative_error(found[..., keep], model(torch.tensor([[1, 3, 2]]))[..., keep]) < 1e-5


@pytest.mark.slow
def test_a_decoder_generates_kept_words_alone():
    pytest.importorskip("transformers")
    model, keep = small.decoder(layers=1), tuple(range(3, 64, 3))
    fast = compiled(model, {"name": "vocabulary_prune", "keep": keep}, "int8_weights")
    with torch.no_grad():
        logits = fast(torch.tensor([[3, 9, 30, 63]]), use_cache=False).logits
    assert set(logits.argmax(-1).flatten().tolist()) <= set(keep)
    assert "21x32 int8" in str(accelpass.explain(fast).passes["int8_weights"].took)


@pytest.mark.slow
def test_onnx_has_the_few_rows(tmp_path: Any):
    runtime, onnx = pytest.importorskip("onnxruntime"), pytest.importorskip("onnx")
    model, ids = tiny_lm(0), torch.tensor([[4, 8, 12]])
    keep = [4, 8, 12, 16]
    accelpass.export_onnx(model, (ids,), tmp_path / "m.onnx", passes=[{"name": "vocabulary_prune", "keep": keep}])
    session = runtime.InferenceSession(str(tmp_path / "m.onnx"), providers=["CPUExecutionProvider"])
    (made,) = session.run(None, {session.get_inputs()[0].name: ids.numpy()})
    with torch.no_grad():
        assert relative_error(torch.from_numpy(made)[..., keep], model(ids)[..., keep]) < 1e-5
    held = [tuple(i.dims) for i in onnx.load(tmp_path / "m.onnx").graph.initializer]
    assert (128, 64) not in held and (4, 64) in held


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"keep": [-1]}, "from 0"),
        ({"keep": [2, 2]}, "2 is there twice"),
        ({"keep": [1], "unknown": 2}, "one of the ids of keep"),
    ],
)
def test_options_are_checked(given: dict[str, Any], said: str):
    with pytest.raises(OptionError, match=said):
        make({"name": "vocabulary_prune", **given})


def test_ids_out_of_range_and_models_without_words():
    with torch.no_grad():
        with pytest.raises(Exception, match="keep has the id 128, and this model's ids go from 0 to 127"):
            compiled(tiny_lm(), {"name": "vocabulary_prune", "keep": [0, 128]})(torch.zeros(1, 2, dtype=torch.long))
        fast = compiled(small.Mlp().eval(), {"name": "vocabulary_prune", "keep": [0]})
        fast(torch.randn(2, 64))
    assert "no logits over the words" in str(accelpass.explain(fast).passes["vocabulary_prune"].skipped)
    with torch.no_grad():
        same = compiled(tiny_lm(), "vocabulary_prune")
        ids = torch.arange(6)[None]
        assert relative_error(same(ids), tiny_lm()(ids)) < 1e-6
    assert "keep is empty" in str(accelpass.explain(same).passes["vocabulary_prune"].skipped)


def test_the_small_model_is_saved_and_loaded(tmp_path: Any):
    keep, ids = [4, 8, 12, 16], torch.tensor([[4, 8, 12]])
    fast = compiled(tiny_lm(0), {"name": "vocabulary_prune", "keep": keep}, "int8_weights")
    with torch.no_grad():
        found = fast(ids)
        accelpass.save(fast, tmp_path)
        torch._dynamo.reset()
        again = accelpass.load(tiny_lm(2), tmp_path)(ids)
    assert relative_error(again[..., keep], found[..., keep]) < 1e-6
    from safetensors.torch import load_file

    shapes = {tuple(t.shape) for file in tmp_path.rglob("*.safetensors") for t in load_file(file).values()}
    assert (4, 64) in shapes and (128, 64) not in shapes, "the rows that are gone are not in the file"
