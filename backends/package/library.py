"""One compiled graph in memory."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from accelpass.backends.package.errors import PackageError
from accelpass.backends.package.file.container import Container
from accelpass.backends.package.file.manifest import Graph, Size, Value
from accelpass.ir.torch_private import library_runner


def loaded(files: Mapping[str, bytes | memoryview], constants: Mapping[str, Tensor], runners: int) -> Any:
    """What has ``run`` for a library with these constants, which it reads where they are; they stay as long as the process.

    Args:
        files: of one graph, by name.
        constants: by the library's names.
        runners: calls that run at once; more wait.
    """
    with _unpacked(files) as library:
        # Operators that are found by name need torch's own runner, under which no other thread runs Python.
        if not any(name.endswith(".json") and not name.endswith("_metadata.json") for name in files):
            container = Container(str(library), runners)
            if container.takes_constants:
                container.set_constants(constants)
                return container
        made = library_runner(str(library), runners)
    if constants:
        made.update_constant_buffer(dict(constants), False, True, True)
    return made


def constant_names(files: Mapping[str, bytes]) -> dict[str, str]:
    """By the library's name of a constant, what the graph called it."""
    with _unpacked(files) as library:
        made: dict[str, str] = library_runner(str(library), 1).get_constant_names_to_original_fqns()
        return made


@contextmanager
def _unpacked(files: Mapping[str, bytes | memoryview]) -> Iterator[Path]:
    """The library among files, on disk; what is loaded stays in memory."""
    folder = Path(tempfile.mkdtemp(prefix="accelpass-"))
    try:
        for name, content in files.items():
            (folder / name).write_bytes(content)
        yield next(folder.glob("*.so"))
    finally:
        shutil.rmtree(folder, ignore_errors=True)


class Library:
    """A graph of a package.

    Args:
        weights: by the manifest's names; they live as long as the library.
    """

    def __init__(
        self, graph: Graph, files: Mapping[str, bytes | memoryview], weights: Mapping[str, Tensor], runners: int
    ):
        self.graph = graph
        self._held = [weights[name] for name in graph.constants.values()]
        self._runner = loaded(files, dict(zip(graph.constants, self._held, strict=True)), runners)

    def __call__(self, inputs: Sequence[Tensor], states: Sequence[Tensor] = ()) -> list[Tensor]:
        """The outputs. ``inputs`` are checked, ``states`` are written to.

        Raises:
            PackageError: an input is not what was compiled for.
        """
        made: list[Tensor] = self._runner.run([*self.checked(inputs), *states])
        return made

    def checked(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """``inputs`` as the library reads them: nothing in it asks for sizes and types again."""
        sizes: dict[str, tuple[int, str]] = {}
        return [_checked(value, tensor, sizes) for value, tensor in zip(self.graph.inputs, inputs, strict=True)]


def _checked(value: Value, tensor: Tensor, sizes: dict[str, tuple[int, str]]) -> Tensor:
    dtype = str(tensor.dtype).removeprefix("torch.")
    if dtype != value.dtype or tensor.device.type != "cpu":
        raise PackageError(f"{value.name} is {dtype} on {tensor.device}; the package takes {value.dtype} on the CPU")
    if tensor.dim() != len(value.shape):
        raise PackageError(f"{value.name} has {tensor.dim()} dimensions; the package takes {_said(value)}")
    for number, (wanted, size) in enumerate(zip(value.shape, tensor.shape, strict=True)):
        if isinstance(wanted, int):
            if size != wanted:
                raise PackageError(f"{value.name} is {tuple(tensor.shape)}; the package takes {_said(value)}")
            continue
        if size < wanted.least or (wanted.most is not None and size > wanted.most):
            limit = f"{wanted.least} or more" if wanted.most is None else f"{wanted.least} to {wanted.most}"
            raise PackageError(
                f"{value.name} has {size} in dimension {number} ({wanted.name}); the package was compiled for {limit}"
            )
        known, where = sizes.setdefault(wanted.name, (size, value.name))
        if known != size:
            raise PackageError(f"{value.name} has {wanted.name} {size}, and {where} has {known}; they must be equal")
    return tensor.detach().contiguous()


def _said(value: Value) -> str:
    return "(" + ", ".join(size.name if isinstance(size, Size) else str(size) for size in value.shape) + ")"


def started(dtype: str, shape: Sequence[int], fill: float) -> Tensor:
    """A state as it begins."""
    kind: torch.dtype = getattr(torch, dtype)
    return torch.full(tuple(shape), fill if kind.is_floating_point else int(fill), dtype=kind)
