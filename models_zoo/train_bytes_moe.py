"""Trains the small mixture of experts (``bytes_moe``): ``python -m accelpass.models_zoo.train_bytes_moe --minutes 12``.

AdamW with a cosine learning rate over the time given, and the load-balancing loss of its experts. What it prints is the perplexity of a
byte of the held-out text, beside those of a model of single bytes and of pairs, counted on the same training text.
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress
from torch import Tensor
from torch.nn import functional as F

from accelpass.models_zoo import bytes_moe
from accelpass.models_zoo.packaged import write_half

WINDOW = 256


def perplexity(model: Any, data: Tensor, window: int = WINDOW) -> float:
    """Of a byte of ``data``, read in windows that do not overlap."""
    rows = data[: len(data) // window * window].view(-1, window)
    total = 0.0
    with torch.no_grad():
        for ids in rows.split(16):
            logits = model(ids, use_cache=False).logits
            total += F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="sum").item()
    return math.exp(total / (len(rows) * (window - 1)))


def counted(train: Tensor, data: Tensor) -> tuple[float, float]:
    """Perplexities of a byte of ``data`` by the counts of bytes in ``train``, and by those of pairs (each with one added)."""
    size = bytes_moe.CONFIG["vocab_size"]
    single = torch.bincount(train, minlength=size).double() + 1
    pairs = torch.bincount(train[:-1] * size + train[1:], minlength=size * size).view(size, size).double() + 1
    unigram = (single / single.sum()).log()[data[1:]]
    bigram = (pairs / pairs.sum(1, keepdim=True)).log()[data[:-1], data[1:]]
    return math.exp(-unigram.mean().item()), math.exp(-bigram.mean().item())


def trained(minutes: float, batch: int, rate: float, seed: int) -> Any:
    """The model in eval mode after so many minutes."""
    torch.manual_seed(seed)
    data = bytes_moe.tokens(bytes_moe.text(held_out=False))
    model = bytes_moe.untrained().train()
    optimizer = torch.optim.AdamW(model.parameters(), rate, betas=(0.9, 0.98), weight_decay=0.05)
    start, done, running = time.monotonic(), 0, math.nan
    with Progress() as progress:
        bar = progress.add_task("training", total=1.0)
        while (share := (time.monotonic() - start) / (60 * minutes)) < 1:
            for group in optimizer.param_groups:
                group["lr"] = rate * min(1.0, (done + 1) / 50) * (0.02 + 0.98 * (1 + math.cos(math.pi * share)) / 2)
            at = torch.randint(len(data) - WINDOW, (batch,))[:, None] + torch.arange(WINDOW)
            out = model(data[at], labels=data[at], use_cache=False, output_router_logits=True)
            optimizer.zero_grad()
            out.loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            done += 1
            running = out.loss.item() if done == 1 else 0.98 * running + 0.02 * out.loss.item()
            progress.update(bar, completed=share, description=f"training, step {done}, loss {running:.3f}")
            if done % 50 == 0:
                print(f"step {done} loss {running:.3f} {time.monotonic() - start:.0f} s", flush=True)
    return model.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=12)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rate", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=bytes_moe.WEIGHTS)
    given = parser.parse_args()
    model = trained(given.minutes, given.batch, given.rate, given.seed)
    write_half(model, given.out)
    train, unseen = (bytes_moe.tokens(bytes_moe.text(held_out=h)) for h in (False, True))
    unigram, bigram = counted(train, unseen)
    print(f"perplexity of a held-out byte: {perplexity(model, unseen):.2f}; unigram {unigram:.2f}, bigram {bigram:.2f}")


if __name__ == "__main__":
    main()
