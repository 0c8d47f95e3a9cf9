"""Resident memory of a process that holds SmolLM2, dense, packed or made smaller, with the float weights released.

    python -m benchmarks.memory '["int8_weights"]'      # one measurement of a list of passes, as JSON, in this process

Each case runs in a process of its own. The graphs are lowered but not compiled by Inductor: the compiler's own memory
is another matter than the model's.
"""

from __future__ import annotations

import gc
import json
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

CASES: dict[str, list[Any] | None] = {
    "dense": None,
    "int8_weights": ["int8_weights"],
    "int4_weights": ["int4_weights"],
}
"""Passes of each; None for the model as it is, not compiled."""


def measure(cases: Mapping[str, list[Any] | None] = CASES) -> list[dict[str, Any]]:
    """A row for each case, beside the first."""
    rows: list[dict[str, Any]] = []
    for name, passes in cases.items():
        command = [sys.executable, "-m", "benchmarks.memory", json.dumps(passes)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        rows.append({"name": name, **json.loads(done.stdout.splitlines()[-1])})
    for row in rows:
        row["model_against_dense"] = round(row["model_mb"] / rows[0]["model_mb"], 3)
    return rows


def _one(passes: list[Any] | None) -> dict[str, Any]:
    import psutil
    import torch

    from accelpass.models_zoo import load

    process = psutil.Process()
    ids = torch.arange(8)[None]
    with torch.no_grad():
        # What a run needs besides this model's weights is there before the count begins: code, thread pools, and the
        # compiler's caches, warmed up on a small model of the same class, which has as many layers as passes may name.
        _run(_small(), passes, ids)
        gc.collect()
        before = process.memory_info().rss
        model, _ = load("smollm2-135m")
        _run(model, passes, ids)
        gc.collect()
        after = process.memory_info().rss
    return {"process_mb": round(after / 1e6), "model_mb": round((after - before) / 1e6)}


def _run(model: Any, passes: list[Any] | None, ids: Any) -> None:
    import torch

    if passes is not None:
        options = {"passes": passes, "free_weights": True, "lowering": "aten"}
        model = torch.compile(model, backend="accelpass", options=options)
    model(input_ids=ids, use_cache=False)


def _small() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(hidden_size=64, intermediate_size=64, num_hidden_layers=30, vocab_size=64)
    ).eval()


if __name__ == "__main__":
    print(json.dumps(_one(json.loads(sys.argv[1]))))
