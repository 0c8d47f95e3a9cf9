"""Step caches in sampling runs that change on the way: guidance, batch, control, time; and what is reported of them."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

import accelpass
from accelpass.api.lookup import find
from tests.passes.run_truth import TIMES, TOKENS, Guided, Oracle, at, compiled, near, noise, notes, steps, text
from tests.public.test_sampling import Denoiser


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
    assert "1 call(s) found nothing that an earlier step of the run had kept in this shape" in notes(fast)


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
            r"only a piece of the model: a graph break cut it at .*test_sampling_changes\.py:\d+, in forward", why
        )
        assert "fullgraph=True" in why and "no block" not in why
    assert "graph_break()" in first, "Dynamo's reason"
