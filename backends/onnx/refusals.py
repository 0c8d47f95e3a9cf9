"""Which passes cannot be written as ONNX, or not without what they need; each said before the model is looked at."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from accelpass.backends.onnx.errors import ExportError
from accelpass.passes.core.base import Pass
from accelpass.passes.kv_cache.base import KVPass
from accelpass.passes.token_pruning.base import TokenPruning


def refuse_unexportable(passes: Sequence[Pass]) -> None:
    """Raise :class:`ExportError` for a pass whose work is not in one graph."""
    for p in passes:
        if isinstance(p, TokenPruning):
            raise ExportError(
                f"{p.name} reads a prompt with graphs that hand the chosen tokens on, and remembers which those were; one ONNX "
                f"file holds one graph without that state. Export without {p.name}; a prompt gets cheaper by sink_window, too"
            )


def refuse_left_out(passes: Sequence[Pass], cache: Any) -> None:
    """Raise :class:`ExportError` for a pass that rewrites a key/value cache, if there is none among the arguments."""
    for p in passes:
        if isinstance(p, KVPass) and cache is None:
            raise ExportError(
                f"{p.name} changes how a key/value cache is kept, and the model is called without one. Give the state: "
                "kwargs={'past_key_values': accelpass.KVCache(model, capacity=...)}, or leave the pass out"
            )
