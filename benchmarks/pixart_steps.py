"""A transformer of PixArt's shape with DiTFastAttn's plan of published density, against dense Inductor, on a CPU.

``python -m benchmarks.run --only pixart_steps``. The weights are random, so nothing is said about images, and no plan can be
searched: all layers follow one row of letters. Every kind of step is timed by itself, in turns with the dense model, and a run is the
sum over its steps; a short run is timed whole, both ways, to check that.
"""

from __future__ import annotations

import statistics
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import accelpass
from accelpass.backends import graphs_of
from accelpass.passes.core.report import StepReport

Row = dict[str, Any]
LETTERS = "FAXACAXAFAXACAXAAXAA"
"""20 steps: full attention twice, for one half of the batch twice, in a window for one half five times, shared else."""
CHECKED = "FAXACX"
"""Of the same kinds of steps."""
CAPTION = (120, 4096)
CONFIG: dict[str, Any] = {
    "num_attention_heads": 16,
    "attention_head_dim": 72,
    "in_channels": 4,
    "out_channels": 8,
    "cross_attention_dim": 16 * 72,
    "patch_size": 2,
    "caption_channels": CAPTION[1],
    "use_additional_conditions": False,
}


@dataclass(frozen=True)
class Sizes:
    """How much is done.

    Attributes:
        layers: of the published 28; all of them are alike.
        latents: side of the latents; 128 are images of 1024 pixels, and 4096 tokens.
        turns: how often each kind of step is timed.
    """

    layers: int = 2
    latents: int = 128
    turns: int = 3


QUICK = Sizes(layers=1, latents=32, turns=2)


def model_of(sizes: Sizes) -> Any:
    from diffusers import PixArtTransformer2DModel

    torch.manual_seed(0)
    return PixArtTransformer2DModel(**CONFIG, num_layers=sizes.layers, sample_size=sizes.latents).eval()


def call_of(sizes: Sizes, step: int, steps: int, latents: Tensor) -> dict[str, Any]:
    """The arguments of one model call; guidance is one batch of two halves."""
    draw = torch.Generator().manual_seed(1)
    return {
        "hidden_states": torch.cat([latents, latents]),
        "encoder_hidden_states": torch.randn(2, *CAPTION, generator=draw),
        "timestep": torch.full((2,), times(steps)[step]),
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
        "return_dict": False,
    }


