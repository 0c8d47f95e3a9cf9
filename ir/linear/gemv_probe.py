"""How fast this machine multiplies a matrix by one row, and how fast it streams the same bytes."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import cache

import torch
import torch.nn.functional as F

from accelpass.ir.torch_private import tracing


@cache
def blas_and_stream_seconds(out_features: int, in_features: int) -> tuple[float, float]:
    """Shortest seconds of a float32 batch-1 linear, and of a row sum over the same matrix.

    The row sum reads each weight once and is vectorised, as the compiled product and row sum would be; it stands in for
    that kernel so that nothing needs to be compiled to decide. Takes about 20 ms a size; kept for the process.
    """
    with tracing(None), torch.no_grad():
        size = out_features * in_features * 4
        # Several copies, taken in turn: a model's weight is not in the cache when its layer runs.
        copies = [torch.ones(out_features, in_features) for _ in range(max(1, min(12, 64_000_000 // size)))]
        x = torch.ones(1, in_features)
        ones = torch.empty(out_features)
        blas, stream = quickest(
            lambda i: F.linear(x, copies[i % len(copies)]), lambda i: torch.sum(copies[i % len(copies)], -1, out=ones)
        )
    return blas, stream


def quickest(*ways: Callable[[int], object]) -> tuple[float, ...]:
    """The shortest of several runs of each: whatever else the machine does only adds. They take turns, so that it adds to all."""
    times: list[list[float]] = [[] for _ in ways]
    for i in range(18):
        for way, taken in zip(ways, times, strict=True):
            start = time.perf_counter()
            way(i)
            taken.append(time.perf_counter() - start)
    return tuple(min(taken[3:]) for taken in times)
