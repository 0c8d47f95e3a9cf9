"""Which passes no file can hold for a call; said before the model is looked at."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from accelpass.backends.export.errors import ExportError
from accelpass.passes.core.base import Pass
from accelpass.passes.kv_cache.base import KVPass


def refuse_left_out(passes: Sequence[Pass], cache: Any) -> None:
    """Raise :class:`ExportError` for a pass that rewrites a key/value cache, if there is none among the arguments, and with one
    for a pass whose later steps read numbers back on the host."""
    for p in passes:
        if p.reads_back and cache is not None:
            raise ExportError(
                f"{p.name} reads back at each step after the prompt how much there is to compute, and a file runs without a host. "
                f"Export the prompt alone, without past_key_values, or leave {p.name} out"
            )
        if isinstance(p, KVPass) and cache is None:
            raise ExportError(
                f"{p.name} changes how a key/value cache is kept, and the model is called without one. Give the state: "
                "kwargs={'past_key_values': accelpass.KVCache(model, capacity=...)}, or leave the pass out"
            )
