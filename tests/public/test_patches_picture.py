"""Which patches of an image the language model read, as a picture."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import accelpass
from accelpass.view.pictures.patches_picture import figure, kept_patches
from accelpass.view.surviving import SurvivingTokens
from tests.passes.visual_truth import IMAGE, asked, generated, llava


@pytest.mark.slow
def test_patches_that_went_on_are_bright(tmp_path: Path) -> None:
    model, question = accelpass.one_graph(llava()), asked(2, images=2)
    _, fast = generated(model, question, {"name": "hired", "keep": 0.25})
    is_patch = question["input_ids"][1] == IMAGE
    (chose,) = accelpass.surviving_tokens(fast)
    kept = kept_patches(chose, is_patch, 2, sequence=1)
    assert kept.shape == (2, 4, 4) and kept.sum(axis=(1, 2)).tolist() == [4, 4]
    went_on = set(chose.kept[1]) & set(is_patch.nonzero().flatten().tolist())
    assert kept.sum() == len(went_on)
    made = accelpass.draw_patches(fast, question["pixel_values"][2:], is_patch, tmp_path / "kept.png", sequence=1)
    assert made.read_bytes().startswith(b"\x89PNG")
    ax = figure([chose], question["pixel_values"][2:], is_patch, sequence=1).axes[0]
    pixels = ax.images[0].get_array()
    dark = pixels.reshape(4, 6, 4, 6, 3).max(axis=(1, 3, 4))
    assert (dark[~kept[0]] <= 0.25 + 1e-6).all() and ax.get_title(loc="left").startswith("4 of 16")
    with pytest.raises(accelpass.AccelpassError, match="32 places for patches of 3 images are no square grids"):
        accelpass.draw_patches(fast, torch.zeros(3, 3, 24, 24), is_patch, tmp_path / "kept.png")
    with pytest.raises(accelpass.AccelpassError, match=r"\.png"):
        accelpass.draw_patches(fast, question["pixel_values"], is_patch, tmp_path / "kept.gif")


def test_another_prompt_is_refused() -> None:
    with pytest.raises(accelpass.AccelpassError, match="had 9 tokens, and is_patch tells of 4"):
        kept_patches(SurvivingTokens("model.layers.1", 9, ((0, 1),)), torch.ones(4, dtype=torch.bool), 1)


@pytest.mark.slow
def test_nothing_dropped_is_said(tmp_path: Path) -> None:
    _, fast = generated(accelpass.one_graph(llava()), asked())
    with pytest.raises(accelpass.AccelpassError, match="nothing to draw"):
        accelpass.draw_patches(fast, torch.zeros(1, 3, 24, 24), torch.ones(16, dtype=torch.bool), tmp_path / "kept.png")
