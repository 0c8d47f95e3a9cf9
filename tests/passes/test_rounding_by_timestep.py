"""Factors and weights for each range of timesteps: vidit_q's earlier variant and the two together, against the paper's formulas."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import accelpass
from accelpass.backends import graphs_of
from accelpass.ir.errors import OptionError, PassError
from accelpass.ir.linear.formats import Int4, Int8
from accelpass.ir.linear.op import linear
from accelpass.ir.linear.spec import LinearSpec, Numbered, WeightFormat
from accelpass.passes.core.plan import Plan
from accelpass.passes.core.registry import make
from accelpass.passes.quantization.int8_dynamic import Int8PerToken
from tests.passes.test_diffusion_rounding import compiled, fq_row_asym, fq_token, viditq_linear
from tests.sweep import examples

EARLIER = {"name": "vidit_q", "boundaries": (500,), "momentum": 0.95, "rotate": False, "strength": 0.89}
"""0.11 of the activation's magnitude."""


class Step(nn.Module):
    """A linear of a denoiser, and the timestep."""

    def __init__(self, width: int = 64, out: int = 24) -> None:
        super().__init__()
        self.mix = nn.Linear(width, out, bias=False)

    def forward(self, hidden_states: Tensor, timestep: Tensor) -> Tensor:
        return self.mix(hidden_states) + 0 * timestep.reshape(-1, 1, 1)


def calls(
    width: int, rng: torch.Generator, times: tuple[int, ...] = (900, 40, 700, 500, 501)
) -> list[dict[str, Tensor]]:
    """Of which channel is large depends on the step."""
    channels = torch.randn(2, width, generator=rng).exp()
    return [
        {
            "hidden_states": torch.randn(2, 5, width, generator=rng) * channels[int(t > 500)],
            "timestep": torch.tensor([t, t]),
        }
        for t in times
    ]


def averages(data: list[dict[str, Tensor]], momentum: float) -> list[Tensor]:
    """A_c of each range: the moving average over calls, begun by the first, of the mean over the batch of the peak over tokens."""
    found: list[Tensor] = []
    for late in (False, True):
        kept: Tensor | None = None
        for call in data:
            if bool(call["timestep"][0] > 500) is late:
                peak = call["hidden_states"].abs().amax(1).mean(0)
                kept = peak if kept is None else momentum * kept + (1 - momentum) * peak
        assert kept is not None
        found.append(kept)
    return found


@settings(max_examples=examples(4), deadline=None)
@given(st.sampled_from([64, 144]), st.sampled_from([4, 8]), st.sampled_from([6, 8]), st.integers(0, 2**16))
def test_the_earlier_variant(width: int, bits: int, tokens: int, seed: int) -> None:
    """s = A^0.11 / Wmax^0.89; x / s by W s, a weight for each range."""
    rng = torch.Generator().manual_seed(seed)
    model, data = Step(width), calls(width, rng)
    plan = accelpass.calibrate(model, data, [EARLIER | {"bits": bits, "activation_bits": tokens}], progress=False)
    fast, w, a = compiled(model, plan=plan), model.mix.weight.detach(), averages(data, 0.95)
    with torch.no_grad():
        for call in calls(width, rng):
            x, late = call["hidden_states"], int(call["timestep"][0] > 500)
            s = a[late].pow(0.11) / w.abs().amax(0).pow(0.89)
            want = F.linear(fq_token(x / s, tokens), fq_row_asym(w * s, bits))
            off = (fast(**call) - want).abs().mean() / want.abs().mean()
            assert off <= 0.02 / 2**tokens * 16 + 1e-5  # a few numbers lie on the edge of two codes


def test_weights_that_are_loaded_anew_are_packed_anew_for_each_range() -> None:
    rng = torch.Generator().manual_seed(5)
    model, data, other = Step(), calls(64, rng), Step()
    plan = accelpass.calibrate(model, data, [EARLIER], progress=False)
    fast = compiled(model, plan=plan)
    with torch.no_grad():
        fast(**data[0])
        model.load_state_dict(other.state_dict())
        for call in data[:2]:
            # Factors are of the plan: they were fitted to the weight that the model had.
            factors = plan.tensors["vidit_q/mix.weight/factors"][int(call["timestep"][0] > 500)]
            want = F.linear(fq_token(call["hidden_states"] / factors, 8), fq_row_asym(other.mix.weight * factors, 8))
            assert (fast(**call) - want).abs().mean() <= 2e-3 * want.abs().mean()


