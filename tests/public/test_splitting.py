"""A model in two halves: where it can be split, what goes over the wire, and two files in two processes."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import accelpass
from accelpass.ir.errors import OptionError
from accelpass.ir.transform.halves import CannotSplit, decoded, encoded
from accelpass.models_zoo import small
from tests.small_models import relative_error
from tests.sweep import examples, sweep


class Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.inner, self.act = nn.Linear(width, width), nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.act(self.inner(x))


def chain(kinds: list[str], width: int, seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    made = {
        "linear": lambda: nn.Linear(width, width),
        "relu": lambda: nn.ReLU(inplace=True),
        "block": lambda: Residual(width),
    }
    return nn.Sequential(*(made[kind]() for kind in kinds)).eval()


def q8(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The card's, for a tensor with values of both signs."""
    s = (x.max() - x.min()) / 255
    zp = int((-x.min() / s).clamp(0, 255))
    return (zp + x / s).clamp(0, 255).round().byte(), s, torch.tensor(zp)


@settings(max_examples=examples(3), deadline=None)
@given(
    kinds=st.lists(st.sampled_from(["linear", "relu", "block"]), min_size=1, max_size=3),
    width=st.integers(2, 9),
    seed=st.integers(0, 9),
)
def test_halves_are_the_model(kinds: list[str], width: int, seed: int):
    kinds = ["linear", *kinds]  # an operation in place on the caller's tensor is refused by the export
    model, x = chain(kinds, width, seed), torch.randn(3, width)
    points = accelpass.split_points(model, x)
    assert {p.at for p in points} >= {str(i) for i in range(len(kinds) - 1)}, "every module of a chain is a place"
    assert not any(p.at.endswith(".inner") for p in points), "inside a residual block two tensors go on"
    with torch.no_grad():
        for point in points:
            head, tail = accelpass.split(model, x, point.at)
            sent = head(x)
            before = sent.clone()
            assert torch.equal(tail(sent), model(x))
            assert torch.equal(sent, before), "what was sent is not written to"
            assert (tuple(sent.shape), sent.numel() * 4) == (point.shape, point.bytes)


@settings(max_examples=examples(8), deadline=None)
@given(count=st.integers(2, 300), shift=st.sampled_from([0.0, 5.0, -1e3]), seed=st.integers(0, 99))
def test_the_wire_of_8_bits(count: int, shift: float, seed: int):
    x = torch.randn(count, generator=torch.Generator().manual_seed(seed)) + shift
    codes, scale, zero = encoded(x)
    assert (decoded(codes, scale, zero, x.dtype) - x).abs().max() <= 1.5 * scale * (1 + 1e-4)
    if x.min() < 0 < x.max():
        want = q8(x)
        assert torch.equal(codes, want[0]) and torch.equal(scale, want[1]) and torch.equal(zero.long(), want[2])


@pytest.mark.parametrize("held", [0.0, 3.5, -2.0])
def test_a_constant_tensor_comes_back(held: float):
    x = torch.full((4,), held)
    assert torch.allclose(
        decoded(*encoded(x), torch.float32), x, rtol=1.01 / 255
    )  # the zero point is cut to a whole code


def test_what_is_not_finite_is_seen():
    assert decoded(*encoded(torch.tensor([1.0, float("nan")])), torch.float32).isnan().all()
    assert decoded(*encoded(torch.tensor([1.0, float("inf")])), torch.float32).isnan().any()


def test_a_decoder_is_split_between_blocks():
    model, ids = small.decoder(), torch.arange(24).view(2, 12)
    points = accelpass.split_points(model, {"input_ids": ids, "use_cache": False})
    point = points["model.layers.0"]
    assert (point.shape, point.bytes, point.bytes_int8) == ((2, 12, 32), 3072, 768 + 5)
    assert point.weights[0] < sum(point.weights) == points[0].weights[0] + points[0].weights[1]
    assert [p.flops[0] for p in points] == sorted(p.flops[0] for p in points)
    table = str(points)
    assert "model.layers.0" in table and "2x12x32" in table and "inputs: 0.2 kB" in table


