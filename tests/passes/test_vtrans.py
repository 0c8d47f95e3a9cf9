"""Masks of channels and heads: the card's formulas, what is left of a model by them, and how they are learned."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

import accelpass
from accelpass.api.calibration.tapped_graph import TappedGraph
from accelpass.ir.transform.tap import Tap
from accelpass.models_zoo import small
from accelpass.passes.core.plan import Plan
from accelpass.passes.core.registry import make
from accelpass.passes.pruning.information_bottleneck import Masks, divergence, log_alpha, masked, sparsity
from tests.passes.pruned_truth import llama
from tests.small_models import relative_error
from tests.sweep import examples

pytest.importorskip("transformers")
IDS = torch.arange(24).view(2, 12)


UNITS = ("channels", "heads", "layers", "width")


def plan_of(kv: int, hidden: int, seed: int, width: int = 0, units: Sequence[str] = UNITS[:2]) -> dict[str, Tensor]:
    """Masks of which about half are noise; of layers one in three."""
    draw = torch.Generator().manual_seed(seed)
    made = {}
    every = {"channels": "mlp.act", "heads": "self_attn.heads", "layers": "mlp.out self_attn.out"}
    if width:
        sizes = {"mlp.act": hidden, "self_attn.heads": kv, "mlp.out": 1, "self_attn.out": 1}
        spots = [f"{n}.{at}" for n in (0, 1) for unit in units for at in every.get(unit, "").split()]
        wanted = {s: sizes[s[2:]] for s in spots} | ({"stream": width} if "width" in units else {})
        for spot, size in wanted.items():
            noisy = torch.rand(size, generator=draw) < (0.3 if size == 1 else 0.5)
            noisy[0] &= size == 1
            mean = 1 + 0.3 * torch.randn(size, generator=draw)
            made[f"vtrans/model.layers.{spot}"] = torch.stack([mean, torch.where(noisy, 4.0, -9.0)])
        return made
    for n in (0, 1):
        for at, size in (("mlp.act", hidden), ("self_attn.heads", kv)):
            mean = 1 + 0.3 * torch.randn(size, generator=draw)
            noisy = torch.rand(size, generator=draw) < 0.5
            noisy[0] = False
            made[f"vtrans/model.layers.{n}.{at}"] = torch.stack([mean, torch.where(noisy, 4.0, -9.0)])
    return made


def by_the_card(model: Any, plan: dict[str, Tensor]) -> Any:
    """Masks by hooks: the mean where it outweighs noise, and 0 elsewhere."""
    twin = copy.deepcopy(model)
    for name, (mean, log_variance) in ((k.removeprefix("vtrans/"), t) for k, t in plan.items()):
        path, _, kind = name.rpartition(".")
        keep = (log_variance - torch.log(mean**2 + 1e-8)) < 0
        module = twin.get_submodule(f"{path}.{'down_proj' if kind == 'act' else 'o_proj'}")
        z = (mean * keep).repeat_interleave(module.in_features // len(mean))
        module.register_forward_pre_hook(lambda m, x, z=z: (x[0] * z,))
    return twin


def _kept(norm: Any, x: Tensor, keep: Tensor) -> Tensor:
    """A norm that averages over the channels that are kept; the others stay 0."""
    some = x[..., keep]
    if isinstance(norm, torch.nn.LayerNorm):
        made = torch.nn.functional.layer_norm(some, some.shape[-1:], norm.weight[keep], norm.bias[keep], norm.eps)
    else:
        made = norm.weight[keep] * some * torch.rsqrt(some.square().mean(-1, keepdim=True) + norm.variance_epsilon)
    return torch.zeros_like(x).index_copy(-1, keep.nonzero().flatten(), made)


def whole_by_the_card(
    model: Any, plan: dict[str, Tensor], writers: Sequence[str] = ("mlp.down_proj", "self_attn.o_proj")
) -> Any:
    """As :func:`by_the_card`, with masks of layers and of the stream: of all that is added to it, and of what it begins with."""
    mask = lambda t: t[0] * ((t[1] - torch.log(t[0] ** 2 + 1e-8)) < 0)  # noqa: E731
    parts = {k: t for k, t in plan.items() if not k.endswith((".out", ".stream"))}
    twin = by_the_card(model, parts)
    stack = next(k for k in ("model.layers", "transformer.h") if any(k in n for n, _ in model.named_modules()))
    width = mask(plan[f"vtrans/{stack}.stream"]) if f"vtrans/{stack}.stream" in plan else torch.ones(())
    for path, module in twin.named_modules():
        own = next((w for w in writers if path.endswith(w)), None)
        if own is not None:
            of = path.removesuffix(own) + own.partition(".")[0]
            layer = mask(plan.get(f"vtrans/{of}.out", torch.tensor([[1.0], [-9.0]])))
            module.register_forward_hook(lambda m, x, y, z=layer * width: y * z)
        if width.dim() and (isinstance(module, torch.nn.LayerNorm) or hasattr(module, "variance_epsilon")):
            module.register_forward_hook(lambda m, x, y: _kept(m, x[0], width != 0))
        if isinstance(module, torch.nn.Embedding):
            module.register_forward_hook(lambda m, x, y: y * width)
    return twin


def compiled(model: Any, *passes: Any, plan: Any = None, **options: Any) -> Any:
    torch._dynamo.reset()
    asked = {"passes": list(passes), "plan": plan, "lowering": "eager", **options}
    return torch.compile(model, backend="accelpass", options=asked)


@settings(max_examples=examples(2), deadline=None)
@given(seed=st.integers(0, 99), kv=st.integers(2, 4), groups=st.integers(1, 2), hidden=st.integers(5, 20))
def test_what_is_left_is_the_masked_model(seed: int, kv: int, groups: int, hidden: int):
    model, tensors = llama(seed, kv, groups, hidden), plan_of(kv, hidden, seed)
    asked = {"name": "vtrans", "multiple": 1}
    fast = compiled(model, asked, plan=Plan.of(model, [asked], tensors))
    with torch.no_grad():
        want = by_the_card(model, tensors)(IDS, use_cache=False).logits
        assert relative_error(fast(IDS, use_cache=False).logits, want) < 1e-4
    took = accelpass.explain(fast).passes["vtrans"].took
    for n in (0, 1):
        kept = int((log_alpha(*tensors[f"vtrans/model.layers.{n}.mlp.act"]) < 0).sum())
        done = took[f"model.layers.{n}.mlp"]
        assert (
            {s.path.split(".")[-2]: s.after for s in done.shrunk} == {}
            if kept == hidden
            else done.bytes_after * hidden == (done.bytes_before * kept)
        )


@settings(max_examples=examples(3), deadline=None)
@given(
    seed=st.integers(0, 999),
    units=st.sets(st.sampled_from(UNITS), min_size=1).map(lambda s: tuple(sorted(s))),
    kv=st.integers(2, 3),
    groups=st.integers(1, 2),
    hidden=st.integers(5, 20),
)
@example(seed=0, units=UNITS, kv=2, groups=2, hidden=12)
@example(seed=0, units=("channels", "heads", "width"), kv=2, groups=2, hidden=64)
@example(seed=0, units=("channels", "heads", "layers"), kv=2, groups=1, hidden=14)  # both parts of the last layer go
def test_width_layers_and_units_together_are_the_masked_model(
    seed: int, units: tuple[str, ...], kv: int, groups: int, hidden: int
):
    model, tensors = llama(seed, kv, groups, hidden), plan_of(kv, hidden, seed, 96, units)
    asked = {"name": "vtrans", "multiple": 1, "units": units}
    fast = compiled(model, asked, plan=Plan.of(model, [asked], tensors))
    with torch.no_grad():
        want = whole_by_the_card(model, tensors)(IDS, use_cache=False).logits
        assert relative_error(fast(IDS, use_cache=False).logits, want) < 1e-4
    report = accelpass.explain(fast).passes["vtrans"]
    assert not report.skipped
    if "width" in units:
        kept = int((log_alpha(*tensors["vtrans/model.layers.stream"]) < 0).sum())
        after = {s.path: s.after for s in report.took["model.layers.stream"].shrunk}
        assert after["model.embed_tokens.weight"] == (64, kept) and after["model.norm.weight"] == (kept,)
    if "layers" in units:
        gone = [n for n, t in tensors.items() if n.endswith(".out") and log_alpha(*t) >= 0]
        assert sorted(gone) == sorted(f"vtrans/{n}" for n, done in report.took.items() if done.what == "left out")


def refused(model: Any, name: str, width: int) -> str:
    """What is said of the width of a model's stream."""
    tensors = {f"vtrans/{name}": torch.stack([torch.ones(width), torch.where(torch.arange(width) % 2 < 1, -9.0, 4.0)])}
    asked = {"name": "vtrans", "units": ("width",)}
    fast = compiled(model, asked, plan=Plan.of(model, [asked], tensors))
    with torch.no_grad():
        for got, want in zip(fast(IDS).to_tuple(), model(IDS).to_tuple(), strict=True):
            if isinstance(got, Tensor):
                assert relative_error(got, want) < 1e-4, "the model is as it was"
    found = accelpass.explain(fast).passes["vtrans"]
    assert not found.took
    return str(found.skipped[name])


