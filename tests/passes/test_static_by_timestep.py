"""Static ranges of inputs by timestep, and inputs in fewer bits: int8_static and mixdq against the rounding written out."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import accelpass
from accelpass.backends import graphs_of
from accelpass.ir.errors import OptionError, PassError, PlanError
from accelpass.passes.core.registry import make
from tests.passes.test_rounding_by_timestep import Step, calls
from tests.sweep import examples


def compiled(model: nn.Module, **options: object):
    torch._dynamo.reset()
    return torch.compile(model, backend="accelpass", options={"lowering": "eager", **options})


def rounded(x: Tensor, step: Tensor | float, bits: int) -> Tensor:
    """Symmetric, clipped to the codes of so many bits."""
    most = 2 ** (bits - 1) - 1
    return (x / step).round().clamp(-most - 1, most) * step


def rows(w: Tensor, bits: int) -> Tensor:
    return rounded(w, w.abs().amax(1, keepdim=True) / (2 ** (bits - 1) - 1), bits)


@settings(max_examples=examples(4), deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([(500,), (100, 700)]), st.sampled_from([4, 8]))
def test_each_range_of_timesteps_has_its_own_step(seed: int, boundaries: tuple[int, ...], bits: int) -> None:
    """The largest magnitude of the data of a range; what is beyond it is clipped in that range alone. One packed weight."""
    rng = torch.Generator().manual_seed(seed)
    model, data = Step().eval(), calls(64, rng, (900, 40, 700, 500, 501, 130))
    asked = {"name": "mixdq", "activation_bits": bits, "boundaries": boundaries}
    plan = accelpass.calibrate(model, data, [asked], progress=False)
    number = lambda call: sum(int(call["timestep"].max()) > b for b in boundaries)  # noqa: E731
    peaks = [
        max(float(c["hidden_states"].abs().max()) for c in data if number(c) == n) for n in range(len(boundaries) + 1)
    ]
    torch.testing.assert_close(plan.tensors["mixdq/mix.weight/range"], torch.tensor(peaks))
    fast, w = compiled(model, plan=plan), rows(model.mix.weight.detach(), 8)
    with torch.no_grad():
        for call in calls(64, rng):
            step = peaks[number(call)] / (2 ** (bits - 1) - 1)
            want = F.linear(rounded(call["hidden_states"], step, bits), w)
            assert (fast(**call) - want).abs().mean() <= 2e-3 * want.abs().mean()
    (graph,) = graphs_of(fast)
    done = next(r.took["mix"] for r in graph.report.records if r.name == "mixdq")
    assert done.bytes_after <= 64 * 24 + 4 * 24


def test_nearer_than_one_range_of_all_and_exported(tmp_path: Path) -> None:
    """Inputs of late steps are tiny beside early ones; in ONNX the step is chosen by the timestep, too."""
    rng = torch.Generator().manual_seed(1)
    model, data = Step().eval(), calls(64, rng)
    for call in data:
        call["hidden_states"] *= 1.0 if int(call["timestep"][0]) > 500 else 0.02
    errors, plans = {}, {}
    for boundaries in ((), (500,)):
        plan = plans[boundaries] = accelpass.calibrate(
            model, data, [{"name": "int8_static", "boundaries": boundaries}], progress=False
        )
        with torch.no_grad():
            fast, call = compiled(model, plan=plan), data[1]
            errors[boundaries] = float((fast(**call) - model(**call)).abs().mean())
    assert errors[(500,)] < 0.1 * errors[()]
    report = accelpass.export_onnx(model, (), tmp_path / "step.onnx", kwargs=data[1], plan=plans[(500,)])
    assert report.difference is not None and report.difference < 0.02


def test_refused() -> None:
    rng = torch.Generator().manual_seed(0)
    model, data = Step().eval(), calls(64, rng)
    with pytest.raises(PassError, match=r"int8_static: no calibration data has a timestep above 950"):
        accelpass.calibrate(model, data, [{"name": "int8_static", "boundaries": (500, 950)}], progress=False)
    for options, why in (
        ({"name": "int8_static", "boundaries": (5, 5)}, "ascending"),
        ({"name": "mixdq", "activation_bits": 3}, "4 or 8"),
    ):
        with pytest.raises(OptionError, match=why):
            make(options)
    plan = accelpass.calibrate(model, data, [{"name": "int8_static", "boundaries": (500,)}], progress=False)
    other = make({"name": "int8_static", "boundaries": (400,)})
    with (
        pytest.raises((PlanError, torch._dynamo.exc.BackendCompilerFailed), match=r"boundaries=\(500.0,\)"),
        torch.no_grad(),
    ):
        compiled(model, passes=[other], plan=plan)(**data[0])
    timeless = Timeless().eval()
    timeless.load_state_dict(model.state_dict())
    fast = compiled(timeless, plan=plan)
    with torch.no_grad():
        assert torch.equal(fast(data[0]["hidden_states"]), timeless(data[0]["hidden_states"]))
    assert "no input of this graph tells it" in accelpass.explain(fast).passes["int8_static"].skipped["mix"]


class Timeless(Step):
    """The same linear in a graph without a timestep."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.mix(hidden_states)
