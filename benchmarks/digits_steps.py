"""The digits model with passes that work across denoising steps: quality, FLOPs and time of each, in one run.

``python -m benchmarks.run --only digits_steps``. Images come from diffusers' own ``DiTPipeline`` (DDIM, classifier-free
guidance as one batch of two halves), whose transformer is compiled. In a turn every candidate makes one image of each
class from the same noise; these are what is timed, and all of a candidate's images together are what is judged. Plans are
made on the first run and kept under ``build/``.
"""

from __future__ import annotations

import hashlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import accelpass
from accelpass.backends import graphs_of
from accelpass.models_zoo import digits
from accelpass.passes.core.plan import Plan, describe
from accelpass.passes.core.report import GraphReport
from benchmarks import digits_quality

Row = dict[str, Any]
INDUCTOR, PLAIN = "inductor", "accelpass, no step pass"
PLANS = Path("build/digits_steps")


@dataclass(frozen=True)
class Setting:
    """How a candidate is compiled.

    Attributes:
        search: what ``search_steps`` fits; None for a model that is computed in full.
        changes: options that are set after the search, which does not depend on them.
        given: a pass whose schedule is given and not searched; it gets the run's timesteps.
        beside: further passes.
    """

    search: dict[str, Any] | None = None
    changes: dict[str, Any] = field(default_factory=dict)
    given: dict[str, Any] | None = None
    beside: tuple[Any, ...] = ()


def _fast_attention(threshold: float) -> Setting:
    return Setting({"name": "ditfastattn", "threshold": threshold})


def _token_cache(ratio: float, intervals: tuple[int, int], blocks: float = 1.0, rotation: int = 0) -> Setting:
    changes = {"ratio": ratio, "intervals": intervals, "blocks": blocks, "rotation": rotation}
    return Setting({"name": "tokencache"}, changes)


CANDIDATES: dict[str, Setting] = {
    INDUCTOR: Setting(),
    PLAIN: Setting(),
    **{f"ditfastattn, threshold {t:g}": _fast_attention(t) for t in (0.05, 0.1, 0.15, 0.2, 0.3, 0.4)},
    "tokencache, half of 3 in 4 blocks, every 2/3": _token_cache(0.5, (2, 3), 0.75, 4),
    "tokencache, half, every 2/3": _token_cache(0.5, (2, 3)),
    "tokencache, 3 in 4, every 2/2": _token_cache(0.75, (2, 2)),
    "tokencache, 3 in 4, every 3/3": _token_cache(0.75, (3, 3)),
    "tokencache, all, every 2/2": _token_cache(1.0, (2, 2)),
    "tokencache, all, every 2/3": _token_cache(1.0, (2, 3)),
    "tokencache, all, every 3/4": _token_cache(1.0, (3, 4)),
    "delta_cache, every 2": Setting(given={"name": "delta_cache", "interval": 2}),
    "delta_cache, every 3": Setting(given={"name": "delta_cache", "interval": 3}),
    "delta_cache, every 3, taylor": Setting(given={"name": "delta_cache", "interval": 3, "predict": "taylor"}),
    "delta_cache, every 6": Setting(given={"name": "delta_cache"}),
    "ditfastattn, threshold 0.15, int8_weights": Setting(
        {"name": "ditfastattn", "threshold": 0.15}, beside=("int8_weights",)
    ),
}
SHORT = (INDUCTOR, PLAIN, "ditfastattn, threshold 0.4", "tokencache, all, every 2/2")


@dataclass(frozen=True)
class Sizes:
    """How much is done.

    Attributes:
        steps: of DDIM.
        per_class: images of each class, which is also the number of turns.
        labels: images in the sampling run that DiTFastAttn's plan is searched in.
        runs, batch: sampling runs that TokenCache's predictor is trained in, and images in each.
    """

    steps: int = 50
    per_class: int = 10
    labels: int = 4
    runs: int = 20
    batch: int = 4


QUICK = Sizes(steps=6, per_class=2, labels=1, runs=1, batch=1)


class Timed(nn.Module):
    """A compiled transformer as a pipeline sees it; counts the seconds that it is at work."""

    def __init__(self, fast: Any, model: Any) -> None:
        super().__init__()
        self.fast, self.seconds = fast, 0.0
        self.config, self.dtype, self.device = model.config, model.dtype, model.device

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        made = self.fast(*args, **kwargs)
        self.seconds += time.perf_counter() - start
        return made


@dataclass(eq=False)
class Candidate:
    """One candidate: its model and pipeline, and what was measured."""

    name: str
    model: Any
    pipe: Any
    timed: Timed
    compile_seconds: float
    images: list[Tensor] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    inside: list[float] = field(default_factory=list)

    def turn(self, steps: int, seed: int) -> None:
        """One image of each class; timed as a whole and in the transformer."""
        self.timed.seconds = 0.0
        start = time.perf_counter()
        self.images.append(digits.sample(self.pipe, list(range(digits.CLASSES)), steps, seed))
        self.seconds.append(time.perf_counter() - start)
        self.inside.append(self.timed.seconds)

    @property
    def report(self) -> GraphReport | None:
        graphs = graphs_of(self.model)
        return graphs[-1].report if graphs else None


