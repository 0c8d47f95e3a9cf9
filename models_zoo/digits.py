"""A class-conditional diffusion transformer of handwritten digits, trained in this repository (``train_digits``).

An image is a mosaic of 2 x 2 cells; each cell shows another specimen of the class's digit, from scikit-learn's digits
(8 x 8 pixels each, enlarged to 16 x 16). The model is diffusers' ``DiTTransformer2DModel`` on pixels: 32 x 32 with
patches of 2, so 256 tokens. Class 1000 is "no class", as ``DiTPipeline`` wants it for classifier-free guidance.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn import functional as F

from accelpass.models_zoo.packaged import ZooError

if TYPE_CHECKING:
    import numpy as np
    from diffusers import DiTPipeline, DiTTransformer2DModel

CELL, CELLS, CLASSES, NO_CLASS = 16, 2, 10, 1000
SIZE = CELL * CELLS
GUIDANCE = 2.0
WEIGHTS = Path(__file__).parent / "weights"
CONFIG: dict[str, Any] = {
    "num_attention_heads": 3,
    "attention_head_dim": 32,
    "in_channels": 1,
    "out_channels": 1,
    "num_layers": 10,
    "sample_size": SIZE,
    "patch_size": 2,
    "num_embeds_ada_norm": NO_CLASS,
    "norm_type": "ada_norm_zero",
    "norm_elementwise_affine": False,
}
SCHEDULE = {"num_train_timesteps": 1000, "beta_schedule": "squaredcos_cap_v2", "clip_sample": False}


class CellClassifier(nn.Module):
    """Tells which digit a cell shows. ``features`` is what the Fréchet distance is taken on: [cells, 64]."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, 24, 3, padding=1)
        self.second = nn.Conv2d(24, 48, 3, padding=1)
        self.hidden = nn.Linear(48 * (CELL // 4) ** 2, 64)
        self.out = nn.Linear(64, CLASSES)

    def features(self, cells: torch.Tensor) -> torch.Tensor:
        x = F.max_pool2d(F.relu(self.first(cells)), 2)
        x = F.max_pool2d(F.relu(self.second(x)), 2)
        return F.relu(self.hidden(x.flatten(1)))

    def forward(self, cells: torch.Tensor) -> torch.Tensor:
        return self.out(self.features(cells))


def specimens(held_out: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Cells ``[n, 1, 16, 16]`` in -1..1 and their digits ``[n]``; every fifth specimen is held out of training."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ZooError("the digits come with scikit-learn; type: pip install 'accelpass[bench]'") from error
    data = load_digits()
    chosen = (torch.arange(len(data.target)) % 5 == 0) == held_out
    small = torch.from_numpy(data.images).float()[chosen].unsqueeze(1) / 8 - 1
    cells = F.interpolate(small, size=(CELL, CELL), mode="bicubic", align_corners=False).clamp(-1, 1)
    return cells, torch.from_numpy(data.target)[chosen].long()


def mosaics(labels: torch.Tensor, held_out: bool, generator: torch.Generator) -> torch.Tensor:
    """Real images ``[n, 1, 32, 32]`` of the digits in ``labels``."""
    cells, digits = specimens(held_out)
    return mosaics_of(cells, digits, labels, generator)


def mosaics_of(
    cells: torch.Tensor, digits: torch.Tensor, labels: torch.Tensor, generator: torch.Generator
) -> torch.Tensor:
    images = torch.empty(len(labels), CELLS**2, 1, CELL, CELL)
    for digit in range(CLASSES):
        rows = (labels == digit).nonzero().flatten()
        pool = (digits == digit).nonzero().flatten()
        picks = torch.randint(len(pool), (len(rows), CELLS**2), generator=generator)
        images[rows] = cells[pool[picks]]
    grid = images.unflatten(1, (CELLS, CELLS)).permute(0, 3, 1, 4, 2, 5)
    return grid.reshape(len(labels), 1, SIZE, SIZE)


def cells_of(images: torch.Tensor) -> torch.Tensor:
    """The cells ``[4 n, 1, 16, 16]`` of images ``[n, 1, 32, 32]``, image by image."""
    parts = images.unflatten(2, (CELLS, CELL)).unflatten(4, (CELLS, CELL))
    return parts.permute(0, 2, 4, 1, 3, 5).reshape(-1, 1, CELL, CELL)


class PixelSpace(nn.Module):
    """Stands where a pipeline wants a VAE: the model works on pixels."""

    def __init__(self) -> None:
        super().__init__()
        from types import SimpleNamespace

        self.config = SimpleNamespace(scaling_factor=1.0)
        # A pipeline asks each of its modules where it is; this one has no weight that would tell.
        self.register_buffer("place", torch.empty(0), persistent=False)
        self.place: torch.Tensor

    @property
    def device(self) -> torch.device:
        return self.place.device

    @property
    def dtype(self) -> torch.dtype:
        return self.place.dtype

    def decode(self, latents: torch.Tensor) -> Any:
        from types import SimpleNamespace

        return SimpleNamespace(sample=latents)


def transformer(trained: bool = True) -> DiTTransformer2DModel:
    from diffusers import DiTTransformer2DModel

    model = DiTTransformer2DModel(**CONFIG)
    if trained:
        model.load_state_dict(_weights("digits_dit"))
    return model.eval()


def load(dtype: torch.dtype) -> tuple[DiTTransformer2DModel, None]:
    """The transformer for the zoo; it has no tokenizer."""
    return transformer().to(dtype), None


def classifier() -> CellClassifier:
    model = CellClassifier()
    model.load_state_dict(_weights("digits_classifier"))
    return model.eval()


def pipeline(scheduler: Any = None) -> DiTPipeline:
    """diffusers' own pipeline around the trained model; DDIM unless another scheduler is given."""
    from diffusers import DDIMScheduler, DiTPipeline

    pipe = DiTPipeline(transformer(), PixelSpace(), DDIMScheduler(**SCHEDULE) if scheduler is None else scheduler)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def sample(pipe: DiTPipeline, labels: list[int], steps: int, seed: int, guidance: float = GUIDANCE) -> torch.Tensor:
    """Images ``[n, 1, 32, 32]`` in 0..1."""
    generator = torch.Generator().manual_seed(seed)
    made = pipe(labels, guidance_scale=guidance, generator=generator, num_inference_steps=steps, output_type="np")
    images: np.ndarray = made.images
    return torch.from_numpy(images).permute(0, 3, 1, 2)


def _weights(name: str) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    file = WEIGHTS / f"{name}.safetensors"
    if not file.is_file():
        raise ZooError(f"{file} is missing; type: python -m accelpass.models_zoo.train_digits")
    return load_file(file)
