"""int8_static: rounding and products against plain integers, ranges from data, and what it makes of a model compiled and exported."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import accelpass
from accelpass.ir.linear.formats import Int8
from accelpass.ir.linear.op import linear
from accelpass.ir.linear.spec import LinearSpec
from accelpass.passes.quantization.int8_static import Int8Static
from tests.sweep import examples

SPEC = LinearSpec(Int8(), Int8Static())


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.gate, self.down = nn.Linear(64, 32), nn.Linear(64, 32), nn.Linear(32, 64)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.up(x)) * self.gate(x))


@pytest.fixture(scope="module")
def two() -> Two:
    torch.manual_seed(0)
    return Two().eval()


def data(count: int = 3, size: float = 1.0) -> list[dict[str, Tensor]]:
    draw = torch.Generator().manual_seed(0)
    return [{"x": size * torch.randn(2, 20, 64, generator=draw)} for _ in range(count)]


def compiled(model: nn.Module, **options: object):
    torch._dynamo.reset()
    return torch.compile(model, backend="accelpass", options={"lowering": "eager", **options})


def oracle(x: Tensor, w: Tensor, most: float) -> Tensor:
    """Jacob et al., section 2.1 with zero points of 0, in Python's integers."""
    step, out = most / 127, torch.empty(len(x), len(w))
    for i, token in enumerate(x.tolist()):
        codes = [max(-128, min(127, round(v / step))) for v in token]
        for j, row in enumerate(w.tolist()):
            size = max(map(abs, row)) / 127
            out[i, j] = sum(c * round(v / size) for c, v in zip(codes, row, strict=True)) * step * size
    return out


@settings(max_examples=examples(12), deadline=None)
@given(st.integers(1, 9), st.integers(1, 7), st.integers(1, 40), st.floats(0.3, 4), st.integers(0, 2**31))
def test_against_integers(rows, out, width, most, seed) -> None:
    r = torch.Generator().manual_seed(seed)
    x, w = torch.randn(rows, width, generator=r), torch.randn(out, width, generator=r)
    step = torch.full((out,), most / 127)
    got = linear(x, [*Int8().pack(w), step], None, SPEC.to_json())
    want = oracle(x, w, most)
    one_code = most * w.abs().amax() / 127  # one number may lie on the edge of two codes
    assert ((got - want).abs() <= one_code + 1e-5).all() and (got - want).abs().mean() <= 0.1 * one_code + 1e-5


def test_codes_stay_inside_the_range_and_nan_shows() -> None:
    x = torch.tensor([[1.0, -300.0, 0.5], [float("nan"), 1.0, 1.0]])
    codes, scale = Int8Static().encode(x, torch.full((2,), 1 / 127))
    assert codes.tolist() == [[127, -128, 64], [0, 127, 127]]
    assert scale[0].isfinite().all() and scale[1].isnan().all()
    codes, scale = Int8Static().encode(torch.zeros(1, 3), torch.zeros(2))
    assert not codes.any() and not scale.any()  # a channel that was dead in all data


def test_ranges_are_those_of_the_data(two: Two) -> None:
    batches = data()
    plan = accelpass.calibrate(two, batches, ["int8_static"], progress=False)
    most = torch.stack([b["x"].abs().amax() for b in batches]).amax()
    assert plan.tensors["int8_static/up.weight/range"] == most == plan.tensors["int8_static/gate.weight/range"]
    fast, x = compiled(two, plan=plan), batches[0]["x"]
    with torch.no_grad():
        got, want = fast(x), two(x)
        hidden = torch.relu(two.up(x)) * two.gate(x)
    assert 0 < (got - want).abs().max() <= 0.03 * want.abs().max()
    made = accelpass.explain(fast).passes["int8_static"]
    assert set(made.took) == {"up", "gate", "down"}
    assert plan.tensors["int8_static/down.weight/range"] >= hidden.abs().amax() * 0.99


@pytest.mark.parametrize("lowering", ["aten", "eager"])
def test_what_lies_outside_is_clipped(two: Two, lowering: str) -> None:
    plan = accelpass.calibrate(two, data(), ["int8_static"], progress=False)
    fast, x = compiled(two, plan=plan, lowering=lowering), 50 * data(1)[0]["x"]
    most = plan.tensors["int8_static/up.weight/range"]
    with torch.no_grad():
        inside = compiled(two, plan=plan, lowering=lowering)(x.clamp(-most * 128 / 127, most)) - x.clamp(
            -most * 128 / 127, most
        )
        torch.testing.assert_close(fast(x) - x, inside, rtol=1e-3, atol=1e-3)


def test_without_data_inputs_are_rounded_as_they_come(two: Two) -> None:
    x = data(1)[0]["x"]
    fast = compiled(two, passes=["int8_static"])
    with torch.no_grad():
        got = fast(x)
        assert "every input is rounded as it comes" in accelpass.explain(fast).passes["int8_static"].skipped["(model)"]
        assert torch.equal(got, compiled(two, passes=["int8_dynamic"])(x))


def test_joined_linears_give_the_same(two: Two) -> None:
    """horizontal_fusion joins those that read one input, their steps with them."""
    plan, x = accelpass.calibrate(two, data(), ["int8_static"], progress=False), data(1)[0]["x"]
    with torch.no_grad():
        want = compiled(two, plan=plan, passes=[])(x)
        fast = compiled(two, plan=plan, passes=["horizontal_fusion"])
        torch.testing.assert_close(fast(x), want, rtol=1e-4, atol=1e-5)
    assert accelpass.explain(fast).passes["horizontal_fusion"].took


def test_onnx_has_the_standards_pair(two: Two, tmp_path: Path) -> None:
    plan = accelpass.calibrate(two, data(), ["int8_static"], progress=False)
    report = accelpass.export_onnx(two, (data(1)[0]["x"],), tmp_path / "two.onnx", plan=plan)
    kinds = [n.op_type for n in onnx.load(tmp_path / "two.onnx").graph.node]
    assert kinds.count("QuantizeLinear") == 2  # once for both that read the input
    assert kinds.count("DequantizeLinear") == 2 + 3
    assert report.difference is not None and report.difference < 0.02


def test_data_that_are_not_finite_are_named(two: Two) -> None:
    broken = data(1)
    broken[0]["x"][0, 0, 0] = float("nan")
    with pytest.raises(accelpass.PassError, match=r"the inputs of (up|gate)\.weight are not finite"):
        accelpass.calibrate(two, broken, ["int8_static"], progress=False)
