"""TokenCache against an eager model that is written from the method's card, and its predictor on tokens that never change."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import accelpass
from accelpass.api.lookup import find
from accelpass.ir.core.graph import aten, is_call, value
from accelpass.ir.errors import OptionError, PlanError
from accelpass.ir.transform.steps import StepError
from accelpass.models_zoo import tiny_diffusers
from accelpass.passes.core.plan import Plan
from accelpass.passes.step_cache.tokencache import IMPORTANCE, TokenCache, Trained
from tests.passes.step_truth import denoise, soft_block, token_cache, token_schedule
from tests.sweep import examples, sweep

TIMES = [9.0, 8.0, 7.0, 5.0, 4.0, 3.0, 2.0, 1.0]
TOKENS = 16
CLOSE = {"atol": 2e-5, "rtol": 1e-4}
SHARE = st.sampled_from([0.0, 0.25, 0.4, 0.5, 0.75, 1.0])
SCHEDULES = st.fixed_dictionaries(
    {
        "intervals": st.tuples(st.integers(1, 4), st.integers(1, 5)),
        "boundary": SHARE,
        "blocks": SHARE,
        "rotation": st.sampled_from([0, 2, 3, 4]),
    }
)
ALWAYS: dict[str, Any] = {"intervals": (9, 9), "boundary": 1.0, "blocks": 1.0, "rotation": 0}
"""Every block is pruned at every step but the first."""


def dit(layers: int = 4) -> tuple[nn.Module, dict[str, Any]]:
    from diffusers import DiTTransformer2DModel

    torch.manual_seed(0)
    model = DiTTransformer2DModel(
        num_attention_heads=4, attention_head_dim=16, num_layers=layers, sample_size=8, num_embeds_ada_norm=10
    )
    _, call = tiny_diffusers.build("dit")
    return model.eval(), call


def pixart() -> tuple[nn.Module, dict[str, Any]]:
    torch.manual_seed(0)
    model, call = tiny_diffusers.build("pixart")
    return model.eval(), call


def random_table(layers: int, seed: int, steps: int = len(TIMES), tokens: int = TOKENS) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(layers, steps, tokens, generator=generator) * torch.rand(layers, steps, 1, generator=generator)


def paths_of(model: nn.Module) -> tuple[str, ...]:
    return tuple(f"transformer_blocks.{n}" for n in range(len(model.transformer_blocks)))


def plan_of(model: nn.Module, table: Tensor, **options: Any) -> Plan:
    made = TokenCache(paths=paths_of(model), timesteps=tuple(TIMES), latents=(4, 8, 8), **options)
    return Plan.of(model, [made], {IMPORTANCE: table})


def fast_of(model: nn.Module, table: Tensor, lowering: str = "eager", **options: Any) -> Any:
    asked = {"plan": plan_of(model, table, **options), "lowering": lowering}
    return torch.compile(model, backend="accelpass", options=asked)


def truth_of(model: nn.Module, call: dict[str, Any], table: Tensor, **options: Any) -> list[Tensor]:
    pruned, keep = token_schedule(table, **options)
    return denoise(token_cache(copy.deepcopy(model), pruned, keep), call, TIMES)


def same(found: list[Tensor], truth: list[Tensor]) -> None:
    for step, (a, b) in enumerate(zip(found, truth, strict=True)):
        torch.testing.assert_close(a, b, **CLOSE, msg=lambda m, step=step: f"step {step}: {m}")


def follow(fast: Any, pruning: Trained) -> None:
    """Let a compiled model follow another plan whose ways to compute a block are compiled already."""
    (graph,) = find(fast).graphs
    graph.steps.passes = (pruning,)
    for made in graph.steps.models.values():
        made.sites[:] = [[(pruning, path) for _, path in block] for block in made.sites]
    accelpass.reset(fast)


def trained(table: Tensor, **options: Any) -> Trained:
    paths = tuple(f"transformer_blocks.{n}" for n in range(table.shape[0]))
    return Trained(paths=paths, timesteps=tuple(map(float, range(table.shape[1], 0, -1))), importance=table, **options)


# --- the compiled model


@pytest.mark.parametrize(
    ("name", "ratio"),
    sweep(("dit", 0.5), ("pixart", 0.3), ("dit", 0.8), ("dit", 1.0), fast=2),
    ids=lambda v: str(v),
)
def test_follows_the_oracle(name: str, ratio: float) -> None:
    model, call = dit() if name == "dit" else pixart()
    layers = len(model.transformer_blocks)
    table = random_table(layers, 0)
    fast = fast_of(model, table, ratio=ratio, **ALWAYS)
    same(denoise(fast, call, TIMES), truth_of(model, call, table, ratio=ratio, **ALWAYS))

    @settings(max_examples=examples(6), deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(seed=st.integers(1, 10**6), options=SCHEDULES)
    def other_plans(seed: int, options: dict[str, Any]) -> None:
        table = random_table(layers, seed)
        follow(fast, Trained(paths=paths_of(model), timesteps=tuple(TIMES), importance=table, ratio=ratio, **options))
        same(denoise(fast, call, TIMES), truth_of(model, call, table, ratio=ratio, **options))

    other_plans()


@pytest.mark.parametrize(
    "options", [{"ratio": 0.0}, {"intervals": (1, 1)}, {"blocks": 0.0}], ids=["ratio", "intervals", "blocks"]
)
def test_dense_without_pruning(options: dict[str, Any]) -> None:
    model, call = dit(2)
    fast = fast_of(model, random_table(2, 0), **{**ALWAYS, **options})
    for a, b in zip(denoise(fast, call, TIMES), denoise(model, call, TIMES), strict=True):
        assert torch.equal(a, b)
    report = find(fast).graphs[0].report.steps
    assert set(report.flops) == {report.dense}
    assert not accelpass.state(fast), "nothing reads what would be kept"


def test_all_pruned_is_the_first_step_again() -> None:
    """Only what surrounds the blocks (the patches, the last norm) still sees the new step."""
    model, call = dit(2)
    fast = fast_of(model, random_table(2, 0), **{**ALWAYS, "ratio": 1.0})
    denoise(fast, call, TIMES)
    kept = [(b.name, b.shape, b.lifetime) for b in accelpass.state(fast)]
    assert kept == [(f"transformer_blocks.{n}:output", (2, TOKENS, 64), "sampling_run") for n in range(2)]
    report = find(fast).graphs[0].report.steps
    (surrounding,) = set(report.flops[1:])
    assert surrounding < 0.2 * report.dense


def test_pruned_blocks_compute_their_kept_tokens_alone() -> None:
    model, call = dit(2)
    table = random_table(2, 3)
    options: dict[str, Any] = {"ratio": 0.75, "intervals": (3, 3), "boundary": 1.0, "blocks": 1.0, "rotation": 0}
    fast = fast_of(model, table, **options)
    denoise(fast, call, TIMES)
    (graph,) = find(fast).graphs
    (made,) = graph.steps.models.values()
    for (block, actions), piece in made.stages.items():
        rows = {
            value(n.args[0]).shape[1] for n in piece.fn.__self__.graph.nodes if is_call(n, aten.linear)
            if value(n.args[0]).dim() == 3
        }  # fmt: skip
        if actions == ("tokens 4",):
            assert rows == {4}, f"block {block} computes {rows} rows"
        elif block in (0, 1):
            assert rows == {TOKENS}
    # As torch's own counter counts the eager model of the card.
    pruned, keep = token_schedule(table, **options)
    slow = token_cache(copy.deepcopy(model), pruned, keep)
    counted = []
    for time in TIMES:
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            slow(**{**call, "timestep": torch.full((2,), int(time))})
        counted.append(counter.get_total_flops())
    report = graph.report.steps
    for ours, theirs in zip(report.flops, counted, strict=True):
        assert ours / report.dense == pytest.approx(theirs / counted[0], abs=0.02)
    assert min(counted) < 0.5 * counted[0]


@pytest.mark.slow
def test_compiled_with_inductor() -> None:
    model, call = dit(1)
    table = random_table(1, 5)
    options: dict[str, Any] = {"ratio": 0.5, "intervals": (2, 3), "boundary": 0.5, "blocks": 1.0, "rotation": 2}
    fast = fast_of(model, table, "inductor", **options)
    truth = truth_of(model, call, table, **options)
    same(denoise(fast, call, TIMES), truth)
    same(denoise(fast, call, TIMES), truth)


# --- the schedule


@given(
    seed=st.integers(0, 10**6),
    layers=st.integers(1, 7),
    steps=st.integers(1, 20),
    ratio=st.sampled_from([0.0, 0.01, 0.3, 0.5, 0.9, 1.0]),
    options=SCHEDULES,
)
def test_schedule(seed: int, layers: int, steps: int, ratio: float, options: dict[str, Any]) -> None:
    table = random_table(layers, seed, steps, 10)
    found = trained(table, ratio=ratio, **options)
    pruned, keep = token_schedule(table, ratio, **options)
    names = [frozenset(f"transformer_blocks.{b}" for b in now) for now in pruned]
    assert list(found.pruned) == names
    assert not found.pruned[0]
    for step in range(steps):
        for layer, path in enumerate(found.paths):
            assert found.rows(path, step).tolist() == keep[step][layer].tolist()
            action = found.action(step, path)
            if path in names[step]:
                assert action == ("reuse" if ratio == 1 else f"tokens {10 - round(ratio * 10)}")
            else:
                assert action == ("full+output" if any(path in now for now in names) else "full")


@given(seed=st.integers(0, 10**6), layers=st.integers(2, 9), rotation=st.integers(2, 5), blocks=SHARE)
def test_every_block_is_refreshed_in_turn(seed: int, layers: int, rotation: int, blocks: float) -> None:
    found = trained(random_table(layers, seed, 24), rotation=rotation, blocks=blocks, intervals=(99, 99), boundary=1.0)
    for path in found.paths:
        without = 0
        for now in found.pruned:
            without = without + 1 if path in now else 0
            assert without < rotation, f"{path} was pruned {without} prediction steps in a row"


def test_phases() -> None:
    found = trained(random_table(2, 0, 10), intervals=(2, 3), boundary=0.4, blocks=1.0, rotation=0)
    assert [bool(now) for now in found.pruned] == [False, True] * 2 + [False, True, True] * 2
    found = trained(random_table(2, 0, 6), intervals=(2, 3), boundary=0.0, blocks=1.0, rotation=0)
    assert [bool(now) for now in found.pruned] == [False, True, True] * 2
    found = trained(random_table(4, 0, 6), intervals=(2, 2), boundary=1.0, blocks=0.5, rotation=0)
    table = found.importance
    for step in (1, 3, 5):
        least = table[:, step].mean(-1).topk(2, largest=False).indices.tolist()
        assert found.pruned[step] == {found.paths[i] for i in least}


# --- what is refused


def test_needs_a_predictor() -> None:
    model, call = dit(1)
    fast = torch.compile(model, backend="accelpass", options={"passes": ["tokencache"], "lowering": "eager"})
    with pytest.raises(Exception, match=r"needs a trained predictor: plan = accelpass\.search_steps"), torch.no_grad():
        fast(**call)


def test_a_table_of_another_size() -> None:
    made = TokenCache(paths=("a", "b"), timesteps=(3.0, 2.0, 1.0))
    with pytest.raises(PlanError, match=r"table is \[2, 4, 5\]; 2 blocks and 3 steps need \[2, 3, tokens\]"):
        made.bound({IMPORTANCE: torch.rand(2, 4, 5)}, torch.device("cpu"))


@pytest.mark.parametrize(
    "options", [{"ratio": 1.1}, {"boundary": -0.1}, {"blocks": 2.0}, {"intervals": (0, 1)}, {"rotation": 1}]
)
def test_options_out_of_range(options: dict[str, Any]) -> None:
    with pytest.raises(OptionError, match=f"{next(iter(options))}=.* is not supported; use"):
        TokenCache(**options)


def test_a_call_beyond_the_plan() -> None:
    with pytest.raises(StepError, match="has 3 model calls, and this is number 4"):
        trained(random_table(1, 0, 3)).action(3, "transformer_blocks.0")


# --- the predictor


class Pointwise(nn.Module):
    """Two blocks that treat each token by itself; the timestep reaches the left half of the tokens alone."""

    def __init__(self, width: int = 16, tokens: int = 8) -> None:
        super().__init__()
        self.time = nn.Linear(1, width)
        self.register_buffer("moved", (torch.arange(tokens) < tokens // 2).float()[:, None])
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 32), nn.GELU(), nn.Linear(32, width)) for _ in range(2)
        )
        self.head = nn.Linear(width, width)

    def forward(self, hidden_states: Tensor, timestep: Tensor) -> Tensor:
        x = hidden_states + self.moved * self.time(timestep[:, None, None] / 4)
        for block in self.blocks:
            x = x + block(x)
        return self.head(x)


def learn(model: nn.Module, runs: int = 40) -> Plan:
    numbers = iter(range(runs))

    def sample(fast: Any) -> None:
        x = torch.randn(2, 8, 16, generator=torch.Generator().manual_seed(next(numbers)))
        for time in (9.0, 6.0, 3.0):
            with torch.no_grad():
                fast(hidden_states=x, timestep=torch.full((2,), time))

    return accelpass.search_steps(model, sample, ["tokencache"], runs=runs, progress=False)


def test_tokens_that_never_change_become_unimportant(tmp_path: Any) -> None:
    torch.manual_seed(0)
    model = Pointwise().eval()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    plan = learn(model)
    table = plan.tensors[IMPORTANCE]
    assert table.dtype == torch.float16 and table.shape == (2, 3, 8)
    assert table.min() >= 0 and table.max() <= 1 and (table[:, 0] == 1).all()
    left, right = table[:, 1:].float().split(4, dim=-1)
    assert right.max() < 0.1 < 0.5 < left[-1].min()
    assert all(p.grad is None and torch.equal(p, before[name]) for name, p in model.named_parameters())
    (settings,) = plan.settings
    assert settings["timesteps"] == (9.0, 6.0, 3.0) and settings["paths"] == ("block", "block#2")
    torch._dynamo.reset()
    assert torch.equal(learn(model).tensors[IMPORTANCE], table), "the same seeds give the same table"

    # What it learned to leave out costs nothing: static tokens come from the cache, and the result is dense.
    plan.settings[0].update(ratio=0.5, intervals=(3, 3), boundary=1.0, blocks=1.0, rotation=0)
    plan.save(tmp_path / "plan.json")
    torch._dynamo.reset()
    fast = torch.compile(model, backend="accelpass", options={"plan": str(tmp_path / "plan.json"), "lowering": "eager"})
    x = torch.randn(2, 8, 16)
    for time in (9.0, 6.0, 3.0):
        with torch.no_grad():
            given = {"hidden_states": x, "timestep": torch.full((2,), time)}
            torch.testing.assert_close(fast(**given), model(**given), **CLOSE)
    report = find(fast).graphs[0].report.steps
    assert report.actions[1] == ("tokens 50%", "tokens 50%") and report.flops[1] < 0.75 * report.dense


def test_the_mixture_is_the_cards() -> None:
    """One step of training: the loss that is told is that of soft blocks over the dense outputs of the step before."""
    torch.manual_seed(1)
    model, said = Pointwise().eval(), []
    from accelpass.passes.step_cache.tokencache_training import TokenCacheTraining

    search = TokenCacheTraining(TokenCache(pressure=0.3), said.append)
    fast = torch.compile(model, backend="accelpass", options={"passes": [search.in_search], "lowering": "aten"})
    xs = torch.randn(2, 2, 8, 16)
    for x, time in zip(xs, (9.0, 6.0), strict=True):
        with torch.no_grad():
            fast(hidden_states=x, timestep=torch.full((2,), time))
    w = torch.full((2, 8), 2.0, requires_grad=True)

    def outputs(x: Tensor, time: float) -> list[Tensor]:
        z = x + model.moved * model.time(torch.full((2, 1, 1), time) / 4)
        made = []
        for block in model.blocks:
            z = z + block(z)
            made.append(z)
        return made

    old, new = (outputs(x, t) for x, t in zip(xs, (9.0, 6.0), strict=True))
    z = xs[1] + model.moved * model.time(torch.full((2, 1, 1), 6.0) / 4)
    for n, block in enumerate(model.blocks):
        z = soft_block(lambda z, block=block: z + block(z), z, old[n], w[n].sigmoid())
    error = (z - new[-1]).square().mean() / (new[-1] - old[-1]).square().mean()
    (slope,) = torch.autograd.grad(error + 0.3 * w.sigmoid().mean(), [w])
    assert said[-1] == f"step 1: error {error.item():.3f}, mean importance {w.sigmoid().mean().item():.2f}"
    torch.testing.assert_close(search.logits[1].grad, slope, atol=1e-6, rtol=1e-3)
    # Adam's first step is as long as its rate, against the slope.
    torch.testing.assert_close(search.logits[1].detach(), 2.0 - 0.2 * slope.sign(), atol=1e-3, rtol=1e-3)
