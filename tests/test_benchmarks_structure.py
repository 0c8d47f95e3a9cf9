"""The benchmark of heads and experts measures what it says, on small sizes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import structure


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="resident sizes are read from /proc")
def test_memory_of_a_head_is_that_of_its_scores():
    # In a process of its own, as it is measured: in this one freed memory of other tests is there to be used again.
    command = [sys.executable, "-m", "benchmarks.structure", "--head", "eager", "--sizes", "8", "40", "20000", "16"]
    done = subprocess.run(
        command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[1], timeout=120
    )
    row = json.loads(done.stdout.splitlines()[-1])
    scores = 8 * 40 * 20_000 * 4 / 1e6
    assert scores < row["MB"] < 5 * scores and row["result_MB"] == 0.64


def test_runs_take_turns():
    order: list[str] = []
    seconds = structure.in_turns({name: lambda name=name: order.append(name) for name in "ab"}, 3)
    assert "".join(order) == "ab" * 4 and [len(s) for s in seconds.values()] == [3, 3]


def test_heads_give_the_same():
    torch.manual_seed(0)
    model, x, mask = structure.Head(50, 8).eval(), torch.randn(2, 5, 8), torch.ones(2, 5)
    with torch.no_grad():
        fast = torch.compile(model, backend="accelpass", options={"passes": ["lexicon_head"], "lowering": "eager"})
        assert torch.allclose(fast(x, mask), structure.compiled(model, "eager")(x, mask), atol=1e-6)


@pytest.mark.slow
def test_forms_of_experts_give_the_same():
    rows = structure.experts(32, 16, 1, 8, 1)
    assert [row["form"] for row in rows] == list(structure.FORMS)
    assert all(row["difference"] < 1e-4 and row["ms"] > 0 for row in rows)