def test_balanced_by_range_and_mixed() -> None:
    """The final variant's factors and rotation, with peaks of the range alone; of a batch with two timesteps the larger tells."""
    rng = torch.Generator().manual_seed(3)
    model, data = Step().eval(), calls(64, rng)
    plan = accelpass.calibrate(model, data, [{"name": "vidit_q", "bits": 4, "boundaries": (500,)}], progress=False)
    assert tuple(plan.tensors["vidit_q/mix.weight/factors"].shape) == (2, 64)
    fast, w = compiled(model, plan=plan), model.mix.weight.detach()
    signs = torch.randint(2, (64,), generator=torch.Generator().manual_seed(0)) * 2.0 - 1
    with torch.no_grad():
        for times in ([500, 3], [3, 501]):
            x, late = data[0]["hidden_states"], max(times) > 500
            seen = [c["hidden_states"].abs().amax((0, 1)) for c in data if bool(c["timestep"][0] > 500) is late]
            want = viditq_linear(x, w, torch.stack(seen).amax(0), 0.5665, signs, 4, 8)
            got = fast(hidden_states=x, timestep=torch.tensor(times))
            assert (got - want).abs().mean() <= 2e-3 * want.abs().mean()


def test_each_range_is_nearer_with_its_own_factors() -> None:
    torch.manual_seed(0)
    model, data = Step(128, 64), calls(128, torch.Generator().manual_seed(0))
    lost = {}
    for boundaries in ((), (500,)):
        given = {"name": "vidit_q", "activation_bits": 4, "strength": 0.3, "rotate": False, "boundaries": boundaries}
        plan = accelpass.calibrate(model, data, [given], progress=False)
        fast = compiled(model, plan=plan)
        with torch.no_grad():
            lost[boundaries] = sum(float((fast(**c) - model(**c)).square().mean()) for c in data)
    assert lost[(500,)] < 0.8 * lost[()]


@settings(max_examples=examples(6), deadline=None)
@given(st.sampled_from([Int8(), Int4(32), Int4(32, False)]), st.booleans(), st.sampled_from([0, 3]), st.integers(0, 99))
def test_a_numbered_weight_is_one_of_the_stack(weight: WeightFormat, rounds: bool, rank: int, seed: int) -> None:
    r = torch.Generator().manual_seed(seed)
    x, stack, number = torch.randn(2, 64, generator=r), torch.randn(3, 5, 64, generator=r), torch.tensor([seed % 3])
    residual = [torch.randn(rank, 64, generator=r), torch.randn(5, rank, generator=r)] if rank else []
    spec = LinearSpec(weight, Int8PerToken() if rounds else None, Numbered(), rank)
    assert LinearSpec.from_json(spec.to_json()) == spec and "numbered()" in spec.shown()
    got = linear(x, [*weight.pack(stack), *residual, number], None, spec.to_json())
    alone = LinearSpec(weight, spec.activation, None, rank)
    want = linear(x, [*weight.pack(stack[seed % 3]), *residual], None, alone.to_json())
    assert torch.equal(got, want)


# --- models ---


@pytest.fixture(scope="module")
def denoiser() -> tuple[nn.Module, list[dict[str, Tensor]]]:
    diffusers = pytest.importorskip("accelpass.models_zoo.tiny_diffusers")
    torch.manual_seed(0)
    model, call = diffusers.build("pixart")
    return model.eval(), [call | {"timestep": torch.full_like(call["timestep"], t)} for t in (900, 600, 300, 20)]


GIVEN = {"name": "vidit_q", "bits": 4, "boundaries": (500,)}


