"""``make bench``: quality, memory, compile time, decode and prefill of SmolLM2-135M, and its KV caches, on this machine.

    python -m benchmarks.run --only decode,prefill        # some of them
    python -m benchmarks.run --only none --write docs/benchmarks.md   # the tables, from the results that lie there
    python -m benchmarks.run --only kv_quality --only-candidates "h2o, 20 %"   # one row, beside those of earlier runs
    python -m benchmarks.run --only kv_quality --only-candidates none --peer PYTHON   # kvpress, with a Python that has it
    python -m benchmarks.run --only kv_quality,kv_decode --quick   # do they work? results go to build/

Each part writes a JSON under benchmarks/results; the tables are made from those.
"""

from __future__ import annotations

import argparse
import json
import platform
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from accelpass.backends import graphs_of
from accelpass.models_zoo import load
from benchmarks import compile_time, decode, kv_decode, kv_memory, kv_prefill, kv_quality, kv_tasks, memory, quality

Content = dict[str, Any]
NOTE = (
    "The model was quantized once before it came here (Q4_1, groups of 32), so int4 results with groups of 32 are flattered. "
    "Timings are medians; candidates take turns within one process."
)
QUALITY = {
    "dense": None,
    "int8_weights": ["int8_weights"],
    "int4_weights, groups of 64": ["int4_weights"],
    "int4_weights, groups of 32": [{"name": "int4_weights", "group_size": 32}],
    "int4_weights, groups of 64, asymmetric": [{"name": "int4_weights", "symmetric": False}],
}


def measure_quality(model: Any, tokenizer: Any) -> list[dict[str, Any]]:
    """Perplexity, agreement and weight bytes of each pass set; the lowered graphs are run without Inductor."""
    ids, dense = quality.prose(tokenizer), quality.answers(model, tokenizer)
    rows: list[dict[str, Any]] = []
    for name, passes in QUALITY.items():
        torch._dynamo.reset()
        run = model if passes is None else torch.compile(
            model, backend="accelpass", options={"passes": passes, "lowering": "aten"}, dynamic=True
        )  # fmt: skip
        call = lambda ids, run=run: run(input_ids=ids, use_cache=False).logits  # noqa: E731
        row = {"name": name, "perplexity": quality.perplexity(call, ids), "agreement": quality.agreement(call, dense)}
        reports = [g.report for g in graphs_of(model)] if passes else []
        full = sum(p.numel() * p.element_size() for p in model.parameters())
        row["weight_bytes"] = reports[-1].after.weight_bytes if reports else full
        row["share_of_f32"] = row["weight_bytes"] / full
        rows.append(row)
        print(f"{name:40s} perplexity {row['perplexity']:.3f}  agreement {row['agreement']:.3f}  "
              f"bytes {row['share_of_f32']:.3f}", flush=True)  # fmt: skip
    return rows


def weight_bytes(candidates: list[decode.Candidate]) -> dict[str, int]:
    """Bytes of weights that a decode step of each candidate reads."""
    sizes = {}
    for c in candidates:
        graphs = graphs_of(c.model)
        plain = {id(t): t for t in (*c.model.parameters(), *c.model.buffers())}.values()
        sizes[c.name] = graphs[-1].report.after.weight_bytes if graphs else sum(_bytes(t) for t in plain)
    return sizes


def _bytes(t: torch.Tensor) -> int:
    inner = [getattr(t, n) for n in t.__tensor_flatten__()[0]] if hasattr(t, "__tensor_flatten__") else [t]
    return sum(i.numel() * i.element_size() for i in inner)


def _say(text: str) -> None:
    print(text, flush=True)


@dataclass(frozen=True)
class Given:
    """What a user typed for the KV parts.

    Attributes:
        candidates: the only ones to measure; None for all.
        quick: a few minutes, to see that all of it runs.
        short: a third of the time: fewer windows, and no pass keys in the longest context.
        peer: a Python that has kvpress.
    """

    candidates: tuple[str, ...] | None = None
    quick: bool = False
    short: bool = False
    peer: str | None = None

    def among(self, known: Sequence[str]) -> list[str]:
        return [name for name in known if self.candidates is None or name in self.candidates]


def _quality(model: Any, tokenizer: Any, given: Given) -> Content:
    return {"rows": measure_quality(model, tokenizer)}


def _memory(model: Any, tokenizer: Any, given: Given) -> Content:
    return {"rows": memory.measure()}


def _compile(model: Any, tokenizer: Any, given: Given) -> Content:
    return {"rows": compile_time.measure(model, _say), "layers": model.config.num_hidden_layers}


def _decode(model: Any, tokenizer: Any, given: Given) -> Content:
    candidates = decode.measure(model, list(decode.CANDIDATES), _say)
    stream = decode.bandwidth()
    return {"rows": decode.rows(candidates, weight_bytes(candidates), stream), "bandwidth_gb_s": stream / 1e9}


def _prefill(model: Any, tokenizer: Any, given: Given) -> Content:
    names = ["inductor bf16", "accelpass int8_weights", "accelpass int4_weights"]
    return {"rows": decode.prefill_rows(decode.measure_prefill(model, names, _say))}


def _kv_quality(model: Any, tokenizer: Any, given: Given) -> Content:
    sizes = kv_tasks.QUICK if given.quick else kv_tasks.SHORT if given.short else kv_tasks.Sizes()
    rows = kv_quality.measure(model, tokenizer, given.among(list(kv_quality.METHODS)), sizes, _say)
    if given.peer is not None:
        rows += kv_quality.measure_peer(model, given.peer, given.quick)
    return {"rows": rows, "capacity": sizes.capacity, "scored": sizes.scored}


