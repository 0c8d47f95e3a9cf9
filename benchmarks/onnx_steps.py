"""Passes across denoising steps as ONNX files: the digits model's schedule in ONNX Runtime against the dense file, in turns.

python -m benchmarks.onnx_steps          # writes benchmarks/results/onnx_steps.json
python -m benchmarks.onnx_steps --table  # and the table in docs/onnx.md
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

import accelpass
from accelpass.models_zoo import digits
from accelpass.passes.core.plan import Plan
from benchmarks.machine import put_table
from benchmarks.onnx_export import PAGE, ROOT, machine
from examples.onnx_denoise import Denoiser, sample

RESULTS = ROOT / "benchmarks" / "results" / "onnx_steps.json"
STEPS, LABELS, ROUNDS, LAYERS, TOKENS = 10, [1, 3, 5, 7], 5, 10, 256
START, END = "<!-- table of benchmarks.onnx_steps -->\n", "<!-- end of steps -->"


def candidates(model: torch.nn.Module) -> dict[str, dict[str, Any]]:
    """What each pass is exported with. Plans are uniform: what is compared is the cost of files, not of images."""
    paths = [f"transformer_blocks.{i}.attn1" for i in range(LAYERS)]
    times = [float(t) for t in range((STEPS - 1) * 1000 // STEPS, -1, -1000 // STEPS)]
    shared = {"name": "ditfastattn", "methods": dict.fromkeys(paths, "FA" * (STEPS // 2)), "timesteps": times}
    chosen = {"name": "tokencache", "paths": [path.rpartition(".")[0] for path in paths], "timesteps": times}
    importance = torch.rand(LAYERS, STEPS, TOKENS, generator=torch.Generator().manual_seed(0))
    return {
        "dense": {"passes": []},
        "delta_cache": {"passes": [{"name": "delta_cache", "start": 2, "interval": 2}], "steps": STEPS},
        "ditfastattn": {"passes": [shared]},
        "tokencache": {"plan": Plan.of(model, [chosen], {"tokencache.importance": importance})},
    }


def measure() -> dict[str, Any]:
    """The machine, and a row for each pass."""
    model = digits.transformer()
    rows = 2 * len(LABELS)
    call = {
        "hidden_states": torch.zeros(rows, 1, digits.SIZE, digits.SIZE),
        "timestep": torch.zeros(rows).long(),
        "class_labels": torch.zeros(rows).long(),
    }
    noise = np.random.default_rng(0).standard_normal((len(LABELS), 1, digits.SIZE, digits.SIZE))
    found: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        ready = {}
        for name, asked in candidates(model).items():
            report = accelpass.export_onnx(model, (), Path(folder) / f"{name}.onnx", kwargs=call, **asked)
            found.append(
                {"pass": name, "files": len(report.files), "bytes": report.bytes, "difference": report.difference}
            )
            manifest = report.manifest or _single(report.path)
            ready[name] = Denoiser(manifest, patient())
            print(json.dumps(found[-1]), flush=True)
        times: dict[str, list[float]] = {name: [] for name in ready}
        for number in range(ROUNDS + 1):
            for name, denoiser in ready.items():
                started = time.perf_counter()
                sample(denoiser, LABELS, noise)
                if number:
                    times[name].append(time.perf_counter() - started)
    for row in found:
        row["ms_a_step"] = round(1000 * median(times[row["pass"]]) / STEPS, 2)
    return {"machine": machine(), "steps": STEPS, "images": len(LABELS), "rows": found}


def patient() -> Any:
    """Threads that wait asleep: those of a dozen sessions would otherwise spin beside the one that computes."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.intra_op_num_threads = torch.get_num_threads()
    return options


def _single(path: Path) -> Path:
    """A schedule that uses one dense file at every step."""
    import onnx

    inputs = [
        {"name": i.name, "shape": [d.dim_value for d in i.type.tensor_type.shape.dim], "from": "caller"}
        for i in onnx.load(path, load_external_data=False).graph.input
    ]
    outputs = [o.name for o in onnx.load(path, load_external_data=False).graph.output]
    steps = [{"timestep": None, "calls": [path.name]}] * STEPS
    content = {"operands": None, "outputs": outputs, "files": {path.name: inputs}, "steps": steps}
    made = path.with_suffix(".json")
    made.write_text(json.dumps(content))
    return made


def table(found: dict[str, Any]) -> str:
    """The rows as Markdown."""
    lines = ["| pass | files | MB | differs from torch | step, of dense's time |", "|---|---|---|---|---|"]
    dense = found["rows"][0]["ms_a_step"]
    for row in found["rows"]:
        cells = (
            row["pass"],
            row["files"],
            f"{row['bytes'] / 1e6:.1f}",
            f"{row['difference']:.0e}",
            f"{row['ms_a_step'] / dense:.2f}",
        )
        lines.append(f"| {' | '.join(map(str, cells))} |")
    about = (
        f"The digits model, {found['steps']} steps of DDIM with guidance, {found['images']} images; {found['machine']['cpu']}, "
        f"{found['machine']['threads']} thread(s). Plans are uniform: every second step shares its attention (`ditfastattn`) or blocks "
        "(`delta_cache`), random importance (`tokencache`); what images that costs is measured elsewhere."
    )
    return "\n".join([*lines, "", about])


def write_table(found: dict[str, Any], page: Path = PAGE) -> None:
    """Put the table between the page's markers."""
    put_table(page, START, table(found), END)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", action="store_true", help="write the table of docs/onnx.md, too")
    given = parser.parse_args()
    found = measure()
    RESULTS.write_text(json.dumps(found, indent=1) + "\n")
    if given.table:
        write_table(found)
    print(table(found))


if __name__ == "__main__":
    main()
