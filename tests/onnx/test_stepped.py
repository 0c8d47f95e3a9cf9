"""Diffusion transformers with step caches as ONNX files: the schedule run on ONNX Runtime against the compiled model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import accelpass
from accelpass.passes.step_cache.ditfastattn import DiTFastAttn
from tests.passes.test_ditfastattn import PATHS, TIMES, model_of

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
    plan = json.loads(path.with_suffix(".json").read_text())
    operands: dict[str, Any] = {}
    if plan["operands"]:
        from safetensors.numpy import load_file

        operands = load_file(path.parent / plan["operands"])
    sessions = {name: onnxruntime.InferenceSession(path.parent / name) for name in plan["files"]}
    state: dict[tuple[int, str], np.ndarray] = {}
    made = []
    for step in range(steps):
        given = noisy(call, step)
        for number, name in enumerate(plan["steps"][step]["calls"]):
            feed = {}
            for one in plan["files"][name]:
                if one["from"] == "caller":
                    feed[one["name"]] = given[one["name"]].numpy()
                elif one["from"] == "plan":
                    feed[one["name"]] = operands[f"{step}/{one['key']}"]
                else:
                    feed[one["name"]] = state[0 if one["first_call"] else number, one["key"]]
            names = [o.name for o in sessions[name].get_outputs()]
            found = dict(zip(names, sessions[name].run(None, feed), strict=True))
            state |= {(number, n.removeprefix("present.")): t for n, t in found.items() if n.startswith("present.")}
            made.append(found[plan["outputs"][0]])
    return made


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


@pytest.mark.parametrize(
    "which",
    ["delta_cache", "ditfastattn", *(pytest.param(w, marks=pytest.mark.slow) for w in ("taylor", "ditfastattn, int8"))],
)
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
    assert report.manifest == tmp_path / "m.json"


def test_what_a_step_shares_is_not_in_its_file(tmp_path):
    model, call = model_of("dit")
    accelpass.export_onnx(model, (), tmp_path / "m.onnx", PASSES["delta_cache"], kwargs=noisy(call, 0), steps=3)
    plan = json.loads((tmp_path / "m.json").read_text())
    full, shared = (tmp_path / plan["steps"][i]["calls"][0] for i in (1, 2))
    import onnx

    products = [
        sum(n.op_type in ("MatMul", "Gemm", "Attention") for n in onnx.load(p).graph.node) for p in (full, shared)
    ]
    assert products[1] < products[0] // 2


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
