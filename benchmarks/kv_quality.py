"""What KV-cache passes cost in quality: SmolLM2's perplexity on prose it goes on with, and pass keys it finds.

The prompt is read by the compiled model, which fills the cache as its passes say; everything after it comes token by token
through the decode graph. Each method is compiled alone; one cache size serves all lengths, so there are few graphs.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor

import accelpass
from accelpass import KVCache
from accelpass.models_zoo.smollm2 import converted
from benchmarks.kv_tasks import Row, Sizes, Tasks
from benchmarks.random_eviction import RandomEviction

EXACT = ("horizontal_fusion", "cpu_gemv", "grouped_query", "cpu_decode_attention")
FITTED: dict[str, Any] = {"name": "cskv", "first_token": 1000.0}
"""CSKV, its factors fitted to prose that comes after what the tasks use."""
CALIBRATION, CALIBRATION_TOKENS = 48, 1024
NEEDLES = (4096, 4)
"""Length of the texts with a pass key that TidalDecode's layers are found on, and how many."""
NEEDLES_SHORT = (1024, 16)
"""The same of CompressKV's heads: more of them, which the model finds."""
TIDAL: dict[str, Any] = {"name": "tidaldecode", "budget": 256}
METHODS: dict[str, list[Any]] = {
    "dense": [],
    "random, 20 %": [RandomEviction(budget=0.2)],
    "random, 20 %, newest too": [RandomEviction(budget=0.2, recent=0.0)],
    "kv_window, 20 %": [{"name": "kv_window", "budget": 0.2}],
    "kv_window, 5 %": [{"name": "kv_window", "budget": 0.05}],
    "h2o, 20 %": [{"name": "h2o", "budget": 0.2}],
    "h2o, 20 %, mean": [{"name": "h2o", "budget": 0.2, "score": "mean"}],
    "h2o, 20 %, 4 bits": [{"name": "h2o", "budget": 0.2}, {"name": "kv_quant", "bits": 4}],
    "mikv, 20 %, rest 4 bits": [{"name": "mikv", "budget": 0.2, "bits": 4}],
    "mikv, 20 %, rest 2 bits": [{"name": "mikv", "budget": 0.2, "bits": 2}],
    "kv_quant, 4 bits": [{"name": "kv_quant", "bits": 4}],
    "kv_quant, 4 bits, keys by channel": [{"name": "kv_quant", "bits": 4, "per_channel_keys": True}],
    "h2o, 60 %, mean, 4 bits": [{"name": "h2o", "budget": 0.6, "score": "mean"}, {"name": "kv_quant", "bits": 4}],
    "kv_quant, 2 bits": [{"name": "kv_quant", "bits": 2}],
    "cskv, 20 % of channels": ["cskv"],
    "cskv, 20 %, calibrated": [{**FITTED, "first_token": 1.0}],
    "cskv, 20 %, calibrated, first token": [FITTED],
    "cskv, 20 %, calibrated, first token, 4 bits": [{**FITTED, "bits": 4}],
    "cskv, 80 %, calibrated, 4 bits": [{"name": "cskv", "keep_k": 0.8, "keep_v": 0.8, "bits": 4}],
    "tidaldecode, 256 rows": [TIDAL],
    "tidaldecode, 256 rows, calibrated": [TIDAL],
    "tidaldecode, 256 rows, two chosen anew, calibrated": [{**TIDAL, "reselect": (12, 18)}],
    "tidaldecode, 256 rows, three chosen anew, calibrated": [{**TIDAL, "reselect": (7, 12, 18)}],
    "tidaldecode, 256 rows, three chosen anew, calibrated on prose too": [{**TIDAL, "reselect": (7, 12, 18)}],
    "tidaldecode, 64 rows, calibrated": [{**TIDAL, "budget": 64}],
}


class Compiled:
    """A :class:`~benchmarks.kv_tasks.Reader`: the model compiled with passes, and an accelpass.KVCache."""

    def __init__(self, model: torch.nn.Module, passes: list[Any], capacity: int, plan: Any = None) -> None:
        options = {"passes": [*EXACT, *([] if plan else passes)], "plan": plan}
        self.fast = torch.compile(model, backend="accelpass", options=options)
        self.cache = KVCache(model, capacity)

    def prompt(self, ids: Tensor) -> Tensor:
        self.cache.reset()
        # Said before the first prompt, so that one graph serves all lengths from the start.
        torch._dynamo.maybe_mark_dynamic(ids, 1)
        return self._logits(ids)

    def step(self, token: int) -> Tensor:
        return self._logits(torch.tensor([[token]]))

    def _logits(self, ids: Tensor) -> Tensor:
        out = self.fast(input_ids=ids, past_key_values=self.cache, use_cache=True, logits_to_keep=1)
        return out.logits[0, -1]


