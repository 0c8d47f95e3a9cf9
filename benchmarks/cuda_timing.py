"""How the CUDA scripts of this folder time: one CUDA graph for each candidate, medians, and a copy to compare with.

They run as scripts on a machine where accelpass is not installed, so this is imported by its bare name.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

Run = Callable[[], Tensor]


def machine(script: str) -> dict[str, Any] | None:
    """What a report says of the machine; None, and a line on stdout, where there is no GPU. Sets what all scripts want."""
    name = Path(script).stem
    if not torch.cuda.is_available():
        print(f"{name}: this needs an NVIDIA GPU, and torch sees none (torch.cuda.is_available() is False)")
        return None
    import triton

    torch.manual_seed(0)
    torch.backends.cuda.matmul.allow_tf32 = False  # the references are float32
    torch.set_grad_enabled(False)
    return {
        "device": torch.cuda.get_device_name(),
        "capability": torch.cuda.get_device_capability(),
        "memory_gib": torch.cuda.get_device_properties(0).total_memory / 2**30,
        "torch": torch.__version__,
        "triton": triton.__version__,
        "cuda": torch.version.cuda,
    }


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
