"""Reading long prompts with fewer tokens, or fewer keys: time to the first token on SmolLM2-135M; what fewer tokens cost in quality.

    python -m benchmarks.prompt_pruning                      # 2k, 4k and 8k tokens of prose, then quality
    python -m benchmarks.prompt_pruning --quick              # does it work? 1k and 2k tokens, little of everything
    python -m benchmarks.prompt_pruning --only time --write benchmarks/results/smollm2_prompt_pruning_cpu.json

All candidates read the same prose and take turns within one process; each is compiled before the first turn, for any length.
Dense is ``torch.compile`` with Inductor and a static cache. Rows are printed as JSON.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

import accelpass
from accelpass.api.generation import new_cache
from accelpass.models_zoo import load
from accelpass.passes.core.plan import Plan
from benchmarks import sparse_quality
from benchmarks.kv_quality import Compiled
from benchmarks.kv_tasks import Row, Sizes, Tasks, prose

INDUCTOR, DENSE = "inductor, StaticCache", "accelpass, dense"
CANDIDATES: dict[str, list[Any] | None] = {
    INDUCTOR: None,
    DENSE: [],
    "gemfilter, 1,024": [{"name": "gemfilter", "keep": 1024}],
    "lazyllm": ["lazyllm"],
    "lazyllm, 30 %": [{"name": "lazyllm", "keep": [0.3, 0.5, 0.5]}],
    "gemfilter, 512": [{"name": "gemfilter", "keep": 512}],
    "gemfilter, 512, layer 18": [{"name": "gemfilter", "keep": 512, "layer": 18}],
    # Those that are calibrated, where their plan has been found.
    **{
        name: passes
        for name, passes in sparse_quality.METHODS.items()
        if passes and (name not in sparse_quality.PLANS or sparse_quality.PLANS[name].exists())
    },
}


@dataclass(frozen=True)
class Amount:
    """How much is measured."""

    lengths: tuple[int, ...] = (2048, 4096, 8192 - 64)
    rounds: int = 5
    sizes: Sizes = field(
        default_factory=lambda: Sizes(
            windows={2048: 2, 4096: 2, 8192: 1}, scored=256, keys=dict.fromkeys((2048, 4096, 8192), 5)
        )
    )


QUICK = Amount((1024, 2048), 3, Sizes(windows={1536: 1}, scored=64, keys={1536: 2}))


class Prompted(Protocol):
    """What reads a prompt into its own, emptied cache."""

    def prompt(self, ids: Tensor) -> Tensor: ...


class Inductor:
    """The model compiled by Inductor, with a static cache."""

    def __init__(self, model: torch.nn.Module, capacity: int) -> None:
        self.fast, self.cache = torch.compile(model), new_cache(model, capacity)

    def prompt(self, ids: Tensor) -> Tensor:
        self.cache.reset()
        torch._dynamo.maybe_mark_dynamic(ids, 1)
        out = self.fast(input_ids=ids, past_key_values=self.cache, use_cache=True, logits_to_keep=1)
        return out.logits[0, -1]


def reader(model: torch.nn.Module, name: str, capacity: int) -> Prompted:
    passes = CANDIDATES[name]
    plan = Plan.load(sparse_quality.PLANS[name]) if name in sparse_quality.PLANS else None
    return Inductor(model, capacity) if passes is None else Compiled(model, passes, capacity, plan)


@torch.no_grad()
def times(
    model: torch.nn.Module, ids: Tensor, names: Sequence[str], plan: Amount, say: Callable[[Row], None]
) -> list[Row]:
    """Milliseconds from the prompt to the logits of the token after it: medians, and the compile time of each candidate."""
    torch._dynamo.reset()
    readers, compiling = {}, {}
    # All candidates are compiled from one model's code, which by default has eight graphs at most and is eager after that.
    with torch._dynamo.config.patch(recompile_limit=256):
        for name in names:
            start = time.perf_counter()
            readers[name] = reader(model, name, max(plan.lengths) + 64)
            for length in plan.lengths:
                readers[name].prompt(ids[:, :length].clone())
            compiling[name] = time.perf_counter() - start
    rows: list[Row] = []
    for length in plan.lengths:
        seconds: dict[str, list[float]] = {name: [] for name in names}
        for _ in range(plan.rounds):
            for name in names:
                given = ids[:, :length].clone()
                start = time.perf_counter()
                int(readers[name].prompt(given).argmax())
                seconds[name].append(time.perf_counter() - start)
        first = statistics.median(seconds[names[0]])
        for name in names:
            median = statistics.median(seconds[name])
            spread = (max(seconds[name]) - min(seconds[name])) / median
            row = {"tokens": length, "name": name, "first_token_ms": round(median * 1e3), "spread": round(spread, 2)}
            rows.append(
                row | {"faster_than_the_first": round(first / median, 2), "first_calls_s": round(compiling[name], 1)}
            )
            say(rows[-1])
    return rows


def has_quality(name: str) -> bool:
    """Whether :func:`quality` has a row for a candidate; those of sparse attention are in ``benchmarks.sparse_quality``."""
    return CANDIDATES[name] is not None and name not in sparse_quality.METHODS


@torch.no_grad()
def quality(
    model: torch.nn.Module, tokenizer: Any, names: Sequence[str], plan: Amount, say: Callable[[Row], None]
) -> list[Row]:
    """Perplexity of the continuation, and pass keys found, of each candidate with a KVCache."""
    tasks, rows = Tasks(tokenizer, plan.sizes), []
    for name in names:
        if not has_quality(name):
            continue
        torch._dynamo.reset()
        asked = Compiled(model, CANDIDATES[name] or [], plan.sizes.capacity)
        row = {"name": name, **tasks.ask(asked, lambda done: None)}
        kept = accelpass.surviving_tokens(asked.fast)
        rows.append(row | {"read_of_last_prompt": f"{len(kept[0].kept[0])} of {kept[0].tokens}" if kept else "all"})
        say(rows[-1])
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a few minutes")
    parser.add_argument("--only", choices=("time", "quality"), help="one of the two parts")
    parser.add_argument("--candidates", nargs="+", choices=list(CANDIDATES), default=list(CANDIDATES), metavar="NAME")
    parser.add_argument("--lengths", nargs="+", type=int, help="tokens of the prompts that are timed")
    parser.add_argument("--write", type=Path, help="a JSON file for the rows")
    given = parser.parse_args()
    plan = QUICK if given.quick else Amount()
    if given.lengths:
        plan = Amount(tuple(given.lengths), plan.rounds, plan.sizes)
    model, tokenizer = load("smollm2-135m")
    ids = tokenizer(prose(), return_tensors="pt").input_ids[:, : max(plan.lengths)]

    def say(row: Row) -> None:
        print(json.dumps(row), flush=True)

    content: dict[str, Any] = {"torch": torch.__version__, "machine": platform.processor() or platform.machine()}
    content["threads"] = torch.get_num_threads()
    if given.only != "quality":
        content["times"] = times(model, ids, given.candidates, plan, say)
    if given.only != "time":
        content["quality"] = quality(model, tokenizer, given.candidates, plan, say)
    if given.write is not None:
        given.write.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
