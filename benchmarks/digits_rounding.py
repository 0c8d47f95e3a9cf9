"""What rounding costs the digits model in W8A8 and W4A8: vidit_q and mixdq beside the nearest rounding at equal bits.

    python -m benchmarks.digits_rounding --per-class 10 --steps 20

Each makes the same images from the same noise. PSNR is against those of the dense model.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import accelpass
from accelpass.models_zoo import digits
from benchmarks.digits_quality import class_accuracy, frechet_distance, labels_of, psnr
from benchmarks.machine import cpu

RESULTS = Path(__file__).parent / "results" / "digits_rounding_cpu.json"
CALLS = 4
"""Of the model in a sampling run, that are learnt from."""


def calls_of(pipe: Any, steps: int) -> list[dict[str, Tensor]]:
    """Some calls of a run with one image of each class, from first to last."""
    seen: list[dict[str, Tensor]] = []

    def keep(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        names = ("hidden_states", "timestep", "class_labels")
        given = dict(zip(names, args, strict=False)) | {k: v for k, v in kwargs.items() if k in names}
        seen.append({k: v.clone() for k, v in given.items()})

    hook = pipe.transformer.register_forward_pre_hook(keep, with_kwargs=True)
    digits.sample(pipe, list(range(digits.CLASSES)), steps, seed=99)
    hook.remove()
    return seen[:: max(1, len(seen) // CALLS)]


def entries() -> dict[str, tuple[dict[str, Any], bool]]:
    """Name, the pass, and whether it learns from data."""
    made: dict[str, tuple[dict[str, Any], bool]] = {}
    for bits in (8, 4):
        made[f"W{bits}A8 nearest"] = {"name": "vidit_q", "bits": bits}, False
        made[f"W{bits}A8 vidit_q"] = {"name": "vidit_q", "bits": bits}, True
        made[f"W{bits}A8 mixdq"] = {"name": "mixdq", "bits": bits}, True
    return made


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--per-class", type=int, default=10, help="images of each class")
    parser.add_argument("--steps", type=int, default=20, help="of DDIM")
    given = parser.parse_args(arguments)
    labels, pipe = labels_of(given.per_class), digits.pipeline()
    dense_model = pipe.transformer
    calls = calls_of(pipe, given.steps)
    dense = digits.sample(pipe, labels.tolist(), given.steps, seed=0)
    found = {"dense": {"accuracy": class_accuracy(dense, labels), "frechet": frechet_distance(dense)}}
    for name, (entry, learns) in entries().items():
        torch._dynamo.reset()
        options: dict[str, Any] = {"lowering": "aten", "passes": [entry]}
        if learns:
            options |= {"passes": [], "plan": accelpass.calibrate(dense_model, calls, [entry], progress=False)}
        pipe.transformer = torch.compile(dense_model, backend="accelpass", options=options)
        images = digits.sample(pipe, labels.tolist(), given.steps, seed=0)
        before, after = accelpass.explain(pipe.transformer).weight_bytes
        found[name] = {
            "accuracy": class_accuracy(images, labels),
            "frechet": frechet_distance(images),
            "psnr": psnr(images, dense),
            "bytes": after / before,
        }
        print(json.dumps({name: found[name]}), file=sys.stderr, flush=True)
    result = {"cpu": cpu(), "torch": torch.__version__, "images": len(labels), "steps": given.steps, "rows": found}
    RESULTS.write_text(json.dumps(result, indent=1) + "\n")
    table = Table("", "right class", "Fréchet", "PSNR, dB", "bytes of weights")
    for name, row in found.items():
        psnr_said, size = (f"{row[k]:.2f}" if k in row else "" for k in ("psnr", "bytes"))
        table.add_row(name, f"{row['accuracy']:.3f}", f"{row['frechet']:.2f}", psnr_said, size)
    Console().print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
