"""Packages of models that sample in steps: the schedule followed by one file, its runs told apart, and calls that do not fit."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import accelpass
from accelpass import ExportError, PackageError
from accelpass.backends.package.denoiser import PackagedDenoiser
from accelpass.ir.errors import AccelpassError
from accelpass.passes.step_cache.ditfastattn import DiTFastAttn
from tests.passes.test_ditfastattn import PATHS, TIMES, model_of

STEPS = 5
CACHE = {"name": "delta_cache", "start": 0, "interval": 2}


@dataclass
class Packaged:
    """A model, an example call, and what was made of them."""

    model: torch.nn.Module
    call: dict[str, Any]
    opened: PackagedDenoiser
    report: Any


def packaged(passes: list[Any], folder: Path, steps: int | None = None, **given: Any) -> Packaged:
    model, call = model_of("dit")
    tensors = {name: t for name, t in call.items() if isinstance(t, Tensor)}
    report = accelpass.package(model, tensors, passes, path=folder / "m.pt2", steps=steps, **given)
    opened = accelpass.open(folder / "m.pt2")
    assert isinstance(opened, PackagedDenoiser)
    return Packaged(model, tensors, opened, report)


@pytest.fixture(scope="module")
def cached(tmp_path_factory: pytest.TempPathFactory) -> Packaged:
    return packaged([CACHE, "int8_weights"], tmp_path_factory.mktemp("steps"), STEPS)


def sampled(model: Any, call: dict[str, Any], seed: int, steps: int = STEPS, noise: float = 0.0) -> list[Tensor]:
    """Latents after each step of a sampler that goes down a slope, with fresh noise if wanted."""
    made = torch.Generator().manual_seed(seed)
    half = torch.randn(call["hidden_states"].chunk(2)[0].shape, generator=made)
    found = []
    for step in range(steps):
        half = one_step(model, call, half, step) + noise * torch.randn(half.shape, generator=made)
        found.append(half)
    return found


@torch.no_grad()
def one_step(model: Any, call: dict[str, Any], half: Tensor, step: int) -> Tensor:
    time = torch.full_like(call["timestep"], TIMES[step])
    out = model(**{**call, "hidden_states": torch.cat([half, half]), "timestep": time})
    result = out if isinstance(out, Tensor) else out["sample"]
    return half - 0.1 * result.chunk(2)[0]


def compiled(model: torch.nn.Module, passes: list[Any]) -> Any:
    torch._dynamo.reset()
    return torch.compile(model, backend="accelpass", options={"passes": passes, "lowering": "eager"})


def same(mine: list[Tensor], its: list[Tensor], bound: float = 1e-4) -> None:
    assert max(float((a - b).abs().max()) for a, b in zip(mine, its, strict=True)) < bound


def test_one_file_follows_the_schedule(cached: Packaged) -> None:
    assert cached.report.difference < 1e-2 and len(cached.report.records) == 2  # full and kept, shared
    assert cached.opened.steps == STEPS and "5 steps" in repr(cached.opened)
    want = sampled(compiled(cached.model, [CACHE, "int8_weights"]), cached.call, 1)
    same(
        sampled(cached.opened, cached.call, 1), want, 3e-3
    )  # under torch many rows are multiplied in bfloat16 where that is fast
    same(sampled(cached.opened, cached.call, 1), want, 3e-3)
    dense = sampled(cached.model, cached.call, 1)
    assert (
        max(float((a - b).abs().max()) for a, b in zip(dense, want, strict=True)) > 3e-3
    )  # the schedule leaves something out


def test_opening_needs_no_compiler(cached: Packaged, tmp_path: Path) -> None:
    torch.save(cached.call, tmp_path / "call.pt")
    script = f"""
import sys, torch, accelpass
call = torch.load({str(tmp_path / "call.pt")!r})
made = accelpass.open({str(cached.report.path)!r})(**call)
assert torch.isfinite(made["sample"]).all()
print([m for m in sys.modules if m in ("torch._dynamo", "torch._inductor", "accelpass.passes", "transformers", "diffusers")])
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_weights_are_in_the_file_once(cached: Packaged) -> None:
    manifest = cached.opened.manifest
    assert manifest.schedule is not None and manifest.schedule.calls[0] == ["step0"]
    used = [set(g.constants.values()) for g in manifest.graphs.values()]
    assert used[1] < used[0]


def test_runs_that_take_turns(cached: Packaged) -> None:
    """In one thread: told by their latents, and by declaration where a sampler adds noise."""
    package = cached.opened
    alone = [sampled(package, cached.call, seed) for seed in (1, 2)]
    made = [torch.randn(alone[0][0].shape, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2)]
    for step in range(STEPS):
        made = [one_step(package, cached.call, half, step) for half in made]
        same(made, [run[step] for run in alone], 1e-5)
    runs = [package.sampling_run(), accelpass.sampling_run(package)]
    noisy = []
    for seed, run in zip((3, 4), runs, strict=True):
        with run:
            noisy.append(sampled(package, cached.call, seed, 2, noise=0.5)[-1])
    for at, run in enumerate(runs):
        package.reset()
        with run:
            again = sampled(package, cached.call, at + 3, 2, noise=0.5)[-1]
        same([again], [noisy[at]], 1e-5)


def test_a_run_that_cannot_be_told_is_computed_in_full(cached: Packaged) -> None:
    cached.opened.reset()
    half = torch.randn(cached.call["hidden_states"].chunk(2)[0].shape)
    for step in (0, 1, 2):  # nothing that a sampler would make of what was before
        got = one_step(cached.opened, cached.call, half * (step + 1) + torch.randn(half.shape), step)
    assert torch.isfinite(got).all()
    accelpass_notes = " ".join(cached.opened.notes)
    assert "of their own" in accelpass_notes or not accelpass_notes


def test_a_run_longer_than_the_schedule(cached: Packaged) -> None:
    cached.opened.reset()
    with pytest.raises(PackageError, match="a schedule of 5 steps, and this is step 6"):
        sampled(cached.opened, cached.call, 1, len(TIMES))


@pytest.mark.slow
def test_a_plan_with_its_timesteps(tmp_path: Path) -> None:
    plan = DiTFastAttn(methods=dict(zip(PATHS, ("FWAXCW", "FAFWAF"), strict=True)), timesteps=tuple(TIMES), window=3)
    found = packaged([plan], tmp_path)
    want = sampled(compiled(found.model, [plan]), found.call, 1, len(TIMES))
    same(sampled(found.opened, found.call, 1, len(TIMES)), want)
    wrong = {**found.call, "timestep": torch.full_like(found.call["timestep"], 777)}
    with pytest.raises(AccelpassError, match="timestep 777, which the plan does not have"):
        found.opened(**wrong)


def refused(folder: Path, said: str, passes: list[Any], **given: Any) -> None:
    model, call = model_of("dit")
    tensors = {name: t for name, t in call.items() if isinstance(t, Tensor)}
    with pytest.raises(ExportError, match=said):
        accelpass.package(model, tensors, passes, path=folder / "m.pt2", **given)
    assert list(folder.iterdir()) == []


def test_what_is_refused(tmp_path: Path) -> None:
    plan = DiTFastAttn(methods=dict(zip(PATHS, ("FAFAFA",) * 2, strict=True)), timesteps=tuple(TIMES), window=3)
    refused(tmp_path, "is for 6 steps, and steps=9", [plan], steps=9)
    refused(tmp_path, "delta_cache and ditfastattn both", [CACHE, plan])
    refused(tmp_path, "steps= is for passes that work across denoising steps", [], steps=4)
