"""``make bench``: SmolLM2-135M (quality, memory, compile time, speed, KV caches) and diffusion models, on this machine.

    python -m benchmarks.run --only decode,prefill        # some of them
    python -m benchmarks.run --only none --write docs/benchmarks.md   # the tables, from the results that lie there
    python -m benchmarks.run --only kv_quality --only-candidates "h2o, 20 %"   # one row, beside those of earlier runs
    python -m benchmarks.run --only kv_quality --only-candidates "kvpress SnapKV, 20 %" --peer PYTHON   # with a Python that has it
    python -m benchmarks.run --only kv_quality,kv_decode --quick   # do they work? results go to build/
    python -m benchmarks.run --only digits_steps,pixart_steps   # diffusion; --peer with a Python that has cache-dit

Each part writes a JSON under benchmarks/results; the tables are made from those.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from accelpass.backends import graphs_of
from accelpass.models_zoo import load
from benchmarks import (
    compile_time,
    decode,
    digits_steps,
    kv_decode,
    kv_eviction,
    kv_memory,
    kv_prefill,
    kv_quality,
    kv_tasks,
    memory,
    pixart_steps,
    prompt_pruning,
    quality,
    sparse_prefill,
    sparse_quality,
)
from benchmarks.machine import cpu

Content = dict[str, Any]
NOTE = (
    "The model was quantized once before it came here (Q4_1, groups of 32), so int4 results with groups of 32 are flattered. "
    "Timings are medians; candidates take turns within one process."
)
ABOUT = {
    "smollm2": "SmolLM2-135M-Instruct, made by `make bench` (`python -m benchmarks.run`).\n\n" + NOTE,
    "digits": "Passes that work across denoising steps on the digits model (docs/digits-model.md): FLOPs, and the time of whole "
    "pipeline runs, as shares of the dense model's with Inductor, which takes turns with all; `outside` is the share of the "
    "time outside the transformer. PSNR is against the dense images. `variants` are steps that differ in what they "
    "compute, `parts` the pieces of code for all of them, `per_variant` the compile time of each variant after the first, "
    "over that of dense Inductor.",
    "pixart": "A transformer of PixArt's shape with random weights: DiTFastAttn by a plan of the published density. Each "
    "kind of step is timed in turns with dense Inductor.",
}
"""What precedes the first table of a model."""
PRUNED = [name for name in prompt_pruning.CANDIDATES if prompt_pruning.has_quality(name)]


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
    """What a user typed for the KV and the diffusion parts.

    Attributes:
        candidates: the only ones to measure; None for all.
        quick: a few minutes, to see that all of it runs.
        short: a third of the time: fewer windows, and no pass keys in the longest context.
        peer: a Python that has kvpress, or cache-dit.
        per_class: images of each digit.
    """

    candidates: tuple[str, ...] | None = None
    quick: bool = False
    short: bool = False
    peer: str | None = None
    per_class: int = digits_steps.Sizes.per_class

    def among(self, known: Sequence[str]) -> list[str]:
        return [name for name in known if self.candidates is None or name in self.candidates]


def _quality(model: Any, tokenizer: Any, given: Given) -> Content:
    return {"rows": quality.measure(model, tokenizer)}


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


def _caches(
    model: Any, tokenizer: Any, given: Given, methods: Mapping[str, list[Any]], peers: Sequence[str], sizes: str
) -> list[kv_tasks.Row]:
    """Rows of our caches, and of the other library's if its Python is given."""
    rows = kv_quality.measure(model, tokenizer, given.among(list(methods)), kv_tasks.SIZES[sizes], _say, methods)
    asked = given.among(peers)
    return rows + kv_quality.measure_peer(model, given.peer, sizes, asked) if given.peer and asked else rows


def _kv_quality(model: Any, tokenizer: Any, given: Given) -> Content:
    named = "quick" if given.quick else "short" if given.short else "all"
    sizes, rows = kv_tasks.SIZES[named], _caches(model, tokenizer, given, kv_quality.METHODS, kv_tasks.PEERS, named)
    return {"rows": rows, "capacity": sizes.capacity, "scored": sizes.scored}


