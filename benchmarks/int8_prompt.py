"""A prompt of SmolLM2 multiplied in integers: int8_dynamic against Inductor in float32 and bfloat16, and int8_weights.

    python -m benchmarks.int8_prompt --tokens 512 --out int8_prompt.json

Candidates take turns within one process; figures are medians. ``error`` is of the last token's logits, relative to float32's.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from accelpass.models_zoo import load
from benchmarks.kv_tasks import Row, prose

CANDIDATES: dict[str, tuple[torch.dtype, list[str] | None]] = {
    "Inductor, float32": (torch.float32, None),
    "Inductor, bfloat16": (torch.bfloat16, None),
    "int8_weights": (torch.float32, ["int8_weights"]),
    "int8_dynamic": (torch.float32, ["int8_dynamic"]),
    "int8_dynamic, bfloat16": (torch.bfloat16, ["int8_dynamic"]),
}


def candidate(dtype: torch.dtype, passes: list[str] | None) -> Callable[[Tensor], Tensor]:
    """The model compiled for prompts, as a function of ids that gives the last token's logits in float32."""
    model: Any = load("smollm2-135m")[0].to(dtype)
    if passes is None:
        fast = torch.compile(model, dynamic=False)
    else:
        fast = torch.compile(model, backend="accelpass", options={"passes": passes}, dynamic=False)
    return lambda ids: fast(input_ids=ids, use_cache=False, logits_to_keep=1).logits[:, -1].float()


@torch.no_grad()
def measure(tokens: int, turns: int) -> list[Row]:
    """A row for each candidate."""
    ids = load("smollm2-135m")[1](prose(), return_tensors="pt").input_ids[:, :tokens]
    runs, logits, times = {}, {}, dict[str, list[float]]()
    for name, (dtype, passes) in CANDIDATES.items():
        torch._dynamo.reset()
        runs[name] = candidate(dtype, passes)
        logits[name] = runs[name](ids)
    for _ in range(turns):
        for name, run in runs.items():
            started = time.perf_counter()
            run(ids)
            times.setdefault(name, []).append(1e3 * (time.perf_counter() - started))
    middle = {name: statistics.median(taken) for name, taken in times.items()}
    float32, dense = next(iter(CANDIDATES)), next(iter(logits.values()))
    return [
        {
            "name": name,
            "tokens": tokens,
            "ms": round(middle[name], 1),
            "of_float32": round(middle[name] / middle[float32], 3),
            "error": round(float((logits[name] - dense).norm() / dense.norm()), 4),
        }
        for name in CANDIDATES
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--turns", type=int, default=9)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, help="a JSON file to write")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows = measure(options.tokens, options.turns)
    for row in rows:
        print("  ".join(f"{name} {value}" for name, value in row.items()), flush=True)
    if options.out is not None:
        options.out.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
