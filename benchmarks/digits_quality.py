"""How good images of the digits model are: classes that a classifier reads, Fréchet distance to real ones, PSNR.

    python -m benchmarks.digits_quality --per-class 20 --steps 50

Images are ``[n, 1, 32, 32]`` in 0..1, as ``digits.sample`` makes them. Accuracy and Fréchet distance say whether a method
still makes good images, PSNR how far it went from those that the dense model makes from the same noise.
"""

from __future__ import annotations

import argparse
import json

import torch
from torch import Tensor

from accelpass.models_zoo import digits

PER_CLASS = 100
"""Real mosaics of each class in :func:`reals`. A Fréchet distance falls with the number of images, so that distances
compare only between equal numbers of them."""
IDENTICAL = 100.0
"""dB at most: an image that is the same bit for bit would make any mean infinite."""


def class_accuracy(images: Tensor, labels: Tensor) -> float:
    """Share of cells that the classifier reads as the label of their image."""
    if len(labels) != len(images):
        raise ValueError(f"{len(images)} images came with {len(labels)} labels; each image has one")
    with torch.no_grad():
        read = digits.classifier()(_cells(images)).argmax(1)
    return (read == labels.repeat_interleave(digits.CELLS**2)).double().mean().item()


def frechet_distance(images: Tensor, reference: Tensor | None = None) -> float:
    """Squared Fréchet distance between Gaussians on the classifier's features of the cells, as FID is on Inception's.

    Args:
        reference: what ``images`` are compared with; :func:`reals` that are held out of training unless given.
    """
    return frechet_of_features(features(images), features(reals(held_out=True) if reference is None else reference))


def frechet_of_features(one: Tensor, two: Tensor) -> float:
    """Squared Fréchet distance between the Gaussians of two sets of rows ``[n, width]``."""
    for rows in (one, two):
        if rows.dim() != 2 or len(rows) < 2:
            raise ValueError(f"features are {tuple(rows.shape)}; a covariance needs [n, width] with two rows or more")
    one, two = one.double(), two.double()
    first, second = (torch.atleast_2d(torch.cov(rows.T)) for rows in (one, two))
    # The trace of (first @ second)^(1/2) through symmetric matrices alone: no complex roots, singular ones allowed.
    values, vectors = torch.linalg.eigh(first)
    root = vectors * values.clamp_min(0).sqrt() @ vectors.T
    shared = torch.linalg.eigvalsh(root @ second @ root).clamp_min(0).sqrt().sum()
    apart = (one.mean(0) - two.mean(0)).square().sum()
    return max(0.0, (apart + first.trace() + second.trace() - 2 * shared).item())


def psnr(images: Tensor, dense: Tensor) -> float:
    """Mean over images of the peak signal-to-noise ratio in dB against ``dense``, each at most :data:`IDENTICAL`."""
    if images.shape != dense.shape:
        raise ValueError(f"images are {tuple(images.shape)} and dense ones {tuple(dense.shape)}; PSNR needs pairs")
    errors = (images.double() - dense.double()).square().flatten(1).mean(1)
    return (-10 * errors.log10()).clamp_max(IDENTICAL).mean().item()


def features(images: Tensor) -> Tensor:
    """The classifier's features ``[4 n, 64]`` of the cells."""
    with torch.no_grad():
        return digits.classifier().features(_cells(images))


def reals(held_out: bool, per_class: int = PER_CLASS, seed: int = 0) -> Tensor:
    """Real mosaics in 0..1, of each class as many, class by class."""
    generator = torch.Generator().manual_seed(seed)
    return (digits.mosaics(labels_of(per_class), held_out, generator) + 1) / 2


def labels_of(per_class: int) -> Tensor:
    """0, 0, ..., 9, 9: each class as often."""
    return torch.arange(digits.CLASSES).repeat_interleave(per_class)


def real_figures(per_class: int = PER_CLASS) -> dict[str, float]:
    """What real images come to: no method can be expected to do better.

    ``frechet`` is the distance of what the model was trained on to what it was not, which is where a perfect model of the
    training data would be; ``frechet_same`` that of two draws of held-out specimens, which is chance alone.
    """
    unseen = reals(held_out=True, per_class=per_class, seed=1)
    return {
        "class_accuracy": class_accuracy(unseen, labels_of(per_class)),
        "frechet": frechet_distance(reals(held_out=False, per_class=per_class)),
        "frechet_same": frechet_distance(unseen),
    }


def _cells(images: Tensor) -> Tensor:
    """The cells in -1..1, as the classifier knows them."""
    if images.dim() != 4 or images.shape[1:] != (1, digits.SIZE, digits.SIZE):
        raise ValueError(f"images are {tuple(images.shape)}; they must be [n, 1, {digits.SIZE}, {digits.SIZE}]")
    return digits.cells_of(images) * 2 - 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--per-class", type=int, default=10, help="images of each class")
    parser.add_argument("--steps", type=int, default=20, help="of DDIM")
    parser.add_argument("--guidance", type=float, default=digits.GUIDANCE)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    labels = labels_of(given.per_class)
    images = digits.sample(digits.pipeline(), labels.tolist(), given.steps, given.seed, given.guidance)
    rows = {
        "model": {"class_accuracy": class_accuracy(images, labels), "frechet": frechet_distance(images)},
        "real": real_figures(given.per_class),
    }
    for name, row in rows.items():
        print(json.dumps({"name": name, **{key: round(value, 4) for key, value in row.items()}}))


if __name__ == "__main__":
    main()
