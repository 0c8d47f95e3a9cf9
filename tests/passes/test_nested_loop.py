"""A sampler inside a decode step against the card's loop, and what is computed once of it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from accelpass import KVCache
from accelpass.backends import graphs_of
from accelpass.ir.analyses.recurrence import loops, scheduled_loops
from accelpass.ir.core.capture import from_export
from accelpass.models_zoo.speech.model import FSQ, guided, speak, speaker
from accelpass.passes.core.base import Record, Skip
from accelpass.passes.structure.loops.nested_loop import NestedLoop
from tests.sweep import examples


def fsq(h: Tensor, wi: nn.Module, wo: nn.Module, s: int = 9) -> Tensor:
    """The card's."""
    return wo((torch.tanh(wi(h)) * s).round() / s)


def cfg_zero_star(vc: Tensor, vu: Tensor, w: float) -> Tensor:
    """The card's."""
    a, b = vc.flatten(1), vu.flatten(1)
    s = (a * b).sum(1) / (b * b).sum(1).clamp_min(1e-8)
    s = s.view(-1, *[1] * (vc.dim() - 1))
    return vu * s + w * (vc - vu * s)


def cfm(estimator: Any, mu: Tensor, cond: Tensor, noise: Tensor, steps: int, w: float) -> Tensor:
    """The card's solver, with the halves of guidance one after the other and times as numbers."""
    x, still = noise, max(1, int((steps + 1) * 0.04))
    for number in range(steps):
        if number >= still:
            t = torch.full((len(x),), 1 - number / steps)
            v = cfg_zero_star(estimator(x, mu, t, cond), estimator(x, mu * 0, t, cond), w)
            x = x - v / steps
    return x


