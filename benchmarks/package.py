"""SmolLM2-135M in a package beside torch.compile: milliseconds a token, seconds to the first token of a fresh process, bytes.

    python -m benchmarks.package                # compile the packages (minutes) and measure; best on a quiet machine
    python -m benchmarks.package --no-timing    # sizes and differences alone, which other work does not disturb
    python -m benchmarks.package --packages build/packages    # packages that lie there already
    python -m benchmarks.package --only tokens  # beside what an earlier run measured
    python -m benchmarks.package --peer PYTHON  # beside llama.cpp and OpenVINO GenAI, with a Python that has them

Candidates take turns, sixteen tokens each, after the same prompt of 128 tokens. Inductor and accelpass under torch.compile use a
static cache, as in ``benchmarks.decode``; a package has its own.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor

import accelpass
from accelpass.cli.commands.export_command import EXAMPLE
from accelpass.models_zoo import load
from benchmarks.decode import CANDIDATES, Candidate, Session, bandwidth
from benchmarks.gguf_peers import NAMES, Peer
from benchmarks.machine import cpu, put_table

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "smollm2_package_cpu.json"
PAGE = ROOT / "docs" / "packages.md"
START, END = "<!-- package table -->\n", "<!-- end of package table -->"
PROMPT, TOKENS, TURN, CAPACITY, STARTS = 128, 192, 16, 512, 3
ANSWERS, DIFFERENT, THREADS = 2000, 40, 8
PACKAGED = {"int8_weights": ["int8_weights"], "int4_weights": ["int4_weights"]}
COMPILED = ("inductor f32", "accelpass int8_weights", "accelpass int8_weights, one call", "accelpass int4_weights")
_PACKAGE = """
import torch, accelpass
ids = torch.arange(1, 17)[None]
accelpass.open({path!r}).generate(ids, 1)
"""
_COMPILE = """
import torch, accelpass
from accelpass.models_zoo import load
from benchmarks.decode import own_call
ids = torch.arange(1, 17)[None]
model, _ = load("smollm2-135m")
with torch.no_grad():
    fast = torch.compile(own_call(), backend="accelpass", options={{"passes": {passes!r}}}, dynamic=False)
    fast(model, ids, accelpass.KVCache(model, capacity={capacity}))
