"""Step caches in sampling runs that stop, take turns and run at once: nothing of one run is in another."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import accelpass
from tests.passes.run_truth import TIMES, Guided, Oracle, at, compiled, equal, near, noise, notes, steps, text


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch._dynamo.reset()
    with torch.no_grad():
        yield


@pytest.fixture
def model() -> nn.Module:
    return Guided().eval()


PASSES = ("delta_cache", "ditfastattn", "tokencache")


@pytest.fixture(params=PASSES)
def which(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def alone(fast: Any, *run: Any, **given: Any) -> list[Tensor]:
    accelpass.reset(fast)
    made = list(steps(fast, *run, **given))
    accelpass.reset(fast)
    return made


# --- two runs


@pytest.mark.parametrize("start", [0, 1, 2])
def test_a_run_after_one_that_was_cancelled(which: str, model: nn.Module, start: int) -> None:
    """The same text, or another; the next run begins where the first did, or below it as image-to-image does."""
    if which == "tokencache" and start:
        pytest.skip("its plan has one beginning")
    fast, times, words = compiled(which, model), TIMES[start:], text(0)
    for other in (words, text(1)):
        for cut in (1, 2, 3):
            wanted = alone(fast, 5, other, times)
            list(steps(fast, 4, words, TIMES[:cut]))
            assert equal(list(steps(fast, 5, other, times)), wanted), f"cut off after {cut} steps"


def test_the_same_noise_again(which: str, model: nn.Module) -> None:
    fast = compiled(which, model)
    for cut in (1, 2, 3):
        wanted = alone(fast, 5, text(1))
        list(steps(fast, 5, text(0), TIMES[:cut]))
        assert equal(list(steps(fast, 5, text(1))), wanted)


@pytest.mark.parametrize("words", [(0, 1), (0, 0)], ids=["texts", "one text"])
def test_runs_that_take_turns(which: str, model: nn.Module, words: tuple[int, int]) -> None:
    fast, texts = compiled(which, model), [text(w) for w in words]
    wanted = [alone(fast, seed, texts[seed]) for seed in (0, 1)]
    assert not equal(wanted[0], list(steps(model, 0, texts[0]))), "nothing is cached"
    turns = zip(steps(fast, 0, texts[0]), steps(fast, 1, texts[1]), strict=True)
    for found, want in zip(zip(*turns, strict=True), wanted, strict=True):
        assert equal(list(found), want)
    # Out of step: one begins when the other is half through.
    accelpass.reset(fast)
    first, second = steps(fast, 0, texts[0]), steps(fast, 1, texts[1])
    found = ([next(first), next(first)], [])
    for _ in range(3):
        found[0].append(next(first))
        found[1].append(next(second))
    found[1].extend(second)
    assert equal(found[0], wanted[0]) and equal(found[1], wanted[1])


def test_runs_in_threads(which: str, model: nn.Module) -> None:
    fast, words = compiled(which, model), text(0)
    wanted = [alone(fast, seed, words) for seed in range(3)]
    found: dict[int, list[Tensor]] = {}
    started = threading.Barrier(3)

    def work(seed: int) -> None:
        started.wait()
        found[seed] = [made for _ in range(4) for made in steps(fast, seed, words)]

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for seed in range(3):
        assert equal(found[seed], 4 * wanted[seed])
    list(steps(fast, 0, words))
    assert len({b.owner for b in accelpass.state(fast)}) == 1, "runs of threads that ended are dropped"


# --- what cannot be told


def test_a_sampler_that_adds_noise(model: nn.Module) -> None:
    """With the pipeline's own text tensor there is enough to go by; with a copy at each step and much noise, there is not."""
    fast, words = compiled("delta_cache", model), text(0)
    truth = list(steps(model, 0, words, noisy=0.2))
    made = list(steps(fast, 0, words, noisy=0.2))
    assert not torch.allclose(made[1], truth[1], atol=1e-4) and "sampling_run" not in notes(fast)

    class Copies:
        def __call__(self, encoder_hidden_states: Tensor, **given: Any) -> Tensor:
            return fast(encoder_hidden_states=encoder_hidden_states.clone(), **given)

    accelpass.reset(fast)
    for found, dense in zip(steps(Copies(), 0, words, noisy=0.2), model_along(model, words, 0.2), strict=True):
        near(found, dense)
    assert "4 call(s) began a run of their own" in notes(fast) and "accelpass.sampling_run" in notes(fast)
    accelpass.reset(fast)
    with accelpass.sampling_run(fast):
        assert equal(list(steps(Copies(), 0, words, noisy=0.2)), made)
    assert "sampling_run" not in notes(fast) and accelpass.state(fast) == []


def model_along(model: nn.Module, words: Tensor, noisy: float) -> list[Tensor]:
    return list(steps(model, 0, words, noisy=noisy))


@pytest.mark.parametrize("share", [1.0, 0.02], ids=["some noise", "hardly anything else"])
def test_runs_with_noise_take_turns(model: nn.Module, share: float) -> None:
    """One text tensor for two runs: what a call does not compute is of its own run, if that can be told at all."""
    fast, words = compiled("delta_cache", model), text(0)
    oracles, x, generator = [Oracle(model), Oracle(model)], [noise(0), noise(1)], torch.Generator().manual_seed(9)
    reused = 0
    for step, time in enumerate(TIMES):
        for turn in (0, 1):
            given = {"hidden_states": x[turn], "timestep": at(time), "encoder_hidden_states": words}
            made = fast(**given)
            if step and torch.allclose(made, oracles[turn](False, **given), atol=1e-5):
                reused += 1
            else:
                near(made, oracles[turn](True, **given))
            x[turn] = share * (x[turn] - 0.3 * made) + torch.randn(made.shape, generator=generator)
    assert (reused > 0) == (share == 1)
    assert share == 1 or "8 call(s) began a run of their own" in notes(fast)


def test_noise_under_a_plan(model: nn.Module) -> None:
    """A plan has no step to begin at in its middle: what cannot be told is computed, and is no error."""
    fast, x = compiled("tokencache", model), noise(0)
    for seed, time in enumerate(TIMES):
        given = {"hidden_states": x, "timestep": at(time), "encoder_hidden_states": text(0)}
        near(fast(**given), model(**given))
        x = noise(10 + seed)
    assert "4 call(s) began a run of their own, or were computed by themselves" in notes(fast)
    with pytest.raises(accelpass.StepError, match=r"timestep 0\.6, which the plan does not have"):
        fast(hidden_states=noise(1), timestep=at(0.6), encoder_hidden_states=text(0))


def test_requests_that_are_declared_take_turns(model: nn.Module) -> None:
    fast, words = compiled("delta_cache", model), text(0)
    wanted = []
    for seed in (0, 1):
        with accelpass.sampling_run(fast):
            wanted.append(list(steps(fast, seed, words, noisy=3.0)))
    requests = [accelpass.sampling_run(fast) for _ in range(2)]
    runs = [steps(fast, seed, words, noisy=3.0) for seed in (0, 1)]
    found: list[list[Tensor]] = [[], []]
    for _ in TIMES:
        for turn in (0, 1):
            with requests[turn]:
                found[turn].append(next(runs[turn]))
    assert equal(found[0], wanted[0]) and equal(found[1], wanted[1])
    assert {b.owner for b in accelpass.state(fast)} == {"sampling run", "sampling run 2"}
    del requests
    assert accelpass.state(fast) == []
