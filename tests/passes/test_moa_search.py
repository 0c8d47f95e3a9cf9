"""What MoA learns: influence against its definition, losses of rules against masks, and the search against brute force."""

from __future__ import annotations

import sys
from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from accelpass.ir.errors import PassError
from accelpass.passes.sparse_attention import moa_profile, moa_search
from accelpass.passes.sparse_attention.moa_profile import Influence, Profile, block_sums, dense
from accelpass.passes.sparse_attention.moa_search import Problem, pareto, programmes, search_space
from accelpass.passes.sparse_attention.spans import density
from tests.passes.span_truth import influence, moa_mask


def attention(q: torch.Tensor, k: torch.Tensor, scale: float) -> torch.Tensor:
    groups = q.shape[1] // k.shape[1]
    scores = q @ k.repeat_interleave(groups, 1).mT * scale
    n = q.shape[2]
    return scores.masked_fill(~torch.ones(n, n, dtype=torch.bool).tril(), float("-inf")).softmax(-1)


def operands(batch: int, heads: int, groups: int, n: int, seed: int) -> list[torch.Tensor]:
    random = torch.Generator().manual_seed(seed)
    shapes = [(batch, heads * groups, n, 4), (batch, heads, n, 4), (batch, heads, n, 4), (batch, heads * groups, n, 4)]
    return [torch.randn(s, generator=random, dtype=torch.float64) for s in shapes]


