"""ZipVL's cache against its eager oracle over random shapes, in a model, and at the settings where it drops nothing."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from accelpass import KVCache
from accelpass.ir.errors import OptionError
from accelpass.ir.kv.banks import Floats
from accelpass.passes.kv_cache.zipvl import ByMass, ByMassInTiers, Probes, ZipVL
from tests.passes import eviction_truth as truth
from tests.passes.kv_truth import attending, fed
from tests.passes.test_eviction import SHAPES
from tests.passes.test_kv_methods import CAPACITY, compiled, llama, tokens
from tests.passes.test_kv_storage import Layer, follows
from tests.sweep import sweep


@settings(max_examples=20, deadline=None)
@given(
    SHAPES, st.sampled_from([0.3, 0.6, 0.9, 0.99]), st.sampled_from([0, 2, 6]), st.sampled_from([0.2, 1.0]),
    st.sampled_from([None, 2, 4]),
)  # fmt: skip
def test_it_keeps_what_the_oracle_keeps(shape, threshold, newest, most, bits):
    batch, groups, width, prompt, more, seed = shape
    probes, newest = Probes(4, 4, 0), max(1, newest)
    store = (
        ByMass(most, newest, score=probes, threshold=threshold)
        if bits is None
        else ByMassInTiers(most, newest, bits, score=probes, threshold=threshold)
    )
    layer = Layer(store, Floats(), batch, groups, width, prompt + sum(more) + 3, seed)
    follows(layer, truth.ZipVL(threshold, newest, most, bits), (prompt, *more))


@settings(max_examples=10, deadline=None)
@given(st.integers(2, 40), st.integers(0, 2**31), st.floats(0.05, 0.99))
def test_the_fewest_tokens_that_hold_so_much(tokens, seed, threshold):
    """Without newest tokens: as many as needed by their sums, and no fewer would do."""
    layer = Layer(ByMass(0.99, 1, score=Probes(tokens, 0, 0), threshold=threshold), Floats(), 1, 1, 8, tokens + 3, seed)
    layer.feed(tokens)
    p = truth.probabilities(*_operands(layer, tokens, seed)).sum((0, 1, 2, 3)).sort(descending=True).values
    count = int((layer.held["positions"][0, 0] >= 0).sum())
    needed = int((p.cumsum(0) < threshold * p.sum() - 1e-6).sum()) + 1
    assert count in (needed, needed + 1)  # the newest is kept besides


def _operands(layer: Layer, tokens: int, seed: int) -> tuple[torch.Tensor, torch.Tensor, float, None]:
    again = torch.Generator().manual_seed(seed)
    q = torch.randn(1, 2, tokens, 8, generator=again) * 2
    return q, layer.k, layer.scale, None


@pytest.mark.parametrize("bits", sweep(None, 4))
def test_in_a_model(bits):
    model, pieces = llama(), tokens(2, 20, *[1] * 6, 9, 1, 1)
    padding = torch.ones(2, 20, dtype=torch.long)
    padding[0, :5] = 0
    options = {"name": "zipvl", "threshold": 0.8, "newest": 3, "last": 4, "others": 4, "most": 1.0}
    options |= {"rest": "dropped"} if bits is None else {"bits": bits}
    got = fed(compiled(model, options), KVCache(model, CAPACITY, 2), pieces, padding)
    with attending(model, truth.ZipVL(0.8, 3, 1.0, bits)) as dense:
        want = fed(model, dense, pieces, padding)
    assert float((got - want).abs().max() / want.abs().max()) < 1e-5


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"threshold": 0.0}, "a share above 0"),
        ({"most": 1.2}, "at most 1"),
        ({"bits": 8}, "2, 3 or 4"),
        ({"last": 0}, "1 query or more"),
        ({"newest": -1}, "0 or more"),
    ],
)
def test_options_out_of_range(options, said):
    with pytest.raises(OptionError, match=said):
        ZipVL(**options)
