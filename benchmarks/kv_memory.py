"""Memory of a process that generates after a long prompt, with the cache as KV passes keep it.

    python -m benchmarks.kv_memory h2o      # one measurement, as JSON, in this process

Each case runs in a process of its own, on SmolLM2 with float32 keys and values. Graphs are lowered but not compiled by
Inductor, whose own memory is another matter. What is freed goes back to the system at once (glibc would keep most of it),
and weights are in memory before, and so are the graphs, from a first answer with a cache that is gone: what is measured is
what tensors take. What the graphs take is a column of its own.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

CAPACITY, TOKENS = 4096, 16
CASES: dict[str, list[Any]] = {
    "dense": [],
    "h2o": ["h2o"],
    "mikv": ["mikv"],
    "cskv": ["cskv"],
    "cskv, 4 bits": [{"name": "cskv", "bits": 4}],
    "h2o, 4 bits": ["h2o", {"name": "kv_quant", "bits": 4}],
}


def measure() -> list[dict[str, Any]]:
    """A row for each case."""
    rows = []
    for case in CASES:
        done = subprocess.run(
            [sys.executable, "-m", "benchmarks.kv_memory", case],
            capture_output=True,
            text=True,
            check=True,
            env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"},
        )
        rows.append(json.loads(done.stdout.splitlines()[-1]))
    return rows


def _one(case: str) -> dict[str, Any]:
    import psutil
    import torch

    from accelpass import KVCache
    from accelpass.models_zoo import load
    from benchmarks.kv_tasks import prose

    process = psutil.Process()
    model, tokenizer = load("smollm2-135m")
    ids = tokenizer(prose(), return_tensors="pt").input_ids[:, : CAPACITY - TOKENS]
    fast = torch.compile(model, backend="accelpass", options={"passes": CASES[case], "lowering": "aten"})

    def answered(cache: KVCache, tokens: int) -> int:
        """Bytes in memory after a prompt and some tokens."""
        token = fast(input_ids=ids, past_key_values=cache, logits_to_keep=1).logits.argmax(-1)
        for _ in range(tokens):
            token = fast(input_ids=token, past_key_values=cache).logits.argmax(-1)
        gc.collect()
        return int(process.memory_info().rss)

    with torch.no_grad():
        # A file's pages count once they are read.
        sum(float(p.sum()) for p in model.parameters())
        gc.collect()
        weights = process.memory_info().rss
        answered(KVCache(model, CAPACITY), 1)
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        before = process.memory_info().rss
        # The kernel's high-water mark of resident memory begins anew.
        Path("/proc/self/clear_refs").write_text("5")
        cache = KVCache(model, CAPACITY)
        after = answered(cache, TOKENS)
    lines = Path("/proc/self/status").read_text().splitlines()
    peak = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
    return {
        "name": case,
        "cache_mb": round(cache.nbytes() / 1e6, 1),
        "against_dense": round(cache.nbytes() / cache.dense_nbytes(), 3),
        "peak_mb": round((peak - before) / 1e6),
        "held_mb": round((after - before) / 1e6),
        "graphs_mb": round((before - weights) / 1e6),
    }


if __name__ == "__main__":
    print(json.dumps(_one(sys.argv[1])))