@settings(max_examples=30, deadline=None)
@given(
    st.integers(1, 2),
    st.integers(1, 2),
    st.integers(1, 3),
    st.integers(1, 21),
    st.sampled_from([4, 8]),
    st.integers(0, 999),
)
def test_the_profile_is_the_cards_influence(batch, heads, groups, n, block, seed):
    """In blocks, made a few rows at a time; and the gradients are those of the attention itself."""
    q, k, v, upper = operands(batch, heads, groups, n, seed)
    into = torch.zeros(heads * groups, -(-n // block), -(-n // block), dtype=torch.float64)
    always = torch.zeros((), requires_grad=True)
    given_ = [t.clone().requires_grad_() for t in (q, k, v)]
    with pytest.MonkeyPatch.context() as here:
        here.setattr(moa_profile, "_SCRATCH", n * heads * groups * batch * block)
        (Influence.apply(*given_, always, 0.7, block, into) * upper).sum().backward()
    wanted = [t.clone().requires_grad_() for t in (q, k, v)]
    (dense(*wanted, 0.7) * upper).sum().backward()
    for got, want in zip(given_, wanted, strict=True):
        assert torch.allclose(got.grad, want.grad, atol=1e-9)
    a = attention(q, k, 0.7)
    g = upper @ v.repeat_interleave(groups, 1).mT
    assert torch.allclose(into, block_sums(influence(a, g).abs(), block), atol=1e-9)


def test_influence_is_the_change_of_a_loss_that_is_linear_in_the_probabilities():
    q, k, v, upper = operands(1, 1, 1, 7, 3)
    a, g = attention(q, k, 0.7)[0, 0], (upper @ v.mT)[0, 0]
    want = influence(a, g, eps=0.0)
    for i in range(1, 7):
        for j in range(i + 1):
            left = a.clone()
            left[i, j] = 0
            left[i] /= left[i].sum()
            assert float((g * left).sum() - (g * a).sum()) == pytest.approx(float(want[i, j]), abs=1e-12)


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 40), st.sampled_from([0, 1]), st.sampled_from([4, 8]), st.integers(0, 999))
def test_losses_are_influence_outside_the_mask(n, sinks, block, seed):
    rules = [(0.0, 0.25), (4.0, 0.0), (-4.0, 0.5), (0.0, 1.0)]
    blocks = -(-n // block)
    random = torch.Generator().manual_seed(seed)
    sums = torch.rand(4, blocks, blocks, generator=random).tril()
    profile = Profile(block, {n: {"a": sums}}, {"a": 2})
    got = profile.losses("a", n, rules, sinks * block)
    for number, rule in enumerate(rules):
        seen = torch.zeros(blocks * block, blocks * block, dtype=torch.bool)
        seen[:n, :n] = moa_mask(*(torch.tensor([part]) for part in rule), n, sinks * block, block)[0]
        by_block = seen.unflatten(0, (-1, block)).unflatten(2, (-1, block)).any(3).any(1)
        want = (sums.unflatten(0, (2, 2)).amax(1) * ~by_block).sum((1, 2))
        assert torch.allclose(got[:, number], want.double(), atol=1e-6)
    assert (got[:, 3] == 0).all()


def problem(
    seed: int, lengths: int = 2, layers: int = 2, heads: int = 3, rules: int = 4, bound: float = 0.5
) -> Problem:
    random = np.random.default_rng(seed)
    losses = np.sort(random.random((lengths, layers * heads, rules)), -1)[:, :, ::-1].copy()
    losses *= random.random((1, layers * heads, 1)) * 10
    densities = np.sort(random.random((lengths, rules)), -1)
    densities[:, 0] = 0.2
    return Problem(losses, densities, np.repeat(np.arange(layers), heads), bound)


@pytest.mark.parametrize("seed", range(6))
def test_the_search_is_as_good_as_trying_everything(seed):
    one = problem(seed)
    calls: list[None] = []
    found = pareto(one, lambda: calls.append(None))
    assert len(calls) == programmes(2)
    every = [np.array(c) for c in product(range(4), repeat=6)]
    allowed = [c for c in every if one.allows(c)]
    costs = np.stack([one.cost(c) for c in allowed])
    mine = np.stack([one.cost(c) for c in found])
    assert all(one.allows(c) for c in found)
    for length in range(2):
        assert mine[:, length].min() == pytest.approx(costs[:, length].min(), rel=2e-4)
    for cost in mine:  # the solver is exact up to its gap
        assert not (costs < cost * (1 - 3e-4)).all(1).any(), "a better choice at each length exists"


@pytest.mark.parametrize("seed", range(4))
def test_the_search_beats_one_rule_for_all(seed):
    one = problem(seed, lengths=1, layers=3)
    (best,) = pareto(one)
    uniform = [np.full(9, rule) for rule in range(4)]
    costs = [float(one.cost(c)[0]) for c in uniform if one.allows(c)]
    assert costs and one.cost(best)[0] <= min(costs) * (1 + 1e-6)


def test_two_rules_a_layer_are_a_limit_that_matters():
    one = problem(1, lengths=1, layers=1, heads=4, rules=4, bound=0.9)
    (few,) = pareto(one)
    (many,) = pareto(Problem(one.losses, one.densities, one.layers, one.bound, per_layer=4))
    assert len(set(few)) <= 2 and one.cost(many)[0] <= one.cost(few)[0] * (1 + 1e-6)
    (same,) = pareto(Problem(one.losses, one.densities, one.layers, one.bound, per_layer=1))
    assert len(set(same)) == 1


def test_many_lengths_do_not_make_it_endless():
    assert [programmes(n) for n in (1, 2, 3, 4, 5, 9)] == [1, 10, 51, 36, 10, 18]
    many = problem(0, lengths=5)
    assert pareto(many) and all(many.allows(c) for c in pareto(many))


def test_a_bound_that_nothing_meets():
    with pytest.raises(PassError, match=r"mean density of 0.1 or less; the narrowest have 0.2"):
        pareto(problem(0, bound=0.1))


def test_without_a_solver(monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy.optimize", None)
    with pytest.raises(moa_search.MissingSolver, match="accelpass\\[search\\]"):
        pareto(problem(0))


def test_the_search_space_is_the_cards():
    space = search_space([2048, 4096, 8192], 1024, 8)
    want = {
        (float(a), b / 8)
        for a in range(-2048, 8193, 1024)
        for b in range(9)
        if a + b / 8 * 2048 > 0 and all(a + b / 8 * n <= n for n in (2048, 4096, 8192))
    }
    assert set(space) == want and len(space) == len(want)
    at_last = [a + b * 8192 for a, b in space]
    assert at_last == sorted(at_last) and space[-1] == (0.0, 1.0)
    assert density((0.0, 0.5), 4096, 64, 64) == 33 / 64
