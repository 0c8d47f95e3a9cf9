"""SmolLM2 made smaller: milliseconds of a prompt and of a token, resident memory, and an output head of codes, beside the dense model.

    python -m benchmarks.structured_timing --part time      # on a quiet machine: a dozen models are compiled, then take turns
    python -m benchmarks.structured_timing --part memory    # each in a process of its own
    python -m benchmarks.structured_timing --part head      # vq_logits: bytes, time, and how often its choice is the dense one
    python -m benchmarks.structured_timing --small          # do they work? nothing is written

A part's rows go into ``smollm2_structured_cpu.json``, beside what another run measured, and into the page.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import accelpass
from accelpass.backends import compiled_graphs
from accelpass.models_zoo import load
from accelpass.passes.core.plan import Plan
from benchmarks import memory
from benchmarks.decode import own_call
from benchmarks.machine import cpu, put_table, row_lines
from benchmarks.quality import TOKENS, prose
from benchmarks.structure import in_turns
from benchmarks.structured_pruning import CALIBRATION, LENGTH

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "smollm2_structured_cpu.json"
PAGE = ROOT / "docs" / "structured-pruning.md"
START, END = "<!-- structured timing -->\n", "<!-- end of structured timing -->"
ANSWER, TURNS, SPARE = 16, 7, 64
CODES = (2048, 4096, 8192)
Row = dict[str, Any]
Say = Callable[[str], None]


def candidates() -> dict[str, list[Any]]:
    """Passes of each row, by its name; those that are there by default run as well."""
    skipping = {"name": "skip_layers", "horizon": LENGTH}
    return {
        "dense": [],
        "wanda, channels 0.25": [{"name": "wanda", "channels": 0.25, "heads": 0.0}],
        "wanda, heads 0.25": [{"name": "wanda", "channels": 0.0, "heads": 0.25}],
        "wanda, channels 0.25, heads 0.25": [{"name": "wanda", "channels": 0.25, "heads": 0.25}],
        "two_of_four": ["two_of_four"],
        "shortgpt, 3 layers": [{"name": "shortgpt", "remove": 3}],
        "shortgpt, 6 layers": [{"name": "shortgpt", "remove": 6}],
        "skip_layers, 24 of 30 run": [{**skipping, "least": 24}],
        "skip_layers, 15 of 30 run": [{**skipping, "least": 15}],
        **{f"vq_logits, {k} codes": [{"name": "vq_logits", "codes": k, "iterations": 5}] for k in CODES},
    }


def smaller() -> dict[str, list[Any]]:
    """For memory, which rows are taken out makes no difference: by weight, and layers by number."""
    pruned = partial(dict, name="magnitude_prune")
    return {
        "dense": [],
        "channels 0.25": [pruned(channels=0.25, heads=0.0)],
        "heads 0.25": [pruned(channels=0.0, heads=0.25)],
        "channels 0.25, heads 0.25": [pruned(channels=0.25, heads=0.25)],
        "two_of_four": ["two_of_four"],
        "3 layers": [{"name": "skip_layers", "layers": (24, 25, 26)}],
        "6 layers": [{"name": "skip_layers", "layers": (21, 22, 23, 24, 25, 26)}],
    }


def learnt(model: Any, ids: Tensor) -> Any:
    """What ``wanda`` and ``shortgpt`` learn from the tokens behind those that quality is measured on."""
    data = list(ids[:, TOKENS : TOKENS + CALIBRATION * LENGTH].split(LENGTH, 1))
    return accelpass.calibrate(model, data, ["wanda", "shortgpt"], progress=False)


class Timed:
    """One way to run the model: a prompt of ``LENGTH`` tokens, and ``ANSWER`` tokens behind it."""

    def __init__(self, model: Any, passes: list[Any], plan: Any, ids: Tensor) -> None:
        tensors = Plan([], plan.fingerprint, plan.tensors)  # the passes are the row's
        options = {
            "plan": tensors,
            **({"passes": passes} if passes else {}),
        }  # an empty list leaves the default ones out
        self.fast = torch.compile(own_call(), backend="accelpass", options=options, dynamic=False)
        self.model, self.ids = model, ids[:, :LENGTH]
        self.prompts: list[float] = []
        self.tokens: list[float] = []
        self.weights = 0

    def __call__(self) -> None:
        cache = accelpass.KVCache(self.model, LENGTH + SPARE)
        start = time.perf_counter()
        chosen = self.fast(self.model, self.ids, cache).argmax(-1)
        self.prompts.append(1e3 * (time.perf_counter() - start))
        start = time.perf_counter()
        for _ in range(ANSWER):
            chosen = self.fast(self.model, chosen, cache).argmax(-1)
        self.tokens.append(1e3 * (time.perf_counter() - start) / ANSWER)
        self.weights = self.weights or compiled_graphs()[-1].report.after.weight_bytes  # the graph of one token

    def row(self, name: str, dense: Timed) -> Row:
        """Medians of all turns but the first two: the first compiled."""
        kept: dict[str, tuple[list[float], list[float]]] = {
            "prefill": (self.prompts[2:], dense.prompts[2:]),
            "decode": (self.tokens[2:], dense.tokens[2:]),
        }
        made: Row = {
            "name": name,
            "weights_mb": round(self.weights / 1e6, 1),
            "weights_of_dense": round(self.weights / dense.weights, 3),
        }
        for what, (mine, its) in kept.items():
            made[f"{what}_ms"] = round(statistics.median(mine), 2)
            made[f"{what}_of_dense"] = round(statistics.median(a / b for a, b in zip(mine, its, strict=True)), 3)
        return made


@torch.no_grad()
def times(model: Any, ids: Tensor, chosen: dict[str, list[Any]], turns: int, say: Say) -> list[Row]:
    """Each candidate against the dense model, in turns."""
    plan = learnt(model, ids)
    runs: dict[str, Timed] = {}
    for name, passes in chosen.items():
        say(f"compiling {name}")
        runs[name] = Timed(model, passes, plan, ids)
        runs[name]()
    calls: dict[str, Callable[[], Any]] = {**runs}
    in_turns(calls, turns)
    return [run.row(name, runs["dense"]) for name, run in runs.items()]


class Head(nn.Module):
    """An output head, with as little of a model as tells that its rows are tokens: an embedding of zeros, one channel wide."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.embed = nn.Embedding(len(weight), 1)
        self.embed.weight = nn.Parameter(torch.zeros(len(weight), 1), requires_grad=False)
        self.lm_head = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
        self.lm_head.weight = nn.Parameter(weight, requires_grad=False)

    def forward(self, ids: Tensor, x: Tensor) -> Tensor:
        logits: Tensor = self.lm_head(x + self.embed(ids))
        return logits


