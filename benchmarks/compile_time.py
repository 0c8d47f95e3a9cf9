"""How long a first call takes, against Inductor alone, on SmolLM2 with fewer layers; every cache is off."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.decode import own_call

LAYERS, ROUNDS = 4, 3
CANDIDATES: dict[str, dict[str, Any]] = {
    "inductor": {},
    "accelpass, no options": {"backend": "accelpass"},
    "accelpass int8_weights": {"backend": "accelpass", "options": {"passes": ["int8_weights"]}},
}


def measure(model: Any, say: Callable[[str], None]) -> list[dict[str, Any]]:
    """Seconds of the first call for one token; the candidates take turns, after one turn that is not counted."""
    small = copy.deepcopy(model)
    small.model.layers = small.model.layers[:LAYERS]
    small.config.num_hidden_layers = LAYERS
    ids = torch.zeros(1, 1, dtype=torch.long)
    seconds: dict[str, list[float]] = {name: [] for name in CANDIDATES}
    with torch._inductor.config.patch(force_disable_caches=True):
        for turn in range(ROUNDS + 1):
            for name, how in CANDIDATES.items():
                torch._dynamo.reset()
                say(f"compiling {name}, round {turn} of {ROUNDS}")
                start = time.perf_counter()
                torch.compile(own_call(), dynamic=False, **how)(small, ids, None)
                if turn:
                    seconds[name].append(time.perf_counter() - start)
    base = statistics.median(seconds["inductor"])
    return [
        {
            "name": name,
            "first_call_seconds": round(statistics.median(times), 1),
            "against_inductor": round(statistics.median(times) / base, 2),
        }
        for name, times in seconds.items()
    ]
