"""Experts that layers share, joined once, and models whose routers are widened for it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import accelpass
from accelpass.api.growing.widening import candidates_at
from accelpass.ir.core.graph import aten
from accelpass.models_zoo import small
from tests.small_models import relative_error
from tests.sweep import examples

IDS = torch.arange(24).view(2, 12)


def rex(x: Tensor, router: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """As the card has it: all experts on all tokens, and the gates' choice."""
    scores = (x @ router.T).softmax(-1)
    gates, chosen = scores.topk(2, -1)
    y = torch.einsum("edh,teh->ted", down, torch.einsum("ehd,td->teh", up, x).relu())
    return (y.gather(1, chosen[..., None].expand(-1, -1, x.shape[1])) * gates[..., None]).sum(1)


def compiled(model: Any, *passes: Any, **options: Any) -> Any:
    torch._dynamo.reset()
    return torch.compile(model, backend="accelpass", options={"passes": list(passes), "lowering": "eager", **options})


@settings(max_examples=examples(3), deadline=None)
@given(seed=st.integers(0, 9), tokens=st.integers(1, 9))
def test_results_are_those_of_the_pool(seed: int, tokens: int):
    model, ids = small.pooled(seed), torch.randint(0, 128, (2, tokens))
    with torch.no_grad():
        x = model.embed(ids).flatten(0, 1)
        for router in model.routers:
            x = x + rex(x, router.weight, torch.cat([*model.up]), torch.cat([*model.down]))
        assert relative_error(compiled(model, "expert_pool")(ids).flatten(0, 1), x) < 1e-4


def test_one_stack_for_all_layers_follows_its_weights_and_is_packed_once():
    model = small.pooled(0)
    fast = compiled(model, "expert_pool", "int8_weights", "tutel_moe")
    with torch.no_grad():
        found = fast(IDS)
        assert 0 < relative_error(found, model(IDS)) < 0.05
        model.load_state_dict(small.pooled(1).state_dict())
        assert relative_error(fast(IDS), small.pooled(1)(IDS)) < 0.05
    passes = accelpass.explain(fast).passes
    assert "6 experts of 2 layers in one stack" in str(passes["expert_pool"].took)
    packed = [done for done in passes["int8_weights"].took.values() if done.what.count("x") == 2]
    assert sorted({done.what for done in packed}) == ["6x32x48 int8", "6x48x32 int8"]
    assert len(passes["tutel_moe"].took) == 2


def test_an_exported_graph_joins_nothing_at_run_time():
    from accelpass.backends.export.capture import bound, captured
    from accelpass.passes.core.base import Record
    from accelpass.passes.core.registry import make

    model = small.pooled(0)
    program = captured(model, bound(model, (IDS,), {}), None).program
    joins = [n for n in program.graph.nodes if n.target is aten.cat.default]
    make("expert_pool").apply(program, Record("expert_pool"))
    program.graph.eliminate_dead_code()
    left = [n for n in program.graph.nodes if n.target is aten.cat.default]
    assert (len(joins), len(left)) == (4, 0)
    pools = {n for n in program.graph.nodes if "pool" in str(n.target) and n.op == "get_attr"}
    assert len(pools) == 2, "both layers read one stack for each matrix"


def test_a_widened_model_is_the_same_until_more_may_be_chosen():
    pytest.importorskip("transformers")
    model = small.experts(layers=3, form="eager")
    before = {id(p) for n, p in model.named_parameters() if "experts" in n}
    with torch.no_grad():
        want = model(IDS, use_cache=False).logits
        assert accelpass.rex_widen(model, 2) == [f"model.layers.{n}.mlp" for n in range(3)]
        assert relative_error(model(IDS, use_cache=False).logits, want) < 1e-5
        assert [len(layer.mlp.weight) for layer in model.model.layers] == [8, 8, 4]
        assert {id(p) for n, p in model.named_parameters() if "proj" in n and "mlp" in n} == before, (
            "no expert is copied"
        )
        fast = compiled(model, "expert_pool", "tutel_moe")
        assert relative_error(fast(IDS, use_cache=False).logits, want) < 1e-4
        model.model.layers[0].mlp.candidates.fill_(True)
        model.model.layers[0].mlp.weight[4:].normal_()
        assert relative_error(model(IDS, use_cache=False).logits, want) > 1e-2
        assert relative_error(fast(IDS, use_cache=False).logits, model(IDS, use_cache=False).logits) < 1e-4
    assert len(accelpass.explain(fast).passes["tutel_moe"].took) >= 2


def test_the_schedule_widens_the_choice():
    assert [candidates_at(t, 10, 30, 4, 8) for t in (0, 10, 20, 30, 31)] == [4, 4, 6, 8, 8]


def test_what_cannot_be_widened_says_so():
    with pytest.raises(accelpass.AccelpassError, match="layers=1 shares nothing"):
        accelpass.rex_widen(small.pooled(), 1)
    with pytest.raises(accelpass.AccelpassError, match="0 blocks of Mixtral's form"):
        accelpass.rex_widen(small.pooled(), 2)
    fast = compiled(small.tiny_lm(), "expert_pool")
    with torch.no_grad():
        fast(IDS)
    assert "no layer joins" in str(accelpass.explain(fast).passes["expert_pool"].skipped)