def measure(
    model: torch.nn.Module,
    tokenizer: Any,
    names: list[str],
    sizes: Sizes,
    say: Callable[[str], None],
    methods: Mapping[str, list[Any]] | None = None,
) -> list[Row]:
    """One row for each method that is named, of :data:`METHODS` unless others are given."""
    methods = METHODS if methods is None else methods
    tasks = Tasks(tokenizer, sizes)
    rows = []
    with progress() as bar:
        for name in names:
            # Each method gets graphs of its own; Dynamo would count them together and stop after eight.
            torch._dynamo.reset()
            plan = calibrated(model, tasks, name, methods[name]) if "calibrated" in name else None
            torch._dynamo.reset()
            reader = Compiled(model, methods[name], sizes.capacity, plan)
            task = bar.add_task(name, total=sizes.units, doing="compiling")
            asked = tasks.ask(reader, lambda doing, task=task: bar.update(task, advance=1, doing=doing))
            rows.append({"name": name, **asked, **_bytes(model, reader.cache.nbytes(), sizes.capacity)})
            bar.update(task, doing="")
            say(json.dumps(rows[-1]))
    return rows


def calibrated(model: torch.nn.Module, tasks: Tasks, name: str, passes: list[Any]) -> Any:
    """A plan from the last of the prose, which no task reads; TidalDecode's and CompressKV's from pass keys in it, as in their papers."""
    if passes[0]["name"] == "compresskv":
        return accelpass.calibrate(model, tasks.needles(*NEEDLES_SHORT, question=False), passes, progress=False)
    if passes[0]["name"] == "tidaldecode":
        texts = tasks.needles(*NEEDLES) + (tasks.endings(*NEEDLES) if "prose" in name else [])
        return accelpass.calibrate(model, texts, passes, progress=False)
    ids = tasks.text[-CALIBRATION * CALIBRATION_TOKENS :]
    return accelpass.calibrate(model, list(ids.view(-1, 1, CALIBRATION_TOKENS)), passes, progress=False)


def measure_peer(model: torch.nn.Module, python: str, sizes: str, names: list[str]) -> list[Row]:
    """The named rows of :mod:`benchmarks.kv_peer`, which runs with another Python: one that has kvpress.

    Args:
        sizes: a name of :data:`~benchmarks.kv_tasks.SIZES`.

    Raises:
        subprocess.CalledProcessError: it failed; its own words are on the terminal.
    """
    with tempfile.TemporaryDirectory() as made:
        out = Path(made) / "rows.json"
        # Not ours: what is on this Python's path would be found before the libraries of the other.
        environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
        command = [python, "-m", "benchmarks.kv_peer", str(converted()), str(out), "--sizes", sizes]
        command += ["--threads", str(torch.get_num_threads()), "--only", *names]
        subprocess.run(command, check=True, cwd=Path(__file__).parents[1], env=environment, stdout=sys.stderr)
        rows = json.loads(out.read_text())
    return [row | _bytes(model, row["cache_bytes"], row.pop("cache_tokens")) for row in rows]


def progress() -> Progress:
    """A bar for each method, on standard error; a file gets the rows alone."""
    return Progress(
        TextColumn("{task.description:26s}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
        TimeRemainingColumn(), TextColumn("{task.fields[doing]}"), console=Console(stderr=True),
    )  # fmt: skip


def dense_bytes(model: Any, tokens: int) -> int:
    """Bytes of the keys and values of so many tokens, in the model's own format."""
    config = model.config.get_text_config(decoder=True)
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return 2 * config.num_hidden_layers * config.num_key_value_heads * width * tokens * model.dtype.itemsize


def _bytes(model: torch.nn.Module, held: int, tokens: int) -> Row:
    return {"cache_bytes": held, "share_of_dense": round(held / dense_bytes(model, tokens), 3)}
