"""Diffusion transformers with step caches as ONNX files: the schedule run on ONNX Runtime against the compiled model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import accelpass
from accelpass.models_zoo import digits
from accelpass.passes.step_cache.ditfastattn import DiTFastAttn
from examples.onnx_denoise import Denoiser, sample
from tests.onnx.counting import Counting
from tests.passes.test_ditfastattn import PATHS, TIMES, model_of
from tests.sweep import quick

onnxruntime = pytest.importorskip("onnxruntime")
EXPORT_ERROR = accelpass.AccelpassError


def noisy(call: dict[str, Any], step: int) -> dict[str, Any]:
    """What the model is called with at a step: other latents and another time each."""
    half = call["hidden_states"].chunk(2)[0]  # guidance: both halves begin with the same latents
    half = half + torch.randn(half.shape, generator=torch.Generator().manual_seed(step))
    time = torch.full_like(call["timestep"], TIMES[step])
    return {**call, "hidden_states": torch.cat([half, half]), "timestep": time}


def run_files(path: Path, call: dict[str, Any], steps: int) -> list[np.ndarray]:
    """The schedule as a deployer runs it: by the JSON alone."""
    denoiser = Denoiser(path.with_suffix(".json"))
    return [
        denoiser(**{name: t.numpy() for name, t in noisy(call, step).items() if isinstance(t, torch.Tensor)})
        for step in range(steps)
    ]


def run_compiled(model: torch.nn.Module, passes: list[Any], call: dict[str, Any], steps: int) -> list[torch.Tensor]:
    torch._dynamo.reset()
    fast = torch.compile(model, backend="accelpass", options={"passes": passes, "lowering": "eager"})
    with torch.no_grad():
        return [fast(**noisy(call, step)).sample for step in range(steps)]


PASSES: dict[str, list[Any]] = {
    "delta_cache": [{"name": "delta_cache", "start": 1, "interval": 2}],
    "taylor": [{"name": "delta_cache", "start": 1, "interval": 2, "predict": "taylor"}],
    "ditfastattn": [
        DiTFastAttn(methods=dict(zip(PATHS, ("FWAXCW", "FAFWAF"), strict=True)), timesteps=tuple(TIMES), window=3)
    ],
    "ditfastattn, int8": [
        DiTFastAttn(methods=dict(zip(PATHS, ("FAFAFA", "FAFAFA"), strict=True)), timesteps=tuple(TIMES), window=3),
        {"name": "int8_weights"},
    ],
}


@pytest.mark.parametrize("which", quick(list(PASSES), "delta_cache"))
def test_the_files_follow_the_schedule(which, tmp_path):
    model, call = model_of("dit")
    report = accelpass.export_onnx(
        model, (), tmp_path / "m.onnx", PASSES[which], kwargs=noisy(call, 0), steps=len(TIMES)
    )
    assert report.difference is not None and report.difference < 1e-4
    got = run_files(tmp_path / "m.onnx", call, len(TIMES))
    want = run_compiled(model, PASSES[which], call, len(TIMES))
    errors = [float(np.abs(mine - its.numpy()).max()) for mine, its in zip(got, want, strict=True)]
    # Under torch a product of packed weights with many rows is taken in bfloat16, in the file in float32.
    assert max(errors) < (3e-2 if "int8" in which else 1e-4), errors
    if which == "delta_cache":  # full, full and kept, shared
        assert len(report.files) == 3
        full, shared = (report.files[i].operators for i in (0, 2))
        products = [sum(of.get(kind, 0) for kind in ("MatMul", "Gemm", "Attention")) for of in (full, shared)]
        assert products[1] < products[0] // 2  # what a step shares is not in its file


def test_state_beside_a_weight_is_refused(tmp_path):
    model, call = model_of("dit")
    passes = [*PASSES["delta_cache"], Counting()]
    with pytest.raises(
        EXPORT_ERROR, match=r"weight.calls is remembered beside a weight \(counting\), .* of delta_cache leave"
    ):
        accelpass.export_onnx(model, (), tmp_path / "m.onnx", passes, kwargs=noisy(call, 0), steps=4)
    assert list(tmp_path.iterdir()) == []


def test_a_plan_for_another_number_of_steps(tmp_path):
    model, call = model_of("dit")
    with pytest.raises(EXPORT_ERROR, match="is for 6 steps, and steps=9"):
        accelpass.export_onnx(model, (), tmp_path / "m.onnx", PASSES["ditfastattn"], kwargs=noisy(call, 0), steps=9)
    assert list(tmp_path.iterdir()) == []


def test_two_step_passes(tmp_path):
    model, call = model_of("dit")
    both = [*PASSES["delta_cache"], *PASSES["ditfastattn"]]
    with pytest.raises(EXPORT_ERROR, match="delta_cache and ditfastattn both"):
        accelpass.export_onnx(model, (), tmp_path / "m.onnx", both, kwargs=noisy(call, 0))


def test_a_model_without_latents(tmp_path):
    with pytest.raises(EXPORT_ERROR, match="no block of the model reads the latents"):
        accelpass.export_onnx(
            torch.nn.Sequential(torch.nn.Linear(8, 8)).eval(),
            (torch.ones(2, 8),),
            tmp_path / "m.onnx",
            PASSES["delta_cache"],
        )


@pytest.mark.slow
def test_images_are_those_of_the_pipeline(tmp_path):
    labels, steps, shape = [3, 7], 5, (2, 1, digits.SIZE, digits.SIZE)
    call = {
        "hidden_states": torch.zeros(4, *shape[1:]),
        "timestep": torch.zeros(4).long(),
        "class_labels": torch.zeros(4).long(),
    }
    pipe = digits.pipeline()
    accelpass.export_onnx(pipe.transformer, (), tmp_path / "d.onnx", PASSES["delta_cache"], kwargs=call, steps=steps)
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    got = sample(Denoiser(tmp_path / "d.json"), labels, noise.numpy())
    pipe.transformer = torch.compile(
        pipe.transformer, backend="accelpass", options={"passes": PASSES["delta_cache"], "lowering": "eager"}
    )
    want = digits.sample(pipe, labels, steps, seed=1)
    assert want.shape == got.shape and float(np.abs(got).max()) > 0.5
    assert np.abs((got / 2 + 0.5).clip(0, 1) - want.numpy()).max() < 1e-3
