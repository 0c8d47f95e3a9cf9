"""What eviction by a score costs in quality: methods, and what goes over any score, at a fifth and a tenth of the bytes.

The tasks are those of :mod:`benchmarks.kv_quality`, of which fewer are asked so that more methods can be compared: prose at 2k, and pass
keys in 1k tokens.
"""

from __future__ import annotations

from typing import Any

from benchmarks import kv_quality
from benchmarks.random_eviction import RandomEviction

SNAP: dict[str, Any] = {"window": 32, "kernel": 5}


def _at(budget: float) -> dict[str, list[Any]]:
    """Methods by name, each with so large a share of the prompt."""
    h2o: dict[str, Any] = {"name": "h2o", "budget": budget}
    made: dict[str, Any] = {
        "random": RandomEviction(budget=budget),
        "kv_window": {"name": "kv_window", "budget": budget},
        "h2o": h2o,
        "h2o, mean": {**h2o, "score": "mean"},
        "h2o, adaptive heads": {**h2o, "heads": "adaptive"},
        "h2o, pyramid": {**h2o, "pyramid": 20.0},
        "h2o, window of 32 pooled": {**h2o, **SNAP},
        "h2o, window of 32 pooled, adaptive heads": {**h2o, **SNAP, "heads": "adaptive"},
        "a2sf": {"name": "a2sf", "budget": budget},
        "a2sf, 0.95": {"name": "a2sf", "budget": budget, "factor": 0.95},
        "a2sf, 0.95, pooled": {"name": "a2sf", "budget": budget, "factor": 0.95, "kernel": 5},
        "keyformer": {"name": "keyformer", "budget": budget, "answer": 512},
        "compresskv, calibrated": {"name": "compresskv", "tokens": None, "budget": budget},
        "compresskv, even layers, calibrated": {
            "name": "compresskv",
            "tokens": None,
            "budget": budget,
            "layers": "even",
        },
        "zipvl, others dropped": {"name": "zipvl", "most": budget, "newest": 32, "rest": "dropped"},
    }
    return {f"{name}, {budget:.0%}".replace("%", " %"): [one] for name, one in made.items()}


KEEPING: dict[str, list[Any]] = {
    name: kv_quality.METHODS[name]
    for name in ("h2o, 60 %, mean, 4 bits", "kv_quant, 4 bits", "kv_quant, 4 bits, keys by channel")
} | {
    "zipvl, others in 2 bits": [{"name": "zipvl"}],
    "zipvl, others in 4 bits": [{"name": "zipvl", "bits": 4}],
    "tokenselect, 256 rows": [{"name": "tokenselect", "budget": 256}],
    "tokenselect, 64 rows": [{"name": "tokenselect", "budget": 64}],
    "vidkv, keys 1.5 and values 1.58 bits": [{"name": "vidkv"}],
    "vidkv, keys 1.5 and values 2 bits": [{"name": "vidkv", "value_bits": 2.0}],
    "vidkv, keys and values 2 bits": [{"name": "vidkv", "bits": 2.0, "value_bits": 2.0}],
}
"""Methods that keep something of every token, or of more tokens: in few bits, or to be chosen from."""
METHODS: dict[str, list[Any]] = {"dense": [], **_at(0.2), **_at(0.1), **KEEPING}
