"""Masked-diffusion decoding on the zoo's model of bytes: steps, and what the texts are worth, before and after distillation.

``python -m benchmarks.masked_decoding`` writes benchmarks/results/masked_bytes.json. A text's worth is the perplexity of its bytes under the zoo's
mixture of experts, which read the same books; ``agrees`` is the share of bytes that one token a step of the same model writes too.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from accelpass.decoding import dparallel
from accelpass.models_zoo import bytes_moe
from accelpass.models_zoo.masked import train
from accelpass.models_zoo.masked.model import BLOCK, masked
from benchmarks.multi_token import PROMPT, prompts

RESULT = Path(__file__).parent / "results" / "masked_bytes.json"
NEW = 64
WAYS: tuple[dict[str, Any], ...] = (
    {"threshold": -1.0}, {"threshold": 0.25}, {"threshold": 0.5}, {"threshold": 0.7}, {"threshold": 1.0}, {"threshold": 0.5, "cached": True},
)  # fmt: skip


def perplexity(judge: Any, texts: Tensor) -> float:
    """Of a byte that was written."""
    with torch.no_grad():
        logits = judge(texts, use_cache=False).logits[:, PROMPT - 1 : -1]
    return math.exp(F.cross_entropy(logits.flatten(0, 1), texts[:, PROMPT:].flatten()).item())


def measure(count: int) -> list[dict[str, Any]]:
    judge, _ = bytes_moe.load(torch.float32)
    asked, unseen = prompts(count, held_out=True), bytes_moe.tokens(bytes_moe.text(held_out=True))
    rows = []
    for name in ("masked_bytes_teacher", "masked_bytes"):
        model, slow = masked(name), None
        loss = train.judged(model, unseen)
        for how in WAYS:
            decoder, texts, calls, computed = dparallel(block=BLOCK, shifted=True, **how), [], 0, 0
            for ids in asked.split(1):
                texts.append(decoder(model, ids, NEW))
                calls, computed = calls + decoder.statistics.calls, computed + decoder.statistics.rows
            made = torch.cat(texts)
            slow = made if slow is None else slow
            agrees = (made[:, PROMPT:] == slow[:, PROMPT:]).float().mean().item()
            rows.append({
                "model": name, **how, "steps": round(calls / count, 1), "rows": round(computed / count), "of": NEW,
                "perplexity": round(perplexity(judge, made), 2), "agrees": round(agrees, 3), "masked_byte_nats": round(loss, 3),
            })  # fmt: skip
            print(rows[-1], flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--write", type=Path, default=RESULT)
    given = parser.parse_args()
    given.write.write_text(json.dumps({"torch": torch.__version__, "rows": measure(given.prompts)}, indent=1) + "\n")


if __name__ == "__main__":
    main()
