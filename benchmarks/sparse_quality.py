"""What sparse attention costs in quality: SmolLM2 goes on with prose, and finds pass keys in it, at half the density and by chosen blocks.

Prompts and cache are both as the passes say. MoA's plan is found first, from answers that the dense model gives about prose
that no task reads, as in its paper: rules are profiled at two lengths, and compared at a third, longer one.
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
from accelpass.loss_study import IGNORED
from accelpass.passes.plan import Plan
from benchmarks.kv_quality import Compiled, dense_bytes, progress
from benchmarks.kv_tasks import QUICK as QUICK_TASKS
from benchmarks.kv_tasks import Row, Sizes, Tasks, prose

DENSITY = 0.5
MOA = f"moa, {DENSITY:.0%}"
PLAN = Path(__file__).parent / "plans" / "smollm2_moa.json"
METHODS: dict[str, list[Any]] = {
    "dense": [],
    f"sink_window, {DENSITY:.0%}": [{"name": "sink_window", "density": DENSITY}],
    MOA: [{"name": "moa", "density": DENSITY}],
    "pbs_attn, 0.9": [{"name": "pbs_attn", "threshold": 0.9}],
    "pbs_attn, 0.95": [{"name": "pbs_attn", "threshold": 0.95}],
}
# Answers that need what stands far before them, as those of the paper's long questions do.
QUESTIONS = ("\n\nThe text above begins with the words:", "\n\nA short summary of the text above:")


@dataclass(frozen=True)
class Calibration:
    """Lengths that are profiled, each with one sample for each question, and the length that plans are compared at."""

    lengths: tuple[int, ...] = (2048, 4096)
    compared: int = 8192
    answer: int = 96
    step: int = 1024

    @property
    def tokens(self) -> int:
        return len(QUESTIONS) * sum(self.lengths) + self.compared


TASKS = Sizes(windows={2048: 2, 4096: 2, 8192: 4}, keys={2048: 5, 4096: 5, 8192: 10}, late=5)
SHORT = Sizes(windows={2048: 2, 4096: 1}, keys={2048: 5, 4096: 5})
SHORT_CALIBRATION = Calibration((1024, 2048), 4096)
QUICK, QUICK_CALIBRATION = QUICK_TASKS, Calibration((512, 768), 1024, 16, 256)


def measure(
    model: torch.nn.Module,
    tokenizer: Any,
    names: list[str],
    sizes: Sizes,
    calibration: Calibration,
    say: Callable[[str], None],
) -> list[Row]:
    """One row for each method of :data:`METHODS` that is named.

    ``moa``'s plan is :data:`PLAN` if there is that file, and else found and written there.
    """
    tasks, rows = Tasks(tokenizer, sizes), []
    with progress() as bar:
        for name in names:
            torch._dynamo.reset()
            plan = None
            if name == MOA:
                is_trial = calibration == QUICK_CALIBRATION
                plan = (planned if is_trial else moa_plan)(model, tokenizer, calibration)
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


def moa_plan(model: Any, tokenizer: Any, calibration: Calibration, path: Path = PLAN) -> Plan:
    """The plan of :data:`MOA`, found if there is none; what that took goes beside it."""
    if not path.exists():
        started = time.perf_counter()
        plan = planned(model, tokenizer, calibration)
        path.parent.mkdir(exist_ok=True)
        plan.save(path)
        path.with_suffix(".md").write_text(about(plan, calibration, time.perf_counter() - started))
    return Plan.load(path)


def about(plan: Plan, calibration: Calibration, seconds: float) -> str:
    """What a plan is, and what finding it took."""
    before, after = plan.tensors["moa/perplexity"].tolist()
    return (
        f"`{PLAN.name}`: moa at a density of {DENSITY:.0%} for SmolLM2-135M-Instruct. Profiled at {calibration.lengths} tokens, "
        f"compared at {calibration.compared}: perplexity of the dense model's answers {before:.3f} dense, {after:.3f} with the "
        f"plan. Found in {seconds:.0f} s by `python -m benchmarks.run --only sparse_quality --only-candidates '{MOA}'`.\n"
    )


def planned(model: Any, tokenizer: Any, sizes: Calibration) -> Plan:
    """A plan from the last of the prose, which no task reads."""
    text = tokenizer(prose(), return_tensors="pt", add_special_tokens=False).input_ids[0, -sizes.tokens :]
    batches = []
    for length in (*sizes.lengths, sizes.compared):
        for question in QUESTIONS if length != sizes.compared else QUESTIONS[-1:]:
            batches.append(answered(model, tokenizer, text[:length], question, sizes.answer))
            text = text[length:]
    made = [{**p, "step": sizes.step} for p in METHODS[MOA]]
    return accelpass.calibrate(model, batches, made, progress=False)


@torch.no_grad()
def answered(model: Any, tokenizer: Any, text: Tensor, question: str, answer: int) -> dict[str, Tensor]:
    """As many tokens as ``text`` has: its beginning, a question, and the dense model's answer, which alone has labels."""
    asked = tokenizer(question, return_tensors="pt", add_special_tokens=False).input_ids[0]
    prompt = torch.cat([text[: len(text) - len(asked) - answer], asked])[None]
    ids = model.generate(
        prompt, attention_mask=torch.ones_like(prompt), do_sample=False, min_new_tokens=answer, max_new_tokens=answer,
        pad_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    labels = ids.clone()
    labels[:, : prompt.shape[1]] = IGNORED
    return {"input_ids": ids, "labels": labels}
