"""SmolLM2-135M in packages after a long text, of several sequences, and while it reads a prompt; llama.cpp beside where it is given.

    python -m benchmarks.package_long                 # compiles the packages first (minutes); time on a quiet machine
    python -m benchmarks.package_long --compile-only  # so that a later run only measures
    python -m benchmarks.package_long --peer PYTHON   # a Python that has llama-cpp-python

Candidates take turns. Texts are prose that Python ships, so that what is evicted from a cache is what a text would lose.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

import accelpass
from accelpass.cli.commands.export_command import EXAMPLE
from accelpass.models_zoo import load
from benchmarks.decode import CANDIDATES
from benchmarks.gguf_peers import Peer
from benchmarks.kv_tasks import prose
from benchmarks.machine import cpu, put_table
from benchmarks.package import PAGE, Packaged, compiled_sessions, in_turns

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "smollm2_package_long_cpu.json"
START, END = "<!-- long package table -->\n", "<!-- end of long package table -->"
CAPACITY, LONG, TOKENS = 4608, 4096, 80
SHORT, ROOM, BATCH = 128, 512, 8
PROMPTS, READS = (512, 2048), 5
H2O, BITS = {"name": "h2o", "budget": 0.2}, {"name": "kv_quant", "bits": 4}
PACKAGED: dict[str, list[Any]] = {
    "int8_weights": ["int8_weights"],
    "int8_weights, h2o, 20 %": ["int8_weights", H2O],
    "int8_weights, kv_quant, 4 bits": ["int8_weights", BITS],
}
SEVERAL = "int8_weights, 8 sequences"
COMPILED = ("inductor f32", "accelpass int8_weights")
PEERS = ("llama.cpp Q8_0", "llama.cpp Q4_0")
Say = Callable[[str], None]


def packages(model: Any, tokenizer: Any, folder: Path, say: Say) -> dict[str, str]:
    """Compile what is not in ``folder``; each one's path."""
    folder.mkdir(parents=True, exist_ok=True)
    ids = tokenizer(EXAMPLE, return_tensors="pt")["input_ids"]
    paths = {}
    for name, passes in {**PACKAGED, SEVERAL: ["int8_weights"]}.items():
        path = folder / f"{name.replace(', ', '_').replace(' ', '')}.pt2"
        paths[name] = str(path)
        if not path.is_file():
            say(f"packaging {name}")
            batch, capacity = (BATCH, ROOM) if name == SEVERAL else (1, CAPACITY)
            example = {"input_ids": ids.expand(batch, -1).contiguous(), "logits_to_keep": 1}
            accelpass.package(model, example, passes, path=path, cache=capacity)
    return paths


def decoding(
    model: Any, begun: dict[str, Any], ids: Any, room: int, peers: list[Peer], say: Say
) -> list[dict[str, Any]]:
    """Milliseconds of a step after ``ids``, in turns."""
    begun |= compiled_sessions(model, COMPILED, ids, room, say)
    seconds = in_turns(begun, peers, TOKENS)
    return [{"name": n, "ms": round(statistics.median(s) * 1e3, 2)} for n, s in seconds.items()]


def _read(opened: Any, ids: Any) -> None:
    session = opened.session()
    session.prompt(ids)
    session.close()


def reading(model: Any, opened: Any, text: Any, peers: list[Peer], say: Say) -> list[dict[str, Any]]:
    """Milliseconds to the first token of prompts, in turns."""
    rows: dict[str, dict[str, Any]] = {}
    fast = {}
    for name in COMPILED:
        make, dtype = CANDIDATES[name]
        own = copy.deepcopy(model).to(dtype)
        fast[name] = (make(own), own)
    for length in PROMPTS:
        ids = text[:, :length].contiguous()
        runs: dict[str, Callable[[], Any]] = {n: partial(f, own, ids, None) for n, (f, own) in fast.items()}
        runs["package int8_weights"] = partial(_read, opened, ids)
        seconds: dict[str, list[float]] = {name: [] for name in [*runs, *(p.name for p in peers)]}
        say(f"compiling, and reading prompts of {length}")
        for run in runs.values():
            run()
        for _ in range(READS):
            for name, run in runs.items():
                start = time.perf_counter()
                run()
                seconds[name].append(time.perf_counter() - start)
            for peer in peers:
                seconds[peer.name].append(peer.prompt(length))
        for name, taken in seconds.items():
            rows.setdefault(name, {"name": name})[f"ms_{length}"] = round(statistics.median(taken) * 1e3, 1)
    return list(rows.values())


def write_table(content: dict[str, Any], page: Path = PAGE) -> None:
    """Put the figures into the page."""
    lines = [f"Measured on {content['cpu']}, {content['threads']} threads, in turns.", ""]
    for title, part in (
        (f"after {LONG:,} tokens", "long"),
        (f"{BATCH} sequences, after {SHORT} tokens of each", "several"),
    ):
        if part not in content:
            continue
        lines += [f"| {title} | ms a step |", "|---|---|", *(f"| {r['name']} | {r['ms']} |" for r in content[part]), ""]
    if "prompts" not in content:
        put_table(page, START, "\n".join(lines), END)
        return
    lines += [
        f"| first token, ms | {' | '.join(f'{n:,} tokens' for n in PROMPTS)} |",
        "|---" * (len(PROMPTS) + 1) + "|",
    ]
    lines += [f"| {r['name']} | {' | '.join(str(r[f'ms_{n}']) for n in PROMPTS)} |" for r in content["prompts"]]
    put_table(page, START, "\n".join(lines), END)


@torch.no_grad()
def main() -> None:
    """Measure, and write the results and the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--packages", type=Path, default=ROOT / "build" / "packages_long")
    parser.add_argument("--compile-only", action="store_true")
    parser.add_argument("--peer", help="a Python that has llama-cpp-python")
    asked = parser.parse_args()

    def say(what: str) -> None:
        print(what, file=sys.stderr, flush=True)

    model, tokenizer = load("smollm2-135m")
    paths = packages(model, tokenizer, asked.packages, say)
    if asked.compile_only:
        return
    text = tokenizer(prose(), return_tensors="pt").input_ids[:, :LONG]
    opened = {name: accelpass.open(path) for name, path in paths.items()}
    peers = [Peer(n, asked.peer, asked.packages / "gguf", CAPACITY, LONG) for n in PEERS] if asked.peer else []
    content: dict[str, Any] = {"cpu": cpu(), "torch": str(torch.__version__), "threads": torch.get_num_threads()}
    say("reading the long text")
    long = {f"package {n}": Packaged(opened[n], text) for n in PACKAGED}
    content["long"] = decoding(model, long, text, CAPACITY, peers, say)
    _keep(content)
    several = text[:, :SHORT].expand(BATCH, -1).contiguous()
    content["several"] = decoding(
        model, {f"package {SEVERAL}": Packaged(opened[SEVERAL], several)}, several, ROOM, [], say
    )
    _keep(content)
    content["prompts"] = reading(model, opened["int8_weights"], text, peers, say)
    for peer in peers:
        peer.close()
    _keep(content)


def _keep(content: dict[str, Any]) -> None:
    """After each part: what was measured outlives a run that is stopped."""
    RESULTS.write_text(json.dumps(content, indent=1) + "\n")
    write_table(content)


if __name__ == "__main__":
    main()
