"""What ways of finding int4 codes cost in quality, at equal bits: perplexity of SmolLM2 on prose that no calibration saw.

    python -m benchmarks.weight_rounding --samples 128      # half an hour; --samples 16 for a look; goes on where it was stopped

The weights of this model were in 4 bits with groups of 32 once (GGUF's Q4_1), which flatters a grid that is alike. The head, tied to
the embedding, is left out of every method, and its bits are counted.
"""

from __future__ import annotations

import argparse
import copy
import json
import resource
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

import accelpass
from accelpass.models_zoo.smollm2 import load
from benchmarks.machine import cpu
from benchmarks.quality import perplexity, prose

RESULTS = Path(__file__).parent / "results" / "smollm2_weight_rounding_cpu.json"
FOUR = (
    "int4_weights", "int4_weights half", "int4_weights search", "torchao", "hqq", "hqq half", "awq", "gptq", "gptq half", "gptq order",
)  # fmt: skip
LEARN = ("awq", "gptq", "smoothquant")
GRIDS = {"4.5 bits": {"group_size": 64}, "5 bits": {"group_size": 32}}
ZEROS = {"4.5 bits": "5 bits", "5 bits": "6 bits"}
"""With a zero point for each group in float32; in float16 both take as much as the scale alone does."""
_HALF: dict[str, Any] = {"symmetric": False, "scales": "float16"}
MORE: dict[str, dict[str, Any]] = {
    "int4_weights half": _HALF, "hqq half": _HALF, "gptq half": {**_HALF, "order": True}, "gptq order": {"order": True},
    "int4_weights search": {"search": True},
}  # fmt: skip
TOKENS = 512


def batches(tokenizer: Any, samples: int) -> list[Tensor]:
    """Text behind the part that is scored."""
    ids = prose(tokenizer, 10**9)
    seen = ids[:, 8192 : 8192 + samples * TOKENS]
    return [part for part in seen.split(TOKENS, 1) if part.shape[1] == TOKENS]


def measured(model: Any, ids: Tensor, options: dict[str, Any]) -> float:
    torch._dynamo.reset()
    fast = torch.compile(model, backend="accelpass", options={"lowering": "aten", **options})
    with torch.no_grad():
        return perplexity(lambda window: fast(window, use_cache=False).logits, ids)


def by_torchao(model: Any, ids: Tensor, group_size: int) -> float:
    """torchao's int4, rounded to the nearest: a symmetric grid whose scale is the largest magnitude by 7.5."""
    from torchao.quantization import IntxWeightOnlyConfig, PerGroup, quantize_

    config, head = IntxWeightOnlyConfig(torch.int4, PerGroup(group_size)), model.lm_head
    made = copy.deepcopy(model)
    quantize_(made, config, lambda m, name: isinstance(m, type(head)) and name != "lm_head")
    with torch.no_grad():
        return perplexity(lambda window: made(window, use_cache=False).logits, ids)


def entries(methods: list[str]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Method, bits of a weight, and the pass."""
    for name in methods:
        for bits, grid in (GRIDS if name in FOUR else {"8 bits": {}}).items():
            yield (
                name,
                ZEROS[bits] if name == "hqq" else bits,
                {"name": name.split()[0], **grid, **MORE.get(name, {})},
            )


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--samples", type=int, default=128, help="of 512 tokens, for methods that learn from data")
    parser.add_argument("--methods", default=",".join((*FOUR, "smoothquant", "int8_dynamic")))
    parser.add_argument("--tokens", type=int, default=4096, help="that are scored")
    given = parser.parse_args(arguments)
    model, tokenizer = load(torch.float32)
    ids, data = prose(tokenizer, given.tokens), batches(tokenizer, given.samples)
    settings = {"cpu": cpu(), "torch": torch.__version__, "samples": len(data), "tokens": given.tokens}
    before = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    rows: list[dict[str, Any]] = before["rows"] if before.items() >= settings.items() else []
    done = {(row["method"], row["bits"]) for row in rows}
    if not rows:
        rows = [
            {"method": "dense", "bits": "32 bits", "perplexity": measured(model, ids, {"passes": []}), "ratio": 1.0}
        ]
    dense = rows[0]["perplexity"]
    for name, bits, entry in entries(list(filter(None, given.methods.split(",")))):
        if (name, bits) in done:
            continue
        start = time.monotonic()
        if name == "torchao":
            taken, found = 0.0, by_torchao(model, ids, entry["group_size"])
        else:
            entry["exclude"] = ["lm_head", "embed_tokens"]
            options: dict[str, Any] = {"passes": [entry]}
            if entry["name"] in LEARN:
                options = {"plan": accelpass.calibrate(model, data, [entry])}
            taken = time.monotonic() - start
            found = measured(model, ids, options)
        rows.append({"method": name, "bits": bits, "perplexity": found, "ratio": found / dense, "seconds": taken})
        print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        # Written as it goes: what is there is not measured again.
        RESULTS.write_text(json.dumps({**settings, "peak_gib": peak, "rows": rows}, indent=1) + "\n")
    table = Table("method", "bits of a linear's weight", "perplexity", "of dense", "to calibrate, s")
    for row in rows:
        seconds = f"{row.get('seconds', 0):.0f}"
        table.add_row(row["method"], row["bits"], f"{row['perplexity']:.2f}", f"{row['ratio']:.3f}", seconds)
    Console().print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
