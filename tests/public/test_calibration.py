"""``accelpass.calibrate`` with the one pass that learns from data."""

from __future__ import annotations

import pytest
import torch
from transformers import BertConfig, BertModel

import accelpass
from accelpass import KVCache
from accelpass.api.calibration.loss_study import parted
from accelpass.backends import graphs_of
from accelpass.passes.core.plan import Plan
from accelpass.passes.kv_cache.learnt.cskv import factorise
from tests.passes.kv_truth import fed
from tests.passes.test_kv_methods import CAPACITY, compiled, llama, tokens

CSKV = {"name": "cskv", "keep_k": 0.25, "keep_v": 0.25, "window": 2}


def batches(count: int = 24) -> list[torch.Tensor]:
    """Tokens from a few of the vocabulary, so that activations have directions that matter."""
    torch.manual_seed(5)
    return [torch.randint(0, 6, (2, 40)) for _ in range(count)]


def off(model, **options) -> float:
    """How far generation is from the dense model's on such data."""
    torch._dynamo.reset()
    pieces = [batches(1)[0], *batches(1)[0][:, :8].split(1, 1)]
    dense = fed(compiled(model), KVCache(model, 64, 2), pieces)
    torch._dynamo.reset()
    fast = torch.compile(model, backend="accelpass", options={"lowering": "eager", **options})
    return float((fed(fast, KVCache(model, 64, 2), pieces) - dense).abs().max())


@pytest.mark.slow
def test_calibrated_factors_are_the_nearest(tmp_path):
    """No factors of this rank are nearer on the data: neither the weight's own nor any that a few steps from these lead to."""
    model, data = llama(head_dim=32), batches(6)
    plan = accelpass.calibrate(model, data, [CSKV], progress=False)
    losses = [t for name, t in plan.tensors.items() if name.endswith("/loss")]
    assert len(losses) == 4 and all(last < 0.9 * first for first, last in losses)
    plan.save(tmp_path / "plan.json")
    again = Plan.load(tmp_path / "plan.json")
    path, seen = "model.layers.1.self_attn.k_proj.weight", []
    weight = model.get_parameter(path).detach()
    handle = model.model.layers[1].self_attn.k_proj.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    with torch.no_grad():
        for ids in data:
            model(ids)
    handle.remove()
    x = torch.cat(seen)
    y = x @ weight.t()

    def error(down, up):
        return (x @ down.t() @ up - y).square().sum()

    fitted = [again.tensors[f"cskv/{path}/{part}"].clone().requires_grad_() for part in ("down", "up")]
    plain = factorise(weight, 16)
    least = error(*fitted)
    for pair, of in ((plain, 0), (fitted, 1)):
        told = float(again.tensors[f"cskv/{path}/loss"][of])
        assert told == pytest.approx(float((error(*pair) / y.square().sum()).detach()), rel=1e-3)
    slopes = torch.autograd.grad(least, fitted)
    assert all(
        float((g * p.detach()).abs().sum()) < 1e-3 * float(y.square().sum())
        for g, p in zip(slopes, fitted, strict=True)
    )
    with torch.no_grad():
        latent = x @ fitted[0].t()
    assert torch.allclose(latent.square().mean((0, 1)), torch.ones(16), atol=1e-2), "rounding costs each latent alike"
    assert off(model, plan=again) != off(model, passes=[CSKV]), "the plan's factors are used"
    (report,) = {g.report.records[0].name for g in graphs_of(model)}
    assert report == "cskv"


@pytest.mark.slow
def test_the_first_token_may_count_more():
    """Its keys get nearer, at the cost of the others'."""
    model, data = llama(head_dim=32), batches(6)
    path = "model.layers.1.self_attn.k_proj"
    seen: list[torch.Tensor] = []
    model.get_submodule(path).register_forward_pre_hook(lambda _, given: seen.append(given[0].detach()))
    errors = []
    for weight in (1.0, 1000.0):
        plan = accelpass.calibrate(model, data, [{**CSKV, "first_token": weight}], progress=False)
        down, up = (plan.tensors[f"cskv/{path}.weight/{part}"] for part in ("down", "up"))
        x = torch.cat(seen[-len(data) :])
        off = (x @ down.t() @ up - x @ model.get_submodule(path).weight.detach().t()).square().sum(-1)
        errors.append((float(off[:, 0].mean()), float(off[:, 1:].mean())))
    assert errors[1][0] < 0.5 * errors[0][0] and errors[1][1] > errors[0][1]


def test_factors_of_data_that_is_not_finite_are_refused():
    model = llama(head_dim=32)
    with torch.no_grad():
        model.model.layers[1].input_layernorm.weight[0] = float("nan")
    with pytest.raises(
        accelpass.PassError, match=r"layers\.1\.self_attn\.[kv]_proj\.weight gives values that are not finite"
    ):
        accelpass.calibrate(model, batches(1), [CSKV], progress=False)


def test_a_plan_for_another_rank_is_refused():
    model = llama(head_dim=32)
    plan = accelpass.calibrate(model, batches(2), [CSKV], progress=False)
    other = {**CSKV, "keep_k": 0.5}
    with pytest.raises(Exception, match="calibrated for rank"):
        fed(torch.compile(model, backend="accelpass", options={"lowering": "eager", "plan": plan, "passes": [other]}),
            KVCache(model, CAPACITY, 2), tokens(2, 9))  # fmt: skip


def test_nothing_to_calibrate():
    with pytest.raises(accelpass.OptionError, match="batches"):
        accelpass.calibrate(llama(), [], [CSKV])
    with pytest.raises(accelpass.OptionError, match="passes"):
        accelpass.calibrate(llama(), batches(1), [])
    torch.manual_seed(0)
    encoder = BertModel(
        BertConfig(vocab_size=32, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
    )
    with pytest.raises(accelpass.CacheError, match="generates nothing"):
        accelpass.calibrate(encoder.eval(), batches(1), [CSKV], progress=False)


@pytest.mark.parametrize(
    ("lengths", "learnt", "compared"),
    [([8, 8, 16, 4, 16], [8, 8, 4], [16, 16]), ([8, 8, 8], [8, 8], [8]), ([8], [8], [8])],
)
def test_what_is_held_back_for_comparison(lengths, learnt, compared):
    batches = [{"input_ids": torch.zeros(1, n)} for n in lengths]
    of = [[b["input_ids"].shape[1] for b in part] for part in parted(batches, [])]
    assert of == [learnt, compared]
    assert parted(batches, batches[:1]) == (batches, batches[:1])
