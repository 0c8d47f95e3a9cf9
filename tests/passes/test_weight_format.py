"""Weights in int3, fp8, mxfp4 and nvfp4 against number systems written out one number at a time."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import accelpass
from accelpass.backends import graphs_of
from accelpass.ir.linear.floats import FP8, MXFP4, NVFP4, fp4_codes, fp4_values
from accelpass.ir.linear.formats import Int3
from accelpass.ir.linear.spec import WeightFormat
from accelpass.passes.core.options import parse
from tests.small_models import relative_error

FP4 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
FORMATS: dict[str, WeightFormat] = {"int3": Int3(32), "fp8": FP8(), "mxfp4": MXFP4(), "nvfp4": NVFP4()}
BITS = {"int3": 3 + 32 / 32, "fp8": 8.0, "mxfp4": 4 + 8 / 32, "nvfp4": 4 + 8 / 16}


def nearest_fp4(v: float) -> float:
    """By search among the sixteen; of two as near, the one with an even code."""
    best = min(range(8), key=lambda i: (abs(abs(v) - FP4[i]), i % 2))
    return math.copysign(FP4[best], v)


def by_hand(name: str, w: Tensor) -> Tensor:
    """What each weight is rounded to."""
    made = torch.zeros_like(w)
    if name == "fp8":
        for r, row in enumerate(w):
            scale = max(float(row.abs().max()) / 448, 0) or 1.0
            made[r] = (row / scale).to(torch.float8_e4m3fn).float() * scale
        return made
    size = 16 if name == "nvfp4" else 32
    whole = torch.tensor(float(w.abs().max())) / (6 * 448)
    for r in range(len(w)):
        for start in range(0, w.shape[1], size):
            block = w[r, start : start + size]
            most = float(block.abs().max())
            if most == 0:
                continue
            if name == "int3":
                scale = -float(block[block.abs().argmax()]) / 4
                rounded = [min(3, max(-4, round(float(v) / scale))) * scale for v in block]
            elif name == "mxfp4":
                power = 2.0 ** (math.floor(math.log2(most)) - 2)
                rounded = [nearest_fp4(float(v) / power) * power for v in block]
            else:
                step = float((torch.tensor(most) / 6 / whole).to(torch.float8_e4m3fn).float() * whole)
                rounded = [nearest_fp4(float(v) / step) * step if step else 0.0 for v in block]
            made[r, start : start + size] = torch.tensor(rounded)
    return made


@pytest.mark.parametrize("name", FORMATS)
@settings(max_examples=15, deadline=None)
@given(
    rows=st.integers(1, 5),
    blocks=st.integers(1, 3),
    seed=st.integers(0, 2**31),
    spread=st.sampled_from([1e-3, 1.0, 50.0]),
)
def test_rounding_is_the_formats(name: str, rows: int, blocks: int, seed: int, spread: float) -> None:
    form = FORMATS[name]
    w = torch.randn(rows, 32 * blocks, generator=torch.Generator().manual_seed(seed)) * spread
    packed = form.pack(w)
    got = form.unpack(packed, torch.float32)
    want = by_hand(name, w)
    # A number between two codes may fall to either side by the last bit of a quotient: such are few, and one step away.
    differ = ~torch.isclose(got, want, rtol=1e-5, atol=1e-7 * spread)
    assert int(differ.sum()) <= max(2, 0.02 * w.numel()), (got[differ], want[differ])
    assert form.width(packed) == w.shape[1]
    assert torch.equal(form.unpack(form.pack(got), torch.float32), got) or name in ("fp8", "nvfp4"), (
        "rounded once is rounded"
    )
    more = form.unpack([p[:1] for p in packed], torch.float32)
    assert torch.equal(more, got[:1]), "rows can be cut"


def test_every_fp4_number_is_its_own() -> None:
    codes = torch.arange(16, dtype=torch.uint8)
    values = fp4_values(codes)
    assert values[:8].tolist() == FP4
    assert torch.equal(fp4_values(fp4_codes(values)), values)
    ties = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 7.0, -2.5])
    assert fp4_values(fp4_codes(ties)).tolist() == [0.0, 1.0, 1.0, 2.0, 2.0, 4.0, 4.0, 6.0, -2.0]


@pytest.mark.parametrize("name", FORMATS)
def test_bits_zeros_and_nan(name: str) -> None:
    form, w = FORMATS[name], torch.randn(64, 512)
    held = 8 * sum(p.numel() * p.element_size() for p in form.pack(w)) / w.numel()
    assert held - (32 / 512 if name in ("fp8", "nvfp4") else 0) == BITS[name], held
    w[3] = 0
    w[5, 7] = torch.nan
    made = form.unpack(form.pack(w), torch.float32)
    assert not made[3].any()
    assert made[5].isnan().any(), "a damaged weight shows"


@pytest.mark.parametrize("name", FORMATS)
def test_a_model_in_the_format(name: str, tmp_path: Path) -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 32)).eval(), torch.randn(3, 64)
    chosen = {"name": "weight_format", "format": name, "group_size": 32}
    fast = torch.compile(model, backend="accelpass", options={"passes": [chosen], "lowering": "eager"})
    form = FORMATS[name]
    rounded = nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 32)).eval()
    rounded.load_state_dict(model.state_dict())
    with torch.no_grad():
        for i in (0, 2):
            rounded[i].weight.copy_(form.unpack(form.pack(model[i].weight), torch.float32))
        assert relative_error(fast(x), rounded(x)) < 1e-5
        assert relative_error(fast(x), model(x)) > 1e-3
    report = accelpass.export_onnx(model, (x,), tmp_path / "m.onnx", [chosen])
    assert report.difference is not None and report.difference < 1e-5
    assert any("are unpacked by operators of the standard" in note for note in report.notes)


def test_widths_and_options_that_do_not_fit() -> None:
    torch._dynamo.reset()
    model = nn.Linear(40, 8).eval()
    fast = torch.compile(
        model,
        backend="accelpass",
        options={"passes": [{"name": "weight_format", "format": "nvfp4"}], "lowering": "eager"},
    )
    with torch.no_grad():
        fast(torch.randn(1, 40))
    (skipped,) = [r.skipped for r in graphs_of(model)[-1].report.records if r.name == "weight_format"]
    assert "not a multiple of the blocks of 16" in next(iter(skipped.values()))
    with pytest.raises(accelpass.OptionError, match="int8, int4, int3, fp8, mxfp4, nvfp4"):
        parse({"passes": [{"name": "weight_format", "format": "fp6"}]})
