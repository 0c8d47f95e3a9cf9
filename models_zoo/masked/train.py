"""Trains the masked model, then distils it: ``python -m accelpass.models_zoo.masked.train --minutes 7 --distil 3``, on one core.

First it learns to read, what the next byte is, as Dream began with a causal model: so the logits of a token are those of the row before it. Then, without the causal mask, it learns to fill in: of a window, what comes before some place is clean, the block after it is masked in part, and what comes later
is masked altogether. Then it answers prompts, a token a step, and learns from its answers to be certain of many tokens at once
(certainty-forcing distillation, dParallel, arXiv 2509.26488): cross entropy over both halves of a block, and twice the entropy at
temperature 0.5 of the tokens that it already has right. All weights are trained, where the paper trains LoRA.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress
from torch import Tensor
from torch.nn import functional as F

from accelpass.models_zoo import bytes_moe
from accelpass.models_zoo.masked.model import BLOCK, FOLDER, MASK, WINDOW, see, untrained
from accelpass.models_zoo.packaged import write_half

_PROMPT = 64


def hidden(
    windows: Tensor, generator: torch.Generator | None = None, share: float = 1.0, blocks: float = 0.5
) -> Tensor:
    """Which tokens of windows ``(n, tokens)`` are masked: part of a block, and all after it; or anywhere.

    Args:
        share: of a window's or block's tokens, at most; each draws its own, from a tenth.
        blocks: how many of the windows have their masks in a block and after it.
    """
    n, length = windows.shape
    some = torch.rand(n, length, generator=generator) < 0.1 + (share - 0.1) * torch.rand(n, 1, generator=generator)
    start = torch.randint(-BLOCK, length - BLOCK + 1, (n, 1), generator=generator).clamp_min(0)
    at = torch.arange(length)
    block = (some & (at >= start)) | (at >= start + BLOCK)
    return torch.where(torch.arange(n)[:, None] < blocks * n, block, some)


def said(model: Any, text: Tensor) -> Tensor:
    """Logits of each token ``(n, tokens, vocabulary)``: those of the row before it; the first token has none of its own."""
    logits: Tensor = model(text, use_cache=False).logits
    return torch.cat([logits[:, :1], logits[:, :-1]], 1)


def loss_of(model: Any, windows: Tensor, masked: Tensor) -> Tensor:
    """Nats a masked token."""
    masked = masked & (torch.arange(windows.shape[1]) > 0)
    return F.cross_entropy(said(model, windows.masked_fill(masked, MASK))[masked], windows[masked])


def _windows(data: Tensor, count: int, length: int = WINDOW, generator: torch.Generator | None = None) -> Tensor:
    return data[torch.randint(len(data) - length, (count,), generator=generator)[:, None] + torch.arange(length)]


def _timed(title: str, minutes: float, model: Any, rate: float) -> Iterator[tuple[int, float, Any]]:
    """Numbers of steps, the share of the time that is over, and what takes a step down a loss: AdamW, the rate a cosine over the minutes.

    Minutes are of the processor's time: on a machine that others use as well, as many steps are taken.
    """
    optimizer = torch.optim.AdamW(model.parameters(), rate, betas=(0.9, 0.98), weight_decay=0.05)
    start, done = time.process_time(), 0

    def take(loss: Tensor) -> None:
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    with Progress() as progress:
        bar = progress.add_task(title, total=1.0)
        while (share := (time.process_time() - start) / (60 * minutes)) < 1:
            for group in optimizer.param_groups:
                group["lr"] = rate * min(1.0, (done + 1) / 50) * (0.02 + 0.98 * (1 + math.cos(math.pi * share)) / 2)
            yield done, share, take
            done += 1
            progress.update(bar, completed=share)


def trained(minutes: float, batch: int, rate: float, seed: int) -> Any:
    """The model in eval mode after so many minutes."""
    torch.manual_seed(seed)
    data, unseen = (bytes_moe.tokens(bytes_moe.text(held_out=h)) for h in (False, True))
    model = untrained().train()
    see(model, both_ways=False)
    for step, _, take in _timed("reading", 0.4 * minutes, model, rate):
        windows = _windows(data, batch)
        loss = F.cross_entropy(said(model, windows)[:, 1:].flatten(0, 1), windows[:, 1:].flatten())
        take(loss)
        if step % 100 == 99:
            print(f"step {step + 1}, the next byte {loss.item():.3f}", flush=True)
    see(model, both_ways=True)
    for step, progress, take in _timed("filling in", 0.6 * minutes, model, 0.6 * rate):
        windows = _windows(data, batch)
        late = progress / 0.4  # few masks first
        take(loss_of(model, windows, hidden(windows, None, min(1.0, 0.3 + late), min(0.5, late))))
        if step % 100 == 99:
            print(f"step {step + 1}, held out {judged(model, unseen):.3f}", flush=True)
    return model.eval()


@torch.no_grad()
def judged(model: Any, unseen: Tensor) -> float:
    """Nats a masked token of held-out text, with the masks of training."""
    generator = torch.Generator().manual_seed(0)
    windows = _windows(unseen, 64, generator=generator)
    return loss_of(model, windows, hidden(windows, generator)).item()


@torch.no_grad()
def answered(model: Any, prompts: Tensor, tokens: int = WINDOW - _PROMPT) -> Tensor:
    """What the model writes after prompts, block by block, the surest token of each step: ``(n, prompt + tokens)``."""
    text = torch.cat([prompts, torch.full((len(prompts), tokens), MASK)], 1)
    for end in range(prompts.shape[1] + BLOCK, text.shape[1] + 1, BLOCK):
        for _ in range(BLOCK):
            logits = said(model, text)
            logits[..., MASK] = -math.inf
            sure, best = logits.log_softmax(-1).max(-1)
            sure[(text != MASK) | (torch.arange(text.shape[1]) >= end)] = -math.inf
            at = sure.argmax(1, keepdim=True)
            text.scatter_(1, at, best.gather(1, at))
    return text


def certainty_loss(model: Any, text: Tensor, start: Tensor, weight: float = 2.0, temperature: float = 0.5) -> Tensor:
    """The distillation's loss on answered texts ``(n, tokens)``, of the block that begins at ``start`` ``(n, 1)`` of each."""
    at = torch.arange(text.shape[1])
    block, later = (at >= start) & (at < start + BLOCK), at >= start + BLOCK
    first = block & (torch.rand(text.shape) < 0.5)
    total = torch.zeros(())
    for masked in (first, block & ~first):
        logits = said(model, text.masked_fill(masked | later, MASK))[masked]
        right = logits.argmax(-1) == text[masked]
        total = total + F.cross_entropy(logits, text[masked])
        if right.any():
            logs = (logits[right] / temperature).log_softmax(-1)
            total = total - weight * (logs.exp() * logs).sum(-1).mean()
    return total


