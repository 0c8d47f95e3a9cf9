"""Step caching as a user meets it: inside diffusers' pipeline, with plans, several runs, and models that do not fit."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import accelpass
from accelpass.api.lookup import find
from accelpass.ir.errors import OptionError, PassError, PlanError
from accelpass.ir.transform.steps import StepError
from accelpass.models_zoo import digits
from accelpass.passes.core.plan import Plan

SITES = ("transformer_blocks.0.attn1",)


# --- in a pipeline


@pytest.fixture
def pipe(monkeypatch: pytest.MonkeyPatch) -> Any:
    from diffusers import DDIMScheduler, DiTPipeline

    monkeypatch.setitem(digits.CONFIG, "num_layers", len(SITES))
    torch.manual_seed(0)
    made = DiTPipeline(digits.transformer(trained=False), digits.PixelSpace(), DDIMScheduler(**digits.SCHEDULE))
    made.set_progress_bar_config(disable=True)
    return made


def images(
    pipe: Any, model: nn.Module, labels: tuple[int, ...] = (3, 7), steps: int = 4, seed: int = 0, guidance: float = 2.0
) -> Tensor:
    before, pipe.transformer = pipe.transformer, model
    try:
        return digits.sample(pipe, list(labels), steps, seed, guidance)
    finally:
        pipe.transformer = before


def following(model: nn.Module, letters: str, **given: Any) -> Any:
    asked = {"name": "ditfastattn", "methods": dict.fromkeys(SITES, letters), **given}
    return torch.compile(model, backend="accelpass", options={"passes": [asked], "lowering": "eager"})


@pytest.mark.slow
def test_a_plan_is_searched_kept_and_followed(pipe: Any, tmp_path: Any) -> None:
    model = pipe.transformer
    dense = images(pipe, model)
    said = {"options": {"lowering": "eager"}, "progress": False}
    for threshold in (0.0, 1.0):
        passes = [{"name": "ditfastattn", "threshold": threshold}]
        torch._dynamo.reset()
        plan = accelpass.search_steps(model, lambda fast: images(pipe, fast), passes, scheduler="DDIM", steps=4, **said)
        (settings,) = plan.settings
        assert set(settings["methods"]) == set(SITES) and settings["guidance"] == "batch"
        assert settings["timesteps"] == (750.0, 500.0, 250.0, 0.0) and settings["latents"] == (1, 32, 32)
        assert settings["scheduler"] == "DDIM"
        plan.save(tmp_path / "plan.json")
        assert Plan.load(tmp_path / "plan.json").passes() == plan.passes()
        torch._dynamo.reset()
        options = {"plan": str(tmp_path / "plan.json"), "lowering": "eager"}
        fast = torch.compile(model, backend="accelpass", options=options)
        made = images(pipe, fast)
        report = find(fast).graphs[0].report.steps
        if threshold == 0:
            assert set("".join(settings["methods"].values())) == {"F"}
            torch.testing.assert_close(made, dense, atol=1e-6, rtol=0)
        else:
            assert set("".join(settings["methods"].values())) > {"F"}
            assert sum(report.flops) < 0.97 * 4 * report.dense
            assert not torch.equal(made, dense)
    # The plan is for this run alone, and says so.
    for steps, text in (
        (5, "timestep 800, which the plan does not have: it was made for 4 model calls from 750 to 0"),
        (2, "timestep 500, .* its step 0 is at 750"),
    ):
        accelpass.reset(fast)
        with pytest.raises(StepError, match=text) as caught:
            images(pipe, fast, steps=steps)
        assert "search_steps" in str(caught.value) and "reset(model)" in str(caught.value)


@pytest.mark.slow
def test_runs_do_not_leak_into_each_other(pipe: Any) -> None:
    """Other seeds, batches and numbers of steps through one compiled model, against one that is compiled for each."""
    model = pipe.transformer
    fast = following(model, "FAWC")
    runs = [((3, 7), 4, 0), ((1,), 4, 1), ((3, 7), 3, 2), ((1,), 2, 4), ((3, 7), 4, 0)]
    made = [images(pipe, fast, *run) for run in runs]
    for run, found in zip(runs, made, strict=True):
        if run in runs[1:3]:
            torch._dynamo.reset()
            torch.testing.assert_close(found, images(pipe, following(model, "FAWC"), *run), atol=1e-5, rtol=1e-4)
    assert torch.equal(made[0], made[-1])
    with pytest.raises(StepError, match="has 4 model calls, and this is number 5"):
        images(pipe, fast, steps=5)


def test_a_run_that_fails_half_way(pipe: Any) -> None:
    fast = following(pipe.transformer, "FAWC", timesteps=[750, 500, 250, 0])
    truth = images(pipe, fast)

    class Stops(nn.Module):
        config, dtype, device = pipe.transformer.config, torch.float32, torch.device("cpu")

        def __init__(self, at: int) -> None:
            super().__init__()
            self.left = at

        def forward(self, *args: Any, **given: Any) -> Any:
            self.left -= 1
            if self.left < 0:
                raise KeyboardInterrupt
            return fast(*args, **given)

    for at in (0, 1, 2, 3):
        with pytest.raises(KeyboardInterrupt):
            images(pipe, Stops(at), labels=(1, 2), seed=9)
        assert torch.equal(images(pipe, fast), truth), f"stopped before step {at}"


def test_state_reset_and_declared_runs(pipe: Any) -> None:
    fast = following(pipe.transformer, "FWA")
    with pytest.raises(accelpass.AccelpassError):
        accelpass.explain(fast)
    assert accelpass.state(fast) == []
    truth = images(pipe, fast, steps=3)
    kept = accelpass.state(fast)
    assert {(b.name, b.shape) for b in kept} == {(f"{s}:output", (4, 256, 96)) for s in SITES} | {
        (f"{s}:residual", (4, 3, 256, 32)) for s in SITES
    }
    assert all(b.owner == "sampling run" and b.lifetime == "sampling_run" and b.bytes == 4 * 256 * 96 * 4 for b in kept)
    past = {b.name: b for b in accelpass.state(fast, history=True)[len(kept) :]}
    assert {f"{name}[-{ago}]" for name in ("latents", "result 1") for ago in (1, 2, 3)} <= set(past)
    assert past["latents[-1]"].shape == (4, 1, 32, 32) and past["latents[-1]"].bytes == 4 * 32 * 32 * 4
    assert "class_labels (call 1)" in past, list(past)
    accelpass.reset(fast)
    assert accelpass.state(fast) == accelpass.state(fast, history=True) == []
    with accelpass.sampling_run(fast):
        assert torch.equal(images(pipe, fast, steps=3), truth)
        assert len(accelpass.state(fast)) == 2 * len(SITES)
        with pytest.raises(StepError, match="this is number 4"):  # no new run inside
            images(pipe, fast, steps=3)
    assert accelpass.state(fast) == []
    assert torch.equal(images(pipe, fast, steps=3), truth)


def test_without_the_guidance_that_the_plan_has(pipe: Any) -> None:
    fast = following(pipe.transformer, "FC")
    with pytest.raises(StepError, match="the batch holds different latents in its two halves"):
        images(pipe, fast, steps=2, guidance=1.0)
    with pytest.raises(StepError, match=r"the batch is odd \(1\)"):
        images(pipe, fast, (4,), steps=2, guidance=1.0)
    # F, A and W need no halves.
    torch._dynamo.reset()
    assert images(pipe, following(pipe.transformer, "FA"), (4,), steps=2, guidance=1.0).isfinite().all()


# --- small models


class Block(nn.Module):
    def __init__(self, width: int, attends: bool = True) -> None:
        super().__init__()
        self.attends = attends
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.q, self.k, self.v, self.o = (nn.Linear(width, width) for _ in range(4))
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        if self.attends:
            h = self.norm1(x)
            q, k, v = (p(h).unflatten(-1, (2, -1)).transpose(1, 2) for p in (self.q, self.k, self.v))
            x = x + self.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Denoiser(nn.Module):
    def __init__(self, attends: bool = True, breaks: bool = False, seed: int = 0) -> None:
        torch.manual_seed(seed)
        super().__init__()
        self.breaks = breaks
        self.time = nn.Linear(1, 16)
        self.blocks = nn.ModuleList(Block(16, attends) for _ in range(2))
        self.head = nn.Linear(16, 16)

    def forward(self, hidden_states: Tensor, timestep: Tensor) -> Tensor:
        x = hidden_states + self.time(timestep[:, None, None])
        for number, block in enumerate(self.blocks):
            if self.breaks and number == 1:
                torch._dynamo.graph_break()
            x = block(x)
        return self.head(x)


def small(model: nn.Module, letters: str = "FAA", **given: Any) -> Any:
    methods = {f"blocks.{n}": letters for n in range(2)}
    asked = {"name": "ditfastattn", "methods": methods, **given}
    return torch.compile(model, backend="accelpass", options={"passes": [asked], "lowering": "eager"})


def small_run(
    model: Any, seed: int = 0, times: tuple[float, ...] = (0.9, 0.6, 0.3), tokens: int = 6, batch: int = 2
) -> list[Tensor]:
    x, made = torch.randn(batch, tokens, 16, generator=torch.Generator().manual_seed(seed)), []
    for time in times:
        with torch.no_grad():
            made.append(model(hidden_states=x, timestep=torch.full((batch,), time)))
        x = x - 0.5 * made[-1]
    return made


def equal(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_instances_of_a_class_have_runs_of_their_own() -> None:
    models = [Denoiser(seed=0).eval(), Denoiser(seed=1).eval()]
    options = {
        "passes": [{"name": "ditfastattn", "methods": {f"blocks.{n}": "FAA" for n in range(2)}}],
        "lowering": "eager",
    }
    one, two = (torch.compile(m, backend="accelpass", options=options) for m in models)
    alone = [small_run(one), small_run(two)]
    assert not equal(*alone)
    assert not torch.allclose(alone[0][1], small_run(models[0])[1], atol=1e-4), "something is shared"
    xs = [torch.randn(2, 6, 16, generator=torch.Generator().manual_seed(0)) for _ in range(2)]
    for step, time in enumerate((0.9, 0.6, 0.3)):
        for n, fast in enumerate((one, two)):  # in turn
            with torch.no_grad():
                out = fast(hidden_states=xs[n], timestep=torch.full((2,), time))
            assert torch.equal(out, alone[n][step])
            xs[n] = xs[n] - 0.5 * out
    accelpass.reset(one)
    assert not accelpass.state(one) and accelpass.state(two)


def test_a_new_run_drops_what_the_last_one_kept() -> None:
    fast = small(Denoiser().eval(), "FAFW")
    small_run(fast, times=(0.9, 0.7, 0.5, 0.3))
    assert {b.name for b in accelpass.state(fast)} == {
        f"blocks.{n}:{what}" for n in range(2) for what in ("output", "residual")
    }
    small_run(fast, seed=1, times=(0.9,))
    assert {b.name for b in accelpass.state(fast)} == {f"blocks.{n}:output" for n in range(2)}


def test_one_model_compiled_twice() -> None:
    model = Denoiser().eval()
    shares, dense = small(model), small(model, "FFF")
    xs: dict[str, Tensor] = {}
    alone = {"shares": small_run(shares), "dense": small_run(dense)}
    assert equal(alone["dense"], small_run(model)) and not equal(*alone.values())
    for step, time in enumerate((0.9, 0.6, 0.3)):
        for name, fast in (("shares", shares), ("dense", dense)):
            x = xs.get(name, torch.randn(2, 6, 16, generator=torch.Generator().manual_seed(0)))
            with torch.no_grad():
                out = fast(hidden_states=x, timestep=torch.full((2,), time))
            assert torch.equal(out, alone[name][step])
            xs[name] = x - 0.5 * out


@pytest.mark.slow
def test_sizes_that_change() -> None:
    """Dynamo makes sizes symbolic at the second one; each size is compiled when it comes, and is a run of its own."""
    model = Denoiser().eval()
    fast = small(model)
    for tokens, batch in ((6, 2), (8, 2), (10, 4)):
        torch_made = small_run(fast, tokens=tokens, batch=batch)
        torch._dynamo.reset()
        fresh = small_run(small(model), tokens=tokens, batch=batch)
        for a, b in zip(torch_made, fresh, strict=True):
            torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)


def test_a_graph_break_inside() -> None:
    """The second graph has the latents and not the timestep: better no result than steps counted in one half alone."""
    fast = small(Denoiser(breaks=True).eval())
    with pytest.raises(Exception, match=r"the model has no input named timestep.* a graph break cuts the model in two"):
        small_run(fast)


def test_no_attention() -> None:
    model = Denoiser(attends=False).eval()
    fast = small(model)
    assert equal(small_run(fast), small_run(model))
    assert accelpass.state(fast) == []
    (graph,) = find(fast).graphs
    (why,) = graph.report.records[0].skipped.values()
    assert "no attention over the latents" in why
    assert why[:40] in " ".join(str(accelpass.explain(fast)).split())


def test_no_blocks() -> None:
    class Images(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 3, padding=1)

        def forward(self, hidden_states: Tensor, timestep: Tensor) -> Tensor:
            return self.conv(hidden_states) * timestep[:, None, None, None]

    model = Images().eval()
    fast = small(model)
    given = {"hidden_states": torch.randn(2, 3, 8, 8), "timestep": torch.ones(2)}
    with torch.no_grad():
        assert torch.equal(fast(**given), model(**given))
    (why,) = find(fast).graphs[0].report.records[0].skipped.values()
    assert "no block of this graph reads the latents" in why and "hidden_states" in why


def test_no_timestep() -> None:
    class Untimed(Denoiser):
        def forward(self, hidden_states: Tensor, moment: Tensor) -> Tensor:
            return super().forward(hidden_states, moment)

    fast = small(Untimed().eval())
    with (
        pytest.raises(
            Exception, match=r"ditfastattn: the model has no input named timestep, .* rename the argument, or wrap"
        ),
        torch.no_grad(),
    ):
        fast(hidden_states=torch.randn(2, 6, 16), moment=torch.ones(2))


def test_gradients_are_refused() -> None:
    fast = small(Denoiser())
    with pytest.raises(Exception, match="ditfastattn: there is no gradient"):
        fast(hidden_states=torch.randn(2, 6, 16), timestep=torch.ones(2))


def test_a_plan_for_another_model_or_size() -> None:
    model = Denoiser().eval()
    passes = [{"name": "ditfastattn", "threshold": 0.5}]
    plan = accelpass.search_steps(model, small_run, passes, options={"lowering": "eager"}, progress=False)
    other = Denoiser().eval()
    other.blocks[1].up = nn.Linear(16, 48)
    other.blocks[1].down = nn.Linear(48, 16)
    options = {"plan": plan, "lowering": "eager"}
    with pytest.raises(Exception, match=r"the plan belongs to another model: blocks\.1\.up\.weight"):
        small_run(torch.compile(other, backend="accelpass", options=options))
    torch._dynamo.reset()
    with pytest.raises(
        Exception,
        match=r"is for latents of \[6, 16\], and these are \[9, 16\]; make a plan for this size \(accelpass\.search_steps\)",
    ):
        small_run(torch.compile(model, backend="accelpass", options=options), tokens=9)
    damaged = copy.deepcopy(plan)
    damaged.settings[0]["methods"] = {"blocks.0": "FA"}
    with pytest.raises(OptionError, match=r"one letter for each model call \(3\)"):
        accelpass.compile(model, plan=damaged)
    assert issubclass(PlanError, ValueError) and issubclass(StepError, ValueError) and PassError


def test_what_search_steps_takes() -> None:
    model = Denoiser()
    for passes in ([], ["int8_weights"], ["ditfastattn", "tokencache"]):
        with pytest.raises(OptionError, match="search_steps fits one pass that works across steps at a time"):
            accelpass.search_steps(model, small_run, passes, progress=False)
