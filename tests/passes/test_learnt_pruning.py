"""Passes that prune by what a model computes on data: wanda's rows and ShortGPT's layers, against their oracles."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import accelpass
from accelpass.ir.errors import OptionError, PassError
from accelpass.passes.core.plan import Plan
from accelpass.passes.core.registry import make
from accelpass.passes.structure.shortgpt import INFLUENCE, ShortGpt
from tests.passes.pruned_truth import best, llama, per_group, smaller
from tests.passes.test_structured_pruning import compiled, ids, logits
from tests.small_models import relative_error
from tests.sweep import examples

TOLERANCE = 1e-4


def data(seed: int = 0, lengths: tuple[int, ...] = (8, 8, 11)) -> list[Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return [torch.randint(0, 64, (2, n), generator=draw) for n in lengths]


@torch.no_grad()
def inputs(model: Any, modules: list[str], batches: list[Tensor]) -> dict[str, Tensor]:
    """All that some modules are given, ``(tokens, width)``, by hooks on the model itself."""
    found: dict[str, list[Tensor]] = {m: [] for m in modules}
    twin = copy.deepcopy(model)
    for m in modules:
        keep = found[m].append
        twin.get_submodule(m).register_forward_pre_hook(lambda _, given, keep=keep: keep(given[0].flatten(0, 1)))
    for batch in batches:
        twin(batch, use_cache=False)
    return {m: torch.cat(seen) for m, seen in found.items()}


def by_wanda(model: Any, batches: list[Tensor], channels: int, groups: int) -> Any:
    """The oracle: columns of the reading weight, each times the norm of the input that it meets."""
    kept_channels, kept_groups = [], []
    for number, layer in enumerate(model.model.layers):
        read = [f"model.layers.{number}.{m}" for m in ("mlp.down_proj", "self_attn.o_proj")]
        norms = [x.norm(dim=0) for x in inputs(model, read, batches).values()]
        kept_channels.append(best((layer.mlp.down_proj.weight.abs() * norms[0]).sum(0), channels))
        scores = per_group(layer.self_attn.o_proj.weight.abs() * norms[1], model.config.num_key_value_heads, 1)
        kept_groups.append(best(scores.sum(1), groups))
    return smaller(model, kept_channels, kept_groups)


@pytest.mark.slow
@settings(max_examples=examples(1), deadline=None)
@given(kv=st.integers(2, 4), per=st.integers(1, 2), seed=st.integers(0, 9))
def test_wanda_keeps_the_rows_of_its_rule(kv: int, per: int, seed: int):
    model, batches, given = llama(seed, kv, per, 48), data(seed), ids(2, seed)
    wanda = {"name": "wanda", "channels": 0.5, "heads": 0.5, "multiple": 8}
    plan = accelpass.calibrate(model, batches, [wanda], progress=False)
    found = logits(compiled(model, plan=plan), model, given)
    with torch.no_grad():
        assert relative_error(found, by_wanda(model, batches, 24, kv - round(kv / 2))(given).logits) < TOLERANCE


def test_wanda_without_a_plan_says_what_to_do_and_prunes_nothing():
    model, given = llama(0, layers=1), ids()
    fast = compiled(model, "wanda")
    with torch.no_grad():
        assert relative_error(fast(given, use_cache=False).logits, model(given).logits) < 1e-6
    skipped = accelpass.explain(fast).passes["wanda"].skipped
    assert "accelpass.calibrate(model, batches, passes=['wanda'])" in skipped["model.layers.0.mlp"]


def test_a_plan_of_another_model_is_refused():
    plan = accelpass.calibrate(llama(0, layers=1), data()[:1], ["wanda"], progress=False)
    other = llama(0, hidden=32, layers=1)
    with pytest.raises(Exception, match="belongs to another model"), torch.no_grad():
        compiled(other, plan=plan)(ids(), use_cache=False)


@pytest.mark.slow
def test_a_calibrated_model_is_saved_and_loaded_with_its_plan(tmp_path: Any):
    model, given = llama(0, layers=1), ids()
    wanda = {"name": "wanda", "channels": 0.5, "heads": 0.5}
    plan = accelpass.calibrate(model, data()[:1], [wanda], progress=False)
    fast = compiled(model, "int8_weights", plan=plan)
    with torch.no_grad():
        wanted = fast(given, use_cache=False).logits
        accelpass.save(fast, tmp_path)
        torch._dynamo.reset()
        again = accelpass.load(llama(3, layers=1), tmp_path, plan=plan)
        assert relative_error(again(given, use_cache=False).logits, wanted) < 1e-6


def test_padding_is_not_taken_for_data():
    batch = {"input_ids": data()[0], "attention_mask": torch.tensor([[0, *[1] * 7], [1] * 8])}
    with pytest.raises(OptionError, match="padding"):
        accelpass.calibrate(llama(0, layers=1), [batch], ["wanda"], progress=False)


def test_a_model_without_attention_is_calibrated_too():
    model = nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 8)).eval()
    x = torch.randn(4, 8)
    plan = accelpass.calibrate(model, [{"input": x}], [{"name": "wanda", "channels": 0.5}], progress=False)
    kept = best((model[2].weight.abs() * model[1](model[0](x)).norm(dim=0)).sum(0), 16)
    mask = torch.zeros(32)
    mask[kept] = 1
    with torch.no_grad():
        wanted = F.linear(model[1](model[0](x)) * mask, model[2].weight, model[2].bias)
        assert relative_error(compiled(model, plan=plan)(x), wanted) < TOLERANCE


def influence(model: Any, batches: list[Tensor]) -> Tensor:
    """1 minus the mean cosine of the stream before and after each layer."""
    count = len(model.model.layers)
    names = [f"model.layers.{n}.input_layernorm" for n in range(count)] + ["model.norm"]
    streams = list(inputs(model, names, batches).values())
    each = [F.cosine_similarity(a, b, dim=-1).mean() for a, b in itertools.pairwise(streams)]
    return 1 - torch.stack(each)


@pytest.mark.slow
def test_shortgpt_takes_out_the_layers_that_change_the_stream_least():
    model, batches, given = llama(2, layers=4), data(), ids(2)
    plan = accelpass.calibrate(model, batches, [{"name": "shortgpt", "remove": 2}], progress=False)
    wanted = influence(model, batches)
    torch.testing.assert_close(plan.tensors[INFLUENCE], wanted, atol=1e-5, rtol=1e-4)
    out = set((wanted[1:].argsort()[:2] + 1).tolist())
    twin = copy.deepcopy(model)
    twin.model.layers = nn.ModuleList(layer for n, layer in enumerate(twin.model.layers) if n not in out)
    twin.config.num_hidden_layers = 2
    fast = compiled(model, plan=plan)
    with torch.no_grad():
        assert relative_error(logits(fast, model, given), twin(given, use_cache=False).logits) < TOLERANCE
    report = accelpass.explain(fast)
    assert set(report.passes["shortgpt"].took) == {f"model.layers.{n}" for n in out}
    assert report.weight_bytes[1] < 0.62 * report.weight_bytes[0]


def test_shortgpt_without_a_plan_or_with_nothing_to_remove_leaves_the_model_as_it_is():
    model, given = llama(0), ids()
    for options, why in (({"remove": 1}, "no block influence"), ({}, "remove=0")):
        fast = compiled(model, {"name": "shortgpt", **options})
        with torch.no_grad():
            assert relative_error(fast(given, use_cache=False).logits, model(given).logits) < 1e-6
        assert why in str(accelpass.explain(fast).passes["shortgpt"].skipped)


def test_a_model_without_a_stack_of_layers_has_none_to_take_out():
    model = nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 8)).eval()
    with pytest.raises(PassError, match="no blocks were recognised"):
        accelpass.calibrate(model, [{"input": torch.randn(4, 8)}], ["shortgpt"], progress=False)


def test_shortgpt_checks_how_many_layers_there_are():
    with pytest.raises(OptionError, match="from 0"):
        make({"name": "shortgpt", "remove": -1})
    with pytest.raises(OptionError, match="at most 1 of 2 layers"):
        ShortGpt(remove=2).least(torch.tensor([0.5, 0.4]), 2)
    with pytest.raises(PassError, match="for 3 layers, and this graph has 2"):
        ShortGpt(remove=1).least(torch.rand(3), 2)
    assert ShortGpt(remove=2).least(torch.tensor([0.0, 0.4, 0.3, 0.4]), 4) == [1, 2]


def test_a_plan_is_kept_in_a_file(tmp_path: Any):
    plan = accelpass.calibrate(llama(0, layers=1), data()[:1], ["wanda"], progress=False)
    plan.save(tmp_path / "plan.json")
    again = Plan.load(tmp_path / "plan.json")
    assert again.tensors.keys() == plan.tensors.keys() and again.passes() == plan.passes()
