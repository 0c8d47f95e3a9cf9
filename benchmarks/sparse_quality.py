"""What sparse attention costs in quality: SmolLM2 goes on with prose, and finds pass keys in it, at half the density and by chosen blocks.

Prompts and cache are both as the passes say. MoA's plan is found first, from answers that the dense model gives about prose
that no task reads, as in its paper: rules are profiled at three lengths, and compared at one that is not among them.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import accelpass
from accelpass.api.calibration.loss_study import IGNORED
from accelpass.passes.core.plan import Plan
from benchmarks.kv_quality import Compiled, dense_bytes, progress
from benchmarks.kv_tasks import SIZES, Row, Sizes, Tasks, prose

DENSITY = 0.5
MOA = f"moa, {DENSITY:.0%}"
PLAN = Path(__file__).parent / "plans" / "smollm2_moa.json"
METHODS: dict[str, list[Any]] = {
    "dense": [],
    f"sink_window, {DENSITY:.0%}": [{"name": "sink_window", "density": DENSITY}],
    MOA: [{"name": "moa", "density": DENSITY}],
    "pbs_attn, 0.9": [{"name": "pbs_attn", "threshold": 0.9}],
    "pbs_attn, 0.95": [{"name": "pbs_attn", "threshold": 0.95}],
    "xattention, 0.9": [{"name": "xattention", "threshold": 0.9}],
    "xattention, 0.95": [{"name": "xattention", "threshold": 0.95}],
    "xattention, calibrated": [{"name": "xattention", "threshold": 0.95}],
    "minference, 1,000 columns, 1,000 diagonals": [{"name": "minference", "vertical": 1000, "slash": 1000}],
    "minference, 500 columns, 700 diagonals": [{"name": "minference", "vertical": 500, "slash": 700}],
    "minference, calibrated": ["minference"],
}
PLANS: dict[str, Path] = {
    MOA: PLAN,
    **{f"{name}, calibrated": PLAN.with_name(f"smollm2_{name}.json") for name in ("xattention", "minference")},
}
"""Of methods that are calibrated."""
# Answers that need what stands far before them, as those of the paper's long questions do.
QUOTE = '\n\nThe text above says at one place: "{words}'
SUMMARY = "\n\nA short summary of the text above:"
CUE = 16
"""Tokens of a quotation; the answer goes on with it."""
DEPTHS: tuple[float | None, ...] = (0.25, 0.6, None)
"""Where the quotations of the profiled answers stand in the text; None: the answer is a summary."""
COMPARED: tuple[float | None, ...] = (0.4, None)
"""The same for the answers that plans are compared on."""


@dataclass(frozen=True)
class Calibration:
    """Lengths that are profiled, and the length that plans are compared at; each with a text of its own, and all questions about it.

    The paper compares at a length beyond those that it profiles; the model here has no positions beyond 8k.
    """

    lengths: tuple[int, ...] = (2048, 4096, 8192)
    compared: int = 6144
    answer: int = 96
    step: int = 1024

    @property
    def tokens(self) -> int:
        return sum(self.lengths) + self.compared


TASKS = Sizes(windows={2048: 2, 4096: 2, 8192: 4}, keys={2048: 5, 4096: 5, 8192: 10}, late=5)
SHORT = Sizes(windows={2048: 2, 4096: 1}, keys={2048: 5, 4096: 5})
SHORT_CALIBRATION = Calibration((1024, 2048), 4096)
QUICK, QUICK_CALIBRATION = SIZES["quick"], Calibration((512, 768), 640, 16, 256)


def measure(
    model: torch.nn.Module,
    tokenizer: Any,
    names: list[str],
    sizes: Sizes,
    calibration: Calibration,
    say: Callable[[str], None],
) -> list[Row]:
    """One row for each method of :data:`METHODS` that is named.

    A plan is that of :data:`PLANS` if there is that file, and else found and written there.
    """
    tasks, rows = Tasks(tokenizer, sizes), []
    with progress() as bar:
        for name in names:
            torch._dynamo.reset()
            plan = None
            if name in PLANS:
                is_trial = calibration == QUICK_CALIBRATION
                plan = (planned if is_trial else held_plan)(model, tokenizer, calibration, name)
            torch._dynamo.reset()
            reader = Compiled(model, METHODS[name], sizes.capacity, plan)
            task = bar.add_task(name, total=sizes.units, doing="compiling")
            asked = tasks.ask(reader, lambda doing, task=task: bar.update(task, advance=1, doing=doing))
            held = reader.cache.nbytes()
            share = round(held / dense_bytes(model, sizes.capacity), 3)
            rows.append({"name": name, **asked, "cache_bytes": held, "share_of_dense": share})
            bar.update(task, doing="")
            say(json.dumps(rows[-1]))
    return rows


def held_plan(model: Any, tokenizer: Any, calibration: Calibration, name: str) -> Plan:
    """The plan of a method, found if there is none; what that took goes beside it."""
    path = PLANS[name]
    if not path.exists():
        started = time.perf_counter()
        plan = planned(model, tokenizer, calibration, name)
        path.parent.mkdir(exist_ok=True)
        plan.save(path)
        path.with_suffix(".md").write_text(about(plan, calibration, time.perf_counter() - started, name))
    return Plan.load(path)


def about(plan: Plan, calibration: Calibration, seconds: float, name: str) -> str:
    """What a plan is, and what finding it took."""
    (before, after), method = plan.tensors[f"{name.split(',')[0]}/perplexity"].tolist(), METHODS[name]
    return (
        f"`{PLANS[name].name}`: {method} for SmolLM2-135M-Instruct. Profiled at {calibration.lengths} tokens, "
        f"compared at {calibration.compared}: perplexity of the dense model's answers {before:.3f} dense, {after:.3f} with the "
        f"plan. Found in {seconds:.0f} s by `python -m benchmarks.run --only sparse_quality --only-candidates '{name}'`.\n"
    )


def planned(model: Any, tokenizer: Any, sizes: Calibration, name: str = MOA) -> Plan:
    """A plan from the last of the prose, which no task reads."""
    text = tokenizer(prose(), return_tensors="pt", add_special_tokens=False).input_ids[0, -sizes.tokens :]
    *texts, last = text.split([*sizes.lengths, sizes.compared])
    batches = [answered(model, tokenizer, part, depth, sizes.answer) for part in texts for depth in DEPTHS]
    validation = [answered(model, tokenizer, last, depth, sizes.answer) for depth in COMPARED]
    step = {"step": sizes.step} if name == MOA else {}
    made = [{**({"name": p} if isinstance(p, str) else p), **step} for p in METHODS[name]]
    return accelpass.calibrate(model, batches, made, progress=False, validation=validation)


@torch.no_grad()
def answered(model: Any, tokenizer: Any, text: Tensor, depth: float | None, answer: int) -> dict[str, Tensor]:
    """As many tokens as ``text`` has: its beginning, a question, and the dense model's answer, which alone has labels.

    The question asks to go on with the words that stand at ``depth`` (a share of the text), or for a summary if that is None.
    """
    question = SUMMARY
    if depth is not None:
        at = int(depth * len(text))
        question = QUOTE.format(words=tokenizer.decode(text[at : at + CUE]).strip())
    asked = tokenizer(question, return_tensors="pt", add_special_tokens=False).input_ids[0]
    prompt = torch.cat([text[: len(text) - len(asked) - answer], asked])[None]
    ids = model.generate(
        prompt, attention_mask=torch.ones_like(prompt), do_sample=False, min_new_tokens=answer, max_new_tokens=answer,
        pad_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    labels = ids.clone()
    labels[:, : prompt.shape[1]] = IGNORED
    return {"input_ids": ids, "labels": labels}
