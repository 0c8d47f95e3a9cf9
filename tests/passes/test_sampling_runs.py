"""Step caches in sampling runs that change, stop, take turns and run at once: nothing of one run is in another."""

from __future__ import annotations

import copy
import re
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import accelpass
from accelpass.lookup import find
from accelpass.passes.plan import Plan
from accelpass.passes.step_cache.tokencache import IMPORTANCE, TokenCache
from tests.public.test_sampling import Block, Denoiser

TIMES = (0.9, 0.7, 0.5, 0.3, 0.1)
TOKENS, WIDTH = 12, 16


class Guided(nn.Module):
    """A denoiser that reads a text, and a residual like a ControlNet's."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        super().__init__()
        self.time, self.text = nn.Linear(1, WIDTH), nn.Linear(8, WIDTH)
        self.blocks = nn.ModuleList(Block(WIDTH) for _ in range(2))
        self.head = nn.Linear(WIDTH, WIDTH)

    def forward(
        self, hidden_states: Tensor, timestep: Tensor, encoder_hidden_states: Tensor, control: Tensor | None = None
    ) -> Tensor:
        at = timestep[..., None] if timestep.dim() == 2 else timestep[:, None, None]
        x = hidden_states + self.time(at) + self.text(encoder_hidden_states).mean(1, keepdim=True)
        for number, block in enumerate(self.blocks):
            x = block(x)
            if number == 0 and control is not None:
                x = x + control
        return self.head(x)


class Cached(nn.Module):
    """A block that keeps what it adds for each branch by itself, as the test says which it is."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.kept = inner, {}
        self.branch, self.full = 0, True

    def forward(self, x: Tensor) -> Tensor:
        if self.full:
            self.kept[self.branch] = self.inner(x) - x
        return x + self.kept[self.branch]


class Oracle:
    """The eager model with cached blocks: ``full`` and ``branch`` of a call are given by the test."""

    def __init__(self, model: nn.Module) -> None:
        self.model = copy.deepcopy(model)
        self.model.blocks = nn.ModuleList(Cached(b) for b in self.model.blocks)

    def __call__(self, full: bool, branch: int = 0, **given: Tensor) -> Tensor:
        for block in self.model.blocks:
            block.branch, block.full = branch, full
        return self.model(**given)


def noise(seed: int, batch: int = 1) -> Tensor:
    return torch.randn(batch, TOKENS, WIDTH, generator=torch.Generator().manual_seed(seed))


def text(seed: int, length: int = 4, batch: int = 1) -> Tensor:
    return torch.randn(batch, length, 8, generator=torch.Generator().manual_seed(100 + seed))


def at(time: float, batch: int = 1) -> Tensor:
    return torch.full((batch,), time)


def settings(which: str, model: nn.Module, times: tuple[float, ...] = TIMES) -> dict[str, Any]:
    paths = [f"blocks.{n}" for n in range(len(model.blocks))]
    if which == "tokencache":
        made = TokenCache(paths=tuple(paths), timesteps=times, latents=(TOKENS, WIDTH), intervals=(2, 2), rotation=0)
        table = torch.rand(len(paths), len(times), TOKENS, generator=torch.Generator().manual_seed(1))
        return {"plan": Plan.of(model, [made], {IMPORTANCE: table})}
    if which == "ditfastattn":
        return {"passes": [{"name": which, "methods": dict.fromkeys(paths, "FAFAA")}]}
    return {"passes": [{"name": "delta_cache", "start": 0, "interval": 2}]}


def compiled(which: str, model: nn.Module) -> Any:
    return torch.compile(model, backend="accelpass", options={**settings(which, model), "lowering": "eager"})


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch._dynamo.reset()
    with torch.no_grad():
        yield


@pytest.fixture
def model() -> nn.Module:
    return Guided().eval()


def steps(
    fast: Any, seed: int, words: Tensor, times: tuple[float, ...] = TIMES, noisy: float = 0.0
) -> Iterator[Tensor]:
    """The model's results at the steps of a run, which goes on when the next is asked for."""
    x, generator = noise(seed), torch.Generator().manual_seed(1000 + seed)
    for time in times:
        with torch.no_grad():
            made = fast(hidden_states=x, timestep=at(time), encoder_hidden_states=words)
        yield made
        x = x - 0.3 * made + noisy * torch.randn(x.shape, generator=generator)


def equal(found: list[Tensor], wanted: list[Tensor]) -> bool:
    return len(found) == len(wanted) and all(map(torch.equal, found, wanted))


def near(found: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-4)


def notes(fast: Any) -> str:
    return " ".join(accelpass.explain(fast).notes)


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
    assert "4 call(s) began a run of its own" in notes(fast) and "accelpass.sampling_run" in notes(fast)
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
    assert share == 1 or "8 call(s) began a run of its own" in notes(fast)


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


# --- changes in the middle of a run


def test_guidance_in_two_calls_ends(model: nn.Module) -> None:
    """Texts of two lengths are two graphs; which call comes first, or is left, is told by the text."""
    fast, words = compiled("delta_cache", model), (text(0, 4), text(1, 7))
    for order in ((0, 1), (1, 0)):
        for left in (0, 1):
            accelpass.reset(fast)
            oracle, x = Oracle(model), noise(left)
            for step, time in enumerate(TIMES):
                for branch in order if step < 3 else (left,):
                    given = {"hidden_states": x, "timestep": at(time), "encoder_hidden_states": words[branch]}
                    want = oracle(step % 2 == 0, branch, **given)
                    near(fast(**given), want)
                x = x - 0.3 * want
    assert len(find(fast).graphs) == 2


