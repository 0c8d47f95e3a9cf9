"""Methods that evict by a score, and every wrapper over one, against an eager oracle over random shapes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from accelpass import KVCache
from accelpass.ir.attention.spec.spec import AttentionMass, LastQueries, ScoreTap
from accelpass.ir.errors import OptionError
from accelpass.ir.kv.banks import Floats
from accelpass.passes.kv_cache.a2sf import A2SF, ForgettingMass
from accelpass.passes.kv_cache.budget import on_pyramid
from accelpass.passes.kv_cache.keyformer import Keyformer, NoisyMass
from accelpass.passes.kv_cache.storage.heavy_hitters import HeavyHitters, pooled
from tests.passes import eviction_truth as truth
from tests.passes.eviction_truth import Budget
from tests.passes.kv_truth import attending, fed
from tests.passes.test_kv_methods import CAPACITY, compiled, llama, tokens
from tests.passes.test_kv_storage import Layer, follows
from tests.sweep import quick, sweep

SHAPES = st.tuples(
    st.integers(1, 2), st.sampled_from([1, 2, 3]), st.sampled_from([8, 16]), st.integers(1, 40),
    st.lists(st.sampled_from([1, 1, 1, 1, 5]), min_size=1, max_size=10), st.integers(0, 2**31),
)  # fmt: skip


def against(oracle: truth.Evicting, tap: ScoreTap, shape: Any) -> None:
    """The storage that has the oracle's budget and ``tap`` keeps what the oracle keeps, and attends to it."""
    batch, groups, width, prompt, more, seed = shape
    given = oracle.budget
    store = HeavyHitters(
        given.heavy, given.recent, score=tap if given.window is None else LastQueries(tap, given.window),
        sinks=given.sinks, kernel=given.kernel, answer=given.answer, shares=given.safeguard,
    )  # fmt: skip
    layer = Layer(store, Floats(), batch, groups, width, prompt + sum(more) + 3, seed)
    follows(layer, oracle, (prompt, *more))


@settings(max_examples=15, deadline=None)
@given(SHAPES, st.sampled_from([0.0, 0.2, 0.95, 1.0]), st.sampled_from([0.2, 0.5, 9]))
def test_a2sf(shape, factor, budget):
    half = budget // 2 if isinstance(budget, int) else budget / 2
    against(truth.A2SF(Budget(half, half, sinks=2), factor), ForgettingMass(factor), shape)


@settings(max_examples=15, deadline=None)
@given(SHAPES, st.sampled_from([0, 3, None]), st.sampled_from([0.3, 0.6]))
def test_keyformer(shape, seed, budget):
    oracle = truth.Keyformer(Budget(budget * 0.7, budget * 0.3), 8, 1.0, 2.0, seed)
    against(oracle, NoisyMass(1.0, 2.0, 8, seed), shape)


@settings(max_examples=15, deadline=None)
@given(SHAPES, st.integers(1, 6), st.sampled_from([0.2, 9]))
def test_an_answer_that_is_kept(shape, answer, heavy):
    against(truth.Evicting(Budget(heavy, 0.2, answer=answer)), AttentionMass(), shape)


@settings(max_examples=15, deadline=None)
@given(SHAPES, st.integers(1, 6), st.sampled_from([1, 3, 5]), st.sampled_from([0.2, 5]))
def test_an_observation_window(shape, window, kernel, heavy):
    against(truth.Evicting(Budget(heavy, 6, window=window, kernel=kernel)), AttentionMass(), shape)


@settings(max_examples=25, deadline=None)
@given(SHAPES, st.sampled_from([0.0, 0.2, 1.0]), st.sampled_from([0.1, 0.4, 7]), st.sampled_from([0, 3]))
def test_heads_that_share_a_budget(shape, safeguard, heavy, answer):
    against(truth.Evicting(Budget(heavy, 0.2, answer=answer, safeguard=safeguard)), AttentionMass(), shape)


@settings(max_examples=8, deadline=None)
@given(SHAPES)
def test_wrappers_together(shape):
    """SnapKV's window and pooling, AdaKV's heads and an answer that is kept, over A2SF's score."""
    budget = Budget(0.2, 4, sinks=1, answer=2, window=4, kernel=3, safeguard=0.2)
    against(truth.A2SF(budget, 0.7), ForgettingMass(0.7), shape)


