"""What ``accelpass search-steps`` and ``accelpass sample`` do with a diffusers pipeline."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from accelpass.cli.terminal import UsageMistake
from accelpass.models_zoo import ZOO

DIGITS = "digits-dit"


@dataclass
class Pipeline:
    """A pipeline that makes images of what it is asked for.

    Attributes:
        asked: class labels or prompts, one for each image.
    """

    pipe: Any
    asked: list[Any]
    steps: int
    guidance: float

    @property
    def model(self) -> torch.nn.Module:
        found: torch.nn.Module = self.pipe.transformer
        return found

    @property
    def scheduler(self) -> str:
        return type(self.pipe.scheduler).__name__

    def sample(self, model: Any, seed: int) -> Tensor:
        """Images ``(n, channels, height, width)`` in 0..1, made with ``model`` in the transformer's place."""
        own, self.pipe.transformer = self.pipe.transformer, model
        try:
            made = self.pipe(
                self.asked,
                guidance_scale=self.guidance,
                generator=torch.Generator().manual_seed(seed),
                num_inference_steps=self.steps,
                output_type="np",
            ).images
        finally:
            self.pipe.transformer = own
        return torch.from_numpy(made).permute(0, 3, 1, 2)


def load(name: str, asked: Sequence[str], steps: int, guidance: float, device: str) -> Pipeline:
    """The zoo's pipeline, or one of diffusers from a folder or the hub.

    Raises:
        UsageMistake: there is no such pipeline, or it has no transformer.
    """
    if name == DIGITS:
        from accelpass.models_zoo import digits

        labels = [int(a) for a in asked if a.isdigit()] if asked else list(range(digits.CLASSES))
        if len(labels) != len(asked or labels) or not all(0 <= n < digits.CLASSES for n in labels):
            raise UsageMistake(f"--ask {' '.join(asked)}: {DIGITS} draws the digits 0 to 9")
        return Pipeline(digits.pipeline().to(device), labels, steps, guidance)
    if name in ZOO:
        raise UsageMistake(
            f"{name} makes no images; {DIGITS} does, and so does a diffusers pipeline's folder or hub id"
        )
    try:
        from diffusers import DiffusionPipeline
    except ImportError as error:
        raise UsageMistake("pipelines need diffusers; type: pip install 'accelpass[diffusers]'") from error
    if not asked:
        raise UsageMistake("--ask: say what the images should show, once for each image")
    try:
        pipe = DiffusionPipeline.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise UsageMistake(f"{name} could not be loaded: {' '.join(str(error).split())[:300]}") from None
    if getattr(pipe, "transformer", None) is None:
        raise UsageMistake(f"{name} has no transformer (a UNet?); passes across steps need one")
    pipe.set_progress_bar_config(disable=True)
    return Pipeline(pipe.to(device), list(asked), steps, guidance)


@dataclass(frozen=True)
class Compared:
    """Images made with and without the passes, and what they cost."""

    dense: Tensor
    fast: Tensor
    dense_seconds: float
    fast_seconds: float
    psnr: float


def compare(made: Pipeline, options: dict[str, Any], seed: int, update: Callable[[str], None]) -> tuple[Compared, Any]:
    """The same images by plain torch.compile and by the passes; each is timed at its second run, in turns."""
    import accelpass

    lowering = options.get("lowering", "inductor")
    plain = torch.compile(made.model) if lowering == "inductor" else made.model
    fast = torch.compile(made.model, backend="accelpass", options=options)
    update("Compiling the plain model, and its images")
    dense = made.sample(plain, seed)
    update("Compiling each way of each block, and the images")
    images = made.sample(fast, seed)
    seconds = []
    for model in (plain, fast):
        update("Timing")
        started = time.perf_counter()
        made.sample(model, seed)
        seconds.append(time.perf_counter() - started)
    error = (dense - images).square().mean().clamp_min(1e-10)
    result = Compared(dense, images, seconds[0], seconds[1], float(-10 * torch.log10(error)))
    return result, accelpass.explain(fast)


def sheet(compared: Compared, target: Path) -> Path:
    """Both sets of images, one above the other, as a PNG."""
    from PIL import Image

    rows = [torch.cat(list(images), -1) for images in (compared.dense, compared.fast)]
    whole = torch.cat(rows, -2).clamp(0, 1).mul(255).round().to(torch.uint8)
    scale = max(1, 64 // compared.dense.shape[-1])
    whole = whole.repeat_interleave(scale, -1).repeat_interleave(scale, -2)
    pixels = whole.permute(1, 2, 0).numpy()
    Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels).save(target)
    return target.resolve()