def _kv_eviction(model: Any, tokenizer: Any, given: Given) -> Content:
    named = "quick eviction" if given.quick else "eviction"
    rows = _caches(model, tokenizer, given, kv_eviction.METHODS, kv_tasks.EVICTION_PEERS, named)
    short = [{key: value for key, value in row.items() if key != "cache_bytes"} for row in rows]
    return {"rows": short, "scored": kv_tasks.SIZES[named].scored}


def _sparse_quality(model: Any, tokenizer: Any, given: Given) -> Content:
    sizes = sparse_quality.QUICK if given.quick else sparse_quality.SHORT if given.short else sparse_quality.TASKS
    calibration = sparse_quality.Calibration()
    if given.quick or given.short:
        calibration = sparse_quality.QUICK_CALIBRATION if given.quick else sparse_quality.SHORT_CALIBRATION
    names = given.among(list(sparse_quality.METHODS))
    rows = sparse_quality.measure(model, tokenizer, names, sizes, calibration, _say)
    windows = ", ".join(f"{count} of {length:,}" for length, count in sizes.windows.items())
    return {"rows": rows, "capacity": sizes.capacity, "scored": sizes.scored, "windows": windows}


def _sparse_prefill(model: Any, tokenizer: Any, given: Given) -> Content:
    tokens = sparse_prefill.TOKENS[:1] if given.quick else sparse_prefill.TOKENS
    return {"rows": sparse_prefill.measure(model, tokenizer, _say, tokens)}


def _prompt_pruning(model: Any, tokenizer: Any, given: Given) -> Content:
    plan = prompt_pruning.QUICK if given.quick else prompt_pruning.Amount()
    ids = tokenizer(kv_tasks.prose(), return_tensors="pt").input_ids[:, : max(plan.lengths)]
    names = given.among(list(prompt_pruning.CANDIDATES))
    return {"rows": prompt_pruning.times(model, ids, names, plan, lambda row: _say(str(row)))}


def _prompt_pruning_quality(model: Any, tokenizer: Any, given: Given) -> Content:
    plan = prompt_pruning.QUICK if given.quick else prompt_pruning.Amount()
    rows = prompt_pruning.quality(model, tokenizer, given.among(PRUNED), plan, lambda row: _say(str(row)))
    return {"rows": rows, "scored": plan.sizes.scored}


def _kv_prefill(model: Any, tokenizer: Any, given: Given) -> Content:
    return {"rows": kv_prefill.measure(model, tokenizer, _say)}


def _kv_memory(model: Any, tokenizer: Any, given: Given) -> Content:
    return {"rows": kv_memory.measure()}


def _kv_decode(model: Any, tokenizer: Any, given: Given) -> Content:
    workloads = kv_decode.QUICK if given.quick else kv_decode.WORKLOADS
    rows = kv_decode.measure(model, tokenizer, given.among(list(kv_decode.CANDIDATES)), workloads, _say)
    return {"rows": rows, "tokens": kv_decode.TOKENS}


def _digits_steps(model: Any, tokenizer: Any, given: Given) -> Content:
    offered = list(digits_steps.SHORT if given.quick else digits_steps.CANDIDATES)
    sizes = digits_steps.QUICK if given.quick else digits_steps.Sizes(per_class=given.per_class)
    return digits_steps.measure(given.among(offered), sizes, _say, given.peer)


def _pixart_steps(model: Any, tokenizer: Any, given: Given) -> Content:
    return pixart_steps.measure(pixart_steps.QUICK if given.quick else pixart_steps.Sizes(), _say)