def test_guidance_in_two_calls_begins_late(model: nn.Module) -> None:
    fast, words, oracle, x = compiled("delta_cache", model), (text(0), text(1)), Oracle(model), noise(0)
    for step, time in enumerate(TIMES):
        for branch in (0,) if step == 0 else (1, 0):
            given = {"hidden_states": x, "timestep": at(time), "encoder_hidden_states": words[branch]}
            # A second text at the second step: which of the two calls had the first one cannot be told yet.
            want = oracle(step % 2 == 0 or step == 1, branch, **given)
            near(fast(**given), want)
        x = x - 0.3 * want
    assert "had inputs that no call of the step before had" in notes(fast)


def test_the_batch_halves(which: str, model: nn.Module) -> None:
    """Guidance in one batch is switched off: the first step of one half alone finds nothing that fits, and computes it."""
    fast, both, x = compiled(which, model), torch.cat([text(0), text(1)]), noise(0)
    for time in TIMES[:3]:
        twice = torch.cat([x, x])
        made = fast(hidden_states=twice, timestep=at(time, 2), encoder_hidden_states=both)
        x = x - 0.3 * (made[:1] - 2 * made[1:])
    for step, time in enumerate(TIMES[3:], 3):
        given = {"hidden_states": x, "timestep": at(time), "encoder_hidden_states": both[1:]}
        made, dense = fast(**given), model(**given)
        if step == 3 or which == "ditfastattn":
            assert torch.allclose(made, dense, atol=1e-5) == (step == 3)
        x = x - 0.3 * made
    assert "1 call(s) had inputs that no call of the step before had" in notes(fast)


def test_the_batch_halves_and_nothing_else_does() -> None:
    """A model without other inputs: what was kept for two samples is no use for one."""
    model = Denoiser().eval()
    fast, x = compiled("delta_cache", model), noise(0)
    for step, time in enumerate(TIMES):
        batch = 2 if step < 3 else 1
        given = {"hidden_states": x.repeat(batch, 1, 1), "timestep": at(time, batch)}
        made = fast(**given)
        assert torch.allclose(made, model(**given), atol=1e-5) == (step != 1), step
        x = x - 0.3 * made[:1]
    assert "1 call(s) found nothing that an earlier step of its run had kept in this shape" in notes(fast)


def test_a_controlnet_ends(model: nn.Module) -> None:
    """Its residual is another at each step; when it ends, the model is compiled anew and the run goes on."""
    fast, words, oracle, x = compiled("delta_cache", model), text(0), Oracle(model), noise(0)
    times = tuple(0.9 - 0.1 * n for n in range(8))
    for step, time in enumerate(times):
        given = {"hidden_states": x, "timestep": at(time), "encoder_hidden_states": words}
        if step < 5:
            given["control"] = 0.1 * noise(50 + step)
        want = oracle(step % 2 == 0 or step == 1, **given)  # at step 1 nothing says yet that it is what changes
        near(fast(**given), want)
        x = x - 0.3 * want
    assert len(find(fast).graphs) == 2


@pytest.mark.parametrize("tokens", [False, True], ids=["one time", "a time for each token"])
@pytest.mark.parametrize("rising", [False, True], ids=["falls", "rises"])
def test_time(model: nn.Module, rising: bool, tokens: bool) -> None:
    fast, words, times = compiled("delta_cache", model), text(0), TIMES[::-1] if rising else TIMES
    for seed in range(2):
        oracle, x = Oracle(model), noise(seed)
        for step, time in enumerate(times):
            timestep = torch.full((1, TOKENS), time) if tokens else at(time)
            if tokens:
                timestep[:, :4] = 1.0 if rising else 0.0  # given tokens have no noise
            given = {"hidden_states": x, "timestep": timestep, "encoder_hidden_states": words}
            want = oracle(step % 2 == 0, **given)
            near(fast(**given), want)
            x = x - 0.3 * want
    view = accelpass.explain(fast).steps
    assert view is not None and view.timesteps[1:] == pytest.approx(times[1:])
    assert [row[0] for row in view.actions] == ["full", "reuse", "full", "reuse", "full"]


def test_the_report_is_of_what_ran(model: nn.Module) -> None:
    """A run that is cut short saves what it saved, not what the schedule would have."""
    fast, words = compiled("delta_cache", model), text(0)
    for count in (1, 4):
        accelpass.reset(fast)
        list(steps(fast, 0, words, TIMES[:count]))
        report = accelpass.explain(fast)
        assert report.steps is not None and report.steps.steps == count
        assert report.flops is not None and (report.flops[0] == report.flops[1]) == (count == 1)
        done = report.passes["delta_cache"].took["blocks.0"]
        assert f"in {count} model calls that ran: full {(count + 1) // 2}" in str(done)


class Cut(Guided):
    """Its blocks are in a second graph, which has neither the latents nor the timestep."""

    def forward(self, hidden_states: Tensor, timestep: Tensor, encoder_hidden_states: Tensor) -> Tensor:
        h = self.head(hidden_states + self.time(timestep[:, None, None]))
        torch._dynamo.graph_break()
        for block in self.blocks:
            h = block(h)
        return h


def test_a_graph_break_is_named() -> None:
    fast = compiled("delta_cache", Cut().eval())
    next(steps(fast, 0, text(0)))
    first, second = (
        why
        for g in find(fast).graphs
        for r in g.report.records
        if r.name == "delta_cache"
        for why in r.skipped.values()
    )
    for why in (first, second):
        assert re.search(
            r"only a piece of the model: a graph break cut it at .*test_sampling_runs\.py:\d+, in forward", why
        )
        assert "fullgraph=True" in why and "no block" not in why
    assert "graph_break()" in first, "Dynamo's reason"