def _kv_prefill(model: Any, tokenizer: Any, given: Given) -> Content:
    return {"rows": kv_prefill.measure(model, tokenizer, _say)}


def _kv_memory(model: Any, tokenizer: Any, given: Given) -> Content:
    return {"rows": kv_memory.measure()}


def _kv_decode(model: Any, tokenizer: Any, given: Given) -> Content:
    contexts = kv_decode.QUICK if given.quick else kv_decode.CONTEXTS
    rows = kv_decode.measure(model, tokenizer, given.among(list(kv_decode.CANDIDATES)), contexts, _say)
    return {"rows": rows, "tokens": kv_decode.TOKENS}


@dataclass(frozen=True)
class Part:
    """One benchmark: how to run it and how its table is headed ({} is filled from the result).

    Attributes:
        apart: its candidates are measured one after another, so that rows of several runs make one table.
    """

    run: Callable[[Any, Any, Given], Content]
    title: str
    apart: bool = False


PARTS = {
    "quality": Part(_quality, "Quality: 4096 tokens of English prose, greedy agreement on 20 prompts"),
    "memory": Part(_memory, "Resident memory, float weights released"),
    "compile": Part(_compile, "Compile time of {layers} layers, all caches off"),
    "decode": Part(_decode, "Decode, batch 1, after 128 tokens; memory streams at {bandwidth_gb_s:.1f} GB/s here"),
    "prefill": Part(_prefill, "Prefill of 512 tokens"),
    "kv_quality": Part(
        _kv_quality,
        "KV caches: perplexity of the last {scored} tokens of a context, and pass keys found at ten depths, where the question "
        "is part of the prompt or comes when the context is stored; bytes of a cache of {capacity} tokens",
        apart=True,
    ),
    "kv_prefill": Part(_kv_prefill, "KV caches: prompts, with and without scores"),
    "kv_memory": Part(_kv_memory, "KV caches: a process that reads 4080 tokens and answers, over what it held before"),
    "kv_decode": Part(_kv_decode, "KV caches: decode, batch 1, of the last {tokens} tokens of a context"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(PARTS), help=f"some of {','.join(PARTS)}, or none")
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--write", type=Path, help="write the tables as Markdown here")
    parser.add_argument("--only-candidates", help="of the KV parts: names with ; between them, or none")
    parser.add_argument("--quick", action="store_true", help="of the KV parts: short ones, results under build/")
    parser.add_argument("--short", action="store_true", help="of kv_quality: fewer windows, no pass keys at 4k")
    parser.add_argument("--peer", help="of kv_quality: a Python that has kvpress, which is measured too")
    given = parser.parse_args()
    if given.quick:
        given.results = Path("build/quick_results")
    candidates = None if given.only_candidates is None else tuple(given.only_candidates.split(";"))
    unknown = set(candidates or ()) - {"none", *kv_quality.METHODS, *kv_decode.CANDIDATES}
    if unknown:
        known = "; ".join([*kv_quality.METHODS, *kv_decode.CANDIDATES])
        parser.error(f"no candidate {'; '.join(sorted(unknown))}; there are {known}")
    wanted = [] if given.only == "none" else given.only.split(",")
    if set(wanted) - set(PARTS):
        parser.error(f"no benchmark {', '.join(sorted(set(wanted) - set(PARTS)))}; there are {', '.join(PARTS)}")
    torch.set_grad_enabled(False)
    given.results.mkdir(parents=True, exist_ok=True)
    model, tokenizer = load("smollm2-135m") if wanted else (None, None)
    for name in wanted:
        torch._dynamo.reset()
        _say(f"== {name}")
        made = PARTS[name].run(model, tokenizer, Given(candidates, given.quick, given.short, given.peer))
        content = {"device": _device(), **made}
        path = given.results / f"smollm2_{name}_cpu.json"
        if PARTS[name].apart and candidates is not None and path.exists():
            content["rows"] = _merged(json.loads(path.read_text())["rows"], content["rows"])
        path.write_text(json.dumps(content, indent=1) + "\n")
        _say(_table(PARTS[name].title.format(**content), content["rows"]))
    if given.write:
        given.write.parent.mkdir(parents=True, exist_ok=True)
        given.write.write_text(_page(given.results))


def _merged(before: list[dict[str, Any]], new: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows of two runs, new ones in the place of old ones; in the order of methods, those of others last."""
    rows = {row["name"]: row for row in (*before, *new)}
    return [rows.pop(name) for name in kv_quality.METHODS if name in rows] + list(rows.values())


def _device() -> str:
    model = (
        re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text()) if Path("/proc/cpuinfo").exists() else None
    )
    cpu = model.group(1) if model else platform.processor() or platform.machine()
    return f"{cpu}, {torch.get_num_threads()} threads, torch {torch.__version__}"


def _page(results: Path) -> str:
    parts = ["# Benchmarks", "SmolLM2-135M-Instruct, made by `make bench` (`python -m benchmarks.run`).", NOTE]
    for name, part in PARTS.items():
        path = results / f"smollm2_{name}_cpu.json"
        if path.exists():
            content = json.loads(path.read_text())
            parts.append(_table(part.title.format(**content), content["rows"]) + f"\nOn: {content['device']}.")
    return "\n\n".join(parts) + "\n"


def _table(title: str, rows: list[dict[str, Any]]) -> str:
    names = list(rows[0])
    cell = lambda v: f"{v:.3f}" if isinstance(v, float) else f"{v:,}" if isinstance(v, int) else str(v)  # noqa: E731
    lines = [f"| {' | '.join(names)} |", f"|{'---|' * len(names)}"]
    lines += [f"| {' | '.join(cell(r[n]) for n in names)} |" for r in rows]
    return f"## {title}\n\n" + "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