@dataclass(frozen=True)
class Part:
    """One benchmark: how to run it and how its table is headed ({} is filled from the result).

    Attributes:
        apart: its candidates in order, if rows of several runs make one table.
        of: the model, by which results are named.
        below: what the page says under the table.
    """

    run: Callable[[Any, Any, Given], Content]
    title: str
    apart: tuple[str, ...] = ()
    of: str = "smollm2"
    below: str = ""


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
        apart=(*kv_quality.METHODS, *kv_tasks.PEERS),
        below="Of prose, 3 windows of 2,048 tokens and 2 of 4,096. What is calibrated is so on other parts of the prose: `cskv` on 48 "
        "texts of 1,024 tokens, `tidaldecode` on four of 2,048 with other keys (one layer that chooses anew: 17; two: 7 and 17; "
        "the paper's 13 where it is not). kvpress evicts once, after the prompt, and keeps all tokens of the answer.",
    ),
    "kv_eviction": Part(
        _kv_eviction,
        "KV caches under a budget: perplexity of the last {scored} tokens of a context (3 windows), and pass keys found, as above",
        apart=(*kv_eviction.METHODS, *kv_tasks.EVICTION_PEERS),
    ),
    "sparse_quality": Part(
        _sparse_quality,
        "Sparse attention: perplexity of the last {scored} tokens of a context (windows: {windows}), and pass keys found, as for "
        "KV caches; bytes of a cache of {capacity} tokens",
        apart=tuple(sparse_quality.METHODS),
    ),
    "sparse_prefill": Part(
        _sparse_prefill,
        "Sparse attention: one layer's prompt on real queries and keys, against torch's sdpa; the choice of blocks is compiled",
    ),
    "prompt_pruning": Part(
        _prompt_pruning,
        "Token pruning and sparse attention: time to the first token of a prompt of prose",
        below="Candidates of one run take turns; `faster_than_the_first` is against the first row of a length. Inductor attends "
        "over a static cache of 8,192 tokens with a mask; `accelpass, dense` attends to the prompt alone.",
    ),
    "prompt_pruning_quality": Part(
        _prompt_pruning_quality,
        "Token pruning: perplexity of the last {scored} tokens of a context, and pass keys found, as for KV caches",
        apart=tuple(PRUNED),
    ),
    "kv_prefill": Part(_kv_prefill, "KV caches: prompts, with and without scores"),
    "kv_memory": Part(
        _kv_memory,
        "KV caches: a process that reads 4080 tokens and answers, over what it held before",
        below="Peak while it reads and answers, and what it holds then, over weights and graphs; `graphs_mb` is what capturing and "
        "lowering the graphs left.",
    ),
    "kv_decode": Part(_kv_decode, "KV caches: decode of the last {tokens} tokens of a context"),
    "digits_steps": Part(
        _digits_steps,
        "Digits, {steps} steps of DDIM with guidance: {images} images; a dense run of ten takes {dense_seconds:.1f} s; real "
        "images come to an accuracy of {real_class_accuracy:.3f} and a Fréchet distance of {real_frechet:.2f}",
        apart=tuple(digits_steps.CANDIDATES),
        of="digits",
        below="cache-dit 1.5.3 (`--peer`) takes the pipeline as it is and is compiled as its documentation says, F1B0 with "
        "four steps of warm-up. It runs in a process of its own: its times are against a dense Inductor that takes turns with "
        "it there, and its FLOPs those of the blocks that it ran.\n\n"
        "![quality against attention FLOPs, all FLOPs and time](images/digits-curves.png)\n\n"
        "The picture is made by `python -m benchmarks.diffusion_plots`.",
    ),
    "pixart_steps": Part(
        _pixart_steps,
        "PixArt's shape, {layers} of 28 layers, {tokens} tokens, {steps} steps `{letters}`: {variants} variants, each after "
        "the first compiled in {per_variant:.2f} of the dense compile time",
        of="pixart",
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(PARTS), help=f"some of {','.join(PARTS)}, or none")
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--write", type=Path, help="write the tables as Markdown here")
    parser.add_argument("--only-candidates", help="of the KV parts and digits_steps: names with ; between, or none")
    parser.add_argument(
        "--quick", action="store_true", help="of the KV and diffusion parts: short, results under build/"
    )
    parser.add_argument("--short", action="store_true", help="of kv_quality, sparse_quality: less of it, none at 8k")
    parser.add_argument(
        "--peer", help="a Python with kvpress (kv_quality, kv_eviction) or cache-dit (digits_steps), measured too"
    )
    parser.add_argument("--per-class", type=int, default=Given.per_class, help="of digits_steps: images of each digit")
    given = parser.parse_args()
    if given.quick:
        given.results = Path("build/quick_results")
    candidates = None if given.only_candidates is None else tuple(given.only_candidates.split(";"))
    known = [name for part in PARTS.values() for name in part.apart]
    known += [*kv_decode.CANDIDATES, *prompt_pruning.CANDIDATES]
    unknown = set(candidates or ()) - {"none", *known}
    if unknown:
        parser.error(f"no candidate {'; '.join(sorted(unknown))}; there are {'; '.join(known)}")
    wanted = [] if given.only == "none" else given.only.split(",")
    if set(wanted) - set(PARTS):
        parser.error(f"no benchmark {', '.join(sorted(set(wanted) - set(PARTS)))}; there are {', '.join(PARTS)}")
    torch.set_grad_enabled(False)
    given.results.mkdir(parents=True, exist_ok=True)
    language = any(PARTS[name].of == "smollm2" for name in wanted)
    model, tokenizer = load("smollm2-135m") if language else (None, None)
    chosen = Given(candidates, given.quick, given.short, given.peer, given.per_class)
    for name in wanted:
        torch._dynamo.reset()
        _say(f"== {name}")
        content = {"device": _device(), **PARTS[name].run(model, tokenizer, chosen)}
        path = given.results / _file(name)
        if PARTS[name].apart and candidates is not None and path.exists():
            old = json.loads(path.read_text())
            content["rows"] = _merged(old["rows"], content["rows"], PARTS[name].apart)
            content |= {"note": old["note"]} if "note" in old else {}
        path.write_text(json.dumps(content, indent=1) + "\n")
        _say(_table(PARTS[name].title.format(**content), content["rows"]))
    if given.write:
        given.write.parent.mkdir(parents=True, exist_ok=True)
        given.write.write_text(_page(given.results))


