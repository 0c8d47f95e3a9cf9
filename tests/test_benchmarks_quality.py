"""What benchmarks of rounding measure: ranks of passages, GPTQ written down as the paper has it, and that the scripts start."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import accelpass
from benchmarks import gptq_cost, sentence_quality
from benchmarks.machine import features


def test_figures_of_embeddings() -> None:
    dense = F.normalize(torch.randn(12, 8, generator=torch.Generator().manual_seed(0)), dim=-1)
    scored = [(f"topic {i % 3}", "") for i in range(12)]
    same = sentence_quality.figures(dense, dense, scored)
    assert same["cosine"] == pytest.approx(1) and same["rank_correlation"] == pytest.approx(1)
    turned = sentence_quality.figures(F.normalize(dense + 0.5 * torch.randn(12, 8), dim=-1), dense, scored)
    assert turned["least_cosine"] < turned["cosine"] < 1 and turned["rank_correlation"] < 1


def test_reciprocal_rank() -> None:
    """Of three passages the first finds its topic's other one second, the other finds it first; the last has none to find."""
    similar = torch.tensor([[0.1, 0.9], [0.9, 0.2], [0.5, 0.4]])
    assert sentence_quality.reciprocal_rank(similar, ["a", "a", "b"]) == pytest.approx((1 / 2 + 1) / 2)


def test_passages_that_are_scored_are_not_learnt_from() -> None:
    scored, others = sentence_quality.passages(50)
    assert len(scored) == 50 and len({topic for topic, _ in scored}) > 20
    assert not {text for _, text in scored} & set(others)


def test_the_straightforward_gptq_rounds_as_the_pass_does() -> None:
    """Both are algorithm 1; theirs keeps floats, ours codes."""
    torch.manual_seed(0)
    layer, x = nn.Linear(256, 16, bias=False), torch.randn(1, 300, 256) @ torch.randn(256, 256) / 16
    flat = x[0].double()
    given = {"name": "gptq", "group_size": gptq_cost.GROUP, "damping": gptq_cost.DAMPING}
    plan = accelpass.calibrate(layer, [{"input": x}], [given], progress=False)
    fast = torch.compile(layer, backend="accelpass", options={"plan": plan, "lowering": "eager"})
    with torch.no_grad():
        made = gptq_cost.rounded(layer.weight.data, (flat.t() @ flat).float())
        nearest = (x @ (gptq_cost.rounded(layer.weight.data, torch.eye(256)) - layer.weight.data).t()).norm()
        got, want = fast(x), x @ made.t()
    assert (got - want).norm() < 0.2 * nearest and (want - layer(x)).norm() < 0.9 * nearest


def test_the_processors_instructions_are_named() -> None:
    assert "VNNI" in features() and "bfloat16" in features()