def test_a_width_that_cannot_be_cut_is_refused_by_name():
    assert "normalise the stream itself" in refused(small.encoder(layers=1), "encoder.layer.stream", 32)
    assert "the graph returns it" in refused(small.decoder(layers=1).model, "layers.stream", 32)


@pytest.mark.parametrize("units", [UNITS, ("width",)])
def test_sizes_are_products_of_what_stays(units: tuple[str, ...]):
    """A short training: masks of all kinds move, and weights are counted once."""
    model = small.decoder(0, layers=1)
    asked = {"name": "vtrans", "units": units, "epochs": 1, "rate": 0.05, "multiple": 1}
    plan = accelpass.calibrate(model, [IDS], [asked], progress=False)
    at = {"stream": 32, "0.mlp.act": 64, "0.self_attn.heads": 2, "0.mlp.out": 1, "0.self_attn.out": 1}
    assert {n.removeprefix("vtrans/model.layers."): t.shape[1] for n, t in plan.tensors.items()} == (
        at if units == UNITS else {"stream": 32}
    )
    assert all((t[0] - 1).abs().max() > 0.03 for t in plan.tensors.values()), "all masks learn"


def test_masks_of_one_leave_the_model_as_it_is():
    model = small.decoder(0)
    ones = {k: torch.stack([torch.ones_like(t[0]), torch.full_like(t[1], -9.0)]) for k, t in plan_of(2, 64, 0).items()}
    fast = compiled(model, "vtrans", plan=Plan.of(model, ["vtrans"], ones))
    with torch.no_grad():
        assert relative_error(fast(IDS, use_cache=False).logits, model(IDS, use_cache=False).logits) < 1e-5


