"""Every pass in the registry as ONNX: is it written, does it match, how large is the file, how fast is it in ONNX Runtime.

    python -m benchmarks.onnx_export                      # writes benchmarks/results/onnx_export.json
    python -m benchmarks.onnx_export --table              # and the table in docs/onnx.md
    python -m benchmarks.onnx_export --only h2o           # one pass, printed; with --replace into the results

The first layers of SmolLM2-135M-Instruct with a KVCache: a prompt and decoding steps. The dense file and a pass's take turns in
one process; medians. ONNX Runtime runs at its default settings, at which it fuses what it can.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks.machine import cpu, put_table

ROOT = Path(__file__).parent.parent
RESULTS, PAGE = ROOT / "benchmarks" / "results" / "onnx_export.json", ROOT / "docs" / "onnx.md"
LAYERS, PROMPT, CAPACITY, STEPS, ROUNDS = 2, 512, 768, 16, 5
FORMS: dict[str, tuple[list[Any], dict[str, Any]]] = {
    "int8_weights": (["int8_weights"], {}),
    "int8_weights, contrib": (["int8_weights"], {"contrib": True}),
    "int8_weights, contrib, activations int8": (["int8_weights"], {"contrib": True, "activations": "int8"}),
    "int4_weights": ([{"name": "int4_weights", "group_size": 32}], {}),
    "int4_weights, contrib": ([{"name": "int4_weights", "group_size": 32}], {"contrib": True}),
    "int8_weights + h2o": (["int8_weights", "h2o"], {}),
    "head_cascade, 30 %": ([{"name": "head_cascade", "keep": 0.3, "dense": 0.0}], {}),
    "horizontal_fusion": (["int8_weights", "horizontal_fusion"], {}),
}
"""Passes in other forms than alone and with their defaults."""


def measure(only: str | None = None) -> dict[str, Any]:
    """The machine, and a row for each pass."""
    import accelpass
    from accelpass.api.quality.compare import first_layers
    from accelpass.models_zoo import load
    from accelpass.passes.core.registry import registered
    from accelpass.passes.step_cache.base import StepPass

    model, _ = load("smollm2-135m")
    first_layers(model, LAYERS)
    ids = torch.arange(PROMPT)[None] % 4096
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        dense = _export(model, ids, Path(folder) / "dense", [], {})
        base = Files(Path(dense["path"]), ids)
        every = (n for n, p in registered().items() if not issubclass(p, StepPass))  # those: benchmarks.onnx_steps
        names = [only] if only else [*FORMS, *(n for n in every if n not in FORMS)]
        for name in names:
            passes, options = FORMS.get(name, ([name], {}))
            row: dict[str, Any] = {"pass": name, "passes": passes, **options}
            started = time.perf_counter()
            try:
                if passes == ["moa"]:
                    passes, options = [], {"plan": _uniform_plan(model)}
                made = _export(model, ids, Path(folder) / "pass", passes, options)
            except accelpass.AccelpassError as refusal:
                rows.append({**row, "exported": False, "why": str(refusal)})
                print(f"{name}: {refusal}", flush=True)
                continue
            files = Files(Path(made["path"]), ids)
            times = in_turns({"dense": base, "pass": files})
            rows.append(
                {**row, "exported": True, **made, **times, "export_seconds": round(time.perf_counter() - started)}
            )
            rows[-1].pop("path")
            print(json.dumps(rows[-1]), flush=True)
    setting = {"layers": LAYERS, "prompt": PROMPT, "capacity": CAPACITY, "steps": STEPS}
    return {"machine": machine(), **setting, "dense_bytes": dense["bytes"], "rows": rows}


def _export(model: Any, ids: torch.Tensor, stem: Path, passes: list[Any], options: dict[str, Any]) -> dict[str, Any]:
    import accelpass

    kwargs = {"input_ids": ids, "past_key_values": accelpass.KVCache(model, CAPACITY), "logits_to_keep": 1}
    report = accelpass.export_onnx(model, (), f"{stem}.onnx", passes, kwargs=kwargs, **options)
    records = next(iter(report.records.values()))
    return {
        "path": str(report.manifest),
        "bytes": report.bytes,
        "weights_before": report.weights_before,
        "weights_after": report.weights_after,
        "state_bytes": _state_bytes(report.manifest),
        "difference": report.difference,
        "took": {r.name: len(r.took) for r in records},
        "left_alone": {r.name: dict(r.skipped) for r in records if r.skipped and not r.took},
    }


def _state_bytes(manifest: Any) -> int:
    total = 0
    for state in json.loads(Path(manifest).read_text())["state"]:
        total += getattr(torch, state["dtype"]).itemsize * int(torch.tensor(state["shape"]).prod())
    return total


def _uniform_plan(model: Any) -> Any:
    """The plan of MoA that sees a half of every prompt in all heads; what a calibration finds has the same form."""
    from accelpass.passes.core.plan import Plan

    heads = model.config.num_key_value_heads
    rule = torch.tensor([[0.0, 0.5]] * heads, dtype=torch.float64)
    tensors = {f"moa/rules/model.layers.{i}.self_attn": rule.clone() for i in range(LAYERS)}
    return Plan.of(model, ["moa"], tensors)


class Files:
    """The sessions of an export, and how long they take."""

    def __init__(self, manifest: Path, ids: torch.Tensor) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = torch.get_num_threads(), 3
        self.about, self.ids = json.loads(manifest.read_text()), ids.numpy()
        self.prompt, self.decode = (
            onnxruntime.InferenceSession(str(manifest.parent / self.about["files"][kind]), options)
            for kind in ("prompt", "decode")
        )
        self.past: dict[str, Any] = {}

    def read(self) -> None:
        """The prompt."""
        self._run(self.prompt, {"input_ids": self.ids})

    def step(self) -> None:
        """One token."""
        self._run(self.decode, {"input_ids": self.ids[:, :1], **self.past})

    def _run(self, session: Any, inputs: dict[str, Any]) -> None:
        names = [o.name for o in session.get_outputs()]
        made = dict(zip(names, session.run(None, inputs), strict=True))
        self.past = {s["past"]: made[s["present"]] for s in self.about["state"]}


def in_turns(both: dict[str, Files]) -> dict[str, float]:
    """Milliseconds of a prompt and of a token; medians."""
    prompts: dict[str, list[float]] = {name: [] for name in both}
    tokens: dict[str, list[float]] = {name: [] for name in both}
    for number in range(ROUNDS + 1):
        for name, files in both.items():
            seconds = _timed(files.read)
            if number:
                prompts[name].append(seconds)
        for _ in range(STEPS):
            for name, files in both.items():
                tokens[name].append(_timed(files.step))
    found = {}
    for kind, all_of in (("prompt", prompts), ("token", tokens)):
        for name, seconds_of in all_of.items():
            found[f"{kind}_ms_{name}"] = round(1000 * median(seconds_of), 2)
    return found


def _timed(run: Callable[[], None]) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def table(found: dict[str, Any]) -> str:
    """The rows as Markdown."""
    lines = [
        "| pass | exported | differs from torch | files, MB (of dense) | state, MB | prompt, of dense's time | token, of dense's time |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in found["rows"]:
        title = f"`{row['pass']}`" if re.fullmatch(r"\w+", row["pass"]) else row["pass"]
        if not row["exported"]:
            why = row["why"].split(";")[0].split(". ")[0]
            lines.append(f"| {title} | refused: {why} | | | | | |")
            continue
        size = f"{row['bytes'] / 1e6:.1f} ({row['bytes'] / found['dense_bytes']:.2f})"
        ratios = [row[f"{kind}_ms_pass"] / row[f"{kind}_ms_dense"] for kind in ("prompt", "token")]
        did = (
            "yes"
            if not row["left_alone"]
            else "yes, unchanged: " + next(iter(next(iter(row["left_alone"].values())).values()))
        )
        cells = [
            title,
            did,
            f"{row['difference']:.0e}",
            size,
            f"{row['state_bytes'] / 1e6:.2f}",
            *(f"{r:.2f}" for r in ratios),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    about = (
        f"The first {found['layers']} layers of SmolLM2-135M-Instruct (dense: {found['dense_bytes'] / 1e6:.1f} MB), a prompt of "
        f"{found['prompt']} tokens, a cache of {found['capacity']}; {found['machine']['cpu']}, {found['machine']['threads']} "
        'thread(s). "Differs" is the largest difference of the outputs, over their largest value, in a prompt and four steps.'
    )
    return "\n".join([*lines, "", about])


def write_table(found: dict[str, Any], page: Path = PAGE) -> None:
    """Put the table between the page's markers."""
    put_table(page, "<!-- table of benchmarks.onnx_export -->\n", table(found), "<!-- end of table -->")


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    return {"cpu": cpu(), "threads": torch.get_num_threads(), "cores": os.cpu_count()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="one pass; nothing is written without --replace")
    parser.add_argument("--replace", action="store_true", help="put the row of --only into the results")
    parser.add_argument("--table", action="store_true", help="write the table of docs/onnx.md, too")
    parser.add_argument("--from-results", action="store_true", help="the table alone, from the results that are there")
    given = parser.parse_args()
    if given.from_results:
        write_table(json.loads(RESULTS.read_text()))
        return
    found = measure(given.only)
    if given.only:
        print(table(found))
        if not given.replace:
            return
        before = json.loads(RESULTS.read_text())
        rows = {row["pass"]: row for row in (*before["rows"], *found["rows"])}
        order = [name for name in (*FORMS, *rows) if name in rows]
        found = {**before, "rows": [rows[name] for name in dict.fromkeys(order)]}
    RESULTS.write_text(json.dumps(found, indent=1) + "\n")
    if given.table:
        write_table(found)


if __name__ == "__main__":
    main()