_HEAD = """
def call(head, ids, x):
    return head(ids, x)
"""


@torch.no_grad()
def heads(model: Any, ids: Tensor, codes: tuple[int, ...], turns: int, say: Say) -> list[Row]:
    """The head of one token: bytes, time, and the share of a text's tokens at which it chooses what the dense one does."""
    streams = [model.model(window).last_hidden_state[0] for window in ids[:, :TOKENS].split(LENGTH, 1)]
    every = torch.cat(streams)[None]
    tokens = torch.zeros(every.shape[:2], dtype=torch.int64)
    head = Head(model.lm_head.weight.detach())
    choice = head(tokens, every).argmax(-1)
    torch._dynamo.reset()
    rows, runs = [], dict[str, Callable[[], Any]]()
    for name, passes in {
        "dense": [],
        **{f"vq_logits, {k} codes": candidates()[f"vq_logits, {k} codes"] for k in codes},
    }.items():
        say(f"head of {name}")
        options = {"passes": passes} if passes else {}
        fast = torch.compile(own_call(_HEAD), backend="accelpass", options=options, dynamic=True)
        parts = zip(tokens.split(LENGTH, 1), every.split(LENGTH, 1), strict=True)
        logits = torch.cat([fast(head, *part) for part in parts], 1)
        runs[name] = partial(fast, head, tokens[:, :1], every[:, :1])
        runs[name]()
        size = compiled_graphs()[-1].report.after.weight_bytes
        same = logits.argmax(-1) == choice
        among = logits.gather(-1, choice[..., None])[..., 0] == logits.amax(
            -1
        )  # of the tokens that share the best logit
        shares = {"agreement": same, "choice_among_the_best": among}
        rows.append({"name": name, "head_mb": round(size / 1e6, 2)})
        rows[-1] |= {what: round(float(share.double().mean()), 4) for what, share in shares.items()}
    seconds = in_turns(runs, 10 * turns)
    for row in rows:
        row["ms"] = round(1e3 * statistics.median(seconds[row["name"]]), 3)
    return rows


def write_tables(content: dict[str, Any], page: Path = PAGE) -> None:
    """Put the figures into the page."""
    lines = []
    titles = {"time": "time", "memory": "memory", "head": "output head, one token"}
    for part, title in titles.items():
        if rows := content["parts"].get(part):
            lines += [f"On {content['cpus'][part]}, {content['threads']} threads:", "", *row_lines(title, rows)]
    put_table(page, START, "\n".join(lines), END)


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=("time", "memory", "head"), default="time")
    parser.add_argument("--only", default="*", help="a shell pattern of names; the dense model is always there")
    parser.add_argument("--turns", type=int, default=TURNS)
    parser.add_argument("--small", action="store_true", help="two rows, two turns, nothing written")
    given = parser.parse_args()
    say: Say = partial(print, file=sys.stderr, flush=True)
    offered = smaller() if given.part == "memory" else candidates()
    chosen = {n: p for n, p in offered.items() if n == "dense" or fnmatch.fnmatchcase(n, given.only)}
    if given.small:
        chosen = dict(list(chosen.items())[:2])
    turns = 2 if given.small else given.turns
    if given.part == "memory":
        rows = memory.measure(chosen)
    else:
        model, tokenizer = load("smollm2-135m")
        ids = prose(tokenizer, TOKENS + CALIBRATION * LENGTH)
        codes = CODES[:1] if given.small else CODES
        rows = times(model, ids, chosen, turns, say) if given.part == "time" else heads(model, ids, codes, turns, say)
    for row in rows:
        print(json.dumps(row))
    if given.small:
        return
    content = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {"parts": {}}
    old = {row["name"]: row for row in content["parts"].get(given.part, []) if given.only != "*"}
    content |= {"torch": str(torch.__version__), "threads": torch.get_num_threads()}
    content.setdefault("cpus", {})[given.part] = cpu()
    content["parts"][given.part] = list((old | {row["name"]: row for row in rows}).values())
    RESULTS.write_text(json.dumps(content, indent=1) + "\n")
    write_tables(content)


if __name__ == "__main__":
    main()
