"""The digits: mosaics hold what their labels say, the judge reads unseen ones, and the metrics have known answers."""

from __future__ import annotations

import math
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from accelpass.models_zoo import ZooError, digits, train_digits
from benchmarks import digits_quality as quality
from benchmarks.digits_sheet import sheet

ROOT = Path(__file__).parent.parent


@pytest.fixture
def untrained(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The digits' pipeline around a small model of random weights: its shapes are right and its images are noise."""
    monkeypatch.setitem(digits.CONFIG, "num_layers", 1)
    real = digits.transformer
    torch.manual_seed(0)
    monkeypatch.setattr(digits, "transformer", lambda: real(trained=False))
    return digits.pipeline()


def near(value: float) -> Any:
    return pytest.approx(value, rel=1e-9, abs=1e-9)


def rows_of_corners(spread: Tensor, middle: Tensor) -> Tensor:
    """Rows whose mean is ``middle`` and whose covariance is ``diag(spread ** 2)`` exactly: a factor of n - 1 included."""
    corners = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0], dtype=torch.float64)] * len(spread))
    return corners * spread * math.sqrt((len(corners) - 1) / len(corners)) + middle


def test_specimens_are_split_and_none_is_lost() -> None:
    seen, seen_labels = digits.specimens(held_out=False)
    unseen, unseen_labels = digits.specimens(held_out=True)
    assert (len(seen), len(unseen)) == (len(seen_labels), len(unseen_labels)) == (1437, 360)
    assert seen.shape[1:] == (1, digits.CELL, digits.CELL)
    assert seen.min() >= -1 and seen.max() <= 1
    assert set(unseen_labels.tolist()) == set(range(digits.CLASSES))


def test_cells_of_a_mosaic_are_the_specimens_it_was_made_of() -> None:
    marks = torch.arange(digits.CLASSES, dtype=torch.float32)
    cells = marks[:, None, None, None].expand(-1, 1, digits.CELL, digits.CELL)
    labels = torch.tensor([3, 0, 9, 3])
    images = digits.mosaics_of(cells, torch.arange(digits.CLASSES), labels, torch.Generator())
    assert images.shape == (4, 1, digits.SIZE, digits.SIZE)
    assert torch.equal(images, labels[:, None, None, None].expand_as(images).float())


def test_cells_are_cut_row_by_row() -> None:
    places = torch.arange(2 * digits.SIZE**2, dtype=torch.float32).view(2, 1, digits.SIZE, digits.SIZE)
    cells = digits.cells_of(places)
    half = digits.CELL
    wanted = [image[:, y : y + half, x : x + half] for image in places for y in (0, half) for x in (0, half)]
    assert torch.equal(cells, torch.stack(wanted))


@pytest.mark.parametrize("held_out", [False, True])
def test_mosaics_hold_specimens_of_their_class_and_of_their_half(held_out: bool) -> None:
    pool, truth = digits.specimens(held_out)
    labels = torch.tensor([7, 1, 7])
    images = digits.mosaics(labels, held_out, torch.Generator().manual_seed(0))
    for cell, label in zip(digits.cells_of(images), labels.repeat_interleave(4), strict=True):
        same = (pool == cell).flatten(1).all(1)
        assert truth[same].tolist().count(label) == same.sum() >= 1


def test_the_judge_reads_cells_that_it_did_not_see() -> None:
    unseen, truth = digits.specimens(held_out=True)
    with torch.no_grad():
        assert (digits.classifier()(unseen).argmax(1) == truth).float().mean() > 0.97


