"""How long a first call takes, against Inductor alone, on the whole of SmolLM2; every cache is off."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from accelpass.api.generation import new_cache
from benchmarks.decode import own_call

ROUNDS, WARM_UP_LAYERS = 2, 2
CANDIDATES: dict[str, dict[str, Any]] = {
    "inductor": {},
    "accelpass, no options": {"backend": "accelpass"},
    "accelpass int8_weights": {"backend": "accelpass", "options": {"passes": ["int8_weights"]}},
    "accelpass int4_weights": {"backend": "accelpass", "options": {"passes": ["int4_weights"]}},
}


def measure(model: Any, say: Callable[[str], None]) -> list[dict[str, Any]]:
    """Seconds of the first call for one token; the candidates take turns.

    A first turn on two layers is not counted: it pays for what a process, or a machine, pays once.
    """
    small = copy.deepcopy(model)
    small.model.layers = small.model.layers[:WARM_UP_LAYERS]
    small.config.num_hidden_layers = WARM_UP_LAYERS
    ids = torch.zeros(1, 1, dtype=torch.long)
    seconds: dict[str, list[float]] = {name: [] for name in CANDIDATES}
    with torch._inductor.config.patch(force_disable_caches=True):
        for turn in range(ROUNDS + 1):
            for name, how in CANDIDATES.items():
                torch._dynamo.reset()
                say(f"compiling {name}, round {turn} of {ROUNDS}")
                own = model if turn else small
                cache = new_cache(own, 64)
                start = time.perf_counter()
                torch.compile(own_call(), dynamic=False, **how)(own, ids, cache)
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
