"""A small mixture of experts that reads bytes, trained in this repository (``train_bytes_moe``) on text that Python ships.

transformers' Mixtral: 4 layers of 8 experts, of which a token goes to 2. A token is a byte, as ByT5 numbers them: 0 to 2 are special.
"""

from __future__ import annotations

import ast
import sysconfig
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from accelpass.models_zoo.packaged import ZooError

if TYPE_CHECKING:
    from transformers import ByT5Tokenizer, MixtralForCausalLM

WEIGHTS = Path(__file__).parent / "weights" / "bytes_moe.safetensors"
SPECIAL = 3
"""What is added to a byte to get its token."""
CONFIG: dict[str, Any] = {
    "vocab_size": 256 + SPECIAL,
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "router_aux_loss_coef": 0.01,
    "sliding_window": None,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "tie_word_embeddings": True,
    "bos_token_id": None,
    "eos_token_id": 1,
    "pad_token_id": 0,
}


def load(dtype: torch.dtype) -> tuple[MixtralForCausalLM, ByT5Tokenizer]:
    """The trained model, with experts in grouped products, which torch.compile captures, and its tokenizer."""
    from safetensors.torch import load_file
    from transformers import ByT5Tokenizer

    if not WEIGHTS.is_file():
        raise ZooError(f"no weights at {WEIGHTS}; type: python -m accelpass.models_zoo.train_bytes_moe")
    model = untrained()
    missing = model.load_state_dict(load_file(WEIGHTS), strict=False).missing_keys
    if missing not in ([], ["lm_head.weight"]):
        raise ZooError(f"{WEIGHTS} is of another model: it has no {missing[0]}")
    model.set_experts_implementation("grouped_mm")
    return model.to(dtype).eval(), ByT5Tokenizer(extra_ids=0)


def untrained() -> MixtralForCausalLM:
    from transformers import MixtralConfig, MixtralForCausalLM

    return MixtralForCausalLM(MixtralConfig(**CONFIG))


def text(held_out: bool) -> bytes:
    """Python's reference text, of which every tenth topic is held out; to learn from, with the docstrings of its library."""
    from pydoc_data.topics import topics

    chosen = [topics[key] for n, key in enumerate(sorted(topics)) if (n % 10 == 0) == held_out]
    if not held_out:
        chosen += _docstrings(Path(sysconfig.get_path("stdlib")))
    return "\n\n".join(chosen).encode()


def _docstrings(folder: Path) -> list[str]:
    """Of modules, classes and functions in the files of one folder."""
    found = []
    for file in sorted(folder.glob("*.py")):
        nodes = ast.walk(ast.parse(file.read_text(encoding="utf-8", errors="replace")))
        kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        found += [text for n in nodes if isinstance(n, kinds) and (text := ast.get_docstring(n))]
    return found


def tokens(data: bytes) -> torch.Tensor:
    """``(bytes,)``."""
    return torch.frombuffer(bytearray(data), dtype=torch.uint8).long() + SPECIAL