def distilled(model: Any, minutes: float, samples: int, batch: int, rate: float, seed: int) -> Any:
    """The model, certain of more tokens at once."""
    torch.manual_seed(seed)
    data = bytes_moe.tokens(bytes_moe.text(held_out=False))
    texts = torch.cat([answered(model, _windows(data, 64, _PROMPT)) for _ in range(samples // 64)])
    print(f"{len(texts)} prompts answered", flush=True)
    model.train()
    for step, _, take in _timed("distilling", minutes, model, rate):
        text = texts[torch.randint(len(texts), (batch,))]
        start = _PROMPT + BLOCK * torch.randint((WINDOW - _PROMPT) // BLOCK, (batch, 1))
        loss = certainty_loss(model, text, start)
        take(loss)
        if step % 50 == 49:
            print(f"step {step + 1}, loss {loss.item():.3f}", flush=True)
    return model.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=7, help="of training; 0 takes the teacher that is there")
    parser.add_argument("--distil", type=float, default=3, help="minutes of distillation, after the answers")
    parser.add_argument("--samples", type=int, default=384, help="prompts that the teacher answers")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rate", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=FOLDER)
    given = parser.parse_args()
    unseen = bytes_moe.tokens(bytes_moe.text(held_out=True))
    if given.minutes:
        model = trained(given.minutes, given.batch, given.rate, given.seed)
        write_half(model, given.out / "masked_bytes_teacher.safetensors")
    else:
        from accelpass.models_zoo.masked.model import masked

        model = masked("masked_bytes_teacher")
    print(f"a masked byte of held-out text: {judged(model, unseen):.3f} nats", flush=True)
    if given.distil:
        model = distilled(model, given.distil, given.samples, given.batch, given.rate / 8, given.seed)
        write_half(model, given.out / "masked_bytes.safetensors")
        print(f"after distillation: {judged(model, unseen):.3f} nats")


if __name__ == "__main__":
    main()
