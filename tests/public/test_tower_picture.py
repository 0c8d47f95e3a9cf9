"""What becomes of an image's patches in a tower, as a picture: dropped ones are dark, merged ones have one colour."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import accelpass
from accelpass.api.lookup import tensors_of
from accelpass.backends.runtime.survivors import last_of
from accelpass.models_zoo import small
from accelpass.view.pictures.tower_picture import figure, painted
from tests.passes.vision_truth import compiled
from tests.passes.visual_truth import answered, asked, llava


def test_merged_patches_are_one_and_dropped_ones_dark() -> None:
    image = np.arange(16 * 3, dtype=float).reshape(4, 4, 3) / 48
    place = np.array([[0, 1], [1, -1]])
    made = painted(image, place)
    assert np.array_equal(made[:2, :2], image[:2, :2]) and np.array_equal(made[2:, 2:], 0.25 * image[2:, 2:])
    mean = np.stack([image[:2, 2:], image[2:, :2]]).mean((0, 1, 2))
    assert np.allclose(made[:2, 2:], mean) and np.allclose(made[2:, :2], mean)


def test_tome_tells_which_patches_became_one(tmp_path: Path) -> None:
    model, images = small.tower(), torch.randn(2, 3, 24, 24, generator=torch.Generator().manual_seed(0))
    fast = compiled(model, [{"name": "tome", "merge": 3}])
    with torch.no_grad():
        fast(images)
    found = last_of(tensors_of(fast), patches=True)
    assert [tuple(one.kept.shape) for one in found] == [(2, 16), (2, 16)]
    for image in range(2):
        assert [len(one.kept[image].unique()) for one in found] == [13, 10]
        first, second = (one.kept[image] for one in found)
        for row in first.unique():  # what is one stays one
            assert len(second[first == row].unique()) == 1
    assert not accelpass.surviving_tokens(fast)
    made = accelpass.draw_tower(fast, images, tmp_path / "merged.png")
    assert made.read_bytes().startswith(b"\x89PNG")
    titles = [ax.get_title(loc="left").split("   ")[0] for ax in figure(found, images).axes]
    assert titles == ["13 of 16", "13 of 16", "10 of 16", "10 of 16"]
    with pytest.raises(accelpass.AccelpassError, match="read 2 images of 16 patches, and 1 are given"):
        accelpass.draw_tower(fast, images[:1], tmp_path / "merged.png")


def test_flowcut_tells_which_patches_left_layer_by_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRANSFORMERS_DISABLE_TORCH_CHECK", "1")
    model, question = llava(num_hidden_layers=6), asked()
    _, fast = answered(model, question, {"name": "flowcut", "keep": 0.25, "entropy": 0.0})
    found = last_of(tensors_of(fast), patches=True)
    kept = [set((one.kept[0] >= 0).nonzero().flatten().tolist()) for one in found]
    assert [len(k) for k in kept] == [8, 4] and kept[1] < kept[0]
    for one in found:  # rows are counted behind the class token, in the order of the patches
        assert one.kept[0][one.kept[0] >= 0].tolist() == list(range(1, 1 + int((one.kept[0] >= 0).sum())))
    assert "vision_tower" in found[0].path


def test_nothing_happened_is_said(tmp_path: Path) -> None:
    fast = compiled(small.tower(), [])
    with torch.no_grad():
        fast(torch.randn(1, 3, 24, 24))
    with pytest.raises(accelpass.AccelpassError, match="nothing to draw"):
        accelpass.draw_tower(fast, torch.zeros(1, 3, 24, 24), tmp_path / "merged.png")
