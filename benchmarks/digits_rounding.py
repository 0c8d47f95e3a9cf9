"""What rounding costs denoisers in W8A8 and W4A8: vidit_q and mixdq beside the nearest rounding at equal bits.

    python -m benchmarks.digits_rounding --per-class 10 --steps 20      # the digits model; goes on where it was stopped
    python -m benchmarks.digits_rounding --pixart                       # two layers of PixArt's shape, with random weights
    python -m benchmarks.digits_rounding --time                         # what a step of these takes

Each makes the same images from the same noise. PSNR is against those of the dense model. Of random weights, which make no images, only
the outputs of single steps are compared, as signal to noise.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import accelpass
from accelpass.api.calibration.bit_search import Group, sqnr
from accelpass.models_zoo import digits
from benchmarks import pixart_steps
from benchmarks.digits_quality import class_accuracy, frechet_distance, labels_of, psnr
from benchmarks.machine import cpu, goes_on
from benchmarks.structure import in_turns

RESULTS = Path(__file__).parent / "results"
CALLS = 4
"""Of the model in a sampling run, that are learnt from."""
EARLIER = {"boundaries": (500,), "momentum": 0.95, "rotate": False, "strength": 0.89}
"""The paper's timestep-aware balancing: 0.11 of the activation's magnitude."""
WAYS: dict[str, tuple[dict[str, Any], bool]] = {
    "nearest": ({"name": "vidit_q"}, False),
    "vidit_q": ({"name": "vidit_q"}, True),
    "vidit_q by timestep": ({"name": "vidit_q", "boundaries": (500,)}, True),
    "vidit_q by timestep, not mixed": ({"name": "vidit_q", **EARLIER}, True),
    "nearest, ranges known": ({"name": "mixdq", "bos": False, "convolutions": False}, True),
    "mixdq": ({"name": "mixdq"}, True),
}
"""The pass, and whether it learns from data."""
SEARCHED = "W4A8 mixdq, bits by sensitivity"
"""2, 4 and 8 bits with an average of 4."""
Figures = dict[str, float]


def calls_of(pipe: Any, steps: int) -> list[dict[str, Tensor]]:
    """Some calls of a run with one image of each class, from first to last."""
    seen: list[dict[str, Tensor]] = []

    def keep(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        names = ("hidden_states", "timestep", "class_labels")
        given = dict(zip(names, args, strict=False)) | {k: v for k, v in kwargs.items() if k in names}
        seen.append({k: v.clone() for k, v in given.items()})

    hook = pipe.transformer.register_forward_pre_hook(keep, with_kwargs=True)
    digits.sample(pipe, list(range(digits.CLASSES)), steps, seed=99)
    hook.remove()
    return seen[:: max(1, len(seen) // CALLS)]


def entries() -> dict[str, tuple[dict[str, Any], bool]]:
    """Name, the pass, and whether it learns from data."""
    return {
        f"W{bits}A8 {name}": (entry | {"bits": bits}, learns)
        for bits in (8, 4)
        for name, (entry, learns) in WAYS.items()
    }


def searched(model: Any, calls: list[dict[str, Any]]) -> dict[str, Any]:
    """mixdq with bits that an integer program found, from what each weight's rounding does to the output of a step in the middle."""
    call = calls[len(calls) // 2]
    groups = (Group("all", ("*",), sqnr),)
    found = accelpass.search_bits(
        model, lambda m: output(m, call), 4.0, choices=(2, 4, 8), groups=groups, progress=False
    )
    return {"name": "mixdq", "bits": 8, "sites": found.sites}


def output(model: Any, call: dict[str, Any]) -> Tensor:
    made = model(**call)
    return made[0] if isinstance(made, tuple) else made.sample


def of_digits(per_class: int, steps: int) -> tuple[Any, list[dict[str, Any]], Callable[[Any], Figures]]:
    """The model, what is learnt from, and what is measured of it compiled."""
    labels, pipe = labels_of(per_class), digits.pipeline()
    model = pipe.transformer
    calls = calls_of(pipe, steps)
    dense = digits.sample(pipe, labels.tolist(), steps, seed=0)

    def figures(fast: Any) -> Figures:
        pipe.transformer = fast
        images = digits.sample(pipe, labels.tolist(), steps, seed=0)
        made = {"accuracy": class_accuracy(images, labels), "frechet": frechet_distance(images)}
        return made if fast is model else made | {"psnr": psnr(images, dense)}

    return model, calls, figures


def of_pixart() -> tuple[Any, list[dict[str, Any]], Callable[[Any], Figures]]:
    """Two layers of PixArt's shape, 256 tokens, and outputs at steps that were not learnt from."""
    sizes = pixart_steps.Sizes(layers=2, latents=32)
    model = pixart_steps.model_of(sizes)

    def call(step: int, seed: int) -> dict[str, Any]:
        latents = torch.randn(1, 4, sizes.latents, sizes.latents, generator=torch.Generator().manual_seed(seed))
        return pixart_steps.call_of(sizes, step, 20, latents)

    calls, scored = [call(s, s) for s in (0, 6, 12, 18)], [call(s, 100 + s) for s in (3, 16)]
    with torch.no_grad():
        dense = [output(model, c) for c in scored]

    def figures(fast: Any) -> Figures:
        if fast is model:
            return {}
        with torch.no_grad():
            return {"sqnr": sum(sqnr(output(fast, c), d) for c, d in zip(scored, dense, strict=True)) / len(scored)}

    return model, calls, figures


TIMED = ("W8A8 nearest", "W8A8 vidit_q", "W8A8 mixdq", "W4A8 vidit_q", "W4A8 mixdq")


def times(turns: int) -> dict[str, float]:
    """Milliseconds of a step of PixArt's two layers, 1,024 tokens and guidance, in turns with Inductor in floats."""
    sizes = pixart_steps.Sizes(layers=2, latents=64)
    model = pixart_steps.model_of(sizes)
    calls = [
        pixart_steps.call_of(sizes, s, 20, torch.randn(1, 4, 64, 64, generator=torch.Generator().manual_seed(s)))
        for s in (0, 6, 12, 18)
    ]
    given: dict[str, dict[str, Any]] = {}
    for name in TIMED:
        entry, learns = entries()[name]
        given[name] = {"passes": [entry]}
        if learns:
            given[name] = {"passes": [], "plan": accelpass.calibrate(model, calls, [entry], progress=False)}
    runs = {"dense": torch.compile(copy.deepcopy(model))}
    for name, options in given.items():
        runs[name] = torch.compile(copy.deepcopy(model), backend="accelpass", options=options)
    with torch.no_grad():
        found = in_turns({name: partial(run, **calls[1]) for name, run in runs.items()}, turns)
    return {name: round(1000 * statistics.median(some), 1) for name, some in found.items()}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--per-class", type=int, default=10, help="images of each class")
    parser.add_argument("--steps", type=int, default=20, help="of DDIM")
    parser.add_argument("--pixart", action="store_true", help="random weights in PixArt's shape instead")
    parser.add_argument("--most", type=int, default=99, help="rows that this call measures")
    parser.add_argument("--time", action="store_true", help="of a step of PixArt's shape, and nothing else")
    given = parser.parse_args(arguments)
    if given.time:
        made = {"cpu": cpu(), "torch": torch.__version__, "milliseconds": times(7)}
        (RESULTS / "pixart_rounding_time_cpu.json").write_text(json.dumps(made, indent=1) + "\n")
        print(json.dumps(made["milliseconds"], indent=1))
        return 0
    results = RESULTS / ("pixart_rounding_cpu.json" if given.pixart else "digits_rounding_cpu.json")
    model, calls, figures = of_pixart() if given.pixart else of_digits(given.per_class, given.steps)
    settings: dict[str, Any] = {"cpu": cpu(), "torch": torch.__version__}
    if not given.pixart:
        settings |= {"images": 10 * given.per_class, "steps": given.steps}
    before = json.loads(results.read_text()) if results.is_file() else {}
    same = goes_on(before, settings)
    found: dict[str, Figures] = before["rows"] if same else {}
    if "dense" not in found:
        found["dense"] = figures(model)
    waiting = [name for name in (*entries(), SEARCHED) if name not in found][: given.most]
    for name in waiting:
        torch._dynamo.reset()
        entry, learns = (searched(model, calls), True) if name == SEARCHED else entries()[name]
        options: dict[str, Any] = {"lowering": "aten", "passes": [entry]}
        if learns:
            options |= {"passes": [], "plan": accelpass.calibrate(model, calls, [entry], progress=False)}
        fast = torch.compile(model, backend="accelpass", options=options)
        made = figures(fast)
        size, now = accelpass.explain(fast).weight_bytes
        found[name] = made | {"bytes": now / size}
        print(json.dumps({name: found[name]}), file=sys.stderr, flush=True)
        # Written as it goes: what is there is not measured again.
        results.write_text(json.dumps({**(same or settings), "rows": found}, indent=1) + "\n")
    names = {
        "accuracy": "right class",
        "frechet": "Fréchet",
        "psnr": "PSNR, dB",
        "sqnr": "SQNR, dB",
        "bytes": "bytes of weights",
    }
    shown = [key for key in names if any(key in row for row in found.values())]
    table = Table("", *(names[key] for key in shown))
    for name, row in found.items():
        table.add_row(name, *(f"{row[key]:.3f}" if key in row else "" for key in shown))
    Console().print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
