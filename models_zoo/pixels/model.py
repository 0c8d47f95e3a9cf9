"""A Llama that writes handwritten digits, 8 x 8 pixels of 17 greys, row by row after a token that names the class.

Tokens 0 to 16 are greys, 17 to 26 the classes 0 to 9, and 27 is "no class", which guidance needs.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from accelpass.models_zoo import digits
from accelpass.models_zoo.packaged import ZooError

FILE = Path(__file__).parents[1] / "weights" / "pixels.safetensors"
SIDE, GREYS, CLASSES = 8, 17, 10
PIXELS, NO_CLASS, VOCABULARY = SIDE**2, GREYS + CLASSES, GREYS + CLASSES + 1
CONFIG: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 80, "intermediate_size": 192, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 4, "max_position_embeddings": 128, "tie_word_embeddings": True, "bos_token_id": None,
    "eos_token_id": None, "pad_token_id": None,
}  # fmt: skip


def untrained() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(**CONFIG))


def load(dtype: torch.dtype) -> tuple[Any, None]:
    """The model for the zoo, in eval mode; it has no tokenizer.

    Raises:
        ZooError: its weights are not there; says how to make them.
    """
    if not FILE.is_file():
        raise ZooError(f"no file {FILE}; type: python -m accelpass.models_zoo.pixels.train")
    from safetensors.torch import load_file

    model = untrained()
    model.load_state_dict(load_file(FILE), strict=False)  # the output head is the embedding
    return model.to(dtype).eval(), None


def prompts(labels: Tensor) -> Tensor:
    """What an image of each class ``(n,)`` begins with, ``(n, 1)``."""
    return labels[:, None] + GREYS


def images(held_out: bool) -> tuple[Tensor, Tensor]:
    """Greys of scikit-learn's digits ``(n, 64)``, row by row, and their classes ``(n,)``; every fifth is held out of training."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ZooError("the digits come with scikit-learn; type: pip install 'accelpass[bench]'") from error
    data = load_digits()
    chosen = (torch.arange(len(data.target)) % 5 == 0) == held_out
    return torch.from_numpy(data.data)[chosen].long(), torch.from_numpy(data.target)[chosen].long()


def read_as(greys: Tensor) -> Tensor:
    """The class ``(n,)`` that the zoo's classifier of cells reads in images ``(n, 64)``."""
    small = greys.float().view(-1, 1, SIDE, SIDE).clamp(0, GREYS - 1) / 8 - 1
    cells = F.interpolate(small, size=(digits.CELL, digits.CELL), mode="bicubic", align_corners=False).clamp(-1, 1)
    with torch.no_grad():
        return digits.classifier()(cells).argmax(1)
