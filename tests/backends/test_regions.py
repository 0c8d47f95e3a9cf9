"""Equal blocks are compiled once; what differs, and what must not be cut, is not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import accelpass
from accelpass.backends import graphs_of
from accelpass.backends.compile import inductor
from accelpass.backends.staged import repetition as regions
from tests.small_models import Mlp, relative_error

WIDTH = 32


class Stack(nn.Module):
    """Blocks in a row, each with a cache row that it writes in place."""

    def __init__(self, blocks: int, width: int = WIDTH, dropout: float = 0.0):
        super().__init__()
        self.layers = nn.ModuleList([Mlp(width, 2 * width) for _ in range(blocks)])
        self.norms = nn.ModuleList([nn.LayerNorm(width) for _ in range(blocks)])
        self.dropout = dropout

    def forward(self, x: Tensor, caches: list[Tensor]) -> tuple[Tensor, Tensor]:
        total = torch.zeros(())
        for layer, norm, cache in zip(self.layers, self.norms, caches, strict=True):
            h = layer(norm(x))
            cache.index_copy_(0, torch.tensor([1]), h[:1])
            x = x + h + cache.sum(0) * 0.1
            if self.dropout:
                x = nn.functional.dropout(x, self.dropout)
            total = total + x.mean()
        return x, total


def parts(run: Any) -> list[tuple[int, int]]:
    return [g.parts for g in accelpass.explain(run).graphs]


def check(model: Stack, options: dict[str, Any] | None, cases: int = 2) -> Any:
    """Compile, and compare outputs and what was written with the model's own."""
    fast = torch.compile(model, backend="accelpass", options=options)
    blocks = len(model.layers)
    with torch.no_grad():
        for case in range(cases):
            torch.manual_seed(case)
            x, mine = torch.randn(4, WIDTH), [torch.randn(4, WIDTH) for _ in range(blocks)]
            theirs = [c.clone() for c in mine]
            got, want = fast(x, mine), model(x, theirs)
            assert relative_error(got[0], want[0]) < 1e-4
            assert relative_error(got[1], want[1]) < 1e-4
            for a, b in zip(mine, theirs, strict=True):
                assert relative_error(a, b) < 1e-4
    return fast


@pytest.mark.slow
def test_equal_blocks_share_their_code():
    torch.manual_seed(0)
    fast = check(Stack(5).eval(), None)
    ((steps, different),) = parts(fast)
    assert steps >= 4
    assert different <= 3  # the first block and the last may be cut elsewhere


@pytest.fixture
def uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts run as they are: how the graph is cut and put together needs no compiler."""
    monkeypatch.setattr(inductor, "compile_whole", lambda gm, inputs, chosen: gm)


@pytest.mark.usefixtures("uncompiled")
def test_a_block_that_differs_is_not_run_by_the_code_of_the_others():
    torch.manual_seed(0)
    model = Stack(8).eval()
    model.norms[4].eps = 0.1  # changes this block's output by percents
    assert parts(check(model, None))[0][0] > 3


@pytest.mark.usefixtures("uncompiled")
def test_whole_on_request_and_equal():
    torch.manual_seed(0)
    assert parts(check(Stack(6).eval(), {"regions": False})) == [(0, 0)]


@pytest.mark.usefixtures("uncompiled")
def test_packed_blocks_share_their_code():
    torch.manual_seed(0)
    model = Stack(6).eval()
    fast = torch.compile(model, backend="accelpass", options={"passes": ["int8_weights"]})
    slow = torch.compile(model, backend="accelpass", options={"passes": ["int8_weights"], "lowering": "eager"})
    x, caches = torch.randn(1, WIDTH), [torch.randn(4, WIDTH) for _ in range(6)]
    with torch.no_grad():
        want = slow(x, [c.clone() for c in caches])[0]
        assert relative_error(fast(x, caches)[0], want) < 1e-4
    (ours,) = [g for g in graphs_of(model) if g.options.lowering == "inductor"]
    assert 0 < ours.report.parts_compiled <= 3 < ours.report.parts


@pytest.mark.slow
def test_two_instances_and_inference_mode():
    torch.manual_seed(0)
    first, second = Stack(6).eval(), Stack(6).eval()
    for model, mode in ((first, torch.no_grad), (second, torch.no_grad), (first, torch.inference_mode)):
        fast = torch.compile(model, backend="accelpass", options={"passes": ["int8_weights"]})
        with mode():
            for case in range(2):
                x, caches = torch.randn(2, WIDTH), [torch.randn(4, WIDTH) for _ in range(6)]
                theirs = [c.clone() for c in caches]
                assert relative_error(fast(x, caches)[0], model(x, theirs)[0]) < 0.05, (mode, case)
                assert all(relative_error(a, b) < 0.05 for a, b in zip(caches, theirs, strict=True))


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("why", ["one tensor written twice", "random", "symbolic sizes"])
def test_what_cannot_be_cut_stays_whole(why: str, monkeypatch: pytest.MonkeyPatch):
    seen: list[Any] = []
    original = regions.compile_repeating
    monkeypatch.setattr(inductor, "compile_repeating", lambda *a: seen.append(original(*a)) or seen[-1])
    torch.manual_seed(0)
    model = Stack(5, dropout=0.5 if why == "random" else 0.0).eval()
    base = torch.randn(8, WIDTH)
    caches = (
        [base[i : i + 4] for i in range(5)] if why == "one tensor written twice" else list(base.clone().split(4)) * 3
    )
    caches = caches[:5] if why == "one tensor written twice" else [c.clone() for c in caches[:5]]
    fast = torch.compile(model, backend="accelpass", dynamic=why == "symbolic sizes" or None)
    x, theirs = torch.randn(4, WIDTH), base.clone()
    with torch.no_grad():
        got = fast(x, caches)[0]
        if why == "one tensor written twice":
            want = model(x, [theirs[i : i + 4] for i in range(5)])[0]
            assert relative_error(got, want) < 1e-4
            assert relative_error(base, theirs) < 1e-4
    assert seen == [None]


OPS = [torch.sin, torch.exp, torch.abs, torch.tanh, torch.relu, torch.neg]


def chain(ops: list[Callable[[Tensor], Tensor]]) -> list[torch.fx.Node]:
    graph = torch.fx.Graph()
    nodes = [graph.placeholder("x")]
    for op in ops:
        nodes.append(graph.call_function(op, (nodes[-1],)))
    graph.output(nodes[-1])
    return nodes[1:]


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 5), min_size=1, max_size=24), st.integers(1, 9), st.integers(0, 5), st.integers(0, 5))
def test_repetitions_are_disjoint_and_repeat(period: list[int], times: int, before: int, after: int):
    calls = chain([torch.cos] * before + [OPS[i] for i in period] * times + [torch.sigmoid] * after)
    found = regions.repetitions(calls)
    signs = [n.target for n in calls]
    end = 0
    for one in found:
        assert one.start >= end
        assert one.period >= regions.LEAST_NODES
        assert one.times >= regions.LEAST_TIMES
        stretches = [signs[one.start + i * one.period :][: one.period] for i in range(one.times)]
        assert all(s == stretches[0] for s in stretches)
        end = one.end
    assert end <= len(calls)
    once = any(period.count(i) == 1 for i in period)  # else a shorter period may hide in the longer one
    if once and len(period) >= regions.LEAST_NODES and times >= regions.LEAST_TIMES + 1:
        assert sum(one.period * one.times for one in found) >= len(period) * (times - 1)
