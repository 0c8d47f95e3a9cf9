"""Time Triton block-sparse attention on an NVIDIA GPU at several densities, against torch SDPA (flash) and FlexAttention.

    PYTHONPATH=<layout> python benchmarks/triton_block_sparse.py --out triton_block_sparse.json

Needs torch >= 2.11, Triton >= 3.6 and accelpass. Each block of queries lists its own block and others drawn at random, so
no density is a special pattern; FlexAttention gets the same lists, as full blocks. SDPA computes all of them. Then the
same under a causal mask, as prompts of language models have it: others are drawn from earlier blocks, densities are of the
causal blocks, FlexAttention masks the diagonal block, and the kernel is timed with keys in order and with keys sorted at
random inside segments of two blocks, for each head its own, of which the segment's blocks are all listed. Every
candidate is first held to the float32 reference at a small size, and is not timed if it is wrong. A candidate is
captured in a CUDA graph, candidates take turns, and the figure is the median of the turns' medians.

Units: milliseconds; TFLOP/s of the listed pairs alone, 4 * pairs * width for both products.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from cuda_timing import Run, captured, machine, milliseconds  # the scripts' own folder is on their path
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from accelpass.ir.attention.spec.block_select import Blocks, listed_mask

TOKENS = (16384, 65536, 131072)
DENSITIES = (10, 25, 50, 100)
HEADS, KV_HEADS, WIDTH, SIZE = 8, 8, 128, 128
SMALL = 2048  # tokens of the check against the reference
SDPA, TRITON, FLEX = "SDPA (flash), all keys", "Triton block-sparse", "FlexAttention"
ORDERED = "Triton, sorted keys"
WRONG = 0.02  # bf16 rounds at 2**-9; a wrong block costs tens of per cent


def lists(tokens: int, density: int) -> tuple[Tensor, Tensor]:
    """The tables of the op: the diagonal and random blocks, int32 (1, q_blocks, most) and (1, q_blocks)."""
    side = tokens // SIZE
    most = max(1, round(side * density / 100))
    order = torch.rand(side, side, device="cuda")
    order.fill_diagonal_(2.0)
    blocks = order.topk(most).indices.sort(-1).values
    return blocks.int().unsqueeze(0), torch.full((1, side), most, dtype=torch.int32, device="cuda")


def block_mask(blocks: Tensor, counts: Tensor) -> BlockMask:
    """The same lists for FlexAttention, which wants room for all blocks in a row."""
    side = blocks.shape[1]
    full = torch.zeros(1, 1, side, side, dtype=torch.int32, device="cuda")
    full[..., : blocks.shape[2]] = blocks.unsqueeze(1)
    partly = torch.zeros(1, 1, side, dtype=torch.int32, device="cuda")
    none = torch.zeros_like(full)
    return BlockMask.from_kv_blocks(partly, none, counts.unsqueeze(1), full, BLOCK_SIZE=SIZE, compute_q_blocks=False)


def causal_lists(tokens: int, density: int, heads: int = 1, segment: int = 1) -> tuple[Tensor, Tensor]:
    """The same under a causal mask: blocks of the query's own segment up to its own (all of it, if a segment is more than
    one block, whose keys lie anywhere), and a share of the earlier ones."""
    side = tokens // SIZE
    at = torch.arange(side, device="cuda")
    own = at[:, None] // segment == at // segment
    key = torch.rand(heads, side, side, device="cuda")
    key.masked_fill_(own, 2.0).masked_fill_(at // segment > at[:, None] // segment, -1.0)
    wanted = (at.add(1) * density / 100).round().int().clamp_min(1)
    counts = torch.maximum(wanted, own.sum(-1).int()).expand(heads, side).contiguous()
    most = int(counts.max())
    blocks = key.topk(most).indices
    valid = torch.arange(most, device="cuda") < counts.unsqueeze(-1)
    return torch.where(valid, blocks, side).sort(-1).values.clamp_max(side - 1).int(), counts


def causal_block_mask(blocks: Tensor, counts: Tensor) -> BlockMask:
    """The lists for FlexAttention: the last entry of each is the diagonal block, which alone is masked."""
    side = blocks.shape[1]
    diagonal = torch.zeros(1, 1, side, side, dtype=torch.int32, device="cuda")
    diagonal[..., 0] = torch.arange(side, device="cuda")
    full = torch.zeros_like(diagonal)
    full[..., : blocks.shape[2]] = blocks.unsqueeze(1)
    one = torch.ones(1, 1, side, dtype=torch.int32, device="cuda")
    return BlockMask.from_kv_blocks(
        one, diagonal, counts.unsqueeze(1) - 1, full, BLOCK_SIZE=SIZE, mask_mod=_not_later, compute_q_blocks=False
    )


def _not_later(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
    return query >= key


def candidates(tokens: int, density: int, causal: bool) -> tuple[dict[str, Run], dict[str, Callable[[], Tensor]]]:
    """What is timed, and the float32 reference of each."""
    import accelpass.backends.kernels.triton.block_sparse_ops  # noqa: F401  # registers the op

    op = torch.ops.accelpass.block_sparse_attention_triton.default
    q = torch.randn(1, HEADS, tokens, WIDTH, device="cuda", dtype=torch.bfloat16)
    k, v = (torch.randn(1, KV_HEADS, tokens, WIDTH, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    blocks, counts = causal_lists(tokens, density) if causal else lists(tokens, density)
    mask, scale = (causal_block_mask if causal else block_mask)(blocks, counts), WIDTH**-0.5
    flex = torch.compile(flex_attention, dynamic=False)

    def sdpa() -> Tensor:
        with sdpa_kernel([SDPBackend.FLASH_ATTENTION]):
            return F.scaled_dot_product_attention(q, k, v, scale=scale, is_causal=causal, enable_gqa=HEADS != KV_HEADS)

    def triton_op() -> Tensor:
        return op(q, k, v, blocks, counts, SIZE, -1, causal, scale)[0]

    def flexible() -> Tensor:
        return flex(q, k, v, block_mask=mask, scale=scale, enable_gqa=HEADS != KV_HEADS)

    def masked(seen: Tensor) -> Tensor:
        if causal:
            seen = seen & torch.ones(tokens, tokens, dtype=torch.bool, device="cuda").tril()
        wide = (t.float().repeat_interleave(HEADS // t.shape[1], 1) for t in (q, k, v))
        return F.scaled_dot_product_attention(*wide, attn_mask=seen, scale=scale)

    def reference() -> Tensor:
        return masked(listed_mask(Blocks(blocks, counts, SIZE), HEADS, tokens, tokens))

    def everything() -> Tensor:
        return masked(torch.ones(tokens, tokens, dtype=torch.bool, device="cuda"))

    runs: dict[str, Run] = {SDPA: sdpa, TRITON: triton_op, FLEX: flexible}
    references = {SDPA: everything, TRITON: reference, FLEX: reference}
    if causal:
        segment = 2 * SIZE
        inside = torch.rand(HEADS, tokens // segment, segment, device="cuda").argsort(-1)
        order = (inside + torch.arange(0, tokens, segment, device="cuda")[:, None]).flatten(1).int()
        sorted_lists = causal_lists(tokens, density, HEADS, 2)

        def ordered() -> Tensor:
            return op(q, k, v, *sorted_lists, SIZE, -1, True, scale, order)[0]

        def reference_of_ordered() -> Tensor:
            return masked(listed_mask(Blocks(*sorted_lists, SIZE, order), HEADS, tokens, tokens))

        runs[ORDERED], references[ORDERED] = ordered, reference_of_ordered
    return runs, references


def checked(density: int, causal: bool) -> dict[str, float | str]:
    """Relative error of every candidate at a small size, or why it has none."""
    errors: dict[str, float | str] = {}
    for name in (SDPA, TRITON, FLEX, *([ORDERED] if causal else [])):
        try:
            runs, references = candidates(SMALL, density, causal)
            expected = references[name]()
            error = (runs[name]().float() - expected).square().mean() / expected.square().mean()
            errors[name] = float(error.sqrt())
        except Exception as failure:  # one candidate that does not run must not cost the others' figures
            errors[name] = f"{type(failure).__name__}: {failure}"
    return errors


def listed_pairs(tokens: int, density: int, causal: bool, name: str) -> int:
    """(Query, key) pairs that a candidate computes, all heads; the diagonal block counts whole."""
    if name == SDPA:
        return HEADS * tokens * (tokens + causal * SIZE) // (1 + causal)
    if not causal:
        return HEADS * tokens * max(1, round(tokens // SIZE * density / 100)) * SIZE
    _, counts = causal_lists(tokens, density, 1, 2 if name == ORDERED else 1)
    return HEADS * int(counts.sum()) * SIZE * SIZE


def measure(tokens: int, density: int, causal: bool, turns: int) -> dict[str, Any]:
    errors, notes = checked(density, causal), {}
    times: dict[str, list[float]] = {}
    graphs: dict[str, Callable[[], None]] = {}
    runs, _ = candidates(tokens, density, causal)
    for name, run in runs.items():
        error = errors[name]
        if isinstance(error, str) or error > WRONG:
            notes[name] = f"not timed: {error}" if isinstance(error, str) else f"WRONG: relative error {error:.3g}"
            continue
        try:
            graphs[name] = captured(run)
        except Exception as failure:
            notes[name] = f"{type(failure).__name__}: {failure}"
    for _ in range(turns):
        for name, graph in graphs.items():
            times.setdefault(name, []).append(milliseconds(graph))
    base = statistics.median(times[SDPA]) if SDPA in times else None
    results = {}
    for name, turned in times.items():
        ms = statistics.median(turned)
        pairs = listed_pairs(tokens, density, causal, name)
        results[name] = {
            "ms": ms,
            "turns_ms": turned,
            "tflops": 4 * pairs * WIDTH / ms / 1e9,
            "times_faster_than_sdpa": base / ms if base else None,
            "relative_error_at_small_size": errors[name],
        }
    if TRITON in results:
        from accelpass.backends.kernels.triton.block_sparse import block_sparse

        results[TRITON]["config"] = str(getattr(block_sparse, "best_config", None))
    return {"tokens": tokens, "causal": causal, "density_percent": density, "results": results, "notes": notes}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="the JSON file to write")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--tokens", help="sequence lengths, as 16384,65536 (default: these and 131072)")
    parser.add_argument("--masks", default="none,causal", help="none, causal or both")
    parser.add_argument("--densities", help="per cent of the blocks, as 10,100 (default: 10,25,50,100)")
    options = parser.parse_args()
    about = machine(__file__)
    if about is None:
        return 2
    torch._dynamo.config.cache_size_limit = 64  # FlexAttention is compiled for each length and list
    lengths = [int(n) for n in options.tokens.split(",")] if options.tokens else TOKENS
    densities = [int(n) for n in options.densities.split(",")] if options.densities else DENSITIES
    report: dict[str, Any] = {
        **about,
        "shape": {"heads": HEADS, "kv_heads": KV_HEADS, "width": WIDTH, "size": SIZE, "dtype": "bfloat16"},
        "cases": [],
    }
    print(f"{report['device']}, torch {report['torch']}, triton {report['triton']}", flush=True)
    for tokens in lengths:
        for causal, density in ((mask == "causal", d) for mask in options.masks.split(",") for d in densities):
            case = measure(tokens, density, causal, options.turns)
            report["cases"].append(case)
            options.out.write_text(json.dumps(report, indent=1))  # after each case: a run cut short leaves its figures
            print(f"\n{tokens} tokens, {density} % of the {'causal ' if causal else ''}blocks")
            for name, r in case["results"].items():
                faster = f"{r['times_faster_than_sdpa']:.2f} x" if r["times_faster_than_sdpa"] else ""
                print(f"  {name:24s} {r['ms']:9.3f} ms {r['tflops']:7.0f} TFLOP/s {faster}")
            for name, note in case["notes"].items():
                print(f"  {name}: {note}")
            sys.stdout.flush()
    return 0


if __name__ == "__main__":
    sys.exit(main())
