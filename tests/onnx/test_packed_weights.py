"""Packed weights in a file: the pass's integers, in the types that they were packed for, and the numbers that they stand for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import nn

import accelpass
from accelpass.backends.onnx.translation.packed_weights import _nibbles
from tests.onnx.files import dtypes, eager, far, ran, stored
from tests.packing import dequantize_int4, pack_int4, pack_int8
from tests.small_models import tiny_lm
from tests.sweep import sweep

INT8: list[Any] = ["int8_weights"]
INT4: list[Any] = [{"name": "int4_weights", "group_size": 32}]
ZERO: list[Any] = [{"name": "int4_weights", "group_size": 32, "symmetric": False}]
DYNAMIC = {"ids": {0: "batch", 1: "tokens"}}


def export(path: Path, passes: list[Any], **options: Any) -> Any:
    return accelpass.export_onnx(
        tiny_lm(), (torch.arange(10).view(2, 5),), path, passes, dynamic_shapes=DYNAMIC, **options
    )


@pytest.mark.parametrize(
    ("passes", "contrib", "types", "operators"),
    [
        (INT8, False, {"INT8", "FLOAT"}, {"DequantizeLinear": 7, "MatMul": 7}),
        pytest.param(INT8, True, {"UINT8", "FLOAT"}, {"com.microsoft.MatMulNBits": 14}, marks=pytest.mark.slow),
        pytest.param(INT4, False, {"INT4", "UINT8", "FLOAT"}, {"DequantizeLinear": 7}, marks=pytest.mark.slow),
        (ZERO, True, {"UINT8", "FLOAT"}, {"com.microsoft.MatMulNBits": 7}),
        pytest.param(ZERO, False, {"UINT4", "UINT8", "FLOAT"}, {"DequantizeLinear": 7}, marks=pytest.mark.slow),
        pytest.param(INT4, True, {"UINT8", "FLOAT"}, {"com.microsoft.MatMulNBits": 7}, marks=pytest.mark.slow),
    ],
)
def test_a_tied_model(tmp_path: Path, passes: list, contrib: bool, types: set, operators: dict) -> None:
    """Look-up and output head share a weight; batch and length are free."""
    report = export(tmp_path / "m.onnx", passes, contrib=contrib)
    assert dtypes(report.path) == types
    found = report.files[0].operators
    assert {name: found.get(name, 0) for name in operators} == operators
    assert report.took() == {passes[0] if isinstance(passes[0], str) else "int4_weights": 8}
    # Codes, scales, norms: a float copy of any weight would not fit.
    assert report.weights_after < report.weights_before * (0.35 if passes is INT8 else 0.25)
    graph = onnx.load(report.path).graph
    shapes = [[d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim] for v in (*graph.input, *graph.output)]
    assert shapes == [["batch", "tokens"], ["batch", "tokens", 128]]
    ids = torch.randint(0, 128, (3, 9), generator=torch.Generator().manual_seed(1))
    want = eager(tiny_lm(), passes, ids)
    assert far(ran(report.path, {"ids": ids})[0], want) < 1e-4


def test_sites_that_are_left_alone(tmp_path: Path) -> None:
    site = "layers.0.gate_proj"
    report = export(tmp_path / "m.onnx", INT8, skip_sites={"int8_weights": [site]}, verify=False)
    (records,) = report.records.values()
    assert records[0].skipped[site] == "named in skip_sites" and site not in records[0].took


class Wide(nn.Module):
    """One linear, of a width that no block of 128 divides."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up = nn.Linear(96, 40)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.up(x)


