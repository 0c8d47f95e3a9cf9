"""A sample of `make conformance`: the default compile equals eager, and every attention is found."""

from __future__ import annotations

import pytest

from accelpass.models_zoo import tiny
from tests import conformance

SAMPLE = ("causal_lm/gpt2", "causal_lm/gemma2", "masked_lm/bert", "image/vit")


@pytest.mark.parametrize("key", SAMPLE)
def test_family(key: str) -> None:
    row = conformance.measure(tiny.family(key), "eager")
    assert row["true"] == row["found"] > 0, row
    assert conformance.is_right(row), row


def test_a_missed_attention_is_seen() -> None:
    row = {"key": "x", "true": 2, "found": 1, "error": 0.0, "spec_error": 0.0, "note": ""}
    assert not conformance.is_right(row)
    assert conformance.is_right({**row, "found": 2})
    assert not conformance.is_right({**row, "found": 2, "error": 0.1})
