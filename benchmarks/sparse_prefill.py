"""Attention of a prompt alone: block selections against torch SDPA over all keys, on real queries, keys and values.

    python -m benchmarks.sparse_prefill --tokens 2048,4096 --out sparse_prefill.json

The operands are those of layers of SmolLM2-135M reading Python's reference text. Dense attention, the attention over chosen
blocks and the choice itself take turns, as other work on the machine comes and goes; figures are medians. The choice is
compiled by Inductor, as it is in a model's graph.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from accelpass.ir.attention import AttentionSpec, BlockSelect
from accelpass.ir.attention.lowering.block_sparse import BLOCK_SPARSE
from accelpass.ir.attention.lowering.clustered import ClusteredAttention
from accelpass.ir.attention.spec.block_select import Blocks
from accelpass.passes.sparse_attention.patterns.vertical_slash import VerticalSlash
from accelpass.passes.sparse_attention.pbs_attn import PermutedBlocks
from accelpass.passes.sparse_attention.xattention import Antidiagonals
from benchmarks.kv_tasks import Row, prose

TOKENS, LAYERS, THREADS = (2048, 4096, 8192), (1, 10, 20), 2
SELECTIONS: dict[str, BlockSelect] = {
    **{f"pbs_attn {threshold}": PermutedBlocks(128, 256, threshold) for threshold in (1.0, 0.95, 0.9, 0.8)},
    **{f"xattention {threshold}": Antidiagonals(128, 8, threshold) for threshold in (0.95, 0.9, 0.8)},
    **{f"xattention {threshold}, stride 16": Antidiagonals(128, 16, threshold) for threshold in (0.95, 0.9)},
    **{
        f"minference {columns} columns, {diagonals} diagonals": VerticalSlash(64, columns, diagonals, 30, 100)
        for columns, diagonals in ((1000, 6096), (1000, 1000), (500, 700), (100, 750))
    },
}
CLUSTERED = {
    f"svg2 {top_p}, blocks of {block}": ClusteredAttention(32, 128, top_p, 0.1, block)
    for top_p in (0.9, 0.8)
    for block in (64, 32)
}
"""Not causal: all tokens see all, as in a picture, and sdpa's time is that of all pairs. The choice is k-means from the
centroids of the step before, which are those of the same operands with noise."""
NOISE = 0.05


@torch.no_grad()
def operands(model: torch.nn.Module, ids: Tensor, layers: Sequence[int]) -> dict[int, tuple[Tensor, Tensor, Tensor]]:
    """Queries, keys and values of these layers for a prompt ``(1, tokens)``, as their attention gets them."""
    from transformers import AttentionInterface
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask

    found: dict[int, tuple[Tensor, Tensor, Tensor]] = {}

    def watched(
        module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, scaling: float, **_: Any
    ) -> tuple[Tensor, None]:
        if module.layer_idx in layers:
            found[module.layer_idx] = query, key, value
        out = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling, enable_gqa=True)
        return out.transpose(1, 2).contiguous(), None

    AttentionInterface.register("watched", watched)
    ALL_MASK_ATTENTION_FUNCTIONS.register("watched", sdpa_mask)
    config: Any = model.config
    before, config._attn_implementation = config._attn_implementation, "watched"
    try:
        model.model(input_ids=ids, use_cache=False)  # type: ignore[operator]  # without the head
    finally:
        config._attn_implementation = before
    return found


@torch.no_grad()
def compare(q: Tensor, k: Tensor, v: Tensor, selections: Mapping[str, BlockSelect], turns: int) -> list[Row]:
    """A row for each selection: milliseconds of all keys and of the chosen ones, the share of blocks that is read, and how
    far the output is from that over all keys, relative to it."""
    spec = AttentionSpec(groups=q.shape[1] // k.shape[1], scale=q.shape[3] ** -0.5, causal=True)
    rows: list[Row] = []
    for name, select in selections.items():

        def dense() -> Tensor:
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

        torch._dynamo.reset()
        choose = torch.compile(lambda q, k, select=select: tuple(select.blocks(q, k, spec)), dynamic=False)
        listed = Blocks(*choose(q, k))

        def chosen(listed: Any = listed) -> Tensor:
            blocks, counts, size, order = listed
            made: Tensor = BLOCK_SPARSE(q, k, v, blocks, counts, size, -1, True, spec.scale, order)[0]
            return made

        def choice(choose: Any = choose) -> Any:
            return choose(q, k)

        exact = dense()
        error = float((chosen() - exact).norm() / exact.norm())
        ms = taken({"sdpa": dense, "chosen": chosen, "choice": choice}, turns)
        side = -(-q.shape[2] // listed.size)
        read = listed.counts.float().sum() * (q.shape[0] * q.shape[1] / len(listed.counts))
        rows.append(_row(q.shape[2], name, float(read) / (q.shape[0] * q.shape[1] * side * (side + 1) / 2), ms, error))
    return rows


@torch.no_grad()
def compare_clustered(q: Tensor, k: Tensor, v: Tensor, ways: Mapping[str, ClusteredAttention], turns: int) -> list[Row]:
    """As :func:`compare`, of attention between clusters of all tokens; ``blocks_read`` is of all pairs, with what fills
    clusters up to blocks."""
    rows: list[Row] = []
    scale, tokens = q.shape[3] ** -0.5, q.shape[2]
    draw = torch.Generator().manual_seed(0)
    earlier = [x + NOISE * x.std() * torch.randn(x.shape, generator=draw) for x in (q, k)]
    for name, how in ways.items():
        (_, asking), (_, asked) = how.centroids(*earlier, None, 50)
        torch._dynamo.reset()
        choose = torch.compile(
            lambda q, k, asking, asked, how=how: how.listing(q, k, scale, (asking, asked), 2)[:2], dynamic=False
        )
        attend = torch.compile(
            lambda q, k, v, at, listed, how=how: how.attend(q, k, v, scale, at, listed), dynamic=False
        )
        at, listed = choose(q, k, asking, asked)
        runs = {
            "sdpa": lambda: F.scaled_dot_product_attention(q, k, v, enable_gqa=True),
            "chosen": lambda attend=attend, at=at, listed=listed: attend(q, k, v, at, Blocks(*listed)),
            "choice": lambda choose=choose, asking=asking, asked=asked: choose(q, k, asking, asked),
        }
        exact = runs["sdpa"]()
        error = float((runs["chosen"]() - exact).norm() / exact.norm())
        ms = taken(runs, turns)
        read = float(listed[1].double().sum()) * how.block**2 / (q.shape[0] * q.shape[1] * tokens**2)
        rows.append(_row(tokens, name, read, ms, error))
    return rows


def taken(runs: Mapping[str, Callable[[], Any]], turns: int) -> dict[str, float]:
    """Medians of milliseconds of functions that take turns."""
    times: dict[str, list[float]] = {}
    for _ in range(turns):
        for what, run in runs.items():
            started = time.perf_counter()
            run()
            times.setdefault(what, []).append(1e3 * (time.perf_counter() - started))
    return {what: statistics.median(of) for what, of in times.items()}


def _row(tokens: int, name: str, read: float, ms: Mapping[str, float], error: float) -> Row:
    return {
        "tokens": tokens,
        "selection": name,
        "blocks_read": round(read, 3),
        "sdpa_ms": round(ms["sdpa"], 1),
        "chosen_ms": round(ms["chosen"], 1),
        "choice_ms": round(ms["choice"], 1),
        "of_sdpa": round(ms["chosen"] / ms["sdpa"], 3),
        "with_choice_of_sdpa": round((ms["chosen"] + ms["choice"]) / ms["sdpa"], 3),
        "output_error": round(error, 5),
    }


def measure(
    model: torch.nn.Module,
    tokenizer: Any,
    say: Callable[[str], None],
    tokens: Sequence[int] = TOKENS,
    layers: Sequence[int] = LAYERS,
    selections: Mapping[str, BlockSelect] = SELECTIONS,
    turns: int = 5,
    clustered: Mapping[str, ClusteredAttention] = CLUSTERED,
) -> list[Row]:
    """Rows for each length, layer and selection."""
    ids = tokenizer(prose(), return_tensors="pt").input_ids
    rows: list[Row] = []
    for length in tokens:
        for layer, (q, k, v) in sorted(operands(model, ids[:, :length], layers).items()):
            found = [*compare(q, k, v, selections, turns), *compare_clustered(q, k, v, clustered, turns)]
            made = [{"layer": layer, **row} for row in found]
            for row in made:
                say("  ".join(f"{name} {value}" for name, value in row.items()))
            rows += made
    return rows


def main() -> list[Row]:
    """The rows, printed too."""
    from accelpass.models_zoo import load

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", default=",".join(map(str, TOKENS)))
    parser.add_argument("--layers", default=",".join(map(str, LAYERS)))
    parser.add_argument("--only", default="", help="selections whose names begin so")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--threads", type=int, default=THREADS)
    parser.add_argument("--out", type=Path, help="a JSON file to write")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    model, tokenizer = load("smollm2-135m")
    numbers = ([int(n) for n in given.split(",")] for given in (options.tokens, options.layers))
    causal, clustered = (
        {name: how for name, how in among.items() if name.startswith(options.only)} for among in (SELECTIONS, CLUSTERED)
    )
    say = lambda line: print(line, flush=True)  # noqa: E731
    rows = measure(model, tokenizer, say, *numbers, causal, options.turns, clustered)
    if options.out is not None:
        options.out.write_text(json.dumps(rows, indent=1))
    return rows


if __name__ == "__main__":
    main()