def test_kept_channels_fill_up_a_multiple_by_their_signal_and_weights_are_packed_after():
    model, tensors = small.decoder(0), plan_of(2, 64, 3)
    for n in (0, 1):  # 22 of 64 are kept by the rule
        tensors[f"vtrans/model.layers.{n}.mlp.act"][1] = torch.where(torch.arange(64) % 3 == 0, -9.0, 4.0)
    asked = {"name": "vtrans", "multiple": 32}
    fast = compiled(model, asked, {"name": "int4_weights", "group_size": 32}, plan=Plan.of(model, [asked], tensors))
    with torch.no_grad():
        cache = accelpass.KVCache(model, 32, batch_size=2)
        for part in IDS.split(6, 1):
            assert torch.isfinite(fast(part, past_key_values=cache).logits).all()
    sizes = {s.path: s.after for d in accelpass.explain(fast).passes["vtrans"].took.values() for s in d.shrunk}
    assert sizes["model.layers.0.mlp.down_proj.weight"] == (32, 32)


def test_formulas_are_the_cards():
    mean, log_variance = 1 + 0.3 * torch.randn(7), torch.tensor([-9.0, 2, 0, 1, -2, 3, -1])
    variance = log_variance.exp()
    assert torch.allclose(divergence(mean, log_variance), 0.5 * torch.log(1 + mean**2 / (variance + 1e-8)).sum())
    keep = log_alpha(mean, log_variance) < 0
    assert torch.equal(keep, mean**2 + 1e-8 > variance), "the mean outweighs the noise"
    soft = torch.sigmoid(-10 * log_alpha(mean, log_variance))
    masks = Masks(mean, log_variance, 4, 30, 1.0)
    other = Masks.fresh(5, 1, 7, 1.0, torch.Generator())
    assert torch.allclose(sparsity({"a": masks, "b": other}), 1 - (30 * soft.sum() + 35) / (210 + 35), atol=1e-4)
    half = Masks(torch.ones(4), torch.tensor([-9.0, -9, 9, 9]), 1, 0, 30.0)
    both = Masks(mean, log_variance, 4, 30, 1.0, (half, half))
    assert torch.allclose(sparsity({"a": both, "b": half}), 1 - 30 * soft.sum() / 4 / 210, atol=1e-4), "shares multiply"
    x = torch.randn(6, 28)
    many = torch.stack([masked(x, *masks.vectors(), widths=[4]) for _ in range(2000)])
    assert relative_error(many.mean(0), x * mean.repeat_interleave(4)) < 0.2
    units = (many / x).view(2000, 6, 7, 4)
    assert torch.allclose(units[..., 0], units[..., 3], atol=1e-3), "the channels of a unit share a draw"
    assert torch.allclose(units[..., 0].var(dim=(0, 1)), variance, rtol=0.1)


