"""kvpress on the tasks of :mod:`benchmarks.kv_tasks`; run by ``kv_quality --peer`` with a Python that has kvpress.

kvpress 0.5.5 asks for a transformers older than the one that we are measured with, hence a process of its own, without
accelpass. Its presses evict once, after the prompt; the answer's tokens are then all kept.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from kvpress import ObservedAttentionPress, RandomPress, SnapKVPress, StreamingLLMPress
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

from benchmarks.kv_tasks import DENSE_PEER, EVICTION_PEERS, PEERS, SIZES, Row, Sizes, Tasks
from benchmarks.kv_tasks import PRESSES as NAMES

PRESSES: dict[str, Callable[[float], Any]] = {
    "Random": RandomPress,
    "StreamingLLM": lambda evicted: StreamingLLMPress(evicted, n_sink=4),
    "ObservedAttention": ObservedAttentionPress,
    "SnapKV": SnapKVPress,
}
"""By the share of the prompt that each takes out."""
assert tuple(PRESSES) == NAMES, "kv_tasks names them for those who cannot import kvpress"
ROWS = dict.fromkeys((*PEERS, *EVICTION_PEERS))


def press(row: str) -> Any:
    """The press of a row such as ``"kvpress SnapKV, 20 %"``; None of the dense one."""
    if row == DENSE_PEER:
        return None
    name, share = row.removeprefix("kvpress ").split(", ")
    return PRESSES[name](round(1 - int(share.removesuffix(" %")) / 100, 2))


class Pressed:
    """A :class:`~benchmarks.kv_tasks.Reader`: the model as it is, its cache pressed after the prompt.

    Attributes:
        bytes, tokens: of the pressed cache and of the prompt that it came from, for the longest prompt so far.
    """

    def __init__(self, model: Any, press: Any) -> None:
        self.model, self.press = model, press
        self.bytes = self.tokens = self.position = 0
        self.cache = DynamicCache()

    def prompt(self, ids: Tensor) -> Tensor:
        self.cache, self.position = DynamicCache(), ids.shape[1]
        with self.press(self.model) if self.press is not None else nullcontext():
            logits = self.model(input_ids=ids, past_key_values=self.cache, logits_to_keep=1).logits[0, -1]
        if self.position > self.tokens:
            self.tokens = self.position
            self.bytes = sum(
                t.numel() * t.element_size() for layer in self.cache.layers for t in (layer.keys, layer.values)
            )
        return logits

    def step(self, token: int) -> Tensor:
        # Said here: transformers would count the tokens that are left.
        position = torch.tensor([[self.position]])
        self.position += 1
        ids = torch.tensor([[token]])
        return self.model(input_ids=ids, past_key_values=self.cache, position_ids=position).logits[0, -1]


def measure(folder: Path, sizes: Sizes, names: Sequence[str]) -> list[Row]:
    """One row for each press that is named."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tasks = Tasks(tokenizer, sizes)
    rows = []
    for name in names:
        torch.manual_seed(0)
        # ObservedAttention reads the probabilities, which only the eager attention hands out.
        model.set_attn_implementation("eager" if "Observed" in name else "sdpa")
        reader = Pressed(model, press(name))
        done = 0

        def advance(doing: str, name: str = name) -> None:
            nonlocal done
            done += 1
            print(f"\r{name}: {done}/{sizes.units}", end="", file=sys.stderr, flush=True)

        row = {"name": name, **tasks.ask(reader, advance), "cache_bytes": reader.bytes, "cache_tokens": reader.tokens}
        rows.append(row)
        print(f"\n{json.dumps(row)}", flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--sizes", choices=SIZES, default="all")
    parser.add_argument("--only", nargs="+", default=PEERS, choices=ROWS)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    torch.set_grad_enabled(False)
    given.out.write_text(json.dumps(measure(given.model, SIZES[given.sizes], given.only)))


if __name__ == "__main__":
    main()