A_PYRAMID = Budget(0.2, 0.2, pyramid=4.0, layers=2)
IN_A_MODEL: dict[str, tuple[dict[str, Any], Any]] = {
    "a2sf": ({"name": "a2sf", "budget": 0.4}, lambda: truth.A2SF(Budget(0.2, 0.2), 0.2)),
    "keyformer": (
        {"name": "keyformer", "budget": 0.4, "answer": 8, "recent": 0.5},
        lambda: truth.Keyformer(Budget(0.2, 0.2), 8),
    ),
    "after the prompt": (
        {"name": "a2sf", "budget": 0.4, "evicts": "after the prompt", "answer": 4},
        lambda: truth.A2SF(Budget(0.2, 0.2, answer=4), 0.2),
    ),
    "snapkv": (
        {"name": "h2o", "tokens": 9, "window": 4, "kernel": 3, "evicts": "after the prompt"},
        lambda: truth.Evicting(Budget(5, 4, window=4, kernel=3, answer=256)),
    ),
    "adakv": (
        {"name": "h2o", "budget": 0.4, "heads": "adaptive"},
        lambda: truth.Evicting(Budget(0.2, 0.2, safeguard=0.2)),
    ),
    "pyramid": ({"name": "h2o", "budget": 0.4, "pyramid": 4.0}, lambda: truth.Evicting(A_PYRAMID)),
}


@pytest.mark.parametrize("which", quick(list(IN_A_MODEL), "a2sf", "keyformer"))
def test_in_a_model(which):
    """A prompt with padding, token by token, and a second turn; padding gives nothing and gets nothing."""
    options, oracle = IN_A_MODEL[which]
    model, pieces = llama(), tokens(2, 20, *[1] * 6, 9, 1, 1)
    padding = torch.ones(2, 20, dtype=torch.long)
    padding[0, :5] = 0
    got = fed(compiled(model, options), KVCache(model, CAPACITY, 2), pieces, padding)
    with attending(model, oracle()) as dense:
        want = fed(model, dense, pieces, padding)
    assert float((got - want).abs().max() / want.abs().max()) < 1e-5


RENUMBERED: list[tuple[dict[str, Any], Budget]] = [
    ({"name": "kv_window", "tokens": 9, "sinks": 2}, Budget(0, 7, sinks=2)),
    ({"name": "h2o", "budget": 0.4}, Budget(0.2, 0.2)),
    ({"name": "h2o", "budget": 0.4, "heads": "adaptive"}, Budget(0.2, 0.2, safeguard=0.2)),
]


@pytest.mark.slow
@pytest.mark.parametrize(("options", "budget"), sweep(*RENUMBERED), ids=str)
def test_positions_within_the_cache(options, budget):
    model, pieces = llama(), tokens(2, 20, *[1] * 4, 5, 1, 1)
    padding = torch.ones(2, 20, dtype=torch.long)
    padding[0, :5] = 0
    got = fed(compiled(model, {**options, "positions": "cache"}), KVCache(model, CAPACITY, 2), pieces, padding)
    torch._dynamo.reset()
    with attending(model, truth.Renumbered(budget, model, padding)) as dense:
        want = fed(model, dense, pieces, padding)
    assert float((got - want).abs().max() / want.abs().max()) < 1e-5


@pytest.mark.parametrize("kernel", [1, 3, 7])
def test_pooling(kernel):
    score = torch.rand(2, 3, 11)
    assert torch.allclose(pooled(score, kernel, "mean"), F.avg_pool1d(score, kernel, 1, kernel // 2))
    assert torch.equal(pooled(score, kernel, "max"), F.max_pool1d(score, kernel, 1, kernel // 2))


def test_a_pyramid_of_layers():
    """All layers together have what even ones have; the first at most everything, the last ``1 / beta`` of the even budget."""
    for heavy, recent in ((0.1, 0.1), (0.8, 0.1), (100, 20)):
        made = [on_pyramid(heavy, recent, 20, layer, 5) for layer in range(5)]
        assert sum(made) == pytest.approx(5 * heavy) and made == sorted(made, reverse=True)
        assert made[2] == pytest.approx(heavy)
    assert made[0] == 195 and made[-1] == 5
    assert on_pyramid(0.8, 0.1, 20, 0, 5) == pytest.approx(0.9)
    assert on_pyramid(0.1, 0.1, 20, 0, 1) == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("kind", "options", "said"),
    [
        (A2SF, {"factor": 1.5}, "a number between 0"),
        (A2SF, {"kernel": 4}, "an odd number"),
        (A2SF, {"window": 0}, "last 1 or more queries"),
        (A2SF, {"pyramid": 0.5}, "1 .even. or more"),
        (A2SF, {"safeguard": 2.0}, "between 0 and 1"),
        (A2SF, {"sinks": -1}, "0 or more first tokens"),
        (Keyformer, {"end": 0.0}, "a temperature above 0"),
        (Keyformer, {"answer": 0}, "1 token or more"),
        (Keyformer, {"seed": -1}, "None for no noise"),
    ],
)
def test_options_out_of_range(kind, options, said):
    with pytest.raises(OptionError, match=said):
        kind(**options)
