"""transformers' LLaVA in small: a CLIP tower with a class token, a projector, and a Llama of four layers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from accelpass.models_zoo.canvases.questions import CELL, END, IMAGE, PAD, PATCH, START, WORDS, Processor
from accelpass.models_zoo.packaged import read_half

FILE = Path(__file__).parents[1] / "weights" / "canvases_llava.safetensors"
TOWER: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 5, "num_attention_heads": 4, "image_size": CELL,
    "patch_size": PATCH, "num_channels": 1,
}  # fmt: skip
TEXT: dict[str, Any] = {
    "hidden_size": 96, "intermediate_size": 192, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2,
    "vocab_size": len(WORDS), "max_position_embeddings": 512, "pad_token_id": PAD, "bos_token_id": START, "eos_token_id": END,
}  # fmt: skip


def llava(trained: bool = True) -> Any:
    """The model, in eval mode.

    Raises:
        ZooError: its weights are not there; says how to make them.
    """
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    config = LlavaConfig(vision_config=CLIPVisionConfig(**TOWER), text_config=LlamaConfig(**TEXT), image_token_id=IMAGE)
    model = LlavaForConditionalGeneration(config)
    if trained:
        read_half(model, FILE, "accelpass.models_zoo.canvases.train")
    return model.eval()


def load(dtype: torch.dtype) -> tuple[Any, Processor]:
    """The model for the zoo, and its processor."""
    return llava().to(dtype), Processor()
