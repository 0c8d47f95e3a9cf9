"""Trains the digits models (``digits``): ``python -m accelpass.models_zoo.train_digits --minutes 60``.

The diffusion transformer learns to predict the noise in mosaics (1000 steps, cosine schedule, a tenth of the labels
dropped), with AdamW, a cosine learning rate over the time given, and an average of the weights, which is what is kept.
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress
from safetensors.torch import save_file
from torch.nn import functional as F

from accelpass.models_zoo import digits


def train_classifier(epochs: int) -> tuple[digits.CellClassifier, float]:
    """The classifier, and its accuracy on specimens that it did not see."""
    torch.manual_seed(0)
    cells, labels = digits.specimens(held_out=False)
    unseen, truth = digits.specimens(held_out=True)
    model = digits.CellClassifier()
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    for _ in range(epochs):
        for batch in torch.randperm(len(cells)).split(64):
            loss = F.cross_entropy(model(_shifted(cells[batch])), labels[batch], label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        schedule.step()
    model.eval()
    with torch.no_grad():
        return model, (model(unseen).argmax(1) == truth).float().mean().item()


def _shifted(cells: torch.Tensor) -> torch.Tensor:
    down, right = torch.randint(-1, 2, (2,)).tolist()
    return torch.roll(cells, (down, right), (2, 3)) + 0.1 * torch.randn_like(cells)


def train_transformer(
    minutes: float, batch: int, device: str, seed: int, rate: float, out: Path
) -> tuple[Any, dict[str, float]]:
    """The model with averaged weights and what its training came to; what there is so far is written to ``out``."""
    from diffusers import DDIMScheduler

    torch.manual_seed(seed)
    cells, labels = digits.specimens(held_out=False)
    model = digits.transformer(trained=False).train().to(device)
    _zero_unused_classes(model)
    average = {name: value.detach().clone() for name, value in model.state_dict().items()}
    noisy = DDIMScheduler(**digits.SCHEDULE)
    optimizer = torch.optim.AdamW(model.parameters(), rate, betas=(0.9, 0.99), weight_decay=0.0)
    compiled = torch.compile(model)
    generator = torch.Generator().manual_seed(seed)
    start, done, running = time.monotonic(), 0, math.nan
    with Progress() as progress:
        bar = progress.add_task("training", total=1.0)
        while (share := (time.monotonic() - start) / (60 * minutes)) < 1:
            for group in optimizer.param_groups:
                group["lr"] = rate * min(1.0, (done + 1) / 200) * (0.02 + 0.98 * (1 + math.cos(math.pi * share)) / 2)
            classes = torch.randint(digits.CLASSES, (batch,), generator=generator)
            clean = digits.mosaics_of(cells, labels, classes, generator).to(device)
            steps = torch.randint(1000, (batch,), generator=generator).to(device)
            noise = torch.randn(clean.shape, generator=generator).to(device)
            dropped = torch.rand(batch, generator=generator) < 0.1
            wanted = torch.where(dropped, torch.tensor(digits.NO_CLASS), classes).to(device)
            with torch.autocast(device, torch.bfloat16):
                predicted = compiled(noisy.add_noise(clean, noise, steps), steps, wanted, return_dict=False)[0]
            loss = F.mse_loss(predicted.float(), noise)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            done += 1
            running = loss.item() if done == 1 else 0.99 * running + 0.01 * loss.item()
            decay = min(0.9995, (1 + done) / (10 + done))
            with torch.no_grad():
                for name, value in model.state_dict().items():
                    average[name].lerp_(value, 1 - decay)
            progress.update(bar, completed=share, description=f"training, step {done}, loss {running:.4f}")
            if done % 200 == 0:
                print(f"step {done} loss {running:.4f} {time.monotonic() - start:.0f} s", flush=True)
                save_file(average, out)
    model.load_state_dict(average)
    return model.eval().cpu(), {"steps": done, "loss": running, "images": done * batch}


def _zero_unused_classes(model: torch.nn.Module) -> None:
    """Rows of classes that do not exist stay zero, so that the file packs well; the labels are dropped here, not by
    the model (``LabelEmbedding.token_drop``), so that "no class" is a label like any other."""
    module: Any
    for module in model.modules():
        if type(module).__name__ == "LabelEmbedding":
            module.dropout_prob = 0.0
            with torch.no_grad():
                module.embedding_table.weight[digits.CLASSES : digits.NO_CLASS] = 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=60, help="time for the transformer")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rate", type=float, default=1.2e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--epochs", type=int, default=40, help="of the classifier; 0 leaves it as it is")
    parser.add_argument("--out", type=Path, default=digits.WEIGHTS)
    given = parser.parse_args()
    given.out.mkdir(exist_ok=True)
    if given.epochs:
        judge, accuracy = train_classifier(given.epochs)
        print(f"classifier: {accuracy:.1%} of the unseen cells")
        save_file(judge.state_dict(), given.out / "digits_classifier.safetensors")
    file = given.out / "digits_dit.safetensors"
    model, figures = train_transformer(given.minutes, given.batch, given.device, given.seed, given.rate, file)
    save_file(model.state_dict(), file)
    print(f"transformer: {figures}")


if __name__ == "__main__":
    main()