@pytest.mark.slow
@pytest.mark.parametrize("lowering", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_one_graph_serves_all_steps(denoiser: tuple[nn.Module, list[dict[str, Tensor]]], lowering: str) -> None:
    model, data = denoiser
    plan = accelpass.calibrate(model, data, [GIVEN], progress=False)
    fast = compiled(model, plan=plan, lowering=lowering)
    with torch.no_grad():
        for call in data:
            want = model(**call).sample
            assert 0 < (fast(**call).sample - want).norm() < 0.4 * want.norm()
    assert len(graphs_of(model)) == 1
    assert len(accelpass.explain(fast).passes["vidit_q"].took) >= 8


@pytest.mark.slow
@pytest.mark.parametrize("caching", ["delta_cache", "ditfastattn", "tokencache"])
def test_beside_a_step_cache(caching: str) -> None:
    """Each stage of a graph that was cut at its blocks reads the range's weights."""
    from accelpass.testing.subjects import SUBJECTS, Shape
    from tests.pass_settings import setting

    subject, given = SUBJECTS["denoiser"], setting(caching)
    model = subject.build(0)
    call = {"hidden_states": torch.randn(2, 4, 8, 8), "class_labels": torch.arange(2)}
    data = [call | {"timestep": torch.tensor([t, t])} for t in (9.0, 1.0)]
    plan = accelpass.calibrate(model, data, [{"name": "vidit_q", "boundaries": (4,)}], progress=False)

    def run(tensors: dict[str, Tensor], *passes: Any) -> list[Tensor]:
        whole = Plan.of(model, [], tensors | dict(given.tensors))
        fast = compiled(model, plan=whole, passes=list(passes))
        with torch.no_grad():
            made = list(subject.drive(fast, model, Shape()))
        if len(passes) == 2:
            assert accelpass.explain(fast).passes["vidit_q"].took and accelpass.explain(fast).passes[caching].took
        return made

    alone = run({}, {"name": caching, **given.options})
    both = run(plan.tensors, {"name": caching, **given.options}, {"name": "vidit_q", "boundaries": (4,)})
    for a, b in zip(alone, both, strict=True):
        assert 0 < (a - b).norm() <= 0.1 * a.norm()


@pytest.mark.slow
def test_exported(tmp_path: Path) -> None:
    """The file finds the range by itself: it is compared with torch at another timestep than it was traced with."""
    pytest.importorskip("onnxruntime")
    from tests.onnx.files import far, ran

    rng = torch.Generator().manual_seed(1)
    model, data = Step().eval(), calls(64, rng)
    for symmetric in (False, True):  # with symmetric=True weights are in a format that ONNX has a form for
        torch._dynamo.reset()
        given = {"name": "vidit_q", "boundaries": (500,), "symmetric": symmetric}
        plan = accelpass.calibrate(model, data, [given], progress=False)
        report = accelpass.export_onnx(model, (), tmp_path / "m.onnx", plan=plan, kwargs=data[0])
        fast = compiled(model, plan=plan)
        with torch.no_grad():
            for call in data[:2]:
                assert far(ran(report.path, call)[0], fast(**call)) < 1e-2


def test_saved_and_loaded(tmp_path: Path) -> None:
    rng = torch.Generator().manual_seed(2)
    model, data = Step().eval(), calls(64, rng)
    plan = accelpass.calibrate(model, data, [GIVEN], progress=False)
    plan.save(tmp_path / "plan.json")
    torch._dynamo.reset()
    with torch.no_grad():
        want = compiled(model, plan=plan)(**data[0])
        assert torch.equal(compiled(model, plan=Plan.load(tmp_path / "plan.json"))(**data[0]), want)


# --- what is refused ---


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"boundaries": (500, 500)}, "ascending order"),
        ({"boundaries": (500, 100)}, "ascending order"),
        ({"boundaries": (float("nan"), 1.0)}, "ascending order"),
        ({"momentum": 1.0}, "below 1"),
        ({"sites": {"*": {"boundaries": (5,)}}}, "boundaries"),
    ],
)
def test_options(options: dict[str, Any], said: str) -> None:
    with pytest.raises(OptionError, match=said):
        make({"name": "vidit_q", **options})


def test_each_range_needs_data() -> None:
    data = calls(64, torch.Generator().manual_seed(0), (900, 700))
    with pytest.raises(PassError, match="no calibration data has a timestep up to 500"):
        accelpass.calibrate(Step(), data, [GIVEN], progress=False)


class NoStep(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(64, 24, bias=False)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.mix(hidden_states)


def test_calls_without_a_timestep() -> None:
    with pytest.raises(PassError, match="name it as one of timestep"):
        accelpass.calibrate(NoStep(), [{"hidden_states": torch.randn(1, 3, 64)}], [GIVEN], progress=False)


def test_a_plan_of_other_boundaries_or_for_a_graph_without_a_timestep() -> None:
    data = calls(64, torch.Generator().manual_seed(0))
    model = Step()
    plan = accelpass.calibrate(model, data, [GIVEN], progress=False)
    other = compiled(model, plan=Plan.of(model, [make({"name": "vidit_q", "bits": 4})], plan.tensors))
    with torch.no_grad(), pytest.raises(Exception, match=r"PlanError: .*calibrate with the options that you use"):
        other(**data[0])
    blind = NoStep()
    fast = compiled(blind, plan=Plan.of(blind, [make(GIVEN)], plan.tensors))
    with torch.no_grad():
        x = data[0]["hidden_states"]
        assert torch.equal(fast(hidden_states=x), blind(x))
    (why,) = accelpass.explain(fast).passes["vidit_q"].skipped.values()
    assert "no input of this graph tells it" in why
