"""Images from a diffusion transformer with ONNX Runtime alone: no torch, no diffusers, and no accelpass.

    import accelpass, torch
    from accelpass.models_zoo import digits
    call = {"hidden_states": torch.zeros(4, 1, 32, 32), "timestep": torch.zeros(4).long(), "class_labels": torch.zeros(4).long()}
    caching = {"name": "delta_cache", "start": 2, "interval": 2}  # or plan=..., what accelpass search-steps has found
    accelpass.export_onnx(digits.transformer(), (), "digits.onnx", [caching], kwargs=call, steps=20)

    python examples/onnx_denoise.py digits.json 3 7 --seed 1 -o digits.png

The files are those of ``accelpass.export_onnx`` with a pass that works across denoising steps. ``digits.json`` says which file
computes which step, and what goes from step to step. The scheduler is DDIM (arXiv 2010.02502, eq. 12 with eta = 0) with
classifier-free guidance, both halves in one batch.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

NO_CLASS, GUIDANCE, TRAINED_STEPS = 1000, 2.0, 1000


class Denoiser:
    """The files of one schedule, and what their steps keep.

    Args:
        manifest: the JSON beside the files.
        options: of all sessions; None for ONNX Runtime's own.
    """

    def __init__(self, manifest: str | Path, options: Any = None) -> None:
        path = Path(manifest)
        self.about = json.loads(path.read_text())
        self.sessions = {
            name: onnxruntime.InferenceSession(str(path.parent / name), options, providers=["CPUExecutionProvider"])
            for name in self.about["files"]
        }
        self.planned: dict[str, np.ndarray] = {}
        if self.about["operands"]:
            from safetensors.numpy import load_file

            self.planned = load_file(path.parent / self.about["operands"])
        self.reset()

    @property
    def steps(self) -> int:
        return len(self.about["steps"])

    @property
    def batch(self) -> int:
        """Rows of a call, both halves of guidance counted."""
        inputs = next(iter(self.about["files"].values()))
        return int(next(i["shape"][0] for i in inputs if i["from"] == "caller"))

    def reset(self) -> None:
        """The next call is the first of a run."""
        self.kept: dict[tuple[int, str], np.ndarray] = {}
        self.step = self.call = 0

    def __call__(self, **given: np.ndarray) -> np.ndarray:
        """The model's output at the next call of the schedule."""
        files = self.about["steps"][self.step]["calls"]
        name = files[self.call]
        feed = {}
        for one in self.about["files"][name]:
            if one["from"] == "caller":
                feed[one["name"]] = given[one["name"]]
            elif one["from"] == "plan":
                feed[one["name"]] = self.planned[f"{self.step}/{one['key']}"]
            else:
                feed[one["name"]] = self.kept[0 if one["first_call"] else self.call, one["key"]]
        session = self.sessions[name]
        names = [output.name for output in session.get_outputs()]
        made = dict(zip(names, session.run(None, feed), strict=True))
        for output, tensor in made.items():
            if output.startswith("present."):
                self.kept[self.call, output.removeprefix("present.")] = tensor
        self.call = (self.call + 1) % len(files)
        self.step += self.call == 0
        return made[self.about["outputs"][0]]


def noise_levels() -> np.ndarray:
    """Cumulative products of alpha for the squared-cosine schedule (arXiv 2102.09672, eq. 17)."""
    at = np.arange(TRAINED_STEPS + 1) / TRAINED_STEPS
    bar = np.cos((at + 0.008) / 1.008 * np.pi / 2) ** 2
    beta = np.minimum(1 - bar[1:] / bar[:-1], 0.999)
    return np.cumprod(1 - beta.astype(np.float32))


def sample(denoiser: Denoiser, labels: Sequence[int], latents: np.ndarray) -> np.ndarray:
    """Images ``(n, channels, height, width)`` in -1..1 from noise of that shape.

    Raises:
        ValueError: the files are for another number of images.
    """
    if 2 * len(labels) != denoiser.batch:
        raise ValueError(f"the files are for {denoiser.batch // 2} images at a time, and {len(labels)} were asked for")
    denoiser.reset()
    stride = TRAINED_STEPS // denoiser.steps
    alphas = noise_levels()
    classes = np.array([*labels, *[NO_CLASS] * len(labels)], dtype=np.int64)
    x = latents.astype(np.float32)
    for t in range((denoiser.steps - 1) * stride, -1, -stride):
        times = np.full(len(classes), t, dtype=np.int64)
        made = denoiser(hidden_states=np.concatenate([x, x]), timestep=times, class_labels=classes)
        wanted, free = np.split(made[:, : x.shape[1]], 2)
        noise = free + np.float32(GUIDANCE) * (wanted - free)
        now, then = alphas[t], alphas[t - stride] if t >= stride else np.float32(1)
        clean = (x - np.sqrt(1 - now) * noise) / np.sqrt(now)
        x = np.sqrt(then) * clean + np.sqrt(1 - then) * noise
    return x


def main() -> None:
    parser = argparse.ArgumentParser(description="Draw digits with ONNX Runtime.")
    parser.add_argument("manifest", help="the JSON that the export wrote")
    parser.add_argument("labels", nargs="+", type=int, help="digits to draw")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--size", type=int, default=32)
    parser.add_argument("-o", "--output", default="digits.png")
    given = parser.parse_args()
    latents = np.random.default_rng(given.seed).standard_normal((len(given.labels), 1, given.size, given.size))
    images = sample(Denoiser(given.manifest), given.labels, latents)
    from PIL import Image

    row = np.concatenate(list(images[:, 0]), 1).clip(-1, 1)
    Image.fromarray(((row + 1) * 127.5).round().astype(np.uint8)).resize((128 * len(images), 128)).save(given.output)
    print(f"{len(images)} images: {given.output}")


if __name__ == "__main__":
    main()
