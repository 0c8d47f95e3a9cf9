"""Which format a file or folder has, and its tensors in this library's formats."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from accelpass.checkpoints.codes import Checkpoint, CheckpointError
from accelpass.checkpoints.compressed import read_compressed
from accelpass.checkpoints.gguf_file import read_gguf
from accelpass.checkpoints.gptq_awq import read_awq, read_gptq

METHODS = {"gptq": read_gptq, "awq": read_awq, "compressed-tensors": read_compressed}


def quantization_of(folder: Path) -> dict[str, Any] | None:
    """What a folder's config.json, or its file of settings alone, says of how its weights were rounded."""
    for name in ("config.json", "quantize_config.json", "quant_config.json"):
        try:
            held = json.loads((folder / name).read_text())
        except FileNotFoundError:
            continue
        except (OSError, ValueError) as cause:
            raise CheckpointError(f"{folder / name} cannot be read: {cause}") from cause
        found = held.get("quantization_config") if name == "config.json" else held
        if found is not None:
            return {**_FIRST.get(name, {}), **found}
    return None


_FIRST: dict[str, dict[str, str]] = {
    "quantize_config.json": {"quant_method": "gptq"},
    "quant_config.json": {"quant_method": "awq"},
}


def read(path: Path, model: nn.Module) -> Checkpoint:
    """A ``.gguf`` file, or a folder of safetensors whose config.json names how they were quantized.

    Raises:
        CheckpointError: there is nothing there, its format is not known, or it is damaged.
    """
    if path.is_file():
        if path.suffix != ".gguf":
            raise CheckpointError(f"{path} is no .gguf file; give one, or the folder of a Hugging Face checkpoint")
        return read_gguf(path, model)
    if not path.is_dir():
        raise CheckpointError(f"there is no file or folder {path}")
    settings = quantization_of(path)
    known = ", ".join(METHODS)
    if settings is None:
        raise CheckpointError(
            f"{path} has no config.json with a quantization_config; checkpoints of {known} and .gguf are read"
        )
    method = settings.get("quant_method")
    if method not in METHODS:
        raise CheckpointError(f"{path} was quantized by {method!r}; checkpoints of {known} and .gguf files are read")
    return METHODS[method](_tensors(path), settings)


def _tensors(folder: Path) -> Mapping[str, Tensor]:
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise CheckpointError(f"{folder} has no .safetensors file")
    found: dict[str, Tensor] = {}
    for file in files:
        try:
            found |= load_file(str(file))
        except (OSError, SafetensorError) as cause:
            raise CheckpointError(f"{file} cannot be read: {cause}") from cause
    return found
