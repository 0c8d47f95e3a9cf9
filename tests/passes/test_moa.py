"""MoA and sink_window in whole models against the eager oracle, with a cache and without; plans; what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import accelpass
from accelpass import KVCache
from accelpass.passes.plan import Plan
from tests.passes import kv_truth
from tests.passes.kv_truth import attending, fed
from tests.passes.span_truth import Spans
from tests.passes.test_kv_methods import CAPACITY, compiled, llama, tokens

SMALL = {"block": 4, "sinks": 4, "reserve": 8}
RULES = {0: [(0.0, 0.25), (-4.0, 0.5)], 1: [(8.0, 0.0), (0.0, 1.0)]}


def plan_of(model: Any, rules: dict[int, list[tuple[float, float]]], **options: Any) -> Plan:
    tensors = {
        f"moa/rules/model.layers.{layer}.self_attn": torch.tensor(of, dtype=torch.float64) for layer, of in rules.items()
    }
    return Plan.of(model, [{"name": "moa", **SMALL, **options}], tensors)


def far(model: Any, oracle: kv_truth.Oracle, pieces: list[torch.Tensor], **options: Any) -> float:
    cache = KVCache(model, CAPACITY, pieces[0].shape[0])
    fast = torch.compile(model, backend="accelpass", options={"lowering": "eager", **options}, fullgraph=True)
    got = fed(fast, cache, pieces)
    with attending(model, oracle) as dense:
        want = fed(model, dense, pieces)
    return float((got - want).abs().max() / want.abs().max())


@pytest.mark.parametrize("lowering", ["eager", "aten"])
def test_equals_the_oracle_over_two_turns(lowering):
    model = llama()
    oracle = Spans(RULES, 4, 4, 8, CAPACITY)
    pieces = tokens(2, 21, *[1] * 6, 9, 1, 1, 1)
    assert far(model, oracle, pieces, plan=plan_of(model, RULES), lowering=lowering) < 1e-5
