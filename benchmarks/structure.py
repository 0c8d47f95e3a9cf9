"""Heads and experts computed otherwise: peak memory of a lexicon head, and the time of a mixture of experts against its loop.

    python -m benchmarks.structure --part lexicon --out lexicon_head_memory.json   # half a minute
    python -m benchmarks.structure --part experts --out experts_cpu.json           # on a quiet machine: times, in turns

The lexicon head is LexLIP's: 64 texts of 40 tokens, 30,522 words, width 768. Each case runs in a process of its own; memory is the
highest resident size during a call, less what the process held before it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

BATCH, TOKENS, WORDS, WIDTH = 64, 40, 30522, 768
HEADS = ("eager", "inductor", "lexicon_head")
Row = dict[str, Any]


class Head(nn.Module):
    """Weights over a vocabulary, as LexLIP has them."""

    def __init__(self, words: int, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, words)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return torch.log1p(torch.relu(self.linear(x) + (1 - mask[..., None]) * -1e6).amax(1))


def compiled(model: nn.Module, case: str) -> Callable[..., Tensor]:
    match case:
        case "eager":
            return model
        case "inductor":
            return torch.compile(model)
    return torch.compile(model, backend="accelpass", options={"passes": [case]})


@torch.no_grad()
def head_memory(case: str, sizes: tuple[int, int, int, int]) -> Row:
    """What one call of a head needs beside its weights and inputs."""
    batch, tokens, words, width = sizes
    torch.manual_seed(0)
    model = Head(words, width).eval()
    x, mask = torch.randn(batch, tokens, width), (torch.arange(tokens) < tokens - 3).float().expand(batch, -1)
    run = compiled(model, case)
    run(x, mask)  # compiles, and touches what libraries keep
    Path("/proc/self/clear_refs").write_text("5")  # the highest resident size counts from here
    before = resident("VmRSS")
    made = run(x, mask)
    return {
        "case": case,
        "MB": (resident("VmHWM") - before) / 1e6,
        "sum": float(made.sum()),
        "result_MB": made.nbytes / 1e6,
    }


def resident(which: str) -> int:
    """Bytes of this process: VmRSS now, VmHWM at most."""
    (line,) = (one for one in Path("/proc/self/status").read_text().splitlines() if one.startswith(which))
    return int(line.split()[1]) * 1024


def lexicon(sizes: tuple[int, int, int, int]) -> list[Row]:
    """All cases, with the share of eager's memory."""
    rows: list[Row] = []
    for case in HEADS:
        command = [sys.executable, "-m", "benchmarks.structure", "--head", case, "--sizes", *map(str, sizes)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        rows.append(json.loads(done.stdout.splitlines()[-1]))
    for row in rows:
        row["of_eager"] = row["MB"] / rows[0]["MB"]
    return rows


FORMS = {"loop": ("eager", None), "grouped_mm": ("grouped_mm", None), "tutel_moe": ("batched_mm", "tutel_moe")}
"""How transformers writes its experts, and the pass that rewrites them."""


@torch.no_grad()
def experts(hidden: int, width: int, batch: int, tokens: int, turns: int) -> list[Row]:
    """Seconds of a call of a Mixtral of 2 layers of 8 experts, two for each token: its own loop and its grouped products under Inductor, and the pass."""
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(
        vocab_size=256, hidden_size=width, intermediate_size=hidden, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4, num_local_experts=8, num_experts_per_tok=2, sliding_window=None,
    )  # fmt: skip
    torch.manual_seed(0)
    first = MixtralForCausalLM(config).eval()
    ids = torch.randint(0, 256, (batch, tokens), generator=torch.Generator().manual_seed(1))
    runs: dict[str, Callable[[], Any]] = {}
    for name, (form, rewriting) in FORMS.items():
        model = MixtralForCausalLM(config).eval()
        model.load_state_dict(first.state_dict())
        model.set_experts_implementation(form)
        torch._dynamo.reset()
        fast = (
            torch.compile(model)
            if rewriting is None
            else torch.compile(model, backend="accelpass", options={"passes": [rewriting]})
        )
        runs[name] = lambda fast=fast: fast(ids, use_cache=False).logits
    found = {name: run() for name, run in runs.items()}
    seconds = in_turns(runs, turns)
    return [
        {
            "form": name,
            "ms": 1e3 * statistics.median(seconds[name]),
            "of_loop": statistics.median(a / b for a, b in zip(seconds[name], seconds["loop"], strict=True)),
            "difference": float((found[name] - found["loop"]).abs().max() / found["loop"].abs().max()),
        }
        for name in runs
    ]


@torch.no_grad()
def in_turns(runs: dict[str, Callable[[], Any]], turns: int) -> dict[str, list[float]]:
    """Seconds of each run, measured one after the other so many times: what slows the machine slows all."""
    for run in runs.values():
        run()
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(turns):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=("lexicon", "experts"), default="lexicon")
    parser.add_argument("--head", choices=HEADS, help="measure one head in this process and print it")
    parser.add_argument(
        "--sizes",
        type=int,
        nargs=4,
        default=(BATCH, TOKENS, WORDS, WIDTH),
        metavar="N",
        help="batch, tokens, words, width",
    )
    parser.add_argument("--turns", type=int, default=15)
    parser.add_argument("--out", type=Path, help="JSON in benchmarks/results")
    given = parser.parse_args()
    if given.head:
        print(json.dumps(head_memory(given.head, tuple(given.sizes))))
        return
    if given.part == "lexicon":
        rows, sizes = lexicon(tuple(given.sizes)), {"batch, tokens, words, width": list(given.sizes)}
    else:
        rows, sizes = experts(768, 256, 8, 128, given.turns), {"hidden, width, batch, tokens": [768, 256, 8, 128]}
    for row in rows:
        print(json.dumps(row))
    if given.out:
        made = {"torch": torch.__version__, "sizes": sizes, "rows": rows}
        (Path(__file__).parent / "results" / given.out.name).write_text(json.dumps(made, indent=1) + "\n")


if __name__ == "__main__":
    main()
