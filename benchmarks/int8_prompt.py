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
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import accelpass
from accelpass.models_zoo import load
from benchmarks.decode import own_call
from benchmarks.kv_tasks import Row, prose
from benchmarks.machine import cpu, features
from benchmarks.structure import in_turns

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


def prepared(name: str, data: list[Tensor]) -> tuple[Any, dict[str, Any] | None]:
    """A model of its own, and accelpass's options; none for the compilers that do without."""
    dtype, how = CANDIDATES[name]
    model = load("smollm2-135m")[0].to(dtype)
    if how == TORCHAO:
        from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

        linear = type(model.lm_head)
        quantize_(
            model, Int8DynamicActivationInt8WeightConfig(), lambda m, name: isinstance(m, linear) and name != "lm_head"
        )
    if how in (INDUCTOR, TORCHAO):
        return model, None
    entry = {"name": how, "exclude": ["lm_head", "embed_tokens"]}
    if how in LEARN:
        return model, {"plan": accelpass.calibrate(model, data, [entry], progress=False)}
    return model, {"passes": [entry]}


def candidate(model: Any, options: dict[str, Any] | None) -> Callable[[Tensor], Tensor]:
    """The model compiled for prompts, as a function of ids that gives the last token's logits in float32."""
    call = own_call()  # a code object of its own: the candidates share no recompile limit
    how: dict[str, Any] = {} if options is None else {"backend": "accelpass", "options": options}
    fast = torch.compile(call, dynamic=False, **how)
    return lambda ids: fast(model, ids, None)[:, -1].float()


@torch.no_grad()
def measure(tokens: Sequence[int], turns: int, names: list[str]) -> list[Row]:
    """A row for each candidate and length; the head, of which one row is computed, is left as it is in all."""
    held, tokenizer = load("smollm2-135m")
    ids = tokenizer(prose(), return_tensors="pt").input_ids
    data = [ids[:, 4096 + i * LENGTH :][:, :LENGTH] for i in range(SAMPLES)]
    del held
    made = {name: prepared(name, data) for name in names}  # calibration forgets what was compiled before
    runs = {name: candidate(*made[name]) for name in names}
    prompts = [ids[:, :length].contiguous() for length in tokens]
    logits: list[dict[str, Tensor]] = []
    for prompt in prompts:
        logits.append({})
        for name, run in runs.items():
            logits[-1][name] = run(prompt)
            print(f"{prompt.shape[1]} tokens: {name} is compiled", file=sys.stderr, flush=True)
    return [row for prompt, found in zip(prompts, logits, strict=True) for row in _timed(runs, prompt, found, turns)]


def _timed(
    runs: dict[str, Callable[[Tensor], Tensor]], ids: Tensor, logits: dict[str, Tensor], turns: int
) -> list[Row]:
    seconds = in_turns({name: partial(run, ids) for name, run in runs.items()}, turns)
    middle = {name: 1e3 * statistics.median(taken) for name, taken in seconds.items()}
    first, half = next(iter(runs)), middle.get("Inductor, bfloat16")
    rows = []
    for name in runs:
        row = {
            "name": name,
            "tokens": ids.shape[1],
            "ms": round(middle[name], 1),
            "of_float32": round(middle[name] / middle[first], 3),
            "error": round(float((logits[name] - logits[first]).norm() / logits[first].norm()), 4),
        }
        rows.append(row | ({} if half is None else {"faster_than_bfloat16": round(half / middle[name], 2)}))
    return rows


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
    rows = measure(options.tokens, options.turns, names)
    for row in rows:
        print("  ".join(f"{name} {value}" for name, value in row.items()), flush=True)
    options.out.write_text(json.dumps({**machine, "turns": options.turns, "rows": rows}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