def measure(names: Sequence[str], sizes: Sizes, say: Callable[[str], None], peer: str | None = None) -> dict[str, Any]:
    """A row for each candidate that is named, and for Inductor, which all are compared with."""
    wanted = [n for n in CANDIDATES if n in names or n == INDUCTOR]
    plans = {n: plan_of(CANDIDATES[n], sizes, say) for n in wanted if CANDIDATES[n].search is not None}
    made = []
    # Instances of one model are compiled by one function, and Dynamo stops after eight graphs of a function.
    with torch._dynamo.config.patch(recompile_limit=8 * len(CANDIDATES)):
        _warm_up()
        for name in wanted:
            made.append(compiled(name, plans.get(name), sizes.steps))
            say(f"{name}: compiled, {made[-1].compile_seconds:.1f} s")
        for turn in range(sizes.per_class):
            for candidate in made:
                candidate.turn(sizes.steps, turn)
            say(f"turn {turn + 1} of {sizes.per_class}: {', '.join(f'{c.seconds[-1]:.1f}' for c in made)} s")
    rows = [row_of(c, made[0]) for c in made]
    if peer is not None:
        rows += peer_rows(peer, sizes, made)
    floor = digits_quality.real_figures()
    return {
        "rows": rows,
        "steps": sizes.steps,
        "images": sizes.per_class * digits.CLASSES,
        "guidance": digits.GUIDANCE,
        "dense_seconds": statistics.median(made[0].seconds),
        **{f"real_{name}": value for name, value in floor.items()},
    }


def plan_of(setting: Setting, sizes: Sizes, say: Callable[[str], None]) -> Plan:
    """The candidate's plan: searched now, or in an earlier run with the same weights."""
    assert setting.search is not None
    asked = json.dumps([setting.search, sizes.steps, sizes.labels, sizes.runs, sizes.batch, _weights_digest()])
    path = PLANS / f"{setting.search['name']}-{hashlib.sha256(asked.encode()).hexdigest()[:12]}.json"
    if path.exists():
        plan = Plan.load(path)
    else:
        say(f"searching {setting.search}")
        start = time.perf_counter()
        plan = searched(setting.search, sizes)
        path.parent.mkdir(parents=True, exist_ok=True)
        plan.save(path)
        say(f"found in {time.perf_counter() - start:.0f} s: {path}")
    (found,) = plan.passes()
    return Plan([describe(replace(found, **setting.changes))], plan.fingerprint, plan.tensors)


def searched(search: dict[str, Any], sizes: Sizes) -> Plan:
    """Seeds are others than those of the images that are judged."""
    pipe, trained = digits.pipeline(), search["name"] == "tokencache"
    runs, count = (sizes.runs, sizes.batch) if trained else (1, sizes.labels)
    seeds = iter(range(1000, 1000 + runs))

    def sample(fast: Any) -> None:
        seed = next(seeds)
        labels = torch.randint(digits.CLASSES, (count,), generator=torch.Generator().manual_seed(seed))
        pipe.transformer = fast
        digits.sample(pipe, labels.tolist(), sizes.steps, seed)

    return accelpass.search_steps(pipe.transformer, sample, [search], steps=sizes.steps, runs=runs, scheduler="DDIM")


def compiled(name: str, plan: Plan | None, steps: int) -> Candidate:
    """The candidate, compiled without what earlier compilations left; the first call alone is counted."""
    pipe = digits.pipeline()
    model = pipe.transformer
    call = _first_call(pipe, steps)
    beside = list(CANDIDATES[name].beside)
    if (given := CANDIDATES[name].given) is not None:
        beside.append({**given, "timesteps": tuple(map(float, pipe.scheduler.timesteps))})
    options: dict[str, Any] = {} if plan is None else {"plan": plan}
    if beside:
        options["passes"] = beside
    how: dict[str, Any] = {} if name == INDUCTOR else {"backend": "accelpass", "options": options or None}
    fast = torch.compile(model, **how)
    with torch._inductor.config.patch(force_disable_caches=True):
        start = time.perf_counter()
        fast(**call)
        seconds = time.perf_counter() - start
    timed = Timed(fast, model)
    pipe.transformer = timed
    return Candidate(name, model, pipe, timed, seconds)