def _file(name: str) -> str:
    """Where a part's result lies; the name of a part of another model begins with the model's."""
    return f"{name}_cpu.json" if name.startswith(PARTS[name].of) else f"{PARTS[name].of}_{name}_cpu.json"


def _merged(before: list[dict[str, Any]], new: list[dict[str, Any]], order: Sequence[str]) -> list[dict[str, Any]]:
    """Rows of two runs, new ones in the place of old ones; in the order given, those of others last."""
    rows = {row["name"]: row for row in (*before, *new)}
    return [rows.pop(name) for name in order if name in rows] + list(rows.values())


def _device() -> str:
    return f"{cpu()}, {torch.get_num_threads()} threads, torch {torch.__version__}"


def _page(results: Path) -> str:
    parts = ["# Benchmarks"]
    about = ""
    for name, part in PARTS.items():
        path = results / _file(name)
        if path.exists():
            if part.of != about:
                about = part.of
                parts.append(ABOUT[about])
            content = json.loads(path.read_text())
            parts.append(_table(part.title.format(**content), content["rows"]) + f"\nOn: {content['device']}.")
            parts += [text for text in (part.below, content.get("note")) if text]
    return "\n\n".join(parts) + "\n"


def _table(title: str, rows: list[dict[str, Any]]) -> str:
    names = list(rows[0])
    cell = lambda v: f"{v:.3f}" if isinstance(v, float) else f"{v:,}" if isinstance(v, int) else str(v)  # noqa: E731
    lines = [f"| {' | '.join(names)} |", f"|{'---|' * len(names)}"]
    lines += [f"| {' | '.join(cell(r.get(n, '')) for n in names)} |" for r in rows]
    return f"## {title}\n\n" + "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
