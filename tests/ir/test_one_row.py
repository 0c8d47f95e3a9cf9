"""Attention of one query row: equal to matrix products, however many rows and columns, and where no key may be seen."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from accelpass.ir.attention.lowering.one_row import row_scores, row_sum, unnormalised_softmax
from accelpass.ir.kv.banks import Quantized

SIZES = {
    "batch": st.integers(1, 2),
    "kv_heads": st.integers(1, 3),
    "groups": st.sampled_from([1, 2, 3, 8, 9]),
    "rows": st.sampled_from([1, 7, 255, 1023, 1024, 1025, 1300, 2048]),
    "width": st.sampled_from([8, 16, 40, 64, 80, 128]),
    "dtype": st.sampled_from([torch.float32, torch.bfloat16]),
    "seed": st.integers(0, 99),
}


@settings(max_examples=60, deadline=None)
@given(**SIZES)
def test_products_equal_matmul(batch, kv_heads, groups, rows, width, dtype, seed):
    torch.manual_seed(seed)
    q, weights = torch.randn(batch, kv_heads, groups, width), torch.rand(batch, kv_heads, groups, rows)
    keys, values = (torch.randn(batch, kv_heads, rows, width).to(dtype) for _ in range(2))
    torch.testing.assert_close(row_scores(q, keys), q @ keys.float().transpose(-1, -2), rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(row_sum(weights, values), weights @ values.float(), rtol=1e-5, atol=1e-3)


def test_rows_of_all_heads_serve_each():
    weights, values = torch.rand(2, 3, 2, 1100), torch.randn(2, 1, 1100, 24)
    torch.testing.assert_close(row_sum(weights, values), weights @ values, rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_many_packed_rows(bits):
    """Summed in chunks as floats are."""
    weights, format = torch.rand(2, 3, 2, 1300), Quantized(bits)
    rows = format.encode(torch.randn(2, 3, 1300, 32))
    want = weights @ format.decode(rows, torch.float32)
    torch.testing.assert_close(format.mixed(weights, rows), want, rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("lengths", [(5, 9), (1300, 9), (1024, 2050)])
def test_one_softmax_over_several_scores(lengths):
    """Long ones are reduced in chunks, with and without a rest."""
    scores = [torch.randn(2, 3, 2, n) for n in lengths]
    scores[1][..., 4:] = float("-inf")
    made, share = unnormalised_softmax(scores)
    torch.testing.assert_close(torch.cat(made, -1) * share, torch.cat(scores, -1).softmax(-1))


@pytest.mark.parametrize("hidden", [float("-inf"), torch.finfo(torch.float32).min])
@pytest.mark.parametrize("length", [4, 1100])
def test_a_query_that_sees_no_key(hidden, length):
    (made,), share = unnormalised_softmax([torch.full((1, 1, 2, length), hidden)])
    weights = made * share
    # As under torch: hidden by -inf there is nothing to attend to; hidden by the lowest number, all keys are equal.
    expected = 0.0 if hidden == float("-inf") else 1 / length
    torch.testing.assert_close(weights, torch.full_like(weights, expected))


@pytest.mark.parametrize("length", [4, 1100])
def test_a_score_that_is_not_a_number_is_told(length):
    scores = torch.zeros(1, 1, 1, length)
    scores[..., 2] = float("nan")
    (made,), share = unnormalised_softmax([scores])
    assert (made * share).isnan().all()
