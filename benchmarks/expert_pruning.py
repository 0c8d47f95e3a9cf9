"""Half the experts of ``bytes-moe`` taken out: perplexity by how they were chosen, bytes of weights, and time of a call.

    python -m benchmarks.expert_pruning             # some minutes; times are only worth something on a quiet machine
    python -m benchmarks.expert_pruning --small     # does it work? nothing is written

Chosen are experts by chance (the mean of five draws), those that most tokens go to, and those that ``eep`` finds: whole ones, and merged
ones. EEP's score is how many bytes of the training text are foretold, in percent; perplexity is of text that was held out.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import accelpass
from accelpass.models_zoo import bytes_moe, load
from accelpass.models_zoo.train_bytes_moe import WINDOW, perplexity
from accelpass.passes.core.plan import Plan
from benchmarks.decode import own_call
from benchmarks.machine import cpu, put_table, row_lines
from benchmarks.structure import in_turns

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "bytes_moe_experts_cpu.json"
PAGE = ROOT / "docs" / "structured-pruning.md"
START, END = "<!-- expert pruning -->\n", "<!-- end of expert pruning -->"
PLANS = ROOT / "build" / "expert_plans"
"""Found once, by a first run: a second one on a quiet machine only measures."""
DRAWS, BATCH, TOKENS, TURNS = 5, 8, 128, 15
Kept = Mapping[int, Sequence[int]]
Say = Callable[[str], None]


def compiled(model: Any, passes: list[Any], **options: Any) -> Any:
    torch._dynamo.reset()
    return torch.compile(model, backend="accelpass", options={"passes": passes, **options})


def named(kept: Kept) -> list[Any]:
    """The pass that keeps these experts of each layer."""
    return [{"name": "eep", "sites": {f"*layers.{n}.mlp*": {"keep": list(rows)} for n, rows in kept.items()}}]


def drawn(layers: int, experts: int, keep: int, seed: int) -> Kept:
    draw = random.Random(seed)
    return {n: sorted(draw.sample(range(experts), keep)) for n in range(layers)}


@torch.no_grad()
def most_used(model: Any, ids: Tensor, keep: int) -> Kept:
    """Of each layer the experts that most tokens of ``ids`` go to."""
    found = model(ids, use_cache=False, output_router_logits=True).router_logits
    top = model.config.num_experts_per_tok
    counts = [torch.bincount(one.topk(top).indices.flatten(), minlength=one.shape[-1]) for one in found]
    return {n: sorted(count.topk(keep).indices.tolist()) for n, count in enumerate(counts)}


def foretold(model: Any, ids: Tensor) -> float:
    """Percent of bytes that are the likeliest ones of their context."""
    chosen = model(ids, use_cache=False).logits[:, :-1].argmax(-1)
    return 100 * float((chosen == ids[:, 1:]).double().mean())


def measure(
    model: Any, ids: Tensor, held: Tensor, trials: int, say: Say
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Rows, and the compiled models of those that are timed."""
    config = model.config
    layers, experts = config.num_hidden_layers, config.num_local_experts
    keep = experts // 2
    searched: dict[str, Any] = {"name": "eep", "experts": keep, "trials": trials}
    parts = {"eep, whole experts": trials, "eep, merged": max(trials // 4, 1)}
    ways: dict[str, list[tuple[list[Any], Any]]] = {
        "all experts": [([], None)],
        "by chance": [(named(drawn(layers, experts, keep, seed)), None) for seed in range(DRAWS)],
        "most used": [(named(most_used(model, ids, keep)), None)],
    }
    for name, pruning in parts.items():
        passes = [{**searched, "pruning_trials": pruning}]
        path = PLANS / f"{name.replace(', ', '_').replace(' ', '_')}_{trials}.json"
        if path.is_file():
            plan = Plan.load(path)
        else:
            say(f"{name}: {trials} candidates")
            plan = accelpass.search_by_score(model, partial(foretold, ids=ids), passes)
            PLANS.mkdir(parents=True, exist_ok=True)
            plan.save(path)
        ways[name] = [(passes, plan)]
    rows, timed = [], {}
    for name, tried in ways.items():
        found = []
        for passes, plan in tried:
            fast = compiled(model, passes, plan=plan, lowering="eager")
            found.append((perplexity(fast, held), foretold(fast, ids), accelpass.explain(fast).weight_bytes[1]))
        passes, plan = tried[0]
        timed[name] = (passes, plan)
        rows.append(
            {
                "name": name,
                "weights_mb": round(found[0][2] / 1e6, 2),
                "perplexity": round(math.exp(statistics.mean(math.log(p) for p, _, _ in found)), 3),
                "foretold": round(statistics.mean(share for _, share, _ in found), 2),
            }
        )
        say(str(rows[-1]))
    return rows, timed


def times(model: Any, ids: Tensor, timed: Mapping[str, Any], turns: int, say: Say) -> dict[str, float]:
    """Milliseconds of a call, in turns."""
    torch._dynamo.reset()
    runs: dict[str, Callable[[], Any]] = {}
    for name, (passes, plan) in timed.items():
        say(f"compiling {name}")
        options = {"passes": passes, "plan": plan}
        runs[name] = partial(
            torch.compile(own_call(_CALL), backend="accelpass", options=options, dynamic=False), model, ids
        )
        runs[name]()
    return {name: round(1e3 * statistics.median(s), 2) for name, s in in_turns(runs, turns).items()}


_CALL = """
def call(model, ids):
    return model(ids, use_cache=False).logits
"""


def write_table(content: dict[str, Any], page: Path = PAGE) -> None:
    """Put the figures into the page."""
    about = f"{BATCH} x {TOKENS} bytes a call. Measured on {content['cpu']}, {content['threads']} threads, in turns."
    put_table(page, START, "\n".join([about, "", *row_lines("experts", content["rows"])]), END)


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=400, help="candidates of each search; the paper's 400")
    parser.add_argument("--small", action="store_true")
    given = parser.parse_args()
    say: Say = partial(print, file=sys.stderr, flush=True)
    model, _ = load("bytes-moe")
    train, held = (bytes_moe.tokens(bytes_moe.text(held_out=which)) for which in (False, True))
    step = len(train) // 17  # windows from all over the text
    ids = torch.stack([train[n * step : n * step + WINDOW] for n in range(4 if given.small else 16)])
    held = held[: (8 if given.small else 128) * WINDOW]
    rows, timed = measure(model, ids, held, 8 if given.small else given.trials, say)
    taken = times(model, ids[:, :TOKENS][:BATCH].contiguous(), timed, 2 if given.small else TURNS, say)
    for row in rows:
        row["ms"] = taken[row["name"]]
    for row in rows:
        print(json.dumps(row))
    if not given.small:
        content = {"cpu": cpu(), "torch": str(torch.__version__), "threads": torch.get_num_threads(), "rows": rows}
        RESULTS.write_text(json.dumps(content, indent=1) + "\n")
        write_table(content)


if __name__ == "__main__":
    main()