def test_the_integers_are_those_of_the_pass(tmp_path: Path) -> None:
    model = Wide().eval()
    x = torch.randn(4, 96)
    accelpass.export_onnx(model, (x,), tmp_path / "8.onnx", INT8)
    q, scale = pack_int8(model.up.weight.detach())
    found = stored(tmp_path / "8.onnx")
    codes = next(a for a in found.values() if a.dtype == np.int8)
    assert np.array_equal(codes, q.numpy())
    assert any(np.array_equal(a.ravel(), scale.numpy()) for a in found.values())

    accelpass.export_onnx(model, (x,), tmp_path / "4.onnx", ZERO)
    q, scale, zero = pack_int4(model.up.weight.detach(), 32, False)
    arrays = [a.astype(np.int32) for a in stored(tmp_path / "4.onnx").values() if a.dtype.name == "uint4"]
    assert {a.shape for a in arrays} == {(40, 96), (40, 3)}
    assert all(np.array_equal(a, _nibbles(q.numpy(), 32) if a.shape[1] == 96 else zero.int().numpy()) for a in arrays)
    (got,) = ran(tmp_path / "4.onnx", {"x": x})
    want = torch.nn.functional.linear(x, dequantize_int4(q, scale, zero, 32, torch.float32), model.up.bias)
    assert far(got, want.detach()) < 1e-5


@pytest.mark.parametrize("contrib", sweep(False, True))
def test_onnx_runtime_rounds_activations_if_it_may(tmp_path: Path, contrib: bool) -> None:
    """At its default settings ONNX Runtime computes what the file says, unless the caller lets it round."""
    model, x = Wide().eval(), torch.randn(4, 96)
    want = eager(model, INT8, x)
    report = accelpass.export_onnx(model, (x,), tmp_path / "m.onnx", INT8, contrib=contrib)
    assert far(ran(report.path, {"x": x}, optimised=True)[0], want) < 1e-5 and not report.notes
    report = accelpass.export_onnx(model, (x,), tmp_path / "m.onnx", INT8, contrib=contrib, activations="int8")
    off = far(ran(report.path, {"x": x}, optimised=True)[0], want)
    assert 1e-4 < off < 0.05
    # Of other values than x, which the rounding moves by about as much.
    said, _, far_off = report.notes[0].rpartition(" and differs by ")
    assert said == "ONNX Runtime at its default settings rounds activations," and off / 3 < float(far_off) < off * 3


class Experts(nn.Module):
    """A batched product with a stack of weights, as mixtures of experts have it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up = nn.Parameter(torch.randn(3, 32, 64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.bmm(x, self.up.transpose(1, 2))


@pytest.mark.parametrize("passes", sweep(INT8, INT4, ZERO))
def test_experts(tmp_path: Path, passes: list) -> None:
    report = accelpass.export_onnx(Experts().eval(), (torch.randn(3, 4, 64),), tmp_path / "m.onnx", passes)
    assert sum(report.took().values()) == 1
    assert dtypes(report.path) & {"INT8", "INT4", "UINT4"} and report.weights_after < report.weights_before / 2


def test_half_precision_stays(tmp_path: Path) -> None:
    model, x = Wide().eval().half(), torch.randn(4, 96).half()
    report = accelpass.export_onnx(model, (x,), tmp_path / "m.onnx", INT8, verify=False)
    (got,) = ran(report.path, {"x": x})
    assert got.dtype == torch.float16
    q, scale = pack_int8(model.up.weight.detach())
    want = (torch.nn.functional.linear(x.float(), q.float()) * scale + model.up.bias.float()).half()
    assert far(got, want.detach()) < 2e-3


def test_weights_in_a_file_of_their_own(tmp_path: Path) -> None:
    model, x = Wide().eval(), torch.randn(4, 96)
    report = accelpass.export_onnx(model, (x,), tmp_path / "m.onnx", INT8, external_data=True)
    assert report.data == tmp_path / "m.onnx.data" and report.data.stat().st_size >= 96 * 40
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m.onnx", "m.onnx.data"]
    assert report.bytes == sum(p.stat().st_size for p in tmp_path.iterdir())
    assert far(ran(report.path, {"x": x})[0], eager(model, INT8, x)) < 1e-4


def test_weights_beyond_the_limit_of_protobuf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("accelpass.backends.onnx.files.LIMIT", 1000)
    report = accelpass.export_onnx(Wide().eval(), (torch.randn(4, 96),), tmp_path / "m.onnx")
    assert report.data is not None and report.data.stat().st_size >= 96 * 40 * 4
    assert report.files[0].bytes < 4000
