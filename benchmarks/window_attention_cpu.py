"""Time the CPU form of window attention against torch SDPA over all keys, in turns.

    python -m benchmarks.window_attention_cpu

The shape is that of a diffusion transformer's self-attention (DiT-XL: 16 heads of 72), the window a band of an eighth of
the tokens on either side, as DiTFastAttn sets it. Medians of turns, since other work on the machine comes and goes.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import torch
import torch.nn.functional as F

from accelpass.ir.attention import Band
from accelpass.ir.attention.lowering.block_sparse import BLOCK_SPARSE, band_blocks, cpu_rows
from accelpass.ir.attention.spec.selected import selected_pairs

TOKENS = (1024, 4096)
HEADS, WIDTH, THREADS = 16, 72, 2


def measure(tokens: int, reach: int, heads: int = HEADS, width: int = WIDTH, turns: int = 11) -> dict[str, Any]:
    """Milliseconds of both, their ratio, and the share of the query-key pairs that is in the band."""
    draw = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, heads, tokens, width, generator=draw) for _ in range(3))
    scale, size = width**-0.5, cpu_rows(reach)
    blocks, counts = band_blocks(tokens, tokens, reach, size, "cpu")

    def sdpa() -> torch.Tensor:
        return F.scaled_dot_product_attention(q, k, v, scale=scale)

    def window() -> torch.Tensor:
        out: torch.Tensor = BLOCK_SPARSE(q, k, v, blocks, counts, size, reach, False, scale)[0]
        return out

    near = (torch.arange(tokens)[:, None] - torch.arange(tokens)).abs() <= reach
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=near, scale=scale)
    error = float((window() - expected).abs().max())
    if error > 1e-4:
        raise AssertionError(f"the window's output is off by {error:.2g} at {tokens} tokens, reach {reach}")
    times: dict[str, list[float]] = {"sdpa": [], "window": []}
    for _ in range(turns):
        for name, run in (("sdpa", sdpa), ("window", window)):
            started = time.perf_counter()
            run()
            times[name].append(1e3 * (time.perf_counter() - started))
    sdpa_ms, window_ms = (statistics.median(times[name]) for name in ("sdpa", "window"))
    pairs = selected_pairs(Band(reach), 1, tokens, tokens)
    assert pairs is not None
    return {
        "tokens": tokens,
        "reach": reach,
        "heads": heads,
        "width": width,
        "sdpa_ms": round(sdpa_ms, 2),
        "window_ms": round(window_ms, 2),
        "of_sdpa": round(window_ms / sdpa_ms, 3),
        "density": round(pairs / tokens**2, 3),
    }


def main() -> list[dict[str, Any]]:
    """A row for each number of tokens, printed too."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--turns", type=int, default=11)
    options = parser.parse_args()
    torch.set_num_threads(THREADS)
    rows = []
    with torch.no_grad():
        for tokens in TOKENS:
            rows.append(measure(tokens, tokens // 8, turns=options.turns))
            print("  ".join(f"{name} {value}" for name, value in rows[-1].items()), flush=True)
    return rows


if __name__ == "__main__":
    main()
