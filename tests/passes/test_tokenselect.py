"""TokenSelect's choice against its eager oracle over random shapes, and its bad options."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from accelpass.ir.attention import AttentionSpec
from accelpass.ir.errors import OptionError
from accelpass.ir.kv.banks import Floats
from accelpass.ir.kv.storage import Layout, New, Positions, Query
from accelpass.passes.kv_cache.tokenselect import TokenSelect, Voted
from tests.passes import kv_truth
from tests.passes.test_kv_storage import MASKED

SHAPES = st.tuples(
    st.integers(1, 2), st.sampled_from([1, 3]), st.integers(1, 30), st.integers(1, 6), st.integers(0, 2**31)
)


@settings(max_examples=20, deadline=None)
@given(
    SHAPES, st.integers(1, 9), st.integers(0, 4), st.integers(1, 5), st.sampled_from([None, -1.0, 0.2])
)  # fmt: skip
def test_it_reads_what_the_oracle_reads(shape, budget, sinks, newest, reuse):
    """Prompts shorter than what is always read, and longer; a prompt between tokens lets the next one vote anew."""
    batch, groups, prompt, more, seed = shape
    random, capacity, width, format = torch.Generator().manual_seed(seed), 48, 8, Floats()
    layout = Layout(2, groups, width, width, torch.float32, capacity)
    select, store = Voted(budget, sinks, newest, reuse, 1), Positions()
    specs = [*store.states(layout, format), *select.states(layout)]
    count = torch.zeros(batch, dtype=torch.int64)
    held = {s.name.removeprefix("kv."): s.start(count) for s in specs}
    oracle, remembered = kv_truth.TokenSelect(budget, sinks, newest, reuse), {}
    keys = values = torch.zeros(batch, 2, 0, width)
    for tokens in (prompt, *[1] * more, 3, 1, 1):
        q = torch.randn(batch, 2 * groups, tokens, width, generator=random)
        k, v = (torch.randn(batch, 2, tokens, width, generator=random) for _ in "kv")
        keys, values = torch.cat([keys, k], 2), torch.cat([values, v], 2)
        want = oracle.attend(remembered, q, keys, values, width**-0.5, None, 0)
        new = New(q, k, v, count)
        store.fill(held, new, layout, format)
        if tokens == 1:
            rows = count[0] + torch.arange(tokens)[:, None]
            mask = (torch.arange(capacity)[None] <= rows)[None, None]
            spec = AttentionSpec(groups=groups, scale=width**-0.5, steps=MASKED, bias="causal")
            got, _ = select.attend(held, new, Query(q, [mask], spec, layout), layout, format, None)
            assert torch.allclose(got, want, atol=1e-4), f"after {keys.shape[2]} tokens"
        count += tokens


def test_neighbours_of_a_token_are_read_with_it():
    """All votes are for token 7: with pooling over three, tokens 6, 7 and 8 are read, beside the first and the newest."""
    layout, format, store = Layout(1, 1, 4, 4, torch.float32, 24), Floats(), Positions()
    count = torch.zeros(1, dtype=torch.int64)
    held = {s.name.removeprefix("kv."): s.start(count) for s in store.states(layout, format)}
    k, v = torch.zeros(1, 1, 20, 4), torch.randn(1, 1, 20, 4)
    k[:, :, 7] = 50.0
    new = New(torch.zeros(1, 1, 20, 4), k, v, count)
    store.fill(held, new, layout, format)
    q = torch.full((1, 1, 1, 4), 1e-1)
    now = New(q, k[:, :, :1], v[:, :, :1], count + 20)
    store.fill(held, now, layout, format)
    query = Query(q, [], AttentionSpec(), layout)
    got, _ = Voted(3, 1, 2, None, 3).attend(held, now, query, layout, format, None)
    read = held["values"][:, :, [0, 6, 7, 8, 19, 20]]
    scores = held["keys"][:, :, [0, 6, 7, 8, 19, 20]] @ q.mT
    torch.testing.assert_close(got, scores.softmax(2).mT @ read)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"budget": 0}, "1 token or more"),
        ({"sinks": -1}, "0 or more first tokens"),
        ({"newest": 0}, "reads itself"),
        ({"reuse": 1.5}, "a cosine between"),
        ({"kernel": 2}, "an odd number"),
    ],
)
def test_options_out_of_range(options, said):
    with pytest.raises(OptionError, match=said):
        TokenSelect(**options)
