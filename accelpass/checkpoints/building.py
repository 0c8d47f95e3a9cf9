"""The model and tokenizer that a quantized checkpoint is for, built from its configuration with weights still to be read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from accelpass.checkpoints.codes import CheckpointError
from accelpass.checkpoints.reading import METHODS, quantization_of


def is_checkpoint(name: str) -> bool:
    """Whether a name is a ``.gguf`` file or a folder that says how its weights were rounded."""
    path = Path(name).expanduser()
    return (path.is_file() and path.suffix == ".gguf") or (path.is_dir() and quantization_of(path) is not None)


def built(path: Path, dtype: torch.dtype) -> tuple[Any, Any]:
    """A transformers model with random weights in eval mode, and its tokenizer (None if there is none).

    Raises:
        CheckpointError: transformers is missing, or does not know the model.
    """
    try:
        from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
    except ImportError as cause:
        raise CheckpointError(
            "building a checkpoint's model needs transformers; pip install 'accelpass[hf]'"
        ) from cause
    folder, given = (path, {}) if path.is_dir() else (path.parent, {"gguf_file": path.name})
    if (
        path.is_dir()
        and (settings := quantization_of(path)) is not None
        and settings.get("quant_method") not in METHODS
    ):
        method = settings.get("quant_method")
        raise CheckpointError(
            f"{path} was quantized by {method!r}; checkpoints of {', '.join(METHODS)} and .gguf are read"
        )
    try:
        config = AutoConfig.from_pretrained(folder, **given)
        if hasattr(config, "quantization_config"):
            del config.quantization_config
        if given:
            config.tie_word_embeddings = not _has_output(path)
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    except (OSError, ValueError, KeyError) as cause:
        raise CheckpointError(f"no model can be built for {path}: {' '.join(str(cause).split())[:300]}") from cause
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, **given)
    except (OSError, ValueError, KeyError):
        tokenizer = None  # the commands that read text say that there is none
    return model.eval(), tokenizer


def _has_output(path: Path) -> bool:
    """Whether a GGUF file has an output matrix of its own, or its embedding is used twice."""
    import gguf

    return any(t.name == "output.weight" for t in gguf.GGUFReader(path).tensors)
