"""Small random vision-language models, each as the installed transformers writes its family, and a text with images for each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor

IMAGE, START, END = 9, 10, 11
SIDE, PATCH = 24, 6
_TOWER: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4, "image_size": SIDE, "patch_size": PATCH,
    "initializer_range": 0.2,
}  # fmt: skip
_TEXT: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
    "vocab_size": 128, "max_position_embeddings": 256, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None,
    "initializer_range": 0.2,
}  # fmt: skip


@dataclass(frozen=True)
class Seen:
    """A model in eval mode, and a call of it.

    Attributes:
        given: for ``model(**given)``.
        blocks: of the tower that the language model reads.
        visual: tokens of the text that are places for image features, of all texts.
    """

    model: Any
    given: dict[str, Any]
    blocks: int
    visual: int


def _text(visual: int, token: int = IMAGE) -> Tensor:
    """Three words, the places between two marks, four words."""
    draw = torch.Generator().manual_seed(1)
    words = lambda n: torch.randint(16, 128, (1, n), generator=draw)  # noqa: E731
    marked = (torch.full((1, 1), START), torch.full((1, visual), token), torch.full((1, 1), END))
    return torch.cat([words(3), *marked, words(4)], 1)


def _pixels(*shape: int) -> Tensor:
    return torch.randn(*shape, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(2))


def _seen(model: Any, given: dict[str, Any], blocks: int, visual: int, token: int = IMAGE) -> Seen:
    ids = _text(visual, token)
    whole = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **given, "use_cache": False, "logits_to_keep": 1}
    return Seen(model.eval(), whole, blocks, visual)


def _llava() -> Seen:
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**_TOWER), text_config=transformers.LlamaConfig(**_TEXT), image_token_id=IMAGE
    )  # fmt: skip
    return _seen(transformers.LlavaForConditionalGeneration(config), {"pixel_values": _pixels(1)}, 2, 16)


def _llava_next() -> Seen:
    config = transformers.LlavaNextConfig(
        vision_config=transformers.CLIPVisionConfig(**_TOWER), text_config=transformers.LlamaConfig(**_TEXT), image_token_id=IMAGE,
        image_grid_pinpoints=[[SIDE, SIDE], [SIDE, 2 * SIDE]],
    )  # fmt: skip
    given = {"pixel_values": _pixels(1, 3), "image_sizes": torch.tensor([[SIDE, 2 * SIDE]])}
    # The whole image, then two tiles side by side with a mark behind each of four rows.
    return _seen(transformers.LlavaNextForConditionalGeneration(config), given, 2, 16 + 4 * (8 + 1))


def _pixtral() -> Seen:
    tower = transformers.PixtralVisionConfig(**_TOWER | {"head_dim": 8})
    config = transformers.LlavaConfig(
        vision_config=tower, text_config=transformers.MistralConfig(**_TEXT | {"sliding_window": None}), image_token_id=IMAGE,
        vision_feature_layer=-1, vision_feature_select_strategy="full",
    )  # fmt: skip
    given = {"pixel_values": _pixels(1), "image_sizes": torch.tensor([[SIDE, SIDE]])}
    return _seen(transformers.LlavaForConditionalGeneration(config), given, 3, 16)


def _video_llava() -> Seen:
    config = transformers.VideoLlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**_TOWER), text_config=transformers.LlamaConfig(**_TEXT),
        image_token_index=IMAGE + 3, video_token_index=IMAGE,
    )  # fmt: skip
    frames = {"pixel_values_videos": _pixels(1, 4)}
    # A video's frames keep their class tokens.
    return _seen(transformers.VideoLlavaForConditionalGeneration(config), frames, 2, 4 * 17)


def _paligemma() -> Seen:
    config = transformers.PaliGemmaConfig(
        vision_config=transformers.SiglipVisionConfig(**_TOWER | {"projection_dim": 32}),
        text_config=transformers.GemmaConfig(**_TEXT | {"head_dim": 8}), image_token_id=IMAGE, projection_dim=32, hidden_size=32,
    )  # fmt: skip
    seen = _seen(transformers.PaliGemmaForConditionalGeneration(config), {"pixel_values": _pixels(1)}, 3, 16)
    # Its processor marks the prefix, all of which sees all; without the marks transformers' own mask differs when it is traced.
    seen.given["token_type_ids"] = torch.zeros_like(seen.given["input_ids"])
    return seen


def _gemma3() -> Seen:
    text = transformers.Gemma3TextConfig(**_TEXT | {"head_dim": 8, "sliding_window": 8})
    config = transformers.Gemma3Config(
        vision_config=transformers.SiglipVisionConfig(**_TOWER), text_config=text, mm_tokens_per_image=4, image_token_id=IMAGE,
        boi_token_id=START, eoi_token_id=END,
    )  # fmt: skip
    seen = _seen(transformers.Gemma3ForConditionalGeneration(config), {"pixel_values": _pixels(1)}, 3, 4)
    seen.given["token_type_ids"] = (seen.given["input_ids"] == IMAGE).long()
    return seen


def _internvl() -> Seen:
    tower = transformers.InternVLVisionConfig(
        **_TOWER | {"image_size": [SIDE, SIDE], "patch_size": [PATCH, PATCH], "layer_scale_init_value": 1.0}
    )
    config = transformers.InternVLConfig(
        vision_config=tower, text_config=transformers.Qwen2Config(**_TEXT), image_token_id=IMAGE, downsample_ratio=0.5
    )
    return _seen(transformers.InternVLForConditionalGeneration(config), {"pixel_values": _pixels(1)}, 3, 4)


def _shuffled(name: str) -> Seen:
    tower = getattr(transformers, f"{name}VisionConfig")(**_TOWER)
    config = getattr(transformers, f"{name}Config")(
        vision_config=tower,
        text_config=transformers.LlamaConfig(**_TEXT),
        image_token_id=IMAGE,
        scale_factor=2,
        pad_token_id=0,
    )
    given = {"pixel_values": _pixels(1, 2), "pixel_attention_mask": torch.ones(1, 2, SIDE, SIDE, dtype=torch.long)}
    return _seen(getattr(transformers, f"{name}ForConditionalGeneration")(config), given, 3, 2 * 4)


def _packed(name: str, tower: dict[str, Any], text: dict[str, Any]) -> Seen:
    """Qwen's: patches of all images in one sequence, with positions of three axes."""
    sizes = {
        "patch_size": PATCH,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "depth": 3,
        "num_heads": 4,
        **tower,
    }
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
    config = getattr(transformers, f"{name}Config")(
        vision_config=sizes, text_config={**_TEXT, "rope_parameters": rope, **text}, image_token_id=IMAGE, video_token_id=IMAGE + 3,
        vision_start_token_id=START, vision_end_token_id=END,
    )  # fmt: skip
    pixels = torch.randn(16, 3 * 2 * PATCH * PATCH, generator=torch.Generator().manual_seed(2))
    given = {"pixel_values": pixels, "image_grid_thw": torch.tensor([[1, 4, 4]])}
    seen = _seen(getattr(transformers, f"{name}ForConditionalGeneration")(config), given, 3, 4)
    # As `generate` calls it: positions of three axes are counted on the host, from the kinds of tokens.
    kinds = (seen.given["input_ids"] == IMAGE).long()
    told = {"image_grid_thw": given["image_grid_thw"], "attention_mask": seen.given["attention_mask"]}
    seen.given["position_ids"], _ = seen.model.model.get_rope_index(seen.given["input_ids"], kinds, **told)
    return seen


_QWEN: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "out_hidden_size": 32}
MODELS: dict[str, Callable[[], Seen]] = {
    "LLaVA": _llava,
    "LLaVA-NeXT": _llava_next,
    "Pixtral (LLaVA)": _pixtral,
    "Video-LLaVA": _video_llava,
    "PaliGemma": _paligemma,
    "Gemma 3": _gemma3,
    "InternVL": _internvl,
    "Idefics3": lambda: _shuffled("Idefics3"),
    "SmolVLM": lambda: _shuffled("SmolVLM"),
    "Qwen2-VL": lambda: _packed("Qwen2VL", {"embed_dim": 32, "hidden_size": 32, "mlp_ratio": 2}, {}),
    "Qwen2.5-VL": lambda: _packed("Qwen2_5_VL", {**_QWEN, "window_size": 2 * PATCH, "fullatt_block_indexes": [2]}, {}),
    "Qwen3-VL": lambda: _packed(
        "Qwen3VL", {**_QWEN, "num_position_embeddings": 16, "deepstack_visual_indexes": [0, 1]}, {"head_dim": 8}
    ),
}
"""By the name that people call them."""


def build(name: str) -> Seen:
    """A model and a call, the same each time; what the caller draws afterwards is not moved."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return MODELS[name]()
