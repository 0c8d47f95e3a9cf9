"""Tokens brought together by expert, against the method card's oracle and transformers' own loop."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import accelpass
from accelpass.ir.errors import OptionError
from accelpass.ir.linear.experts import expert_linear
from accelpass.models_zoo import small
from accelpass.passes.core.registry import make
from tests.small_models import relative_error
from tests.sweep import examples, sweep

IDS = torch.arange(24).view(2, 12)


class Mixture(nn.Module):
    """Experts as transformers writes them in batched products."""

    def __init__(self, experts: int, k: int, width: int = 8, hidden: int = 12) -> None:
        super().__init__()
        self.k, self.gate = k, nn.Linear(width, experts, bias=False)
        self.up = nn.Parameter(torch.randn(experts, hidden, width))
        self.down = nn.Parameter(torch.randn(experts, width, hidden))

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        gates, chosen = self.gate(x).softmax(-1).topk(self.k, -1)
        return gates / gates.sum(-1, keepdim=True), chosen

    def forward(self, x: Tensor) -> Tensor:
        gates, chosen = self.route(x)
        ids = chosen.reshape(-1)
        rows = torch.bmm(self.up[ids], x.repeat_interleave(self.k, 0).unsqueeze(-1)).squeeze(-1).relu()
        rows = torch.bmm(self.down[ids], rows.unsqueeze(-1)).squeeze(-1) * gates.reshape(-1).unsqueeze(-1)
        return rows.view(len(x), self.k, -1).sum(1)


def slots(chosen: Tensor, experts: int) -> Tensor:
    """The card's: where each choice stands in its expert."""
    base, out = torch.zeros(experts, dtype=torch.long), []
    for rank in range(chosen.shape[1]):
        mine = F.one_hot(chosen[:, rank], experts)
        out.append(((mine.cumsum(0) - 1 + base) * mine).sum(1))
        base = base + mine.sum(0)
    return torch.stack(out, 1)


def encoded(model: Mixture, x: Tensor, factor: float) -> Tensor:
    """The card's: tokens in a buffer (experts, capacity, width), and back."""
    gates, chosen = model.route(x)
    experts, places = len(model.up), slots(chosen, len(model.up))
    capacity = int(places.max()) + 1 if factor == 0 else model.k * int(factor * -(-len(x) // experts))
    buffer, fits = x.new_zeros(experts, capacity, x.shape[1]), places < capacity
    token = torch.arange(len(x))[:, None].expand_as(chosen)
    buffer[chosen[fits], places[fits]] = x[token[fits]]
    y = (buffer @ model.up.transpose(1, 2)).relu() @ model.down.transpose(1, 2)
    if not capacity:
        return torch.zeros_like(x)
    return (y[chosen, places.clamp(max=capacity - 1)] * (gates * fits)[..., None]).sum(1)


def compiled(model: Any, *passes: Any, **options: Any) -> Any:
    torch._dynamo.reset()
    return torch.compile(model, backend="accelpass", options={"passes": list(passes), "lowering": "eager", **options})


@settings(max_examples=examples(5), deadline=None)
@given(
    tokens=st.integers(2, 40),
    experts=st.integers(2, 6),
    k=st.integers(1, 2),
    factor=st.sampled_from([0.0, 0.5, 1.0, 2.0]),
    seed=st.integers(0, 9),
)
def test_results_are_those_of_slots(tokens: int, experts: int, k: int, factor: float, seed: int):
    torch.manual_seed(seed)
    model, x = Mixture(experts, k).eval(), torch.randn(tokens, 8)
    fast = compiled(model, {"name": "tutel_moe", "capacity_factor": factor})
    with torch.no_grad():
        found, want = fast(x), encoded(model, x, factor)
        assert torch.allclose(found, want, atol=1e-4)
        if factor == 0:
            assert torch.allclose(found, model(x), atol=1e-4)
            order = torch.randperm(tokens)
            assert torch.allclose(fast(x[order]), found[order], atol=1e-4), "no token depends on the others"
    assert len(accelpass.explain(fast).passes["tutel_moe"].took) == 1


@pytest.mark.parametrize("transposed", [False, True])
def test_a_row_without_an_expert_is_zero(transposed: bool):
    torch.manual_seed(0)
    weight, x, ids = torch.randn(3, 5, 4), torch.randn(6, 4), torch.tensor([2, 0, 3, 2, 7, 0])
    found = expert_linear(x, ids, [weight.transpose(1, 2).contiguous() if transposed else weight], "", transposed)
    want = torch.stack([weight[i] @ row if i < 3 else torch.zeros(5) for row, i in zip(x, ids.tolist(), strict=True)])
    assert torch.allclose(found, want, atol=1e-5)
    torch.library.opcheck(expert_linear, (x, ids, [weight], "", False), test_utils=("test_schema", "test_faketensor"))


def test_a_mixtral_is_one_graph_and_equals_its_loop():
    model = small.experts(layers=1, form="eager")
    with torch.no_grad():
        want = model(IDS, use_cache=False).logits
        model.set_experts_implementation("batched_mm")
        fast = compiled(model, "tutel_moe")
        for ids in (IDS, IDS[:, :7]):
            assert relative_error(fast(ids, use_cache=False).logits, want[:, : ids.shape[1]]) < 1e-4
    report = accelpass.explain(fast).passes["tutel_moe"]
    assert list(report.took) == ["model.layers.0.mlp.experts"]
    assert "4 experts, 2 products by expert" in str(report.took)


@pytest.mark.parametrize("form", sweep("batched_mm", "grouped_mm"))
def test_packed_experts_are_multiplied_as_they_are(form: str):
    model = small.experts(layers=1, form=form)
    alone, both = compiled(model, "int8_weights"), None
    with torch.no_grad():
        want = alone(IDS, use_cache=False).logits
        both = compiled(model, "int8_weights", "tutel_moe")
        found = both(IDS, use_cache=False).logits
        assert relative_error(found, want) < 1e-4 < relative_error(found, model(IDS, use_cache=False).logits)
    report = accelpass.explain(both)
    assert "model.layers.0.mlp.experts.gate_up_proj" in report.passes["int8_weights"].took
    assert len(report.passes["tutel_moe"].took) == 1


@pytest.mark.slow
def test_groups_of_floats_are_left_as_they_are():
    fast = compiled(small.experts(layers=1, form="grouped_mm"), "tutel_moe")
    with torch.no_grad():
        fast(IDS, use_cache=False)
    assert "brought together by expert already" in str(accelpass.explain(fast).passes["tutel_moe"].skipped)


@pytest.mark.slow
def test_a_loop_is_refused_with_the_remedy():
    fast = compiled(small.experts(layers=1, form="eager"), "tutel_moe")
    with torch.no_grad():
        fast(IDS, use_cache=False)
    report = accelpass.explain(fast).passes["tutel_moe"]
    assert not report.took and "set_experts_implementation('batched_mm')" in str(report.skipped)


def test_options_are_checked():
    with pytest.raises(OptionError, match="capacity_factor=-1"):
        make({"name": "tutel_moe", "capacity_factor": -1.0})
