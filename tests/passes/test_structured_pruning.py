"""Pruned channels and heads: the model that is left is the smaller model, which computes and stores less."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import DynamicCache, StaticCache

import accelpass
from accelpass import KVCache
from accelpass.ir.errors import OptionError
from accelpass.passes.core.registry import make
from accelpass.testing.subjects import subject
from tests.passes.pruned_truth import best, llama, per_group, smaller
from tests.small_models import relative_error
from tests.sweep import examples, quick

PROMPT, ANSWER = 6, 2
MAGNITUDE = {"name": "magnitude_prune", "channels": 0.5, "heads": 0.5}
TOLERANCE = 1e-4


def compiled(model: Any, *passes: Any, **options: Any) -> Any:
    torch._dynamo.reset()
    return torch.compile(model, backend="accelpass", options={"passes": list(passes), "lowering": "eager", **options})


def ids(batch: int = 1, seed: int = 0) -> Tensor:
    return torch.randint(0, 64, (batch, PROMPT + ANSWER), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def logits(fast: Any, model: Any, given: Tensor) -> Tensor:
    """Of a prompt and of the tokens after it, one by one."""
    cache = KVCache(model, 16, batch_size=len(given))
    made = [fast(given[:, :PROMPT], past_key_values=cache).logits]
    made += [fast(given[:, at : at + 1], past_key_values=cache).logits for at in range(PROMPT, given.shape[1])]
    return torch.cat(made, 1)


def by_magnitude(model: Any, channels: int, groups: int) -> Any:
    """The oracle: the sum of the absolute weights of each channel, and of each group of heads."""
    kept_channels, kept_groups = [], []
    count = model.config.num_key_value_heads
    for layer in model.model.layers:
        mlp, attention = layer.mlp, layer.self_attn
        total = mlp.gate_proj.weight.abs().sum(1) + mlp.up_proj.weight.abs().sum(1) + mlp.down_proj.weight.abs().sum(0)
        sums = per_group(attention.o_proj.weight, count, 1).abs().sum(1)
        for linear in (attention.q_proj, attention.k_proj, attention.v_proj):
            sums = sums + per_group(linear.weight, count, 0).abs().sum(1)
            if linear.bias is not None:
                sums = sums + per_group(linear.bias, count, 0).abs().sum(1)
        if mlp.gate_proj.bias is not None:
            total = total + mlp.gate_proj.bias.abs() + mlp.up_proj.bias.abs()
        kept_channels.append(best(total, channels))
        kept_groups.append(best(sums, groups))
    return smaller(model, kept_channels, kept_groups)


@pytest.mark.slow
@settings(max_examples=examples(2), deadline=None)
@given(
    kv=st.integers(2, 4), per=st.integers(1, 2), hidden=st.sampled_from([32, 48]), share=st.sampled_from([0.25, 0.5]),
    bias=st.booleans(), seed=st.integers(0, 9),
)  # fmt: skip
def test_the_model_that_is_left_is_the_smaller_model(
    kv: int, per: int, hidden: int, share: float, bias: bool, seed: int
):
    model, given = llama(seed, kv, per, hidden, bias=bias), ids(2, seed)
    fast = compiled(model, {"name": "magnitude_prune", "channels": share, "heads": share, "multiple": 8})
    twin = by_magnitude(model, round(hidden * (1 - share) / 8) * 8, kv - round(kv * share))
    found = logits(fast, model, given)
    with torch.no_grad():
        assert relative_error(found, twin(given).logits) < TOLERANCE
    report = accelpass.explain(fast)
    assert report.weight_bytes[1] == sum(p.numel() * p.element_size() for p in twin.parameters()) + 4 * 4  # rotary


@pytest.mark.parametrize("family", ["prompt", "encoder"])
def test_nothing_taken_out_is_the_dense_model(family: str):
    of = subject(family)
    model = of.build(0)
    fast = compiled(model, {"name": "magnitude_prune", "channels": 0.0, "heads": 0.0})
    args, kwargs = of.export(of.shapes[0])
    with torch.no_grad():
        assert relative_error(fast(*args, **kwargs)[0], model(*args, **kwargs)[0]) < 1e-6
    skipped = accelpass.explain(fast).passes["magnitude_prune"].skipped
    assert skipped and set(skipped.values()) == {"nothing is to be taken out here"}


COMBINED = {
    "int8_weights": [{"name": "int8_weights"}],
    "int4_weights": [{"name": "int4_weights", "group_size": 32}],
    "h2o": [{"name": "h2o", "budget": 0.5}],
    "int8_weights, h2o": [{"name": "int8_weights"}, {"name": "h2o", "budget": 0.5}],
}


@pytest.mark.slow
@pytest.mark.parametrize("which", quick(list(COMBINED), "int8_weights, h2o"))
def test_with_other_passes_it_is_the_smaller_model_with_these(which: str):
    model, given = llama(1, layers=1), ids(2)
    found = logits(compiled(model, MAGNITUDE, *COMBINED[which]), model, given)
    twin = by_magnitude(model, 32, 1)
    wanted = logits(compiled(twin, *COMBINED[which]), twin, given)
    assert relative_error(found, wanted) < TOLERANCE
    with torch.no_grad():
        assert relative_error(wanted, twin(given).logits) > 10 * TOLERANCE  # the others did their work


def test_what_is_kept_follows_weights_that_are_loaded_or_swapped():
    model, other, given = llama(0), llama(1), ids()
    fast = compiled(model, MAGNITUDE)
    with torch.no_grad():
        for state in (model.state_dict(), other.state_dict()):
            model.load_state_dict(copy.deepcopy(state))
            assert (
                relative_error(fast(given, use_cache=False).logits, by_magnitude(model, 32, 1)(given).logits)
                < TOLERANCE
            )
        layer = model.model.layers[0].mlp
        layer.down_proj.weight = torch.nn.Parameter(torch.randn_like(layer.down_proj.weight))
        assert relative_error(fast(given, use_cache=False).logits, by_magnitude(model, 32, 1)(given).logits) < TOLERANCE


def test_a_pruned_model_is_saved_and_loaded_and_its_floats_can_go(tmp_path: Any):
    model, given = llama(0), ids()
    wanted = by_magnitude(model, 32, 1)(given).logits
    fast = compiled(model, MAGNITUDE, free_weights=True)
    with torch.no_grad():
        assert relative_error(fast(given, use_cache=False).logits, wanted) < TOLERANCE
        memory = accelpass.explain(fast).memory
        assert (
            memory["released"] == sum(p.numel() * 4 for n, p in model.named_parameters() if "_proj" in n)
            and memory["derived"] == memory["released"] // 2
        )
        accelpass.save(fast, tmp_path)
        torch._dynamo.reset()
        again = accelpass.load(llama(7), tmp_path)
        assert relative_error(again(given, use_cache=False).logits, wanted) < TOLERANCE


@pytest.mark.slow
def test_onnx_has_the_smaller_weights(tmp_path: Any):
    onnx, runtime = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    model, given = llama(0, hidden=48), ids()
    accelpass.export_onnx(model, (given,), tmp_path / "pruned.onnx", passes=[MAGNITUDE])
    session = runtime.InferenceSession(str(tmp_path / "pruned.onnx"), providers=["CPUExecutionProvider"])
    (made, *_) = session.run(None, {session.get_inputs()[0].name: given.numpy()})
    assert relative_error(torch.from_numpy(made), by_magnitude(model, 32, 1)(given).logits) < TOLERANCE
    shapes = {tuple(t.dims) for t in onnx.load(str(tmp_path / "pruned.onnx")).graph.initializer}
    assert not shapes & {(96, 48), (48, 96)} and shapes >= {(96, 32), (32, 96), (96, 16), (16, 96), (96, 8)}


def test_a_cache_that_is_the_callers_keeps_its_heads():
    model, given = llama(0), ids()
    fast = compiled(model, MAGNITUDE)
    with torch.no_grad():
        for cache in (DynamicCache(), StaticCache(config=model.config, max_cache_len=16)):
            torch._dynamo.reset()
            fast(given, past_key_values=cache)
            report = accelpass.explain(fast).passes["magnitude_prune"]
            assert all("self_attn" in site for site in report.skipped)
            assert all("the graph returns it" in why or "the caller's" in why for why in report.skipped.values())


def test_sites_that_the_user_names_stay():
    model, given = llama(0), ids()
    fast = compiled(model, {**MAGNITUDE, "exclude": ["model.layers.0.*"], "sites": {"*.1.mlp": {"channels": 0.25}}})
    with torch.no_grad():
        fast(given, use_cache=False)
    report = accelpass.explain(fast).passes["magnitude_prune"]
    assert report.took["model.layers.1.mlp"].what == "48 of 64 channels"
    assert report.took["model.layers.1.self_attn"].what == "2 of 4 heads (1 of 2 groups that share keys and values)"
    assert set(report.skipped) == {"model.layers.0.mlp", "model.layers.0.self_attn"}


def test_one_head_of_keys_cannot_be_shared_out():
    model, given = llama(0, kv_heads=1, groups=2), ids()
    fast = compiled(model, MAGNITUDE)
    with torch.no_grad():
        fast(given, use_cache=False)
    skipped = accelpass.explain(fast).passes["magnitude_prune"].skipped
    assert skipped["model.layers.0.self_attn"] == "there is one head"


def test_a_model_without_anything_to_prune_says_so():
    fast = compiled(torch.nn.Linear(4, 4).eval(), MAGNITUDE)
    with torch.no_grad():
        fast(torch.randn(2, 4))
    (why,) = accelpass.explain(fast).passes["magnitude_prune"].skipped.values()
    assert why == "no MLP and no attention was recognised in this graph"


@pytest.mark.parametrize(
    ("given", "error"),
    [
        ({"channels": 1.0}, "a share from 0 to below 1"),
        ({"heads": -0.1}, "a share from 0 to below 1"),
        ({"multiple": 0}, "at least 1"),
        ({"sites": {"*": {"heads": 2.0}}}, "a share from 0 to below 1"),
    ],
)
def test_options_are_checked(given: dict[str, Any], error: str):
    with pytest.raises(OptionError, match=error):
        make({"name": "magnitude_prune", **given})


def test_the_report_of_what_shrank():
    model, given = llama(0), ids()
    fast = compiled(
        model, MAGNITUDE, {"name": "skip_layers", "layers": [1]}, {"name": "int8_weights", "exclude": ["*.o_proj"]}
    )
    with torch.no_grad():
        fast(given, use_cache=False)
    report = accelpass.shrink_report(fast)
    assert report.bytes == (3 * 36864, 3 * 18432) and report.gone == {"skip_layers": ("model.layers.1",)}
    assert "  96x64 -> 96x32  model.layers.0.mlp.down_proj.weight" in str(report).splitlines()
    taken = accelpass.explain(fast).passes["int8_weights"]  # a smaller weight has its own name still
    assert "model.layers.0.mlp.down_proj" in taken.took and "model.layers.0.self_attn.o_proj" in taken.skipped
    plain = compiled(model, "int8_weights")
    with torch.no_grad():
        plain(given, use_cache=False)
    assert str(accelpass.shrink_report(plain)) == "nothing was made smaller"
