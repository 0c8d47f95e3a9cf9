"""Time the Triton int8 and int4 weight-only linears on an NVIDIA GPU against bf16 and against PyTorch's own int4.

    PYTHONPATH=<layout> python benchmarks/triton_weight_only.py --out triton_weight_only.json

Needs torch >= 2.11, Triton >= 3.6 and accelpass; torchao is optional. Every candidate is checked against a float32
reference first and is not timed if it is wrong. A candidate is captured in a CUDA graph, so that its time is the GPU's
and not Python's; `do_bench` clears the L2 cache before each replay, so weights come from memory, as they do in a model.
Candidates take turns, and the figure is the median of the turns' medians.

Units: milliseconds; GB/s = 1e9 bytes (weight, scales, x, y, each counted once) per second; copy bandwidth counts bytes
read plus bytes written; TFLOP/s counts 2 * rows * outputs * inputs whatever the format.
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

SHAPES = ((4096, 4096), (11008, 4096), (128256, 4096))  # outputs, inputs
BATCHES = (1, 8, 64)


@dataclass
class Candidate:
    """One way to compute y. `expected` is its own reference: formats differ in the weight they represent."""

    name: str
    run: Run
    expected: Tensor
    weight_bytes: int


def fixed_int4(outputs: int, inputs: int, group: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Random nibbles (N, K) uint8, scale and zero (N, K/g) that bf16 holds exactly, and the float32 weight."""
    nibbles = torch.randint(0, 16, (outputs, inputs), device="cuda", dtype=torch.uint8)
    scale = (torch.rand(outputs, inputs // group, device="cuda") * 0.01 + 0.001).bfloat16().float()
    zero = torch.randint(4, 12, scale.shape, device="cuda").float()
    weight = (nibbles.view(outputs, -1, group).float() - zero[:, :, None]) * scale[:, :, None]
    return nibbles, scale, zero, weight.view(outputs, inputs)


def packed(nibbles: Tensor, group: int) -> Tensor:
    """accelpass's bytes: low nibble the first half of a group, high nibble the second."""
    halves = nibbles.view(nibbles.shape[0], -1, 2, group // 2)
    return (halves[:, :, 0] | (halves[:, :, 1] << 4)).flatten(1).contiguous()


def bytes_of(*tensors: Tensor | None) -> int:
    return sum(t.numel() * t.element_size() for t in tensors if t is not None)


def candidates(x: Tensor, outputs: int, group: int, notes: dict[str, str]) -> list[Candidate]:
    """All candidates for one shape; one that cannot be built leaves its reason in `notes`."""
    from accelpass.backends.kernels.triton import weight_only_ops as ops

    rows, inputs = x.shape
    found: list[Candidate] = []
    paths = ("auto", "gemv", "gemm") if rows <= ops.GEMV_ROWS_LIMIT else ("auto",)

    dense = torch.randn(outputs, inputs, device="cuda", dtype=torch.bfloat16) / inputs**0.5
    linear = torch.compile(F.linear, dynamic=False)
    expected = x.float() @ dense.float().T
    found.append(Candidate("bf16 Inductor", lambda: linear(x, dense), expected, bytes_of(dense)))

    q8 = torch.randint(-127, 128, (outputs, inputs), device="cuda", dtype=torch.int8)
    s8 = torch.rand(outputs, device="cuda") * 0.001
    expected = x.float() @ (q8.float() * s8[:, None]).T
    for path in paths:

        def int8(path: Any = path) -> Tensor:
            return ops.int8_linear(x, q8, s8, None, path)

        found.append(Candidate(f"int8 Triton {path}", int8, expected, bytes_of(q8, s8)))
    op8 = torch.compile(lambda x: torch.ops.accelpass.int8_linear_triton(x, q8, s8), dynamic=False)
    found.append(Candidate("int8 Triton compiled", lambda: op8(x), expected, bytes_of(q8, s8)))

    nibbles, s4, zero, weight = fixed_int4(outputs, inputs, group)
    q4 = packed(nibbles, group)
    expected, eights = x.float() @ weight.T, torch.full_like(zero, 8)
    symmetric = expected + x.float() @ ((zero - eights) * s4).repeat_interleave(group, 1).T
    for path in paths:

        def int4(path: Any = path, zero: Tensor | None = None) -> Tensor:
            return ops.int4_linear(x, q4, s4, zero, None, group, path)

        def int4_zero(path: Any = path) -> Tensor:
            return ops.int4_linear(x, q4, s4, zero, None, group, path)

        found.append(Candidate(f"int4 Triton {path}", int4, symmetric, bytes_of(q4, s4)))
        found.append(Candidate(f"int4 Triton {path}, zero point", int4_zero, expected, bytes_of(q4, s4, zero)))
    op4 = torch.compile(lambda x: torch.ops.accelpass.int4_linear_triton(x, q4, s4, None, None, group), dynamic=False)
    found.append(Candidate("int4 Triton compiled", lambda: op4(x), symmetric, bytes_of(q4, s4)))

    def tinygemm() -> Candidate:
        # Its bytes hold neighbouring columns, the even one high; W = (nibble - 8) * scale + offset, all in bf16.
        stored = (nibbles[:, ::2] << 4 | nibbles[:, 1::2]).contiguous()
        tiles = torch.ops.aten._convert_weight_to_int4pack(stored, 8)
        offset = (8 - zero) * s4
        both = torch.stack([s4, offset], 2).transpose(0, 1).contiguous().bfloat16()
        steps = (nibbles.view(outputs, -1, group).float() - 8) * s4[:, :, None] + offset.bfloat16().float()[:, :, None]
        wanted = x.float() @ steps.view(outputs, inputs).T
        run = lambda: torch.ops.aten._weight_int4pack_mm(x, tiles, group, both)  # noqa: E731
        return Candidate("int4 tinygemm", run, wanted, bytes_of(tiles, both))

    def torchao(name: str, config: Callable[[], Any], size: int) -> Candidate:
        from torchao.quantization import quantize_

        module = torch.nn.Sequential(torch.nn.Linear(inputs, outputs, bias=False, device="cuda", dtype=torch.bfloat16))
        module[0].weight.data.copy_(dense)
        quantize_(module, config())
        compiled = torch.compile(module, dynamic=False)
        try:
            wanted = x.float() @ module[0].weight.dequantize().float().T
        except (AttributeError, NotImplementedError):
            wanted = module(x).float()  # without a dequantize(), it is held only to its own uncompiled self
        return Candidate(name, lambda: compiled(x), wanted, size)

    def torchao4() -> Candidate:
        from torchao.quantization import Int4WeightOnlyConfig

        config = lambda: Int4WeightOnlyConfig(group_size=group, int4_packing_format="tile_packed_to_4d")  # noqa: E731
        return torchao("int4 torchao", config, outputs * inputs // 2 + 4 * outputs * inputs // group)

    def torchao8() -> Candidate:
        from torchao.quantization import Int8WeightOnlyConfig

        return torchao("int8 torchao", Int8WeightOnlyConfig, outputs * inputs + 2 * outputs)

    for build in (tinygemm, torchao4, torchao8):
        try:
            found.append(build())
        except Exception as error:  # another project's kernel may lack support for this GPU or version
            notes[build.__name__] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    return found


def error_of(y: Tensor, expected: Tensor) -> float:
    """Root mean square of the error over that of the result. bf16 rounds at 2**-9; 1 % is five times that, and a wrong
    nibble order, scale or mask costs tens of per cent."""
    return float((y.float() - expected).square().mean().sqrt() / expected.square().mean().sqrt())


def measure(rows: int, outputs: int, inputs: int, group: int, turns: int, copy: float) -> dict[str, Any]:
    torch._dynamo.reset()  # every case compiles F.linear anew, and Dynamo gives up after eight
    x = torch.randn(rows, inputs, device="cuda", dtype=torch.bfloat16)
    notes: dict[str, str] = {}
    graphs: dict[str, tuple[Candidate, Callable[[], None], float]] = {}
    for candidate in candidates(x, outputs, group, notes):
        try:
            wrong = error_of(candidate.run(), candidate.expected)
            if wrong > 0.01:
                notes[candidate.name] = f"WRONG: relative error {wrong:.3g}; not timed"
                continue
            graphs[candidate.name] = candidate, captured(candidate.run), wrong
        except Exception as error:  # one candidate that does not run must not cost the others' figures
            notes[candidate.name] = f"{type(error).__name__}: {error}"
    times: dict[str, list[float]] = {name: [] for name in graphs}
    for _ in range(turns):
        for name, (_, replay, _) in graphs.items():
            times[name].append(milliseconds(replay))
    results = {}
    base = statistics.median(times["bf16 Inductor"]) if "bf16 Inductor" in times else None
    for name, (candidate, _, wrong) in graphs.items():
        ms = statistics.median(times[name])
        rate = (candidate.weight_bytes + 2 * rows * (inputs + outputs)) / ms / 1e6
        results[name] = {
            "ms": ms,
            "turns_ms": times[name],
            "gb_per_s": rate,
            "share_of_copy": rate / copy,
            "tflop_per_s": 2 * rows * outputs * inputs / ms / 1e9,
            "times_faster_than_bf16": base / ms if base else None,
            "relative_error": wrong,
        }
    return {"rows": rows, "outputs": outputs, "inputs": inputs, "group": group, "results": results, "notes": notes}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="the JSON file to write")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--group", type=int, default=128, choices=(32, 64, 128))
    parser.add_argument("--shapes", help="N,K pairs, as 4096,4096;11008,4096 (default: all)")
    parser.add_argument("--batches", help="rows of x, as 1,8,64 (default: all)")
    options = parser.parse_args()
    about = machine(__file__)
    if about is None:
        return 2
    shapes = [tuple(map(int, s.split(","))) for s in options.shapes.split(";")] if options.shapes else SHAPES
    batches = [int(b) for b in options.batches.split(",")] if options.batches else BATCHES
    copy = copy_bandwidth()
    report: dict[str, Any] = {
        **about,
        "copy_gb_per_s": copy,
        "cases": [],
    }
    print(f"{report['device']}, torch {report['torch']}, triton {report['triton']}: copy {copy:.0f} GB/s", flush=True)
    for outputs, inputs in shapes:
        for rows in batches:
            case = measure(rows, outputs, inputs, options.group, options.turns, copy)
            report["cases"].append(case)
            options.out.write_text(json.dumps(report, indent=1))  # after each case: a run cut short leaves its figures
            print(f"\n{rows} x {inputs} -> {outputs}")
            for name, r in case["results"].items():
                print(
                    f"  {name:34s} {r['ms'] * 1e3:9.1f} us {r['gb_per_s']:7.0f} GB/s {r['share_of_copy']:5.0%} of copy"
                    f" {r['tflop_per_s']:7.1f} TFLOP/s  error {r['relative_error']:.1e}"
                )
            for name, note in case["notes"].items():
                print(f"  {name}: {note}")
            sys.stdout.flush()
            torch.cuda.empty_cache()
    return 0


if __name__ == "__main__":
    sys.exit(main())