def _first_call(pipe: Any, steps: int) -> dict[str, Any]:
    """What the pipeline gives its transformer at the first step."""
    pipe.scheduler.set_timesteps(steps)
    labels = torch.tensor([*range(digits.CLASSES), *[digits.NO_CLASS] * digits.CLASSES])
    latents = torch.randn(digits.CLASSES, 1, digits.SIZE, digits.SIZE, generator=torch.Generator().manual_seed(0))
    time = pipe.scheduler.timesteps[0].expand(len(labels))
    return {"hidden_states": torch.cat([latents, latents]), "timestep": time, "class_labels": labels}


def _weights_digest() -> str:
    return hashlib.sha256((digits.WEIGHTS / "digits_dit.safetensors").read_bytes()).hexdigest()


def _warm_up() -> None:
    """Pay for what a process pays once when it compiles."""
    from diffusers import DiTTransformer2DModel

    call = _first_call(digits.pipeline(), 2)
    backends: list[dict[str, Any]] = [{}, {"backend": "accelpass"}]
    for how in backends:
        small = DiTTransformer2DModel(**{**digits.CONFIG, "num_layers": 1}).eval()
        with torch._inductor.config.patch(force_disable_caches=True):
            torch.compile(small, **how)(**call)


def row_of(candidate: Candidate, dense: Candidate) -> Row:
    """What is reported of a candidate; FLOPs and seconds are shares of dense ones."""
    report = candidate.report
    costs = shares(report)
    variants = costs.pop("variants")
    extra: float | str = ""
    if variants > 1:
        extra = round((candidate.compile_seconds / dense.compile_seconds - 1) / (variants - 1), 3)
    pairs = zip(candidate.seconds, candidate.inside, strict=True)
    return {
        "name": candidate.name,
        **quality(candidate.images, dense.images),
        **costs,
        "time": ratio(candidate.seconds, dense.seconds),
        "seconds": round(statistics.median(candidate.seconds), 3),
        "outside": round(statistics.median(1 - inside / whole for whole, inside in pairs), 3),
        "variants": variants,
        "parts": report.parts_compiled if report is not None and report.steps is not None else 1,
        "compile_seconds": round(candidate.compile_seconds, 1),
        "per_variant": extra,
    }


def shares(report: GraphReport | None) -> Row:
    """Of the FLOPs of a run that is computed in full; ``variants`` is how many steps differ in what they compute."""
    steps = None if report is None else report.steps
    if steps is None or not steps.flops:
        return {"attention_flops": 1.0, "flops": 1.0, "variants": 1}
    return {
        "attention_flops": round(sum(steps.attention) / len(steps.attention) / steps.dense_attention, 3),
        "flops": round(sum(steps.flops) / len(steps.flops) / steps.dense, 3),
        "variants": steps.variants,
    }


def quality(images: Sequence[Tensor], dense: Sequence[Tensor]) -> Row:
    """Of images made in turns, each turn one of each class."""
    labels = torch.arange(digits.CLASSES).repeat(len(images))
    made = torch.cat(list(images))
    return {
        "class_accuracy": round(digits_quality.class_accuracy(made, labels), 4),
        "frechet": round(digits_quality.frechet_distance(made), 3),
        "psnr": round(digits_quality.psnr(made, torch.cat(list(dense))), 1),
    }


def ratio(seconds: Sequence[float], dense: Sequence[float]) -> float:
    """The median over turns: what slows a whole turn down is in both."""
    return round(statistics.median(a / b for a, b in zip(seconds, dense, strict=True)), 3)


def peer_rows(python: str, sizes: Sizes, ours: Sequence[Candidate]) -> list[Row]:
    """The rows of :mod:`benchmarks.digits_peer`, which runs with another Python: one that has cache-dit and accelpass.

    Its times are against a dense Inductor of its own process, its images against ours. Its FLOPs are those of the blocks
    that it ran, which all cost the same; what surrounds them is less than a thousandth.

    Raises:
        subprocess.CalledProcessError: it failed; its own words are on the terminal.
    """
    with tempfile.TemporaryDirectory() as made:
        out = Path(made) / "rows.pt"
        command = [python, "-m", "benchmarks.digits_peer", str(out), "--steps", str(sizes.steps)]
        command += ["--turns", str(sizes.per_class), "--threads", str(torch.get_num_threads())]
        root = Path(__file__).parents[1]
        subprocess.run(command, check=True, cwd=root, env=dict(os.environ), stdout=sys.stderr)
        found = torch.load(out)
    dense = found.pop(0)
    rows = []
    for one in found:
        reused = one["reused"]
        rows.append(
            {
                "name": one["name"],
                **quality(one["images"], ours[0].images),
                "attention_flops": round(1 - reused, 3),
                "flops": round(1 - reused, 3),
                "time": ratio(one["seconds"], dense["seconds"]),
                "seconds": round(statistics.median(one["seconds"]), 3),
                "outside": "",
                "variants": "",
                "parts": "",
                "compile_seconds": "",  # its instances share compiled code
                "per_variant": "",
            }
        )
    return rows
