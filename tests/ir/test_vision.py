"""Vision towers are found however a model is written, and where their features enter a text; what is none is said."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    GemmaConfig,
    PaliGemmaConfig,
    PaliGemmaForConditionalGeneration,
    SiglipVisionConfig,
)

import accelpass
from accelpass.ir.analyses.structure.vision import PACKED, Vision, describe, vision
from accelpass.models_zoo import small
from tests.ir.test_shrink import captured
from tests.passes.vision_truth import compiled, tower
from tests.passes.visual_truth import asked, llava


def found(model: Any, **given: Any) -> Vision:
    program, _ = captured(lambda kwargs: model(**kwargs), given)
    made: Vision = program.analysis(vision)
    return made


@pytest.mark.parametrize("first", [0, 1, 3])
def test_a_plain_tower(first: int):
    program, _ = captured(tower(first=first), torch.randn(1, 3, 16, 16))
    (one,) = program.analysis(vision).towers
    assert (one.first, one.patches, one.grid, len(one.blocks)) == (first, 16, (4, 4), 3)


def test_a_llava(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TRANSFORMERS_DISABLE_TORCH_CHECK", "1")
    model, question = llava(), asked()
    with torch.no_grad():
        model(**question, use_cache=False)
    seen = found(model, **question, use_cache=False)
    (entry,) = seen.entries
    assert entry.how == "scatter" and entry.tower is seen.towers[0] and entry.projector[-1] is entry.features
    assert describe(seen) == [
        "model.vision_tower.encoder.layers: tower of 3 blocks over 16 patches (4x4), 1 tokens before",
        "model: features of model.vision_tower.encoder.layers enter by scatter",
    ]


def test_a_tower_without_a_class_token(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TRANSFORMERS_DISABLE_TORCH_CHECK", "1")
    sizes: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    config = PaliGemmaConfig(
        vision_config=SiglipVisionConfig(**sizes, image_size=24, patch_size=6, projection_dim=32),
        text_config=GemmaConfig(**sizes, head_dim=8, num_key_value_heads=2, vocab_size=128),
        image_token_id=9, projection_dim=32, hidden_size=32,
    )  # fmt: skip
    model, question = PaliGemmaForConditionalGeneration(config).eval(), asked()
    with torch.no_grad():
        model(**question, use_cache=False)
    seen = found(model, **question, use_cache=False)
    assert [(t.first, t.patches) for t in seen.towers] == [(0, 16)] and seen.entries[0].tower is seen.towers[0]


class Joined(nn.Module):
    """Puts an image in front of a text, as captioning models do."""

    def __init__(self) -> None:
        super().__init__()
        self.tower, self.text, self.widen = tower(), small.decoder(), nn.Linear(16, 32)

    def forward(self, ids: Tensor, pixels: Tensor) -> Any:
        x = self.tower.embedded(pixels)
        for block in self.tower.blocks:
            x = block(x)
        words = self.text.get_input_embeddings()(ids)
        return self.text(inputs_embeds=torch.cat([self.widen(x), words], 1), use_cache=False).logits


def test_an_image_in_front_of_a_text():
    program, _ = captured(Joined().eval(), torch.arange(6)[None], torch.randn(1, 3, 16, 16))
    seen: Vision = program.analysis(vision)
    assert [(e.how, e.mask, e.tower) for e in seen.entries] == [("join", None, seen.towers[0])]


class Packed(nn.Module):
    """Patches of all images in one sequence, each image seeing itself, as Qwen's towers have it."""

    def __init__(self) -> None:
        super().__init__()
        self.tower = tower(first=0)

    def forward(self, pixels: Tensor) -> Tensor:
        x = self.tower.embedded(pixels).flatten(0, 1)
        for block in self.tower.blocks:
            x = block.mlp(x + block.proj(self.mixed(block, x)))
        return self.tower.norm(x)

    def mixed(self, block: nn.Module, x: Tensor) -> Tensor:
        parts = zip(*(t.split(16, 2) for t in block.heads_of(x[None])), strict=True)
        seen = torch.cat([F.scaled_dot_product_attention(*part) for part in parts], 2)
        return seen.transpose(1, 2).reshape(x.shape)


class Alone(Packed):
    """Each patch by itself."""

    def mixed(self, block: nn.Module, x: Tensor) -> Tensor:
        return block.up(x)[:, :16]


def test_packed_patches_are_no_tower():
    program, _ = captured(Alone().eval(), torch.randn(2, 3, 16, 16))
    seen: Vision = program.analysis(vision)
    assert not seen.towers and "is not (images, tokens, channels)" in next(iter(seen.missed.values()))


def test_a_tower_of_packed_patches_is_found_and_left_alone():
    program, _ = captured(Packed().eval(), torch.randn(2, 3, 16, 16))
    (found_tower,) = program.analysis(vision).towers
    assert (found_tower.is_packed, len(found_tower.blocks), found_tower.patches) == (True, 3, 32)
    model, pixels = Packed().eval(), torch.randn(2, 3, 16, 16)
    fast = compiled(model, [{"name": "tome", "merge": 2}])
    with torch.no_grad():
        assert torch.allclose(fast(pixels), model(pixels), atol=1e-5)
    assert PACKED in accelpass.explain(fast).passes["tome"].skipped.values()


@pytest.mark.parametrize("images", [2, 28])
def test_a_sequence_in_the_first_dimension_is_no_tower(images: int):
    """Also where there are as many images as tokens."""
    program, _ = captured(small.piece_tokenizer(), torch.randn(images, 3, 24, 24))
    seen: Vision = program.analysis(vision)
    assert not seen.towers and "the sequence is the first dimension" in next(iter(seen.missed.values()))


def test_a_denoiser_has_no_tower():
    model = small.denoiser()
    given = {"hidden_states": torch.randn(2, 4, 8, 8), "timestep": torch.ones(2), "class_labels": torch.tensor([1, 2])}
    seen = found(model, **given, return_dict=False)
    assert not seen.towers and "depend on a condition" in next(iter(seen.missed.values()))
