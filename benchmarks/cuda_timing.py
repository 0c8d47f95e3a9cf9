"""How the CUDA scripts of this folder time: one CUDA graph for each candidate, medians, and a copy to compare with.

They run as scripts on a machine where accelpass is not installed, so this is imported by its bare name.
"""

from collections.abc import Callable

import torch
from torch import Tensor

Run = Callable[[], Tensor]


def captured(run: Run) -> Callable[[], None]:
    """`run` as one CUDA graph. Compilation and autotuning happen before, outside the capture."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run.kept = run()  # type: ignore[attr-defined]  # the graph writes into this tensor
    return graph.replay


def milliseconds(run: Callable[[], None], rep: int = 40) -> float:
    from triton.testing import do_bench

    return float(do_bench(run, warmup=10, rep=rep, return_mode="median"))


def copy_bandwidth() -> float:
    """GB/s, read plus written, of a 2 GiB copy on this device."""
    source = torch.empty(2**31, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.numel() / milliseconds(lambda: target.copy_(source), 200) / 1e6
