"""Prompts of SmolLM2 in W8A8: int8_dynamic, int8_static and smoothquant against Inductor in float32 and bfloat16, and torchao's int8.

    python -m benchmarks.int8_prompt --tokens 512 2048 --turns 9

Candidates take turns within one process; figures are medians. ``error`` is of the last token's logits, relative to float32's. Which
instructions the processor has decides this comparison, and is part of the result: without VNNI no integers are multiplied as such.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import accelpass
from accelpass.models_zoo import load
from benchmarks.kv_tasks import Row, prose
from benchmarks.machine import cpu, features

RESULTS = Path(__file__).parent / "results" / "smollm2_int8_prompt_cpu.json"
INDUCTOR, TORCHAO = "Inductor", "torchao int8"
CANDIDATES: dict[str, tuple[torch.dtype, str]] = {
    "Inductor, float32": (torch.float32, INDUCTOR),
    "Inductor, bfloat16": (torch.bfloat16, INDUCTOR),
    "torchao int8, float32": (torch.float32, TORCHAO),
    "torchao int8, bfloat16": (torch.bfloat16, TORCHAO),
    **{
        f"{name}, {short}": (dtype, name)
        for name in ("int8_weights", "int8_dynamic", "int8_static", "smoothquant")
        for short, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16))
    },
}
LEARN = ("int8_static", "smoothquant")
SAMPLES, LENGTH = 4, 512
"""Of text behind the prompt, for those that learn from data."""


def candidate(model: Any, how: str, data: list[Tensor]) -> Callable[[Tensor], Tensor]:
    """The model compiled for prompts, as a function of ids that gives the last token's logits in float32."""
    if how == TORCHAO:
        from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

        linear = type(model.lm_head)
        quantize_(
            model, Int8DynamicActivationInt8WeightConfig(), lambda m, name: isinstance(m, linear) and name != "lm_head"
        )
    if how in (INDUCTOR, TORCHAO):
        fast = torch.compile(model, dynamic=False)
    else:
        entry = {"name": how, "exclude": ["lm_head", "embed_tokens"]}
        options: dict[str, Any] = {"passes": [entry]}
        if how in LEARN:
            options = {"plan": accelpass.calibrate(model, data, [entry], progress=False)}
        fast = torch.compile(model, backend="accelpass", options=options, dynamic=False)
    return lambda ids: fast(input_ids=ids, use_cache=False, logits_to_keep=1).logits[:, -1].float()


@torch.no_grad()
def measure(tokens: int, turns: int, names: list[str]) -> list[Row]:
    """A row for each candidate; the head, of which one row is computed, is left as it is in all."""
    held, tokenizer = load("smollm2-135m")
    ids = tokenizer(prose(), return_tensors="pt").input_ids
    data = [ids[:, 4096 + i * LENGTH :][:, :LENGTH] for i in range(SAMPLES)]
    ids = ids[:, :tokens]
    del held
    runs, logits, times = {}, {}, dict[str, list[float]]()
    for name in names:
        torch._dynamo.reset()
        dtype, how = CANDIDATES[name]
        runs[name] = candidate(load("smollm2-135m")[0].to(dtype), how, data)
        logits[name] = runs[name](ids)
        print(f"{tokens} tokens: {name} is compiled", file=sys.stderr, flush=True)
    for _ in range(turns):
        for name, run in runs.items():
            started = time.perf_counter()
            run(ids)
            times.setdefault(name, []).append(1e3 * (time.perf_counter() - started))
    middle = {name: statistics.median(taken) for name, taken in times.items()}
    first = names[0]
    return [
        {
            "name": name,
            "tokens": tokens,
            "ms": round(middle[name], 1),
            "of_float32": round(middle[name] / middle[first], 3),
            "error": round(float((logits[name] - logits[first]).norm() / logits[first].norm()), 4),
        }
        for name in names
    ]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tokens", type=int, nargs="+", default=[512, 2048])
    parser.add_argument("--turns", type=int, default=9)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", nargs="+", default=[], help="of the candidates, by the beginning of their names")
    parser.add_argument("--out", type=Path, default=RESULTS, help="the JSON file to write")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    names = [
        n for n in CANDIDATES if n == next(iter(CANDIDATES)) or not options.only or n.startswith(tuple(options.only))
    ]
    machine = {"cpu": cpu(), "features": features(), "torch": torch.__version__, "threads": options.threads}
    print(f"{machine['cpu']}: {machine['features']}")
    rows: list[Row] = []
    for tokens in options.tokens:
        for row in measure(tokens, options.turns, names):
            print("  ".join(f"{name} {value}" for name, value in row.items()), flush=True)
            rows.append(row)
        options.out.write_text(json.dumps({**machine, "turns": options.turns, "rows": rows}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
