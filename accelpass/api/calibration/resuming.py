"""What calibration learnt of each block, in a folder, so that a run that was interrupted goes on after the last finished block."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from accelpass.ir.core.tensors import digest
from accelpass.ir.errors import OptionError
from accelpass.passes.core.base import Pass
from accelpass.passes.core.plan import describe, read_json, read_tensors, write_json

ABOUT = "calibration.json"


class BlockStore:
    """A folder of one calibration: of these passes, this model and these data.

    Raises:
        OptionError: the folder is of another calibration; says what differs.
    """

    def __init__(
        self, folder: Path, model: nn.Module, batches: Sequence[Mapping[str, Any]], passes: Sequence[Pass]
    ) -> None:
        self.folder = folder
        about = {
            "passes": json.loads(json.dumps([describe(p) for p in passes])),
            "model": _of_model(model),
            "data": _of_data(batches),
        }
        if (folder / ABOUT).exists():
            begun = read_json(folder / ABOUT, "calibration")
            if differing := [what for what, known in about.items() if begun.get(what) != known]:
                raise OptionError(
                    f"{folder} holds a calibration that was begun with other {' and '.join(differing)}; remove it, or name another folder"
                )
            return
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / ABOUT, about)

    def read(self, name: str, number: int) -> dict[str, Tensor] | None:
        """What a pass learnt of a block; None if it is not finished."""
        file = self._file(name, number)
        return read_tensors(file) if file.exists() else None

    def write(self, name: str, number: int, learnt: Mapping[str, Tensor]) -> None:
        """Keep it, whole or not at all."""
        file = self._file(name, number)
        begun = file.with_suffix(".tmp")
        save_file({k: v.detach().cpu().contiguous().clone() for k, v in learnt.items()}, str(begun))
        os.replace(begun, file)

    def _file(self, name: str, number: int) -> Path:
        return self.folder / f"{name}.{number}.safetensors"


def _of_model(model: nn.Module) -> str:
    """Of all its weights: their names, and sums that another training would change."""
    found = hashlib.sha1()
    for name, p in model.named_parameters():
        found.update(
            f"{name}{list(p.shape)}{p.detach().double().sum():.17g}{p.detach().double().abs().sum():.17g}".encode()
        )
    return found.hexdigest()


def _of_data(batches: Sequence[Mapping[str, Any]]) -> str:
    found = hashlib.sha1()
    for batch in batches:
        for key, value in batch.items():
            found.update(f"{key}:{digest(value) if isinstance(value, torch.Tensor) else value!r}".encode())
    return found.hexdigest()
