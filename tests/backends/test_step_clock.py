"""Which step a call is, told from timesteps and latents alone."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor, nn

from accelpass.backends.runtime.step_clock import Clock, declared, is_declared
from accelpass.ir.transform.steps import StepError


def latents(seed: int, batch: int = 2, size: int = 4) -> Tensor:
    return torch.randn(batch, 1, size, size, generator=torch.Generator().manual_seed(seed))


def call(clock: Clock, time: float, given: Tensor) -> tuple[int, int, bool]:
    tick = clock.tick(time, given)
    clock.done(tick, time, given)
    return tick.step, tick.branch, tick.fresh


def run(clock: Clock, times: Sequence[float], seed: int = 0, batch: int = 2) -> list[tuple[int, int, bool]]:
    return [call(clock, t, latents(100 * seed + i, batch)) for i, t in enumerate(times)]


def counted(steps: int) -> list[tuple[int, int, bool]]:
    return [(step, 0, step == 0) for step in range(steps)]


@pytest.mark.parametrize("planned", [False, True])
def test_runs_follow_each_other(planned: bool) -> None:
    times = [999.0, 500.0, 250.0, 0.0]
    clock = Clock(times if planned else None)
    for seed in range(3):
        assert run(clock, times, seed) == counted(4)


@pytest.mark.parametrize("planned", [False, True])
def test_a_run_that_was_cut_off_is_over_when_the_next_begins(planned: bool) -> None:
    times = [9.0, 5.0, 1.0]
    for cut in range(4):
        clock = Clock(times if planned else None)
        assert run(clock, times[:cut]) == counted(cut)
        assert run(clock, times, seed=1) == counted(3), f"cut off before step {cut}"


def test_runs_of_a_single_step() -> None:
    for clock in (Clock(), Clock([999.0])):
        assert [call(clock, 999.0, latents(i)) for i in range(3)] == [(0, 0, True)] * 3


def test_a_run_begins_with_another_shape() -> None:
    clock = Clock()
    run(clock, [9.0, 5.0])
    assert call(clock, 1.0, latents(7, batch=4)) == (0, 0, True)
    assert call(clock, 0.5, latents(8, batch=4)) == (1, 0, False)
    planned = Clock([9.0, 5.0, 1.0])
    run(planned, [9.0, 5.0])
    assert call(planned, 9.0, latents(7, size=8)) == (0, 0, True)
    with pytest.raises(StepError, match="its step 0 is at 9"):
        planned.tick(1.0, latents(7, size=6))


def test_two_calls_with_the_same_latents_are_one_step() -> None:
    for clock in (Clock(), Clock([9.0, 5.0, 1.0])):
        for seed in (0, 1):
            made = []
            for i, time in enumerate([9.0, 5.0, 1.0]):
                x = latents(10 * seed + i)
                made += [call(clock, time, x), call(clock, time, x.clone()), call(clock, time, x)]
            assert made == [(s, b, s == b == 0) for s in range(3) for b in range(3)]


def test_a_timestep_twice_with_other_latents_is_two_steps() -> None:
    heun = [9.0, 5.0, 5.0, 1.0, 1.0]
    for clock in (Clock(), Clock(heun)):
        assert run(clock, heun) == counted(5)
        assert run(clock, heun, seed=1) == counted(5)


def test_guidance_calls_and_a_second_order_scheduler_together() -> None:
    heun = [9.0, 5.0, 5.0]
    for clock in (Clock(), Clock(heun)):
        made = [call(clock, t, latents(i)) for i, t in enumerate(heun) for _ in range(2)]
        assert made == [(s, b, s == b == 0) for s in range(3) for b in range(2)]


@given(
    times=st.lists(st.integers(0, 1000), min_size=1, max_size=12, unique=True).map(lambda t: sorted(t, reverse=True)),
    dtype=st.sampled_from([torch.bfloat16, torch.float16, torch.float32]),
)
def test_a_plan_accepts_rounded_timesteps(times: list[int], dtype: torch.dtype) -> None:
    # Steps closer than the rounding cannot be told apart.
    assume(all(a - b >= 12 for a, b in itertools.pairwise(times)))
    rounded = [float(torch.tensor(t, dtype=dtype)) for t in times]
    assert run(Clock([float(t) for t in times]), rounded) == counted(len(times))
    assert run(Clock(rounded), [float(t) for t in times]) == counted(len(times))


def test_timesteps_of_rising_sigmas_as_a_plan() -> None:
    rising = [0.0, 0.25, 0.5, 0.75]
    clock = Clock(rising)
    assert run(clock, rising) == counted(4) and run(clock, rising, seed=1) == counted(4)


@pytest.mark.parametrize(
    ("first", "then", "said"),
    [
        ([], 8.0, r"timestep 8, .* 3 model calls from 9 to 1, and its step 0 is at 9\..*search_steps.*reset\(model\)"),
        ([9.0], 1.0, "timestep 1, .* its step 1 is at 5"),
        ([9.0, 5.0], 3.0, "timestep 3, .* its step 2 is at 1"),
        ([9.0, 5.0, 1.0], 0.5, "timestep 0.5, .* it ends there"),
    ],
)
def test_a_timestep_that_is_not_the_plans(first: list[float], then: float, said: str) -> None:
    clock = Clock([9.0, 5.0, 1.0])
    run(clock, first)
    with pytest.raises(StepError, match=said):
        clock.tick(then, latents(50))
    # Nothing has changed: the run can go on, and a new one can begin.
    if len(first) < 3:
        due = [9.0, 5.0, 1.0][len(first)]
        assert clock.tick(due, latents(51)).step == len(first)
    assert run(clock, [9.0, 5.0, 1.0], seed=1) == counted(3)


def test_a_call_that_failed_is_made_again() -> None:
    clock = Clock()
    run(clock, [9.0])
    x = latents(5)
    assert clock.tick(5.0, x) == clock.tick(5.0, x), "done() was not called"
    assert call(clock, 5.0, x) == (1, 0, False)


def test_reset_begins_a_run() -> None:
    clock = Clock()
    run(clock, [9.0, 5.0])
    clock.reset()
    assert call(clock, 4.0, latents(9)) == (0, 0, True)


def test_time_goes_back_in_a_declared_run() -> None:
    times = [9.0, 5.0, 7.0, 3.0]
    assert run(Clock(), times) == [(0, 0, True), (1, 0, False), (0, 0, True), (1, 0, False)]
    assert run(Clock(declared=True), times) == counted(4)
    # A plan says itself how time goes.
    assert run(Clock(times, declared=True), times) == counted(4) == run(Clock(times), times)


def test_a_declaration_is_for_one_model_and_ends() -> None:
    one, other = nn.Linear(2, 2), nn.Linear(2, 2)
    with declared(one.parameters()), declared(one.parameters()):
        assert is_declared(one.weight) and not is_declared(other.weight) and not is_declared(None)
    assert not is_declared(one.weight)
    with pytest.raises(KeyError), declared(other.parameters()):
        raise KeyError
    assert not is_declared(other.weight)


def test_one_call_a_step_is_never_followed_by_a_second_one() -> None:
    """A run that was cut off after its first step, and one with the same noise and other labels."""
    latents = torch.ones(2, 3)
    for clock in (Clock((9.0, 5.0), 1), Clock(most=1)):
        for _ in range(2):
            tick = clock.tick(9.0, latents)
            assert (tick.step, tick.branch, tick.fresh) == (0, 0, True)
            clock.done(tick, 9.0, latents)
