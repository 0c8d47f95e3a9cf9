"""Multi-token prediction modules: how far they guess right, and what is lost without verification.

``python -m benchmarks.multi_token --steps 400`` trains modules for the zoo's mixture of bytes on texts that the model wrote (some minutes on
one core), and writes benchmarks/results/bytes_moe_mtp.json; ``--model smollm2`` does it for SmolLM2: how often the guess of each module is the model's own token after right guesses before it, calls a token, and
without verification, the perplexity of the texts under the model itself.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from accelpass import KVCache
from accelpass.decoding import MTPHeads, Proposal, Request, Verified, exact, mtp_heads
from accelpass.decoding.heads import distil
from accelpass.models_zoo import bytes_moe, smollm2
from benchmarks.kv_tasks import prose

RESULTS = Path(__file__).parent / "results"
PROMPT = 64
Data = Callable[[bool], Tensor]
"""Tokens of a text, or of one that is held out."""


def of_bytes() -> tuple[Any, Data]:
    return bytes_moe.load(torch.float32)[0], lambda held_out: bytes_moe.tokens(bytes_moe.text(held_out))


def of_smollm2() -> tuple[Any, Data]:
    """The first tenth of the prose is held out."""
    model, tokenizer = smollm2.load(torch.float32)
    ids = tokenizer(prose(), return_tensors="pt").input_ids[0]
    part = len(ids) // 10
    return model, lambda held_out: ids[:part] if held_out else ids[part:]


SUBJECTS = {"bytes": (of_bytes, "bytes_moe_mtp.json", 16), "smollm2": (of_smollm2, "smollm2_mtp.json", 4)}
"""How a model and its data are had, the file of its figures, and the texts of a batch."""


def prompts(data: Tensor, count: int) -> Tensor:
    at = torch.randint(len(data) - PROMPT, (count, 1), generator=torch.Generator().manual_seed(5))
    return data[at + torch.arange(PROMPT)]


def written(model: Any, ids: Tensor, new: int, **how: Any) -> Tensor:
    text: Tensor = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, eos_token_id=None, **{"do_sample": False, **how}
    )
    return text


def perplexity(model: Any, texts: Tensor) -> float:
    """Of a byte that was written."""
    with torch.no_grad():
        logits = model(texts, use_cache=False).logits[:, PROMPT - 1 : -1]
    return math.exp(F.cross_entropy(logits.flatten(0, 1), texts[:, PROMPT:].flatten()).item())


class Counted:
    """Accepts as ``exact`` does, and counts to which position."""

    def __init__(self, depth: int) -> None:
        self.tried, self.right = [0] * depth, [0] * depth

    def __call__(self, read: Tensor, logits: Tensor, proposal: Proposal, request: Request) -> Verified:
        found = exact(read, logits, proposal, request)
        for count in found.counts.tolist():
            for place in range(min(count + 1, proposal.count)):
                self.tried[place] += 1
                self.right[place] += place < count
        return found


def measure(name: str, depth: int, steps: int, batches: int, judged: int, new: int) -> dict[str, Any]:
    torch.manual_seed(0)
    load, _, size = SUBJECTS[name]
    model, data = load()
    asked = prompts(data(False), size * batches).split(size)
    texts = [written(model, ids, 160, do_sample=number % 2 == 1, temperature=0.7) for number, ids in enumerate(asked)]
    print("texts written", flush=True)
    heads = MTPHeads(model, depth)
    losses = distil(heads, texts, steps, 1e-3, lambda step, found: step % 20 or print(step, found, flush=True))
    counted = Counted(depth)
    decoder = mtp_heads(heads, adaptive=False)
    decoder.acceptance = counted
    calls = tokens = same = 0
    plain_texts, free_texts = [], []
    for ids in prompts(data(True), judged).split(1):
        plain = written(model, ids, new)
        cache = KVCache(model, PROMPT + new + depth + 1)
        same += torch.equal(written(model, ids, new, custom_generate=decoder, past_key_values=cache), plain)
        calls, tokens = calls + decoder.statistics.calls, tokens + decoder.statistics.tokens
        plain_texts.append(plain)
        free_texts.append(written(model, ids, new, custom_generate=mtp_heads(heads, verify=False)))
    return {
        "depth": depth, "steps": steps, "losses": [round(loss, 3) for loss in losses], "prompts": judged, "new_tokens": new,
        "accepted_by_position": [round(r / max(1, t), 3) for r, t in zip(counted.right, counted.tried, strict=True)],
        "tokens_per_call": round(tokens / calls, 2), "texts_as_plain": same,
        "perplexity_plain": round(perplexity(model, torch.cat(plain_texts)), 3),
        "perplexity_unverified": round(perplexity(model, torch.cat(free_texts)), 3), "torch": torch.__version__,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--depth", type=int, default=4)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--model", choices=list(SUBJECTS), default="bytes")
    parser.add_argument("--batches", type=int, default=12, help="of texts that are learnt from")
    parser.add_argument("--judged", type=int, default=16, help="prompts of held-out text")
    parser.add_argument("--new", type=int, default=128)
    parser.add_argument("--write", type=Path)
    given = parser.parse_args()
    found = measure(given.model, given.depth, given.steps, given.batches, given.judged, given.new)
    print(json.dumps(found, indent=1))
    (given.write or RESULTS / SUBJECTS[given.model][1]).write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