def test_losses_have_the_gradients_of_an_eager_model():
    model = small.decoder(0)
    z = (1 + 0.1 * torch.randn(64)).requires_grad_()
    graph = TappedGraph(
        model,
        lambda program: [Tap("model.layers.1.mlp.act", lambda x, z: x * z, "replace", written=1)],
        lambda: {"model.layers.1.mlp.act": z * 1.0},
        "test",
    )
    twin = copy.deepcopy(model)
    twin.model.layers[1].mlp.down_proj.register_forward_pre_hook(lambda m, x: (x[0] * z,))
    with torch.enable_grad():
        (found,) = torch.autograd.grad(graph(input_ids=IDS, use_cache=False).logits.square().mean(), [z])
        (want,) = torch.autograd.grad(twin(IDS, use_cache=False).logits.square().mean(), [z])
    graph.close()
    assert relative_error(found, want) < 1e-4
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.slow
def test_training_reaches_its_size_and_beats_chance(monkeypatch: pytest.MonkeyPatch):
    def nearer(units: int, width: int, weights: int, multiplier: float, draw: torch.Generator) -> Masks:
        """From the authors' start, with next to no noise, thousands of steps are needed."""
        mean, log_variance = torch.ones(units), torch.full((units,), -1.0)
        return Masks(mean.requires_grad_(), log_variance.requires_grad_(), width, weights, multiplier)

    monkeypatch.setattr(Masks, "fresh", nearer)
    model = small.decoder(2)
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        text = model.generate(torch.randint(0, 64, (8, 2), generator=draw), max_new_tokens=14, do_sample=False)
    asked = {"name": "vtrans", "sparsity": 0.4, "epochs": 60, "rate": 0.05, "multiple": 1}
    plan = accelpass.calibrate(model, list(text.split(2)), [asked], progress=False, validation=[text])
    fast = compiled(model, plan=plan)

    def loss(logits: Tensor) -> float:
        return float(torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), text[:, 1:].flatten()))

    with torch.no_grad():
        mine = loss(fast(text, use_cache=False).logits)
        took = accelpass.explain(fast).passes["vtrans"].took.values()
        before, after = (sum(getattr(d, n) for d in took) for n in ("bytes_before", "bytes_after"))
        assert 0.2 < 1 - after / before < 0.6
        chance = []
        for seed in range(3):
            drawn = torch.Generator().manual_seed(seed)
            other = {}
            for name, (mean, log_variance) in plan.tensors.items():
                kept = (log_alpha(mean, log_variance) < 0)[torch.randperm(len(mean), generator=drawn)]
                other[name] = torch.stack([torch.ones_like(mean), torch.where(kept, -9.0, 9.0)])
            chance.append(loss(by_the_card(model, other)(text, use_cache=False).logits))
    assert mine < min(chance)


def test_what_does_not_fit_says_so():
    for bad, match in (
        ({"sparsity": 1.0}, "between 0 and 1"),
        ({"epochs": 0}, "1 or more"),
        ({"rate": -1.0}, "above 0"),
        ({"units": ("rows",)}, "some of channels, heads, layers, width"),
    ):
        with pytest.raises(accelpass.OptionError, match=match):
            make({"name": "vtrans", **bad})
    model = small.decoder(0)
    with pytest.raises(Exception, match="which has 64 units"), torch.no_grad():
        compiled(model, "vtrans", plan=Plan.of(model, ["vtrans"], plan_of(2, 63, 0)))(IDS, use_cache=False)
    fast = compiled(model, "vtrans")
    with torch.no_grad():
        fast(IDS, use_cache=False)
    assert "the plan has no masks of it" in str(accelpass.explain(fast).passes["vtrans"].skipped)
