"""Whether latents come of a run, with diffusers' own schedulers and a model that gives anything."""

from __future__ import annotations

from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor

from accelpass.backends.runtime.continuity import STEPS, Past, origin, result_of

SHAPE = (1, 4, 16, 16)
EXACT = [
    ("DDIMScheduler", {"clip_sample": False}),
    ("EulerDiscreteScheduler", {}),
    ("HeunDiscreteScheduler", {}),
    ("DPMSolverMultistepScheduler", {}),
    ("DPMSolverMultistepScheduler", {"solver_order": 3}),
    ("UniPCMultistepScheduler", {}),
    ("DEISMultistepScheduler", {}),
    ("PNDMScheduler", {"skip_prk_steps": True}),
    ("FlowMatchEulerDiscreteScheduler", {}),
]
NOISY = [
    ("DDIMScheduler", {"clip_sample": True}),
    ("DDPMScheduler", {}),
    ("EulerAncestralDiscreteScheduler", {}),
]


def model(x: Tensor) -> Tensor:
    """Neither linear nor the same for all pixels."""
    return torch.tanh(x.roll(1, -1) + 0.5 * x.flip(-2)) + 0.3 * x


def run(
    name: str, given: dict[str, Any], seed: int = 0, steps: int = 8, dtype: torch.dtype = torch.float32
) -> list[Past]:
    scheduler = getattr(diffusers, name)(**given)
    scheduler.set_timesteps(steps)
    generator = torch.Generator().manual_seed(seed)
    sigma = getattr(scheduler, "init_noise_sigma", 1.0)
    x = torch.randn(SHAPE, generator=generator) * sigma
    made = []
    for time in scheduler.timesteps:
        shown = scheduler.scale_model_input(x, time) if hasattr(scheduler, "scale_model_input") else x
        shown = shown.to(dtype)
        halves = model(shown), model(shown + 0.2)
        made.append(Past(shown, list(halves)))
        step = {"generator": generator} if name in ("DDPMScheduler", "EulerAncestralDiscreteScheduler") else {}
        x = scheduler.step((halves[1] + 2 * (halves[0] - halves[1])).float(), time, x, **step).prev_sample
    return made


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("name", "given"), EXACT, ids=lambda v: v if isinstance(v, str) else "-".join(map(str, v)))
def test_schedulers_whose_steps_are_sums(name: str, given: dict[str, Any], dtype: torch.dtype) -> None:
    mine, other = (run(name, given, seed, dtype=dtype) for seed in (0, 1))
    for at in range(1, len(mine)):
        past = mine[max(0, at - STEPS) : at]
        assert origin(mine[at].latents, past).proved, f"step {at}"
        assert not origin(other[at].latents, past).proved
    for at in range(2, len(mine)):  # a step was left out: the run was cancelled, and another with its noise has gone on
        assert not origin(torch.randn(SHAPE), mine[:at]).alike


@pytest.mark.parametrize(("name", "given"), NOISY, ids=lambda v: v if isinstance(v, str) else "-".join(map(str, v)))
def test_schedulers_that_add_noise_or_clip(name: str, given: dict[str, Any]) -> None:
    mine = run(name, given)
    found = [origin(mine[at].latents, mine[max(0, at - STEPS) : at]) for at in range(1, len(mine))]
    assert not all(o.proved for o in found) and sum(o.alike for o in found) > len(found) // 2


def test_the_same_picture_with_other_noise() -> None:
    """Image-to-image twice, the first time cancelled: much in common, and no sum."""
    picture = torch.randn(SHAPE)
    first, second = (0.7 * picture + 0.3 * torch.randn(SHAPE) for _ in range(2))
    found = origin(second, [Past(first, [model(first)])])
    assert found.alike and not found.proved


def test_guidance_in_one_batch() -> None:
    half = torch.randn(SHAPE)
    both = torch.cat([half, half])
    made = torch.cat([model(half), model(half + 0.2)])
    after = half - 0.3 * (made[:1] + 2 * (made[1:] - made[:1]))
    past = [Past(both, [made])]
    assert origin(torch.cat([after, after]), past).proved
    assert origin(after, past).proved, "guidance is switched off"
    assert not origin(torch.cat([after, torch.randn(SHAPE)]), past).alike, "another request has the second place"
    assert origin(torch.cat([after, after]), [Past(half, [made[:1], made[1:]])]).proved, "guidance in one batch begins"


def test_what_the_step_does_not_change_is_left_out() -> None:
    """A picture that is given beside the latents, as further tokens or channels."""
    x, picture = torch.randn(1, 64, 8), torch.randn(1, 64, 8)
    tokens = torch.cat([x, picture], 1)
    made = model(tokens)
    assert origin(torch.cat([x - 0.3 * made[:, :64], picture], 1), [Past(tokens, [made])]).proved
    channels = torch.cat([x, picture], 2)
    made = model(x)
    assert result_of([None, made], channels) is made
    assert origin(torch.cat([x - 0.3 * made, picture], 2), [Past(channels, [made])]).proved
    wide = torch.cat([made, made], 2)  # a model that learns the variance, too
    assert origin(x - 0.3 * made, [Past(x, [wide])]).proved


def test_latents_that_stand_still_or_are_few_prove_nothing() -> None:
    x = torch.randn(SHAPE)
    assert not origin(x, [Past(x, [model(x)])]).proved
    few = torch.randn(1, 4)
    assert not origin(few - few.flip(-1), [Past(few, [few.flip(-1)])]).proved
    assert not origin(x, []).alike and not origin(x[0], [Past(x, [model(x)])]).alike
