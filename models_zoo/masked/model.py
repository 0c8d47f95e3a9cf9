"""A Llama without a causal mask that fills masked bytes in, on the text that ``bytes_moe`` learnt from.

A token is a byte, as ByT5 numbers them; token 2 is the mask. As in Dream, the logits of a token are those of the row before it.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from accelpass.models_zoo.bytes_moe import SPECIAL
from accelpass.models_zoo.packaged import ZooError

if TYPE_CHECKING:
    from transformers import ByT5Tokenizer

FOLDER = Path(__file__).parents[1] / "weights"
MASK, WINDOW, BLOCK = 2, 128, 32
CONFIG: dict[str, Any] = {
    "vocab_size": 256 + SPECIAL, "hidden_size": 128, "intermediate_size": 288, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 4, "max_position_embeddings": 512, "tie_word_embeddings": True, "bos_token_id": None,
    "eos_token_id": 1, "pad_token_id": 0, "is_causal": False, "initializer_range": 0.05,
}  # fmt: skip


def untrained() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    model = LlamaForCausalLM(LlamaConfig(**CONFIG))
    model.config.mask_token_id = MASK
    return see(model, both_ways=True)


def see(model: Any, both_ways: bool) -> Any:
    """The model, whose tokens see those after them or not."""
    model.config.is_causal = not both_ways
    for module in model.modules():
        if hasattr(module, "is_causal"):
            module.is_causal = not both_ways
    return model


def masked(name: str = "masked_bytes", dtype: torch.dtype = torch.float32) -> Any:
    """The model in eval mode: ``"masked_bytes_teacher"`` as it was trained first, ``"masked_bytes"`` distilled to be certain.

    Raises:
        ZooError: its weights are not there; says how to make them.
    """
    file = FOLDER / f"{name}.safetensors"
    if not file.is_file():
        raise ZooError(f"no file {file}; type: python -m accelpass.models_zoo.masked.train")
    from safetensors.torch import load_file

    model = untrained()
    model.load_state_dict(load_file(file), strict=False)  # the output head is the embedding
    return model.to(dtype).eval()


def load(dtype: torch.dtype) -> tuple[Any, ByT5Tokenizer]:
    """The distilled model for the zoo, and its tokenizer."""
    from transformers import ByT5Tokenizer

    return masked(dtype=dtype), ByT5Tokenizer(extra_ids=0)
