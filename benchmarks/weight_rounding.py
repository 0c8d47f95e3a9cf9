"""What ways of finding int4 codes cost in quality, at equal bits: perplexity of SmolLM2 on prose that no calibration saw.

    python -m benchmarks.weight_rounding --samples 128      # half an hour; --samples 16 for a look

The weights of this model were in 4 bits with groups of 32 once (GGUF's Q4_1), which flatters a grid that is alike. The head, tied to
the embedding, is left out of every method, and its bits are counted.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import time
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
METHODS = ("int4_weights", "hqq", "awq", "gptq")
GRIDS = {"4.5 bits": {"group_size": 64}, "5 bits": {"group_size": 32}}
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


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--samples", type=int, default=128, help="of 512 tokens, for methods that learn from data")
    parser.add_argument("--methods", default=",".join((*METHODS, "smoothquant", "int8_dynamic")))
    parser.add_argument("--tokens", type=int, default=4096, help="that are scored")
    given = parser.parse_args(arguments)
    model, tokenizer = load(torch.float32)
    ids, data = prose(tokenizer, given.tokens), batches(tokenizer, given.samples)
    dense = measured(model, ids, {"passes": []})
    rows: list[dict[str, Any]] = [{"method": "dense", "perplexity": dense, "ratio": 1.0}]
    for name in filter(None, given.methods.split(",")):
        for bits, grid in (GRIDS if name in METHODS else {"8 bits": {}}).items():
            entry = {"name": name, "exclude": ["lm_head", "embed_tokens"], **grid}
            if name == "hqq":
                bits = {"4.5 bits": "5 bits", "5 bits": "6 bits"}[bits]  # a zero point for each group
            start, options = time.monotonic(), {"passes": [entry]}
            if name in ("awq", "gptq", "smoothquant"):
                options = {"plan": accelpass.calibrate(model, data, [entry])}
            taken = time.monotonic() - start
            found = measured(model, ids, options)
            rows.append({"method": name, "bits": bits, "perplexity": found, "ratio": found / dense, "seconds": taken})
            print(json.dumps(rows[-1]), file=sys.stderr)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    result = {
        "cpu": cpu(),
        "torch": torch.__version__,
        "samples": len(data),
        "tokens": given.tokens,
        "peak_gib": peak,
        "rows": rows,
    }
    RESULTS.write_text(json.dumps(result, indent=1) + "\n")
    table = Table("method", "bits of a linear's weight", "perplexity", "of dense", "to calibrate, s")
    for row in rows:
        table.add_row(
            row["method"],
            row.get("bits", "32"),
            f"{row['perplexity']:.2f}",
            f"{row['ratio']:.3f}",
            f"{row.get('seconds', 0):.0f}",
        )
    Console().print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
