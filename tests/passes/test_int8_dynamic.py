"""int8_dynamic: rounding and products against plain integers, its sites, and what it makes of a model compiled and exported."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import accelpass
from accelpass.backends import graphs_of
from accelpass.backends.compile import rewriting
from accelpass.backends.compile.lowering import lower
from accelpass.backends.kernels.cpu import linear as linear_cpu
from accelpass.backends.onnx import runtime
from accelpass.backends.onnx.translation import activations
from accelpass.ir.linear.formats import Int8
from accelpass.ir.linear.op import linear
from accelpass.ir.linear.spec import LinearSpec
from accelpass.passes.quantization.int8_dynamic import Int8PerToken
from tests.onnx.files import far, ran
from tests.small_models import relative_error, tiny_lm


def compiled(model: nn.Module, *passes, **options):
    options = {"lowering": "eager", "passes": list(passes) or ["int8_dynamic"], **options}
    return torch.compile(model, backend="accelpass", options=options, dynamic=False)


def oracle(x: Tensor, w: Tensor, bias: Tensor | None) -> Tensor:
    """Row by row in Python's integers: ZeroQuant's token-wise rounding, sums as Jacob et al. have them."""
    out = torch.empty(len(x), len(w))
    for i, token in enumerate(x.tolist()):
        step = max(map(abs, token)) / 127
        codes = [round(v / step) if step else 0 for v in token]
        for j, row in enumerate(w.tolist()):
            size = max(map(abs, row)) / 127
            total = sum(c * (round(v / size) if size else 0) for c, v in zip(codes, row, strict=True))
            out[i, j] = total * step * size
    return out if bias is None else out + bias


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 12), st.integers(1, 7), st.integers(1, 40), st.booleans(), st.integers(0, 2**31))
def test_against_integers(rows, out, width, biased, seed):
    r = torch.Generator().manual_seed(seed)
    x, w = torch.randn(rows, width, generator=r), torch.randn(out, width, generator=r)
    x[:1] = 0
    bias = torch.randn(out, generator=r) if biased else None
    near(linear(x, Int8().pack(w), bias, LinearSpec(Int8(), Int8PerToken()).to_json()), oracle(x, w, bias), x, w)


@pytest.mark.parametrize("integers", [True, False])
@pytest.mark.parametrize(("rows", "out", "width"), [(1, 3, 40), (5, 7, 33), (20, 2, 1), (20, 6, 40)])
def test_lowered_against_integers(rows, out, width, integers, monkeypatch):
    torch.manual_seed(rows)
    if not integers:
        monkeypatch.setattr(linear_cpu, "multiplies_integers", lambda: False)
    elif not linear_cpu.multiplies_integers():
        pytest.skip("this CPU has no VNNI")
    layer, x = nn.Linear(width, out).eval(), torch.randn(rows, width)
    with torch.no_grad():
        near(compiled(layer, lowering="aten")(x), oracle(x, layer.weight, layer.bias), x, layer.weight)


def near(got: Tensor, want: Tensor, x: Tensor, w: Tensor) -> None:
    """One value in each product may be rounded to the other side of a half than the oracle does, which adds in float64."""
    assert got.shape == want.shape
    one_code = x.abs().amax(-1, keepdim=True) * w.abs().amax() / 127
    assert ((got - want).abs() <= one_code + 1e-5).all()
    assert not want.numel() or (got - want).abs().mean() <= 1e-3 * want.abs().max() + 1e-6


def test_sums_are_exact():
    """Wider than float32 can add products of eight bits without rounding."""
    torch.manual_seed(0)
    codes, q = (torch.randint(90, 128, (n, 5000), dtype=torch.int8) for n in (20, 9))
    codes[:, 0], q[:, 0] = 127, 127  # so that a scale of 1 is found for each row
    layer = nn.Linear(5000, 9, bias=False).eval()
    with torch.no_grad():
        layer.weight.copy_(q)
        want = (codes.long() @ q.long().t()).float()
        assert want.min() > 2**24
        for how in ("eager", "aten") if linear_cpu.multiplies_integers() else ("eager",):
            torch._dynamo.reset()
            assert torch.equal(compiled(layer, lowering=how)(codes.float()), want)


def test_not_a_number_shows():
    codes, scale = Int8PerToken().encode(torch.tensor([[1.0, float("nan")], [2.0, 1.0]]))
    product = Int8().multiply(codes, Int8().pack(torch.ones(3, 2))) * scale
    assert product[0].isnan().all() and product[1].isfinite().all()


def test_many_rows_are_multiplied_as_integers_and_inputs_rounded_once(monkeypatch):
    """Two that are not fused, as one has a bias: their input is rounded once. A few rows stream the weight."""
    lowered = []
    monkeypatch.setattr(rewriting, "lower", lambda program: (lower(program), lowered.append(str(program.graph))))
    model = Two().eval()
    for rows, products in ((16, 2), (1, 0)):
        fast = compiled(model, {"name": "int8_dynamic"}, lowering="aten")
        with torch.no_grad():
            fast(torch.randn(rows, 64))
        assert lowered[-1].count("aten._int_mm") == products * linear_cpu.multiplies_integers()
        assert lowered[-1].count("aten.amax") == 1


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k = nn.Linear(64, 32), nn.Linear(64, 32, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.q(x) * self.k(x)


def test_sites():
    """The tied table is looked up as int8; experts in one product are left, and said to be."""

    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lm, self.experts = tiny_lm(), nn.Parameter(torch.randn(3, 128, 16))

        def forward(self, ids: Tensor) -> Tensor:
            return torch.bmm(self.lm(ids).expand(3, -1, -1), self.experts)

    model, ids = Mixed().eval(), torch.arange(12)[None]
    with torch.no_grad():
        got, want = compiled(model)(ids), model(ids)
    (record,) = (r for r in graphs_of(model)[-1].report.records if r.name == "int8_dynamic")
    assert len(record.took) == 8 and list(record.skipped) == ["experts"]
    assert "whose input is not rounded; int8_weights packs its weight" in record.skipped["experts"]
    assert 0 < relative_error(got, want) < 0.05


def test_fused_and_beside_int4():
    model, ids = tiny_lm(), torch.arange(12)[None]
    passes = (
        {"name": "int8_dynamic", "exclude": ["down_proj"]},
        {"name": "int4_weights", "group_size": 32},
        "horizontal_fusion",
    )
    with torch.no_grad():
        assert relative_error(compiled(model, *passes)(ids), model(ids)) < 0.3
    took = {r.name: set(r.took) for r in graphs_of(model)[-1].report.records}
    assert took["int4_weights"] == {f"layers.{i}.down_proj" for i in range(2)} and len(took["int8_dynamic"]) == 6
    assert took["horizontal_fusion"] == {f"layers.{i}.{{gate_proj,up_proj}}" for i in range(2)}


def test_saved_and_loaded(tmp_path: Path):
    """The packed form is int8_weights', and the input's rounding has nothing to save."""
    model, ids = tiny_lm(0), torch.arange(12)[None]
    fast = accelpass.compile(model, ["int8_dynamic"], lowering="eager")
    with torch.no_grad():
        want = fast(ids)
        accelpass.save(fast, tmp_path)
        torch._dynamo.reset()
        assert torch.equal(accelpass.load(tiny_lm(1), tmp_path)(ids), want)


def test_exported(tmp_path: Path):
    """Plain operators of ONNX: the product is MatMulInteger, and weights are integers in the file."""
    model, dynamic = Two().eval(), {"x": {0: "rows"}}
    report = accelpass.export_onnx(
        model, (torch.randn(5, 64),), tmp_path / "m.onnx", ["int8_dynamic"], dynamic_shapes=dynamic
    )
    assert report.files[0].operators["MatMulInteger"] == 2 and "MatMul" not in report.files[0].operators
    assert report.weights_after < report.weights_before * 0.3
    x = torch.randn(9, 64)
    with torch.no_grad():
        want = compiled(model)(x)
    # A code that falls on the other side of a half is 1/127 of a row's largest value, in one of 64 channels.
    assert far(ran(report.path, {"x": x})[0], want) < 1e-2


def test_a_file_may_differ_by_what_rounding_of_inputs_does(tmp_path, monkeypatch):
    """A number near a half may be rounded to either side by a runtime that adds in another order: no fault of the file."""
    seen, allowed, ids = [], [], torch.arange(4)[None]
    effect, difference = activations.effect_of_rounding, runtime.difference
    monkeypatch.setattr(activations, "effect_of_rounding", lambda made: seen.append(effect(made)) or seen[-1])
    monkeypatch.setattr(runtime, "difference", lambda *a: allowed.append(a[-1]) or difference(*a))
    accelpass.export_onnx(tiny_lm(), (ids,), tmp_path / "m.onnx", ["int8_dynamic"])
    torch._dynamo.reset()
    model = tiny_lm()
    with torch.no_grad():
        rounded, plain = (compiled(model, name)(ids).clone() for name in ("int8_dynamic", "int8_weights"))
    assert seen == [pytest.approx(float((rounded - plain).abs().max() / plain.abs().max()), rel=0.05)]
    assert allowed == [max(seen[0], runtime.TOLERANCE)] and seen[0] > runtime.TOLERANCE


def test_static_ranges_are_for_what_no_pass_rounds(tmp_path: Path):
    with pytest.raises(accelpass.ExportError, match="int8_dynamic rounds already"):
        accelpass.export_onnx(
            tiny_lm(), (torch.arange(4)[None],), tmp_path / "m.onnx", ["int8_dynamic"], activations="qdq"
        )