class Solver(nn.Module):
    """The loop alone."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.estimator, self.solve = model.estimator, model.solve

    def forward(self, mu: Tensor, cond: Tensor, noise: Tensor) -> Tensor:
        return self.solve(mu, cond, noise)


def rewritten(model: nn.Module, *args: Tensor) -> tuple[Any, Record]:
    with torch.no_grad():
        program = from_export(torch.export.export(model, args))
    record = Record("nested_loop")
    NestedLoop().apply(program, record)
    program.graph.lint()
    program.gm.recompile()
    return program, record


def inputs(batch: int, tokens: int, width: int = 32, channels: int = 8, seed: int = 0) -> tuple[Tensor, ...]:
    draw = torch.Generator().manual_seed(seed)
    sizes = ((batch, width), (batch, tokens, channels), (batch, tokens, channels))
    return tuple(torch.randn(size, generator=draw) for size in sizes)


@settings(max_examples=examples(4), deadline=None)
@given(
    st.integers(0, 10**6),
    st.integers(3, 11),
    st.integers(1, 3),
    st.integers(1, 3),
    st.sampled_from([0.0, 1.0, 2.0, 3.5]),
)
def test_the_unrolled_loop_is_the_cards(seed, trips, batch, tokens, guidance):
    model = Solver(speaker(seed, trips=trips, guidance=guidance, tokens=tokens))
    given = inputs(batch, tokens, seed=seed)
    program, record = rewritten(model, *given)
    with torch.no_grad():
        want = cfm(model.estimator, *given, trips, guidance)
        got = program.gm(*given)
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)
    (done,) = record.took.values()
    assert done.what.startswith(f"{trips - 1} trips of ") and list(record.took) == ["estimator"]


@pytest.mark.slow
def test_what_is_computed_once():
    """Linears of the body by how often they run, and how many rows they have."""
    model, given = Solver(speaker(trips=10)), inputs(1, 2)

    def rows(program: Any) -> dict[str, list[int]]:
        found: dict[str, list[int]] = {}
        for node in program.graph.find_nodes(op="call_function", target=torch.ops.aten.linear.default):
            path = str(program.tensors.path(node.args[1]))
            found.setdefault(path, []).append(node.meta["val"].shape[:-1].numel())
        return found

    with torch.no_grad():
        before = rows(from_export(torch.export.export(model, given)))
    after = rows(rewritten(model, *given)[0])
    assert before["estimator.time.0.weight"] == [2] * 9 and "estimator.time.0.weight" not in after
    assert before["estimator.cond_proj.weight"] == [4] * 9 and after["estimator.cond_proj.weight"] == [2]
    assert before["estimator.in_proj.weight"] == [4] * 9 and after["estimator.in_proj.weight"] == [2] * 9
    assert after["estimator.blocks.1.up.weight"] == [10] * 9  # each trip's own, and each half's


def test_trips_that_read_other_times_are_a_loop_of_their_own_kind():
    with torch.no_grad():
        program = from_export(torch.export.export(Solver(speaker(trips=6)), inputs(2, 2)))
    (loop,) = scheduled_loops(program)
    assert loop.trips == 5 and not loop.writes and not loop.inside and "estimator.in_proj.weight" in loop.parameters
    assert not any(loop.trips == 5 for loop in loops(program))  # bodies that differ in a constant are not one body


def test_the_step_is_one_graph_and_follows_new_weights():
    """A prompt, then steps with two caches: one graph, no second one for another patch, and times are held for these weights."""
    model = speaker(trips=4)
    with torch.no_grad():
        model.stop_head.bias.copy_(torch.tensor([9.0, -9.0]))
    prompt = torch.randn(1, 5, 32, generator=torch.Generator().manual_seed(3))
    torch._dynamo.reset()
    options = {"lowering": "eager", "passes": ["nested_loop"]}
    fast = torch.compile(model, backend="accelpass", options=options, fullgraph=True)

    def said(call: Any) -> Tensor:
        return speak(model, prompt, (KVCache(model.base_lm, 16), KVCache(model.residual_lm, 16)), 5, call=call)

    want = said(None)
    torch.testing.assert_close(said(fast), want, atol=1e-4, rtol=1e-4)
    with torch.no_grad():
        for parameter in model.estimator.time.parameters():
            parameter.mul_(2)
    other = said(None)
    assert (other - want).abs().max() > 1e-2
    with torch._dynamo.config.patch(error_on_recompile=True):
        torch.testing.assert_close(said(fast), other, atol=1e-4, rtol=1e-4)
    (graph,) = graphs_of(fast)
    assert next(r.took for r in graph.report.records if r.name == "nested_loop").keys() == {"estimator"}


def test_stops_are_read_once_in_some_patches_and_cut():
    model, prompt = speaker(trips=3), torch.randn(1, 4, 32, generator=torch.Generator().manual_seed(1))
    lengths = []
    for every in (1, 3, 8):
        caches = (KVCache(model.base_lm, 16), KVCache(model.residual_lm, 16))
        lengths.append(speak(model, prompt, caches, 8, every=every))
    assert all(torch.equal(a, lengths[0]) for a in lengths) and lengths[0].shape[1] < 8
    with pytest.raises(ValueError, match="every=0"):
        speak(model, prompt, caches, 8, every=0)


@settings(max_examples=examples(8), deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 12))
def test_quantization_and_guidance_are_the_cards(seed, scale):
    draw = torch.Generator().manual_seed(seed)
    layer, h = FSQ(8, 6, scale), torch.randn(3, 8, generator=draw)
    torch.testing.assert_close(layer(h), fsq(h, layer.in_proj, layer.out_proj, scale))
    codes = (torch.tanh(layer.in_proj(h)) * scale).round()
    assert codes.abs().max() <= scale
    c, u = torch.randn(2, 2, 3, 4, generator=draw).unbind(0)
    torch.testing.assert_close(guided(c, u, 2.0), cfg_zero_star(c, u, 2.0))
    torch.testing.assert_close(guided(c, u, 1.0), c)


class Trips(nn.Module):
    """A loop whose body may write, draw, or hold nothing that could be taken out."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.inner = kind, nn.Linear(8, 8)
        self.register_buffer("seen", torch.zeros(3, 8))

    def forward(self, x: Tensor) -> Tensor:
        given = x
        for _ in range(3):
            x = torch.tanh(self.inner(x)).sin().cos() * 0.5
            if self.kind == "writes":
                self.seen.add_(x)
            elif self.kind == "draws":
                x = x + torch.rand_like(given).exp()
        return x


@pytest.mark.parametrize(
    ("kind", "why"),
    [
        ("plain", "each trip reads only what the one before it gave"),
        ("writes", "no stretch of this graph runs several times on what it gave"),
        ("draws", "each trip reads only"),
    ],
)
def test_left_alone(kind, why):
    """Nothing to take out; a trip that writes; and numbers that are drawn are drawn anew in each trip."""
    model, x = Trips(kind), torch.randn(3, 8)
    program, record = rewritten(model, x)
    assert not record.took and [reason for reason in record.skipped.values() if why in reason]
    draws = program.graph.find_nodes(op="call_function", target=torch.ops.aten.rand_like.default)
    assert len(draws) == (3 if kind == "draws" else 0)


def test_trips_that_write_are_refused():
    """What a trip wrote the next one may read, whatever its operands are; in a compiled model it is written all the same."""
    verdict = NestedLoop().check(SimpleNamespace(writes=True), None)  # type: ignore[arg-type]
    assert isinstance(verdict, Skip) and "each trip writes to a tensor" in verdict.why
    model, x = Trips("writes"), torch.randn(3, 8)
    torch._dynamo.reset()
    fast = torch.compile(model, backend="accelpass", options={"lowering": "eager", "passes": ["nested_loop"]})
    with torch.no_grad():
        fast(x)
        seen = model.seen.clone()
        fast(x)
    torch.testing.assert_close(model.seen, 2 * seen)
    assert seen.abs().max() > 0


def test_no_loop():
    _, record = rewritten(nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8)), torch.randn(3, 8))
    assert record.skipped == {"model": NestedLoop.nothing} and not record.took
