"""A codebook in the place of the output head, against the method card's oracle."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import accelpass
from accelpass.ir.errors import OptionError
from accelpass.models_zoo import small
from accelpass.passes.core.registry import make
from tests.small_models import relative_error, tiny_lm
from tests.sweep import examples

IDS = torch.arange(12).reshape(2, 6)


def kmeans(weight: Tensor, count: int, iterations: int, seed: int) -> tuple[Tensor, Tensor]:
    """As the card has it."""
    draw = torch.Generator().manual_seed(seed)
    centres = weight[torch.randperm(weight.shape[0], generator=draw)[:count]].clone()
    for _ in range(iterations):
        codes = torch.cdist(weight, centres).argmin(1)
        size = torch.bincount(codes, minlength=count).clamp_min(1)[:, None]
        new = torch.zeros_like(centres).index_add(0, codes, weight) / size
        centres = torch.where(torch.bincount(codes, minlength=count)[:, None] > 0, new, centres)
    return centres, torch.cdist(weight, centres).argmin(1)


def wanted(model: Any, ids: Tensor, count: int, iterations: int = 25, seed: int = 0) -> Tensor:
    """The model with each row of its head replaced by the row's centre; its embedding stays as it is."""
    with torch.no_grad():
        x = model.embed(ids)
        for layer in model.layers:
            x = layer(x)
        centres, codes = kmeans(model.lm_head.weight, count, iterations, seed)
        return (model.norm(x) @ centres.t()).index_select(-1, codes)


def compiled(model: Any, *passes: Any, **options: Any) -> Any:
    torch._dynamo.reset()
    return torch.compile(model, backend="accelpass", options={"passes": list(passes), "lowering": "eager", **options})


@settings(max_examples=examples(5), deadline=None)
@given(count=st.integers(1, 127), iterations=st.integers(0, 6), seed=st.integers(0, 5))
def test_logits_are_those_of_the_codes(count: int, iterations: int, seed: int):
    model = tiny_lm(seed)
    fast = compiled(model, {"name": "vq_logits", "codes": count, "iterations": iterations, "seed": seed})
    with torch.no_grad():
        found = fast(IDS)
    assert relative_error(found, wanted(model, IDS, count, iterations, seed)) < 1e-4
    _, codes = kmeans(model.lm_head.weight.detach(), count, iterations, seed)
    first = torch.stack([(codes == code).nonzero()[0, 0] for code in codes])
    assert torch.equal(found, found[..., first]), "tokens of one code have one logit"


def test_the_head_is_smaller_and_follows_its_weight():
    model, other = tiny_lm(0), tiny_lm(1)
    fast = compiled(model, {"name": "vq_logits", "codes": 16})
    with torch.no_grad():
        assert relative_error(fast(IDS), wanted(model, IDS, 16)) < 1e-4
        model.load_state_dict(other.state_dict())
        assert relative_error(fast(IDS), wanted(other, IDS, 16)) < 1e-4
    done = accelpass.explain(fast).passes["vq_logits"].took["lm_head"]
    assert (done.what, done.bytes_before, done.bytes_after) == ("16 codes for 128 tokens", 32768, 4096 + 1024)
    before, after = accelpass.explain(fast).flops or (0, 0)
    assert before - after == 2 * 12 * 64 * (128 - 16)


def test_as_many_codes_as_tokens_leave_the_head_as_it_is():
    model = tiny_lm(0)
    fast = compiled(model, {"name": "vq_logits", "codes": 128})
    with torch.no_grad():
        assert relative_error(fast(IDS), model(IDS)) < 1e-6
    assert "each of 128 tokens" in accelpass.explain(fast).passes["vq_logits"].skipped["lm_head"]
    distinct = wanted(model, IDS, 128, 0)  # the card's own identity: every row is a centre
    with torch.no_grad():
        assert relative_error(distinct, model(IDS)) < 1e-5


def test_a_bias_stays_a_tokens_own():
    model = nn.Sequential(nn.Embedding(32, 16), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 32)).eval()
    ids = torch.arange(8)[None]
    fast = compiled(model, {"name": "vq_logits", "codes": 8})
    centres, codes = kmeans(model[3].weight.detach(), 8, 25, 0)
    with torch.no_grad():
        x = model[2](model[1](model[0](ids)))
        assert relative_error(fast(ids), (x @ centres.t())[..., codes] + model[3].bias) < 1e-4


def test_the_codebook_is_packed_saved_and_loaded(tmp_path: Any):
    model = tiny_lm(0)
    fast = compiled(model, {"name": "vq_logits", "codes": 16}, "int8_weights")
    with torch.no_grad():
        found = fast(IDS)
        assert 0 < relative_error(found, wanted(model, IDS, 16)) < 0.05
        assert accelpass.explain(fast).passes["int8_weights"].took["lm_head"].what == "16x64 int8"
        accelpass.save(fast, tmp_path)
        torch._dynamo.reset()
        assert relative_error(accelpass.load(tiny_lm(2), tmp_path)(IDS), found) < 1e-6


def test_onnx_gathers_logits(tmp_path: Any):
    runtime = pytest.importorskip("onnxruntime")
    model = tiny_lm(0)
    accelpass.export_onnx(model, (IDS,), tmp_path / "m.onnx", passes=[{"name": "vq_logits", "codes": 16}])
    session = runtime.InferenceSession(str(tmp_path / "m.onnx"), providers=["CPUExecutionProvider"])
    (made,) = session.run(None, {session.get_inputs()[0].name: IDS.numpy()})
    assert relative_error(torch.from_numpy(made), wanted(model, IDS, 16)) < 1e-4


def test_a_model_without_a_head_says_so():
    fast = compiled(small.Mlp().eval(), "vq_logits")
    with torch.no_grad():
        fast(torch.randn(2, 64))
    assert "returns no logits" in str(accelpass.explain(fast).passes["vq_logits"].skipped)


@pytest.mark.parametrize("given", [{"codes": 0}, {"iterations": -1}, {"seed": -1}])
def test_options_are_checked(given: dict[str, int]):
    with pytest.raises(OptionError, match="a number from"):
        make({"name": "vq_logits", **given})
