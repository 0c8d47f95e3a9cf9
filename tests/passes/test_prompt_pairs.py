"""Passes for long prompts beside every other pass for decoders, each where it changes nothing: dense, or refused by name."""

from __future__ import annotations

from itertools import combinations
from typing import Any

import pytest
import torch

from accelpass import KVCache
from accelpass.ir.errors import AccelpassError
from tests.passes.test_lazyllm import CAPACITY, ids, llama, pieces

PROMPT: dict[str, dict[str, Any]] = {
    "pbs_attn": {"threshold": 1.0, "block": 8, "segment": 16},
    "moa": {"alpha": 0.0, "beta": 1.0},
    "sink_window": {"density": 1.0},
    "gemfilter": {"keep": CAPACITY},
    "lazyllm": {"keep": (1.0, 1.0)},
}
OTHER: dict[str, dict[str, Any]] = {
    "h2o": {"budget": 1.0},
    "mikv": {"budget": 1.0},
    "kv_window": {"budget": 1.0},
    "cskv": {"keep_k": 1.0, "keep_v": 1.0, "window": 3},
    "tidaldecode": {"budget": CAPACITY},
    "kv_quant": {"bits": 8},
    "int8_weights": {},
    "int4_weights": {"group_size": 32},
}
TOGETHER = {("gemfilter", other) for other in OTHER}
TOGETHER |= {(name, weights) for name in PROMPT for weights in ("int8_weights", "int4_weights", "kv_quant")}
"""Pairs that must work, not only be refused."""


def logits(model: Any, *passes: dict[str, Any]) -> torch.Tensor:
    torch._dynamo.reset()
    fast = torch.compile(model, backend="accelpass", options={"passes": list(passes), "lowering": "eager"})
    given, cache = ids(40), KVCache(model, CAPACITY)
    with torch.no_grad():
        return torch.cat([fast(given[:, p], past_key_values=cache).logits[:, -1] for p in pieces([33, 1, 1])])


PAIRS = [*combinations(PROMPT, 2), *((a, b) for a in PROMPT for b in OTHER)]
SHOWN = [
    pair if pair[1] in PROMPT else pytest.param(pair, marks=pytest.mark.slow, id=" + ".join(pair)) for pair in PAIRS
]


@pytest.mark.parametrize("pair", SHOWN, ids=" + ".join)
def test_a_pair_is_dense_or_refused(pair):
    every = {**PROMPT, **OTHER}
    model, passes = llama(layers=3), [{"name": name, **every[name]} for name in pair]
    rounding = [p for p in passes if p["name"] in ("kv_quant", "int8_weights", "int4_weights")]
    try:
        got = logits(model, *passes)
    except Exception as refused:
        named = refused if isinstance(refused, AccelpassError) else getattr(refused, "inner_exception", refused)
        assert isinstance(named, AccelpassError), named
        assert all(name in str(named) for name in pair), named
        assert pair not in TOGETHER, named
        return
    want = logits(model, *rounding) if rounding else logits(model)
    assert torch.allclose(got, want, rtol=2e-3, atol=2e-3)