def test_missing_weights_say_what_to_type(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(digits, "WEIGHTS", tmp_path)
    for load in (digits.classifier, digits.transformer):
        with pytest.raises(ZooError, match=r"is missing; type: python -m accelpass\.models_zoo\.train_digits"):
            load()


def test_a_pipeline_samples_alike_from_one_seed(untrained: Any) -> None:
    one, same, other = (digits.sample(untrained, [3, 9], 2, seed) for seed in (0, 0, 1))
    assert one.shape == (2, 1, digits.SIZE, digits.SIZE)
    assert one.min() >= 0 and one.max() <= 1
    assert torch.equal(one, same) and not torch.equal(one, other)


def test_accuracy_counts_cells() -> None:
    labels = quality.labels_of(20)
    images = quality.reals(held_out=False, per_class=20)
    assert quality.class_accuracy(images, labels) > 0.99
    assert quality.class_accuracy(images, (labels + 1) % 10) < 0.01
    # One cell in four shows the digit of the next class: three quarters are left.
    images[..., : digits.CELL, : digits.CELL] = images.roll(20, 0)[..., : digits.CELL, : digits.CELL]
    assert quality.class_accuracy(images, labels) == pytest.approx(0.75, abs=0.01)


def test_frechet_of_gaussians_is_what_their_moments_say() -> None:
    spread, wide = torch.tensor([1.0, 2.0, 0.5]).double(), torch.tensor([3.0, 2.0, 1.5]).double()
    origin, moved = torch.zeros(3).double(), torch.tensor([3.0, -4.0, 0.0]).double()
    one = rows_of_corners(spread, origin)
    assert quality.frechet_of_features(one, one) == near(0)
    assert quality.frechet_of_features(one, rows_of_corners(spread, moved)) == near(25)
    # Covariances that commute: the distance is that of the deviations, (3 - 1)^2 + (1.5 - 0.5)^2.
    assert quality.frechet_of_features(one, rows_of_corners(wide, moved)) == near(25 + 4 + 1)
    # A singular covariance has a square root like any other.
    assert quality.frechet_of_features(one * torch.tensor([1.0, 0.0, 0.0]), one) == near(4 + 0.25)


def test_frechet_of_covariances_that_do_not_commute_agrees_with_scipy() -> None:
    linalg = pytest.importorskip("scipy.linalg")
    generator = torch.Generator().manual_seed(0)
    one, two = (
        torch.randn(50, 6, generator=generator).double() @ torch.randn(6, 6, generator=generator).double()
        for _ in range(2)
    )
    first, second = torch.cov(one.T), torch.cov(two.T)
    root = torch.from_numpy(linalg.sqrtm((first @ second).numpy()).real)
    wanted = (one.mean(0) - two.mean(0)).square().sum() + (first + second - 2 * root).trace()
    assert quality.frechet_of_features(one, two) == pytest.approx(wanted.item(), rel=1e-9)
    assert quality.frechet_of_features(two, one) == pytest.approx(wanted.item(), rel=1e-9)


@pytest.mark.slow
def test_frechet_tells_real_images_from_others() -> None:
    reals, unlike = quality.reals(held_out=True), quality.reals(held_out=True).roll(3, 2)
    assert quality.frechet_distance(reals) == pytest.approx(0, abs=1e-6)
    floor = quality.real_figures()
    assert 0 < floor["frechet_same"] < floor["frechet"] < 0.1 * quality.frechet_distance(unlike)
    assert floor["class_accuracy"] > 0.97


def test_psnr() -> None:
    dense = torch.full((2, 1, digits.SIZE, digits.SIZE), 0.5)
    tenth, hundredth = dense + torch.tensor([0.1, 0.01]).view(2, 1, 1, 1)
    off = torch.stack([tenth, hundredth])
    assert quality.psnr(off, dense) == pytest.approx((20 + 40) / 2, abs=1e-4), "the mean of the images, not of errors"
    assert quality.psnr(dense, dense) == quality.IDENTICAL
    off[0] = dense[0]
    assert quality.psnr(off, dense) == pytest.approx((quality.IDENTICAL + 40) / 2, abs=1e-4)


def test_metrics_refuse_what_does_not_fit() -> None:
    images = torch.zeros(4, 1, digits.SIZE, digits.SIZE)
    with pytest.raises(ValueError, match="4 images came with 3 labels"):
        quality.class_accuracy(images, torch.zeros(3))
    with pytest.raises(ValueError, match=r"must be \[n, 1, 32, 32\]"):
        quality.class_accuracy(images[:, 0], torch.zeros(4))
    with pytest.raises(ValueError, match="PSNR needs pairs"):
        quality.psnr(images[:2], images)
    with pytest.raises(ValueError, match="two rows or more"):
        quality.frechet_of_features(torch.zeros(1, 64), torch.zeros(4, 64))


def test_a_sheet_has_a_row_for_each_class() -> None:
    pytest.importorskip("matplotlib")
    made, real = quality.reals(held_out=False, per_class=3), quality.reals(held_out=True, per_class=2)
    shown = sheet(made, real, "said")
    assert len(shown.axes) == 50
    assert [ax.get_ylabel() for ax in shown.axes if ax.get_ylabel()] == [str(digit) for digit in range(10)]
    (image,) = shown.axes[29].get_images()
    assert (image.get_array() == made[29, 0].numpy()).all()
    corners = [ax.get_position() for ax in shown.axes]
    assert min(min(c.x0, c.y0) for c in corners) >= 0 and max(max(c.x1, c.y1) for c in corners) <= 1


def test_unused_classes_are_zero_and_labels_are_not_dropped_by_the_model() -> None:
    model = digits.transformer(trained=False)
    train_digits._zero_unused_classes(model)
    tables = [m for m in model.modules() if type(m).__name__ == "LabelEmbedding"]
    assert len(tables) == digits.CONFIG["num_layers"]
    for table in tables:
        weight = table.embedding_table.weight
        assert weight[: digits.CLASSES].any(1).all() and weight[digits.NO_CLASS].any()
        assert not weight[digits.CLASSES : digits.NO_CLASS].any()
        assert table.dropout_prob == 0


@pytest.mark.slow
def test_training_writes_files_that_load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = ["--minutes", "0.05", "--epochs", "1", "--batch", "4", "--device", "cpu", "--out", str(tmp_path)]
    command = [sys.executable, "-m", "accelpass.models_zoo.train_digits", *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, env=dict(os.environ))
    assert done.returncode == 0, done.stderr
    said = re.search(r"'steps': (\d+), 'loss': (\d+\.\d+), 'images': (\d+)", done.stdout)
    assert said and int(said[1]) >= 1 and int(said[3]) == 4 * int(said[1]), done.stdout
    monkeypatch.setattr(digits, "WEIGHTS", tmp_path)
    assert digits.classifier()(torch.zeros(1, 1, digits.CELL, digits.CELL)).isfinite().all()
    assert digits.sample(digits.pipeline(), [1], 1, 0).isfinite().all()


@pytest.mark.skipif(
    not (digits.WEIGHTS / "digits_dit.safetensors").is_file(), reason="the transformer's weights are not here"
)
@pytest.mark.slow
def test_the_documented_example_runs(tmp_path: Path) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "digits-model.md").read_text(), re.S)
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert "torch.Size([4, 1, 32, 32])" in done.stdout
