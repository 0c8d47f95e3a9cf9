"""Resident memory of a process that holds SmolLM2, dense and packed with the float weights released.

    python -m benchmarks.memory int8_weights      # one measurement, as JSON, in this process

Each case runs in a process of its own. The graphs are lowered but not compiled by Inductor: the compiler's own memory
is another matter than the model's.
"""

from __future__ import annotations

import gc
import json
import subprocess
import sys
from typing import Any

CASES = ("dense", "int8_weights", "int4_weights")


def measure() -> list[dict[str, Any]]:
    """A row for each case."""
    rows = []
    for case in CASES:
        done = subprocess.run(
            [sys.executable, "-m", "benchmarks.memory", case], capture_output=True, text=True, check=True
        )
        rows.append(json.loads(done.stdout.splitlines()[-1]))
    for row in rows:
        row["model_against_dense"] = round(row["model_mb"] / rows[0]["model_mb"], 3)
    return rows


def _one(case: str) -> dict[str, Any]:
    import psutil
    import torch

    from accelpass.models_zoo import load

    process = psutil.Process()
    ids = torch.arange(8)[None]
    with torch.no_grad():
        # What a run needs besides this model's weights is there before the count begins: code, thread pools, and the
        # compiler's caches, warmed up on a model of the same class with one small layer.
        _run(_small(), case, ids)
        gc.collect()
        before = process.memory_info().rss
        model, _ = load("smollm2-135m")
        _run(model, case, ids)
        gc.collect()
        after = process.memory_info().rss
    return {"name": case, "process_mb": round(after / 1e6), "model_mb": round((after - before) / 1e6)}


def _run(model: Any, case: str, ids: Any) -> None:
    import torch

    if case != "dense":
        options = {"passes": [case], "free_weights": True, "lowering": "aten"}
        model = torch.compile(model, backend="accelpass", options=options)
    model(input_ids=ids, use_cache=False)


def _small() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(hidden_size=64, intermediate_size=64, num_hidden_layers=1, vocab_size=64)
    ).eval()


if __name__ == "__main__":
    print(json.dumps(_one(sys.argv[1])))
