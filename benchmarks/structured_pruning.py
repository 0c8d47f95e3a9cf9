"""SmolLM2 with a share of its FFN channels, heads or layers taken out: what is left of its bytes and of its perplexity.

    python -m benchmarks.structured_pruning --out structured_pruning.json          # some minutes on one core

Times are ``benchmarks.structured_timing``'s. Scorers are compared at equal size. Perplexity is over 4096 tokens of Python's reference text; norms and block influence are of
2048 tokens that come after these, vtrans' masks are trained on those behind them. Weights are not trained.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

import accelpass
from accelpass.ir.core.derived import Recipe
from accelpass.ir.core.program import Program
from accelpass.ir.transform.changed_axes import Carrier
from accelpass.models_zoo import load
from accelpass.passes.core.plan import Plan
from accelpass.passes.pruning.structured import Site, StructuredPruning
from benchmarks.quality import TOKENS, perplexity, prose

CALIBRATION, LENGTH = 4, 512
SHARES = (
    {"channels": 0.25, "heads": 0.0},
    {"channels": 0.0, "heads": 0.25},
    {"channels": 0.25, "heads": 0.25},
    {"channels": 0.335, "heads": 0.0},  # as many bytes as vtrans leaves
)
TRAINING, SHORT = 512, 128
"""Of vtrans: batches, of one text of so many tokens, each of which is seen once; the paper has 4,000 of 512. Masks learn by steps, so
short texts and many of them."""
RATE = 0.2
"""Of its masks: four times the authors', as so few steps at theirs leave all units in."""
LAYERS = (3, 6)
CODES = (2048, 8192)
Row = dict[str, Any]


@dataclass(frozen=True)
class RandomPrune(StructuredPruning):
    """Takes rows out by chance: what a score must beat."""

    name: ClassVar[str] = "random_prune"
    summary: ClassVar[str] = "channels of MLPs and heads are taken out by chance"

    def score(self, site: Site, found: Sequence[Carrier], program: Program) -> tuple[Recipe, Sequence[fx.Node]]:
        draw = random.Random(site.path)
        (axis,) = site.dimension(program)
        drawn = [draw.random() for _ in range(int(axis.size))]
        return Recipe(("random", site.path), lambda _: (torch.tensor(drawn),)), [found[0].weight]


def candidates(model: Any, ids: Tensor, only: str) -> dict[str, tuple[list[Any], Any]]:
    """Passes and plan of each row, by its name."""
    data = list(ids[:, TOKENS : TOKENS + CALIBRATION * LENGTH].split(LENGTH, 1))
    plan = accelpass.calibrate(model, data, ["wanda", "shortgpt"], progress=False)
    rows: dict[str, tuple[list[Any], Any]] = {"dense": ([], None)}
    for share in SHARES:
        size = ", ".join(f"{kind} {value:g}" for kind, value in share.items() if value)
        rows[f"random, {size}"] = [RandomPrune(**share)], None
        rows[f"magnitude_prune, {size}"] = [{"name": "magnitude_prune", **share}], None
        rows[f"wanda, {size}"] = [{"name": "wanda", **share}], plan
    for count in CODES:
        rows[f"vq_logits, {count} codes"] = [{"name": "vq_logits", "codes": count, "iterations": 5}], None
    for count in LAYERS:
        rows[f"shortgpt, {count} layers"] = [{"name": "shortgpt", "remove": count}], plan
    for units in (["channels", "heads"], ["channels", "heads", "layers", "width"]):
        asked = {"name": "vtrans", "sparsity": 0.25, "units": units, "rate": RATE}
        name = f"vtrans, {', '.join(units)}, sparsity 0.25"
        if fnmatch.fnmatchcase(name, only):  # minutes of training
            texts = list(ids[:, TOKENS + CALIBRATION * LENGTH :].split(SHORT, 1))
            rows[name] = [asked], accelpass.calibrate(model, texts, [asked])
    return rows


def compiled(model: Any, passes: list[Any], plan: Any, **options: Any) -> Any:
    torch._dynamo.reset()
    tensors = None if plan is None else Plan([], plan.fingerprint, plan.tensors)  # the passes are the row's
    return torch.compile(model, backend="accelpass", options={"passes": passes, "plan": tensors, **options})


@torch.no_grad()
def quality(model: Any, ids: Tensor, only: str) -> list[Row]:
    rows = []
    for name, (passes, plan) in candidates(model, ids, only).items():
        if not fnmatch.fnmatchcase(name, only):
            continue
        fast = compiled(model, passes, plan, lowering="eager")
        found = perplexity(lambda window, fast=fast: fast(window, use_cache=False).logits, ids[:, :TOKENS])
        report = accelpass.explain(fast)
        flops = report.flops or (0, 0)
        rows.append(
            {
                "name": name,
                "weight_megabytes": round(report.weight_bytes[1] / 1e6, 1),
                "flops_of_dense": round(flops[1] / flops[0], 3) if flops[0] else None,
                "perplexity": round(found, 2),
            }
        )
        print(rows[-1], flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="*", help="a shell pattern: rows to measure anew in the file")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, help="a JSON file to write")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    model, tokenizer = load("smollm2-135m")
    ids = prose(tokenizer, TOKENS + CALIBRATION * LENGTH + TRAINING * SHORT)
    rows = quality(model, ids, options.only)
    if options.out is not None:
        if options.only != "*" and options.out.is_file():
            new = {row["name"] for row in rows}
            rows = [row for row in json.loads(options.out.read_text()) if row["name"] not in new] + rows
        options.out.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
