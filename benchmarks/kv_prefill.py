"""What collecting scores adds to a prompt: SmolLM2-135M with int8 weights, a dense KVCache against one with h2o."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.kv_decode import DENSE, Session
from benchmarks.kv_tasks import Row, prose

CONTEXTS, ROUNDS = (1024, 2048, 4096), 3
CANDIDATES = (DENSE, "+ h2o, 20 %")


def measure(model: torch.nn.Module, tokenizer: Any, say: Callable[[str], None]) -> list[Row]:
    """Rows for each context; the two take turns after a first prompt each, which compiles."""
    rows: list[Row] = []
    for context in CONTEXTS:
        torch._dynamo.reset()
        ids = tokenizer(prose(), return_tensors="pt").input_ids[:, : context - 64]
        sessions = [Session(name, model, context) for name in CANDIDATES]
        for session in sessions:
            session.read(ids)
            say(f"{context}: {session.name} compiled")
        seconds = [[session.read(ids) for session in sessions] for _ in range(ROUNDS)]
        dense, scored = (statistics.median(column) for column in zip(*seconds, strict=True))
        for name, median in zip(CANDIDATES, (dense, scored), strict=True):
            rows.append(
                {
                    "tokens": ids.shape[1],
                    "name": name,
                    "prompt_ms": round(median * 1e3),
                    "more_than_dense": f"{median / dense - 1:+.1%}",
                }
            )
    return rows