"""
Say = Callable[[str], None]


def packages(model: Any, tokenizer: Any, folder: Path, say: Say) -> dict[str, dict[str, Any]]:
    """Compile what is not in ``folder``; what is known of each, by name."""
    folder.mkdir(parents=True, exist_ok=True)
    known = {}
    for name, passes in PACKAGED.items():
        path, about = folder / f"{name}.pt2", folder / f"{name}.json"
        if not (path.is_file() and about.is_file()):
            say(f"packaging {name}")
            ids = tokenizer(EXAMPLE, return_tensors="pt")["input_ids"]  # the check wants what the model knows
            example = {"input_ids": ids, "logits_to_keep": 1}
            report = accelpass.package(model, example, passes, path=path, cache=CAPACITY)
            content = report.to_dict()
            del content["records"]
            about.write_text(json.dumps(content, indent=1))
        known[name] = json.loads(about.read_text()) | {"path": str(path)}
    return known


class Packaged:
    """A package in the middle of a text; has the ``step`` of :class:`benchmarks.decode.Session`."""

    def __init__(self, opened: Any, ids: Tensor) -> None:
        self._session = opened.session()
        self._next = self._session.prompt(ids).argmax(-1)

    def step(self) -> float:
        """Seconds of one more token."""
        start = time.perf_counter()
        self._next = self._session.step(self._next).argmax(-1)
        return time.perf_counter() - start


def _tokens(
    model: Any, known: dict[str, dict[str, Any]], files: Path, python: str | None, say: Say
) -> list[dict[str, Any]]:
    peers = [Peer(name, python, files, CAPACITY, PROMPT) for name in NAMES] if python else []
    rows = tokens(model, known, peers, say)
    for peer in peers:
        peer.close()
    return rows


def compiled_sessions(model: Any, names: Sequence[str], ids: Tensor, capacity: int, say: Say) -> dict[str, Session]:
    """Candidates of :mod:`benchmarks.decode` behind the prompt ``ids``, compiled by a first token."""
    begun = {}
    for name in names:
        say(f"compiling {name}")
        make, dtype = CANDIDATES[name]
        own = copy.deepcopy(model).to(dtype)
        begun[name] = Session(Candidate(name, make, dtype, make(own), own), ids, capacity)
        begun[name].step()
    return begun


def in_turns(begun: Mapping[str, Any], peers: Sequence[Peer], count: int) -> dict[str, list[float]]:
    """Seconds of ``count`` tokens of each, in turns of :data:`TURN`, as some run in processes of their own; the first turn is left out."""
    takes: dict[str, Callable[[int], list[float]]] = {n: partial(_some, one) for n, one in begun.items()}
    takes |= {peer.name: peer.tokens for peer in peers}
    seconds: dict[str, list[float]] = {name: [] for name in takes}
    for turn in range(count // TURN):
        for name, take in takes.items():
            taken = take(TURN)
            if turn:  # threads that slept, memory that was not read
                seconds[name] += taken
    return seconds


def _some(session: Any, count: int) -> list[float]:
    return [session.step() for _ in range(count)]


@torch.no_grad()
def tokens(model: Any, known: dict[str, dict[str, Any]], peers: list[Peer], say: Say) -> list[dict[str, Any]]:
    """Milliseconds of a token, the candidates in turns."""
    ids = torch.randint(0, model.config.vocab_size, (1, PROMPT), generator=torch.Generator().manual_seed(0))
    begun: dict[str, Any] = {f"package {n}": Packaged(accelpass.open(k["path"]), ids) for n, k in known.items()}
    begun |= compiled_sessions(model, COMPILED, ids, CAPACITY, say)
    say("timing tokens")
    seconds = in_turns(begun, peers, TOKENS)
    base, stream = statistics.median(seconds["inductor f32"]), bandwidth()
    rows = []
    for name, taken_ in seconds.items():
        median = statistics.median(taken_)
        row = {"name": name, "ms_per_token": round(median * 1e3, 2), "against_inductor_f32": round(base / median, 2)}
        if name.startswith("package "):
            read = known[name.removeprefix("package ")]["weights_after"]
            row["share_of_bandwidth"] = round(read / median / stream, 3)
        row |= next(({"version": p.about["version"], "bytes": p.about["bytes"]} for p in peers if p.name == name), {})
        rows.append(row)
    return rows


def starts(known: dict[str, dict[str, Any]], say: Say) -> list[dict[str, Any]]:
    """Seconds of a fresh process up to its first token, imports and the reading of weights included."""
    rows = []
    for name, about in known.items():
        with tempfile.TemporaryDirectory() as caches:
            program = _COMPILE.format(passes=PACKAGED[name], capacity=CAPACITY)
            say(f"start: torch.compile {name}")
            rows.append({"name": f"torch.compile {name}, cold", "seconds": [_run(program, caches)]})
            warm = [_run(program, caches) for _ in range(STARTS)]
            rows.append({"name": f"torch.compile {name}, warm caches", "seconds": warm})
        say(f"start: package {name}")
        ran = [_run(_PACKAGE.format(path=about["path"])) for _ in range(STARTS)]
        rows.append({"name": f"package {name}", "seconds": ran})
    return [{"name": r["name"], "seconds": round(statistics.median(r["seconds"]), 2)} for r in rows]


def long_run(path: str, vocabulary: int, say: Say) -> dict[str, Any]:
    """Answers of mixed lengths by several threads on one package: are they those of one thread, and does memory grow?"""
    made = torch.Generator().manual_seed(1)
    draw = lambda least, most: int(torch.randint(least, most, (1,), generator=made))  # noqa: E731
    asked = [(torch.randint(0, vocabulary, (1, draw(2, 64)), generator=made), draw(4, 17)) for _ in range(DIFFERENT)]
    package = accelpass.open(path, threads=THREADS)
    alone = [package.generate(ids, count) for ids, count in asked]
    say(f"{ANSWERS} answers by {THREADS} threads")
    start, wrong, held = time.perf_counter(), 0, []
    with ThreadPoolExecutor(THREADS) as pool:
        for begun in range(0, ANSWERS, DIFFERENT):
            answers = list(pool.map(lambda one: package.generate(*one), asked))
            wrong += sum(not torch.equal(mine, its) for mine, its in zip(answers, alone, strict=True))
            if begun % (ANSWERS // 5) == 0:
                held.append(round(psutil.Process().memory_info().rss / 1e6, 1))
    taken = time.perf_counter() - start
    return {"answers": ANSWERS, "threads": THREADS, "wrong": wrong, "resident_mb": held, "seconds": round(taken, 1)}


def _run(program: str, caches: str = "") -> float:
    environment = {**os.environ, **({"TORCHINDUCTOR_CACHE_DIR": caches} if caches else {})}
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, env=environment, check=True, capture_output=True)
    return time.perf_counter() - start


def write_table(content: dict[str, Any], page: Path = PAGE) -> None:
    """Put the figures into the page."""
    lines = [
        f"SmolLM2-135M, room for {content['capacity']} tokens, torch {content['torch']}.",
        "",
        "| package | file, MB | weights, MB | as floats, MB | differs from torch by |",
        "|---|---|---|---|---|",
    ]
    for name, one in content["packages"].items():
        sizes = [f"{one[key] / 1e6:.1f}" for key in ("bytes", "weights_after", "weights_before")]
        lines.append(f"| `{name}` | {' | '.join(sizes)} | {one['difference']:.1e} |")
    if content.get("tokens"):
        lines += ["", f"Measured on {content['cpu']}, {content['threads']} threads, in turns.", ""]
        lines += ["| | ms a token | against Inductor f32 | share of the bandwidth |", "|---|---|---|---|"]
        for row in content["tokens"]:
            share = f"{row['share_of_bandwidth']:.0%}" if "share_of_bandwidth" in row else ""
            name = f"{row['name']} ({row['version']})" if "version" in row else row["name"]
            lines.append(f"| {name} | {row['ms_per_token']} | {row['against_inductor_f32']}x | {share} |")
        lines += ["", "| a fresh process | seconds to the first token |", "|---|---|"]
        lines += [f"| {r['name']} | {r['seconds']} |" for r in content["starts"]]
        if (ran := content.get("long_run")) is not None:
            held = ", ".join(f"{mb:.0f}" for mb in ran["resident_mb"])
            lines += [
                "",
                f"{ran['answers']} answers of 4 to 16 tokens by {ran['threads']} threads on one package: {ran['wrong']} differ from those "
                f"of one thread; resident memory {held} MB along the way; {ran['seconds']:.0f} s.",
            ]
        lines += ["", "| | seconds to compile the prompt's graph | and the token's |", "|---|---|---|"]
        seconds = {n: p["seconds"] for n, p in content["packages"].items()}
        lines += [f"| `{n}` | {s['prompt']:.0f} | {s['decode']:.0f} |" for n, s in seconds.items()]
    else:
        lines += ["", "No times yet: they are for a machine that does nothing else."]
    put_table(page, START, "\n".join(lines), END)


def main() -> None:
    """Measure, and write the results and the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--packages", type=Path, default=ROOT / "build" / "packages")
    parser.add_argument("--no-timing", action="store_true")
    parser.add_argument("--only", choices=("tokens", "starts", "long_run"))
    parser.add_argument("--peer", help="a Python that has llama-cpp-python and openvino-genai")
    asked = parser.parse_args()

    def say(what: str) -> None:
        print(what, file=sys.stderr, flush=True)

    model, tokenizer = load("smollm2-135m")
    known = packages(model, tokenizer, asked.packages, say)
    content: dict[str, Any] = {"capacity": CAPACITY, "torch": str(torch.__version__), "packages": {}}
    for name, about in known.items():
        about = {k: v for k, v in about.items() if k != "path"}
        if asked.no_timing:
            del about["seconds"]
        content["packages"][name] = about
    if not asked.no_timing:
        content |= {"cpu": cpu(), "threads": torch.get_num_threads(), "prompt": PROMPT}
        measures: dict[str, Callable[[], Any]] = {
            "tokens": lambda: _tokens(model, known, asked.packages / "gguf", asked.peer, say),
            "starts": lambda: starts(known, say),
            "long_run": lambda: long_run(known["int8_weights"]["path"], model.config.vocab_size, say),
        }
        before = json.loads(RESULTS.read_text()) if asked.only else {}
        for part, measure in measures.items():
            content[part] = before[part] if asked.only not in (None, part) else measure()
    RESULTS.write_text(json.dumps(content, indent=1) + "\n")
    write_table(content)


if __name__ == "__main__":
    main()
