"""Digits drawn pixel by pixel: calls of the model with speculative Jacobi decoding, and what a classifier reads in the images.

``python -m benchmarks.image_decoding`` writes benchmarks/results/pixels_sjd.json. Calls are of single images, shares of images that are
read rightly are of batches, whose texts go on by as many pixels as the slowest.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from accelpass.decoding import Decoder, Guidance, sjd
from accelpass.models_zoo.pixels import model as pixels

RESULT = Path(__file__).parent / "results" / "pixels_sjd.json"
NO_CLASS = torch.tensor([pixels.NO_CLASS])
WAYS: dict[str, dict[str, Any]] = {
    "pixel by pixel": {"window": 1},
    "window 8": {"window": 8},
    "window 16": {"window": 16},
    "window 16, repeat above": {"window": 16, "initial": "repeat", "row": 8},
    "window 16, sample above": {"window": 16, "initial": "sample", "row": 8},
}


def drawn(model: Any, decoder: Decoder, labels: Tensor) -> Tensor:
    """An image ``(n, 64)`` of each class."""
    made: Tensor = model.generate(
        pixels.prompts(labels), attention_mask=torch.ones(len(labels), 1, dtype=torch.int64), do_sample=True, top_k=0,
        max_new_tokens=pixels.PIXELS, custom_generate=decoder,
    )  # fmt: skip
    return made[:, 1:]


def measure(scale: float, single: int, many: int) -> list[dict[str, Any]]:
    model, _ = pixels.load(torch.float32)
    rows = []
    for name, how in WAYS.items():
        torch.manual_seed(0)
        guidance = None if scale == 1 else Guidance(scale, NO_CLASS)
        decoder = sjd(guidance=guidance, tokens=(0, pixels.GREYS), **how)
        calls = 0
        for number in range(single):
            drawn(model, decoder, torch.tensor([number % 10]))
            calls += decoder.statistics.calls + 1  # the prompt's own
        labels = torch.arange(many) % 10
        right = (pixels.read_as(drawn(model, decoder, labels)) == labels).float().mean().item()
        rows.append({"way": name, "guidance": scale, "calls": round(calls / single, 1), "images": single,
                     "read_rightly": round(right, 3), "judged": many})  # fmt: skip
        print(rows[-1], flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--single", type=int, default=50, help="images whose calls are counted")
    parser.add_argument("--many", type=int, default=500, help="images that are judged")
    parser.add_argument("--write", type=Path, default=RESULT)
    given = parser.parse_args()
    rows = [row for scale in (1.0, 2.0) for row in measure(scale, given.single, given.many)]
    given.write.write_text(
        json.dumps({"pixels": pixels.PIXELS, "torch": torch.__version__, "rows": rows}, indent=1) + "\n"
    )


if __name__ == "__main__":
    main()
