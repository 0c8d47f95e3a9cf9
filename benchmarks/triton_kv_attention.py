"""Time Triton decode attention over float, packed and gathered keys and values on an NVIDIA GPU, against torch SDPA.

    PYTHONPATH=<layout> python benchmarks/triton_kv_attention.py --out triton_kv_attention.json

Needs torch >= 2.11, Triton >= 3.6 and accelpass. Every format is first held to the float32 reference at a small size,
and is not timed if it is wrong. A candidate is captured in a CUDA graph, so that its time is the GPU's and not
Python's; `do_bench` clears the L2 cache before each replay. Candidates take turns, and the figure is the median of the
turns' medians. A candidate that does not fit in memory is left out by name; each is built, timed and freed alone, since
a float cache of 16 long contexts fills most of a GPU.

Units: milliseconds; GB/s = 1e9 bytes per second, of the bytes that the attention has to read (the keys and values of
the rows that are read, their steps and lows, the list of rows); copy bandwidth counts bytes read plus bytes written.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from cuda_timing import Run, captured, copy_bandwidth, machine, milliseconds  # the scripts' own folder is on their path
from torch import Tensor

CONTEXTS = (32768, 131072)
BATCHES = (1, 16)
KV_HEADS, HEADS, WIDTH, GROUP = 8, 32, 128, 32
GATHERED = 4096
SMALL = 2048  # context of the check against the reference
BASE = "bf16 SDPA"


@dataclass
class Candidate:
    """One way to attend. bits: of a code, 0 for bf16. rows: how many of the rows are read, None for all."""

    name: str
    bits: int = 0
    rows: int | None = None
    sdpa: bool = False

    def row_bytes(self) -> int:
        """Of one key and one value."""
        if not self.bits:
            return 2 * 2 * WIDTH
        return 2 * (WIDTH * self.bits // 8 + 2 * 2 * WIDTH // GROUP)

    def read_bytes(self, batch: int, context: int) -> int:
        read = context if self.rows is None else min(self.rows, context)
        listed = 0 if self.rows is None else 4
        return batch * KV_HEADS * read * (self.row_bytes() + listed)

    def stored_bytes(self, batch: int, context: int) -> int:
        return batch * KV_HEADS * context * self.row_bytes()


CANDIDATES = (
    Candidate(BASE, sdpa=True),
    Candidate("bf16 Triton"),
    Candidate("8-bit Triton", 8),
    Candidate("4-bit Triton", 4),
    Candidate("3-bit Triton", 3),
    Candidate("2-bit Triton", 2),
    Candidate(f"bf16 Triton, {GATHERED} rows", 0, GATHERED),
    Candidate(f"4-bit Triton, {GATHERED} rows", 4, GATHERED),
)


def store(batch: int, context: int, bits: int) -> Any:
    """Random keys or values. Packed ones are filled as such: no float copy of a long context is ever made."""
    from accelpass.ir.kv.decode.attention import PackedRows
    from accelpass.ir.kv.rows import row_bytes

    lead = (batch, KV_HEADS, context)
    if not bits:
        return torch.randn(*lead, WIDTH, device="cuda", dtype=torch.bfloat16)
    codes = torch.randint(0, 256, (*lead, row_bytes(WIDTH, bits)), device="cuda", dtype=torch.uint8)
    step = torch.rand(*lead, WIDTH // GROUP, device="cuda", dtype=torch.float16).mul_(0.2).add_(0.9).mul_(4 / 2**bits)
    return PackedRows(codes, step, -step * (2 ** (bits - 1)), bits)


def built(candidate: Candidate, batch: int, context: int) -> tuple[Run, Callable[[], Tensor]]:
    """A candidate on random stores, and the float32 reference over the same."""
    from accelpass.backends.kernels.triton.kv_attention_ops import kv_decode
    from accelpass.ir.kv.decode.reference import decode_reference

    q = torch.randn(batch, HEADS, WIDTH, device="cuda", dtype=torch.bfloat16)
    k, v = (store(batch, context, candidate.bits) for _ in range(2))
    rows = None
    if candidate.rows is not None:
        scores = torch.rand(batch, KV_HEADS, context, device="cuda")
        rows = scores.topk(min(candidate.rows, context), sorted=False).indices.sort(-1).values.int()
    scale = WIDTH**-0.5

    def sdpa() -> Tensor:
        return F.scaled_dot_product_attention(q.unsqueeze(2), k, v, scale=scale, enable_gqa=True).squeeze(2)

    def triton_decode() -> Tensor:
        return kv_decode(q, k, v, scale=scale, rows=rows).out

    def reference() -> Tensor:
        return decode_reference(q, k, v, scale=scale, rows=rows, dtype=torch.float32).out

    return (sdpa if candidate.sdpa else triton_decode), reference


def error_of(y: Tensor, expected: Tensor) -> float:
    """Root mean square of the error over that of the result. bf16 rounds at 2**-9, and the probabilities and the output
    are rounded to it; a wrong plane, step or mask costs tens of per cent."""
    return float((y.float() - expected).square().mean().sqrt() / expected.square().mean().sqrt())


def checked() -> dict[str, float | str]:
    """Relative error of every candidate at a small size, or why it has none."""
    errors: dict[str, float | str] = {}
    for candidate in CANDIDATES:
        try:
            run, reference = built(candidate, 2, SMALL)
            errors[candidate.name] = error_of(run(), reference())
        except Exception as error:  # one candidate that does not run must not cost the others' figures
            errors[candidate.name] = f"{type(error).__name__}: {error}"
    return errors


def best_config() -> str:
    """What autotuning last chose."""
    from accelpass.backends.kernels.triton.kv_attention import kv_split

    return str(getattr(kv_split, "best_config", None))


def measure(batch: int, context: int, turns: int, copy: float, errors: dict[str, float | str]) -> dict[str, Any]:
    results: dict[str, Any] = {}
    notes: dict[str, str] = {}
    times: dict[str, list[float]] = {}
    config: dict[str, str] = {}
    for turn in range(turns):
        for candidate in CANDIDATES:
            name, error = candidate.name, errors[candidate.name]
            if name in notes:
                continue
            if isinstance(error, str) or error > 0.02:
                notes[name] = f"not timed: {error}" if isinstance(error, str) else f"WRONG: relative error {error:.3g}"
                continue
            torch.cuda.empty_cache()
            # Stores are made in their own dtype. Beside them there are partial results and what `do_bench` clears.
            need, free = 1.02 * candidate.stored_bytes(batch, context) + 2**31, torch.cuda.mem_get_info()[0]
            if need > free:
                notes[name] = f"skipped: needs {need / 2**30:.1f} GiB of GPU memory, {free / 2**30:.1f} GiB are free"
                continue
            try:
                run = built(candidate, batch, context)[0]
                times.setdefault(name, []).append(milliseconds(captured(run)))
                if not candidate.sdpa and turn == 0:
                    config[name] = best_config()
            except Exception as failure:
                notes[name] = f"{type(failure).__name__}: {failure}"
            run = None  # its stores are freed before the next candidate's are made
    base = statistics.median(times[BASE]) if times.get(BASE) else None
    for candidate in CANDIDATES:
        name = candidate.name
        if not times.get(name):
            continue
        ms = statistics.median(times[name])
        rate = candidate.read_bytes(batch, context) / ms / 1e6
        results[name] = {
            "ms": ms,
            "turns_ms": times[name],
            "read_bytes": candidate.read_bytes(batch, context),
            "gb_per_s": rate,
            "share_of_copy": rate / copy,
            "times_faster_than_sdpa": base / ms if base else None,
            "relative_error_at_small_size": errors[name],
            "config": config.get(name),
        }
    return {"batch": batch, "context": context, "results": results, "notes": notes}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="the JSON file to write")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--contexts", help="slots of the cache, as 32768,131072 (default: these)")
    parser.add_argument("--batches", help="sequences, as 1,16 (default: these)")
    options = parser.parse_args()
    about = machine(__file__)
    if about is None:
        return 2
    contexts = [int(n) for n in options.contexts.split(",")] if options.contexts else CONTEXTS
    batches = [int(b) for b in options.batches.split(",")] if options.batches else BATCHES
    copy, errors = copy_bandwidth(), checked()
    report: dict[str, Any] = {
        **about,
        "copy_gb_per_s": copy,
        "shape": {"kv_heads": KV_HEADS, "heads": HEADS, "width": WIDTH, "group": GROUP, "dtype": "bfloat16"},
        "errors_at_small_size": errors,
        "cases": [],
    }
    print(f"{report['device']}, torch {report['torch']}, triton {report['triton']}: copy {copy:.0f} GB/s", flush=True)
    for context in contexts:
        for batch in batches:
            case = measure(batch, context, options.turns, copy, errors)
            report["cases"].append(case)
            options.out.write_text(json.dumps(report, indent=1))  # after each case: a run cut short leaves its figures
            print(f"\nbatch {batch}, context {context}")
            for name, r in case["results"].items():
                print(
                    f"  {name:26s} {r['ms'] * 1e3:9.1f} us {r['gb_per_s']:7.0f} GB/s {r['share_of_copy']:5.0%} of copy"
                    f"  error {r['relative_error_at_small_size']:.1e}"
                )
            for name, note in case["notes"].items():
                print(f"  {name}: {note}")
            sys.stdout.flush()
    return 0


if __name__ == "__main__":
    sys.exit(main())
