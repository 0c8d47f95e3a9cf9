"""From a file to something that runs: manifest first, then every byte, then the libraries."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from accelpass.backends.package.decoder import PackagedDecoder
from accelpass.backends.package.file.archive import Archive
from accelpass.backends.package.file.manifest import refuse_elsewhere
from accelpass.backends.package.library import Library
from accelpass.backends.package.model import PackagedModel

if TYPE_CHECKING:
    from accelpass.backends.package.denoiser import PackagedDenoiser


def opened(path: str | os.PathLike[str], threads: int = 8) -> PackagedModel | PackagedDecoder | PackagedDenoiser:
    """See :func:`accelpass.open`."""
    archive = Archive(Path(path).expanduser())
    manifest = archive.manifest
    refuse_elsewhere(manifest, str(archive.path))
    archive.check()
    weights = archive.weights()
    graphs = {name: Library(g, archive.library(name), weights, threads) for name, g in manifest.graphs.items()}
    if manifest.decoder is not None:
        return PackagedDecoder(manifest, graphs, archive.tokenizer())
    if manifest.schedule is not None:
        from accelpass.backends.package.denoiser import PackagedDenoiser  # what tells runs apart is for these alone

        return PackagedDenoiser(manifest, graphs, weights)
    return PackagedModel(manifest, graphs["model"])
