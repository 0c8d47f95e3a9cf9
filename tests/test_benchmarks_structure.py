"""The benchmark of heads and experts measures what it says, on small sizes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import accelpass
from accelpass.models_zoo import small
from benchmarks import expert_pruning, structure, structured_timing


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


def test_experts_that_are_kept_are_those_that_tokens_go_to():
    model, ids = small.experts(), torch.arange(24).view(2, 12)
    kept = expert_pruning.most_used(model, ids, 2)
    with torch.no_grad():
        chosen = model(ids, use_cache=False, output_router_logits=True).router_logits[0]
    counts = torch.bincount(chosen.topk(model.config.num_experts_per_tok).indices.flatten(), minlength=4)
    assert counts[list(kept[0])].min() >= counts.sort(descending=True).values[1] and len(kept) == 2
    fast = expert_pruning.compiled(model, expert_pruning.named(kept), lowering="eager")
    with torch.no_grad():
        fast(ids, use_cache=False)
    assert len(accelpass.explain(fast).passes["eep"].took) == len(kept)


def test_rows_of_the_page_are_those_of_the_results(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(f"before\n{structured_timing.START}old\n{structured_timing.END}\nafter\n")
    content = {"cpus": {"memory": "one"}, "threads": 2, "parts": {"memory": [{"name": "dense", "resident_mb": 1.5}]}}
    structured_timing.write_tables(content, page)
    made = page.read_text()
    assert "| dense | 1.5 |" in made and "old" not in made and made.startswith("before") and made.endswith("after\n")