def test_sizes_stay_dynamic_and_halves_take_passes():
    model, ids = small.decoder(), torch.arange(24).view(2, 12)
    shapes = {"input_ids": {0: "batch", 1: "tokens"}}
    example = {"input_ids": ids, "use_cache": False}
    head, tail = accelpass.split(model, example, "model.layers.0", wire_bits=8, dynamic_shapes=shapes)
    other = torch.arange(21).view(3, 7)
    with torch.no_grad():
        codes, scale, zero = head(other)
        assert codes.dtype == zero.dtype == torch.uint8 and codes.shape == (3, 7, 32)
        found, want = tail(codes, scale, zero), model(other, use_cache=False).logits
        assert 0 < relative_error(found, want) < 0.05
        fast = torch.compile(tail, backend="accelpass", options={"passes": ["int8_weights"], "lowering": "eager"})
        assert relative_error(fast(codes, scale, zero), found) < 0.05
    took = accelpass.explain(fast).passes["int8_weights"].took
    assert "model.layers.1.mlp.up_proj" in took and "model.layers.0.mlp.up_proj" not in took
    assert {id(p) for p in tail.parameters()} <= {id(p) for p in model.parameters()}, "weights are the model's own"


_HEAD = """
import sys, numpy, onnxruntime
run = onnxruntime.InferenceSession(sys.argv[1], providers=["CPUExecutionProvider"])
numpy.savez(sys.argv[3], *run.run(None, {run.get_inputs()[0].name: numpy.load(sys.argv[2])}))
"""
_TAIL = """
import sys, numpy, onnxruntime
run, sent = onnxruntime.InferenceSession(sys.argv[1], providers=["CPUExecutionProvider"]), numpy.load(sys.argv[2])
(made,) = run.run(None, {i.name: sent[f"arr_{n}"] for n, i in enumerate(run.get_inputs())})
numpy.save(sys.argv[3], made)
"""


@pytest.mark.slow
def test_two_files_in_two_processes(tmp_path: Any):
    numpy = pytest.importorskip("numpy")
    pytest.importorskip("onnxruntime")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3, 2), nn.ReLU(), nn.Conv2d(8, 2, 2, 2), nn.ReLU(), nn.Conv2d(2, 8, 1)).eval()
    x = torch.randn(1, 3, 16, 16)
    head, tail = accelpass.split(model, x, "2", wire_bits=8)
    with torch.no_grad():
        sent = head(x)
        accelpass.export_onnx(head, (x,), tmp_path / "head.onnx")
        accelpass.export_onnx(tail, sent, tmp_path / "tail.onnx")
        want = tail(*sent)
    numpy.save(tmp_path / "x.npy", x.numpy())
    for code, file, read, made in ((_HEAD, "head", "x.npy", "sent.npz"), (_TAIL, "tail", "sent.npz", "y.npy")):
        paths = [str(tmp_path / name) for name in (f"{file}.onnx", read, made)]
        subprocess.run([sys.executable, "-c", code, *paths], check=True, timeout=120)
    assert numpy.load(tmp_path / "sent.npz")["arr_0"].nbytes == sent[0].numel()
    step = sent[1].item()
    assert abs(torch.from_numpy(numpy.load(tmp_path / "y.npy")) - want).max() <= 8 * step  # a code may be the next one
    assert relative_error(want, model(x)) < 0.05


@pytest.mark.parametrize(
    ("at", "said"),
    sweep(
        ("model.layers.0.self_attn", "2 values go on from there"),
        ("model.layers.7", "no module of that name"),
        ("model.rotary_emb", "does not depend on the model's inputs"),
        ("lm_head", "it ends the model"),
    ),
)
def test_places_that_are_none(at: str, said: str):
    with pytest.raises(CannotSplit, match=said) as refused:
        accelpass.split(small.decoder(), {"input_ids": torch.arange(12)[None], "use_cache": False}, at)
    assert "model.layers.0" in str(refused.value)


def test_an_input_that_both_halves_read_is_no_place():
    given = {"input_ids": torch.arange(12)[None], "attention_mask": torch.ones(1, 12), "use_cache": False}
    with pytest.raises(CannotSplit, match="values go on"):
        accelpass.split(small.decoder(), given, "model.layers.0")


def test_options_are_checked():
    model, x = chain(["linear", "relu", "linear"], 4, 0), torch.randn(2, 4)
    with pytest.raises(OptionError, match="wire_bits=4"):
        accelpass.split(model, x, "0", wire_bits=4)
    with pytest.raises(accelpass.ExportError, match="training mode"):
        accelpass.split(chain(["linear", "linear"], 4, 0).train(), x, "0")
