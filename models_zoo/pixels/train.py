"""Trains the model of pixels: ``python -m accelpass.models_zoo.pixels.train --minutes 8``, on one core.

AdamW with a cosine learning rate over the time given; a tenth of the classes is dropped, images are shifted sideways, and some pixels that
the model reads are wrong by up to two greys, so that it does not learn 1,437 images by heart. An average of the weights is kept.
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

from accelpass.models_zoo.packaged import write_half
from accelpass.models_zoo.pixels import model as pixels

_WRONG = 0.08


def loss_of(model: Any, first: Tensor, greys: Tensor, read: Tensor | None = None) -> Tensor:
    """Nats a pixel of images ``(n, 64)`` after their first tokens ``(n, 1)``; ``read``: what the model reads in their place."""
    given = torch.cat([first, (greys if read is None else read)[:, :-1]], 1)
    return F.cross_entropy(model(given, use_cache=False).logits.flatten(0, 1), greys.flatten())


def trained(minutes: float, batch: int, rate: float, seed: int) -> Any:
    """The model in eval mode after so many minutes."""
    torch.manual_seed(seed)
    known, classes = pixels.images(held_out=False)
    unseen, truth = pixels.images(held_out=True)
    model = pixels.untrained().train()
    average = {name: value.detach().clone() for name, value in model.state_dict().items()}
    optimizer = torch.optim.AdamW(model.parameters(), rate, betas=(0.9, 0.98), weight_decay=0.1)
    start, done = time.monotonic(), 0
    with Progress() as progress:
        bar = progress.add_task("training", total=1.0)
        while (share := (time.monotonic() - start) / (60 * minutes)) < 1:
            for group in optimizer.param_groups:
                group["lr"] = rate * min(1.0, (done + 1) / 50) * (0.02 + 0.98 * (1 + math.cos(math.pi * share)) / 2)
            at = torch.randint(len(known), (batch,))
            greys = _shifted(known[at])
            first = pixels.prompts(classes[at])
            first = torch.where(torch.rand(batch, 1) < 0.1, pixels.NO_CLASS, first)
            off = torch.randint(-2, 3, greys.shape) * (torch.rand(greys.shape) < _WRONG)
            loss = loss_of(model, first, greys, (greys + off).clamp(0, pixels.GREYS - 1))
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            done += 1
            decay = min(0.997, done / (done + 10))
            for name, value in model.state_dict().items():
                average[name].lerp_(value, 1 - decay)
            if done % 100 == 0:
                with torch.no_grad():
                    held = loss_of(model, pixels.prompts(truth), unseen).item()
                said = f"step {done}, loss {loss.item():.3f}, held out {held:.3f}"
                print(f"{said}, {time.monotonic() - start:.0f} s", flush=True)
                progress.update(bar, completed=share, description=said)
    model.load_state_dict(average)
    return model.eval()


def _shifted(greys: Tensor) -> Tensor:
    """Images ``(n, 64)``, a third of them a column to the left or to the right; what comes in is empty."""
    rows = F.pad(greys.view(-1, pixels.SIDE, pixels.SIDE), (1, 1))
    start = 1 + torch.randint(-1, 2, (len(greys), 1, 1)) * (torch.rand(len(greys), 1, 1) < 0.5)
    columns = start + torch.arange(pixels.SIDE)
    return rows.gather(2, columns.expand(-1, pixels.SIDE, -1)).flatten(1)


def drawn(model: Any, labels: Tensor, seed: int = 0) -> Tensor:
    """An image ``(n, 64)`` of each class."""
    torch.manual_seed(seed)
    how = {"do_sample": True, "top_k": 0, "max_new_tokens": pixels.PIXELS}
    made: Tensor = model.generate(pixels.prompts(labels), attention_mask=torch.ones(len(labels), 1).long(), **how)
    return made[:, 1:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=8)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rate", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=pixels.FILE)
    given = parser.parse_args()
    model = trained(given.minutes, given.batch, given.rate, given.seed)
    write_half(model, given.out)
    unseen, truth = pixels.images(held_out=True)
    with torch.no_grad():
        loss = loss_of(model, pixels.prompts(truth), unseen).item()
    labels = torch.arange(300) % pixels.CLASSES
    right = (pixels.read_as(drawn(model, labels)) == labels).float().mean().item()
    real = (pixels.read_as(unseen) == truth).float().mean().item()
    print(f"held-out pixels: {loss:.3f} nats; samples read rightly: {right:.1%} (real images: {real:.1%})")


if __name__ == "__main__":
    main()
