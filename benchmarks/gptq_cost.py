"""What gptq on SmolLM2 takes: minutes and peak memory, beside algorithm 1 of the paper written down as it stands.

    python -m benchmarks.gptq_cost --samples 128 --tokens 512      # each in a process of its own; an hour or so

Both round the same linears to int4 in symmetric groups of 64, block by block, with the same data, damping and batches of 128 columns;
both are scored by perplexity, with products in floats. ``core_minutes`` are those that the process computed, other work on the machine
left out. ``growth`` is the peak of the process less what it held with model and data.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import accelpass
from accelpass.models_zoo import smollm2
from benchmarks.machine import cpu
from benchmarks.quality import perplexity, prose

RESULTS = Path(__file__).parent / "results" / "smollm2_gptq_cost_cpu.json"
GROUP, COLUMNS, DAMPING = 64, 128, 0.01
KEPT = ["lm_head", "embed_tokens"]


def plain(model: Any, data: list[Tensor]) -> Any:
    """The model with its linears rounded: Frantar et al. 2023, arXiv 2210.17323, algorithm 1, one block after another."""
    states: list[tuple[Tensor, dict[str, Any]]] = []

    class Stop(Exception):
        pass

    def hold(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        states.append((args[0], kwargs))
        raise Stop

    hook = model.model.layers[0].register_forward_pre_hook(hold, with_kwargs=True)
    for ids in data:
        try:
            model(ids, use_cache=False)
        except Stop:
            continue
    hook.remove()
    for block in model.model.layers:
        sites = {m: torch.zeros(m.in_features, m.in_features) for m in block.modules() if isinstance(m, nn.Linear)}

        def watch(module: nn.Module, args: Any, sites: dict[nn.Module, Tensor] = sites) -> None:
            flat = args[0].flatten(0, -2).float()
            sites[module] += flat.t() @ flat

        hooks = [m.register_forward_pre_hook(watch) for m in sites]
        for x, kwargs in states:
            block(x, **kwargs)
        for one in hooks:
            one.remove()
        for module, hessian in sites.items():
            module.weight.data = rounded(module.weight.data, hessian)
        states = [(_first(block(x, **kwargs)), kwargs) for x, kwargs in states]
    return model


def rounded(weight: Tensor, hessian: Tensor) -> Tensor:
    """A weight's numbers after each column was rounded and the columns after it have made up for the error."""
    w, made = weight.clone(), torch.zeros_like(weight)
    hessian.diagonal()[hessian.diagonal() == 0] = 1
    hessian.diagonal().add_(DAMPING * hessian.diagonal().mean())
    inverse = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(hessian)), upper=True)
    for start in range(0, w.shape[1], COLUMNS):
        end = min(start + COLUMNS, w.shape[1])
        errors = torch.zeros_like(w[:, start:end])
        for column in range(start, end):
            if column % GROUP == 0:
                part = w[:, column : column + GROUP]
                scale = part.gather(1, part.abs().argmax(1, True))[:, 0] / -8
                scale = torch.where(scale == 0, 1.0, scale)
            made[:, column] = (w[:, column] / scale).round().clamp(-8, 7) * scale
            errors[:, column - start] = (w[:, column] - made[:, column]) / inverse[column, column]
            w[:, column:end] -= errors[:, column - start, None] * inverse[column, column:end]
        w[:, end:] -= errors @ inverse[start:end, end:]
    return made


def _first(out: Any) -> Tensor:
    return out[0] if isinstance(out, tuple) else out


def ours(model: Any, data: list[Tensor]) -> Any:
    """The model compiled with what ``accelpass.calibrate`` found."""
    given = {"name": "gptq", "group_size": GROUP, "damping": DAMPING, "exclude": KEPT}
    plan = accelpass.calibrate(model, data, [given], progress=False)
    return torch.compile(model, backend="accelpass", options={"plan": plan, "lowering": "aten"})


WAYS: dict[str, Callable[[Any, list[Tensor]], Any]] = {"accelpass": ours, "algorithm 1 as it stands": plain}


@torch.no_grad()
def measure(way: str, samples: int, tokens: int) -> dict[str, Any]:
    """One way, in this process."""
    model, tokenizer = smollm2.load(torch.float32)
    seen = prose(tokenizer, 10**9)[:, 8192 : 8192 + samples * tokens]
    data = [part for part in seen.split(tokens, 1) if part.shape[1] == tokens]
    model(data[0][:, :64], use_cache=False)
    before, start, busy = _peak(), time.monotonic(), time.process_time()
    made = WAYS[way](model, data)
    minutes, after = (time.monotonic() - start) / 60, _peak()
    busy = (time.process_time() - busy) / 60
    score = perplexity(lambda window: made(window, use_cache=False).logits, prose(tokenizer, 4096))
    found = {
        "minutes": minutes,
        "core_minutes": busy,
        "peak_gib": after,
        "growth_gib": after - before,
        "perplexity": score,
    }
    return {"samples": len(data), **found}


def _peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=512, help="of each sample")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--way", choices=list(WAYS), help="this one alone, in this process; prints JSON")
    given = parser.parse_args(arguments)
    torch.set_num_threads(given.threads)
    if given.way:
        print(json.dumps(measure(given.way, given.samples, given.tokens)))
        return 0
    found: dict[str, Any] = {}
    for way in WAYS:
        sizes = ["--samples", str(given.samples), "--tokens", str(given.tokens), "--threads", str(given.threads)]
        call = [sys.executable, "-m", "benchmarks.gptq_cost", "--way", way, *sizes]
        done = subprocess.run(call, check=True, stdout=subprocess.PIPE, text=True)
        found[way] = json.loads(done.stdout.splitlines()[-1])
        print(way, json.dumps(found[way]), file=sys.stderr, flush=True)
    machine = {"cpu": cpu(), "torch": torch.__version__, "threads": given.threads}
    RESULTS.write_text(json.dumps({**machine, "tokens": given.tokens, "rows": found}, indent=1) + "\n")
    table = Table("", "minutes", "of a core", "peak, GiB", "more than before, GiB", "perplexity")
    for way, row in found.items():
        table.add_row(
            way, *(f"{row[k]:.2f}" for k in ("minutes", "core_minutes", "peak_gib", "growth_gib", "perplexity"))
        )
    Console().print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