def times(steps: int) -> list[int]:
    return [999 - 1000 * step // steps for step in range(steps)]


def compiled(model: Any, letters: str) -> Any:
    """The model with all layers as ``letters`` say."""
    methods = {f"transformer_blocks.{i}.attn1": letters for i in range(len(model.transformer_blocks))}
    plan: Any = {"name": "ditfastattn", "methods": methods, "timesteps": times(len(letters)), "cond_first": False}
    return torch.compile(model, backend="accelpass", options={"passes": [plan]})


def measure(sizes: Sizes, say: Callable[[str], None]) -> dict[str, Any]:
    """Rows: each kind of step, the run that is made of them, and the short run."""
    model = model_of(sizes)
    side = sizes.latents
    latents = torch.randn(1, 4, side, side, generator=torch.Generator().manual_seed(2))
    dense = torch.compile(model)
    with torch._inductor.config.patch(force_disable_caches=True):
        compiled_in = {"inductor": _seconds(dense, **call_of(sizes, 0, len(LETTERS), latents))}
        fast = compiled(model, LETTERS)
        compiled_in["accelpass"] = _seconds(fast, **call_of(sizes, 0, len(LETTERS), latents))
    for name, seconds in compiled_in.items():
        say(f"{name}: compiled, {seconds:.0f} s")
    report = graphs_of(model)[-1].report.steps
    assert report is not None
    rows, sums = step_rows(sizes, latents, fast, dense, report, say)
    rows += run_rows(sizes, latents, model, dense, sums, report, say)
    kinds = len(set(report.actions))
    return {
        "rows": rows,
        "layers": sizes.layers,
        "tokens": (side // CONFIG["patch_size"]) ** 2,
        "steps": len(LETTERS),
        "letters": LETTERS,
        "compile_seconds": {name: round(seconds, 1) for name, seconds in compiled_in.items()},
        "variants": kinds,
        "per_variant": round((compiled_in["accelpass"] / compiled_in["inductor"] - 1) / (kinds - 1), 3),
    }


def step_rows(
    sizes: Sizes, latents: Tensor, fast: Any, dense: Any, report: StepReport, say: Callable[[str], None]
) -> tuple[list[Row], dict[str, float]]:
    """A row for each kind of step, timed in turns of a whole run each, and the seconds of the kinds by action."""
    kinds = [row[0] for row in report.actions]
    chosen = {kind: kinds.index(kind) for kind in kinds}
    found: dict[str, list[float]] = {kind: [] for kind in ("inductor", *chosen)}
    last = max(chosen.values())
    for turn in range(sizes.turns):
        # A step needs what the steps before it kept, so the run is made up to the last kind that is new.
        # That they are one run is declared: the latents of these steps do not come of each other.
        with accelpass.sampling_run(fast):
            for step in range(last + 1):
                call = call_of(sizes, step, len(LETTERS), latents + step)
                found[kinds[step]].append(_seconds(fast, **call))
                if step % 4 == 0:
                    found["inductor"].append(_seconds(dense, **call))
        say(f"steps, turn {turn + 1} of {sizes.turns}")
    seconds = {kind: statistics.median(taken) for kind, taken in found.items()}
    base, counts = seconds["inductor"], Counter(kinds)
    rows = [_row("inductor, dense step", len(kinds), 1.0, 1.0, base, 1.0)]
    for kind, at in chosen.items():
        attention, flops = report.attention[at] / report.dense_attention, report.flops[at] / report.dense
        rows.append(_row(f"step: {kind}", counts[kind], attention, flops, seconds[kind], seconds[kind] / base))
    return rows, seconds


def run_rows(
    sizes: Sizes,
    latents: Tensor,
    model: Any,
    dense: Any,
    sums: dict[str, float],
    report: StepReport,
    say: Callable[[str], None],
) -> list[Row]:
    """The run of all steps, summed; and a short one, summed and timed whole."""
    kinds = [row[0] for row in report.actions]
    base = sums["inductor"]
    total = sum(sums[kind] for kind in kinds)
    calls = len(kinds)
    attention = sum(report.attention) / calls / report.dense_attention
    flops = sum(report.flops) / calls / report.dense
    rows = [_row(f"run of {calls} steps, summed", calls, attention, flops, total, total / base / calls)]
    short = len(CHECKED)
    fast = compiled(model, CHECKED)
    fast(**call_of(sizes, 0, short, latents))
    taken: dict[str, list[float]] = {"fast": [], "dense": []}
    for turn in range(max(1, sizes.turns // 2)):
        for name, run in (("fast", fast), ("dense", dense)):
            taken[name].append(_seconds(denoise, sizes, run, latents, short))
        say(f"whole runs, turn {turn + 1}")
    whole, full = (statistics.median(taken[name]) for name in ("fast", "dense"))
    made = graphs_of(model)[-1].report.steps
    assert made is not None
    summed = sum(sums[row[0]] for row in made.actions)
    attention = sum(made.attention) / short / made.dense_attention
    flops = sum(made.flops) / short / made.dense
    rows.append(_row(f"run of {short} steps, summed", short, attention, flops, summed, summed / base / short))
    rows.append(_row(f"run of {short} steps, timed whole", short, attention, flops, whole, whole / full))
    return rows


def denoise(sizes: Sizes, run: Any, latents: Tensor, steps: int) -> Tensor:
    """A run with guidance and a step that is as cheap as a scheduler's."""
    for step in range(steps):
        first, second = run(**call_of(sizes, step, steps, latents))[0][:, :4].chunk(2)
        latents = latents - (first + 4.5 * (second - first)) / steps
    return latents


def _seconds(run: Callable[..., Any], *args: Any, **kwargs: Any) -> float:
    start = time.perf_counter()
    run(*args, **kwargs)
    return time.perf_counter() - start


def _row(name: str, count: int, attention: float, flops: float, seconds: float, share: float) -> Row:
    return {
        "name": name,
        "steps": count,
        "attention_flops": round(attention, 3),
        "flops": round(flops, 3),
        "seconds": round(seconds, 2),
        "time": round(share, 3),
        "faster": round(1 / share, 2),
    }
