"""Time to the first token of a vision-language model that reads fewer visual tokens, at batch 1 and 16.

    python -m benchmarks.visual_tokens                       # shapes of SmolVLM-256M, random weights
    python -m benchmarks.visual_tokens --quick               # does it work? a small model, two rounds
    python -m benchmarks.visual_tokens --write benchmarks/results/visual_tokens_cpu.json

The tower has the shapes of SmolVLM-256M's (12 blocks of 768 channels) with a class token, and the language model is SmolLM2-135M's;
a plain projector stands between, so that an image is 576 visual tokens. Candidates take turns within one process, each compiled
before the first turn; times are medians, and ratios are of dense Inductor's. What a score costs by itself is the row that drops one
token. Rows are printed as JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.machine import cpu

IMAGE, TEXT = 9, 32
INDUCTOR = "inductor"
CANDIDATES: dict[str, list[Any] | None] = {
    INDUCTOR: None,
    "accelpass, dense": [],
    "tome, 24": [{"name": "tome", "merge": 24}],
    "visionzip, 50 %": [{"name": "visionzip", "keep": 0.5}],
    "visionzip, 20 %": [{"name": "visionzip", "keep": 0.2}],
    "hired, 50 %": [{"name": "hired", "keep": 0.5}],
    "hired, 20 %": [{"name": "hired", "keep": 0.2}],
    "fastv, 50 %": [{"name": "fastv", "keep": 0.5}],
    "fastv, 20 %": [{"name": "fastv", "keep": 0.2}],
    "fastv, all but one": [{"name": "fastv", "keep": 0.9999}],
    "hired, all but one": [{"name": "hired", "keep": 0.9999}],
}


def model(quick: bool) -> Any:
    """A LLaVA of these shapes, random weights."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    small: dict[str, Any] = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_attention_heads": 4,
        "num_hidden_layers": 4,
    }
    tower = small | {"image_size": 96} if quick else {
        "hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12, "num_hidden_layers": 12, "image_size": 384,
    }  # fmt: skip
    text = small if quick else {
        "hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9, "num_key_value_heads": 3, "num_hidden_layers": 30,
    }  # fmt: skip
    torch.manual_seed(0)
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**tower, patch_size=16),
        text_config=LlamaConfig(**text, vocab_size=1024 if quick else 49152, max_position_embeddings=4096),
        image_token_id=IMAGE,
    )
    return LlavaForConditionalGeneration(config).eval()


def question(vlm: Any, batch: int) -> dict[str, Any]:
    """An image and some words in each text."""
    side = vlm.config.vision_config.image_size
    ids = torch.randint(16, 1000, (batch, TEXT + (side // 16) ** 2))
    ids[:, 4 : 4 + (side // 16) ** 2] = IMAGE
    return {
        "input_ids": ids,
        "pixel_values": torch.randn(batch, 3, side, side),
        "use_cache": False,
        "logits_to_keep": 1,
    }


def compiled(vlm: Any, passes: list[Any] | None) -> Callable[..., Any]:
    if passes is None:
        return torch.compile(vlm, dynamic=False)
    return torch.compile(vlm, backend="accelpass", options={"passes": passes}, dynamic=False)


@torch.no_grad()
def measure(names: Sequence[str], batches: Sequence[int], rounds: int, quick: bool) -> list[dict[str, Any]]:
    torch._dynamo.config.recompile_limit = 8 * len(names) * len(batches)  # all candidates share the model's code
    vlm = model(quick)
    rows = []
    for batch in batches:
        given = question(vlm, batch)
        vlm(**given)  # transformers installs hooks at the first call
        ready: dict[str, Callable[..., Any]] = {}
        compiling: dict[str, float] = {}
        for name in names:
            start = time.perf_counter()
            ready[name] = compiled(vlm, CANDIDATES[name])
            for _ in range(2):  # the second call may compile once more
                ready[name](**given)
            compiling[name] = time.perf_counter() - start
        times: dict[str, list[float]] = {name: [] for name in names}
        for _ in range(rounds):
            for name in names:
                start = time.perf_counter()
                ready[name](**given)
                times[name].append(time.perf_counter() - start)
        dense = statistics.median(times[INDUCTOR])
        for name in names:
            seconds = statistics.median(times[name])
            row = {
                "batch": batch,
                "candidate": name,
                "first_token_s": round(seconds, 4),
                "of_inductor": round(seconds / dense, 3),
            }
            rows.append(row | {"compile_s": round(compiling[name], 1)})
            print(json.dumps(rows[-1]), flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--batches", default="1,16", help="numbers of texts, with commas")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", default="", help="candidates that contain one of these words, with commas")
    parser.add_argument("--write", type=Path)
    asked = parser.parse_args()
    os.environ["TRANSFORMERS_DISABLE_TORCH_CHECK"] = "1"
    words = [w for w in asked.only.split(",") if w]
    names = [n for n in CANDIDATES if n == INDUCTOR or not words or any(w in n for w in words)]
    rounds = min(asked.rounds, 2) if asked.quick else asked.rounds
    rows = measure(names, [int(b) for b in asked.batches.split(",")], rounds, asked.quick)
    if asked.write:
        made = {"cpu": cpu(), "threads": torch.get_num_threads(), "torch": torch.__version__, "rows": rows}
        asked.write.write_text(json.dumps(made, indent=1) + "\n")


if __name__ == "__main__":
    main()
