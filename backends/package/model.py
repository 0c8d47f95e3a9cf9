"""A package of one graph: it is called as the model was."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from accelpass.backends.package.errors import PackageError
from accelpass.backends.package.file.manifest import Manifest
from accelpass.backends.package.library import Library


def named(names: Sequence[str], args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors of a call by name, in the order of ``names``.

    Raises:
        PackageError: one is missing, unknown, or no tensor.
    """
    given: dict[str, Any] = dict(zip(names, args, strict=False)) | dict(kwargs)
    unknown, missing = sorted(set(given).difference(names)), [n for n in names if n not in given]
    if unknown or missing or len(args) > len(names):
        wrong = (
            f"unknown: {', '.join(unknown)}" if unknown else f"missing: {', '.join(missing)}" if missing else "too many"
        )
        raise PackageError(f"the package takes the tensors {', '.join(names)} ({wrong})")
    for name in names:
        if not isinstance(given[name], Tensor):
            raise PackageError(f"{name} is a {type(given[name]).__name__}; the package takes a tensor")
    return {name: given[name] for name in names}


class PackagedModel:
    """Takes the tensors of the example call, by name or in its order; several threads may call it.

    Attributes:
        manifest: what the package says of itself.
    """

    def __init__(self, manifest: Manifest, library: Library) -> None:
        self.manifest = manifest
        self._library = library

    def __call__(self, *args: Tensor, **kwargs: Tensor) -> Any:
        """The model's output if it is one tensor, else its tensors by name.

        Raises:
            PackageError: an input is missing, unknown, or not what was compiled for.
        """
        given = named([v.name for v in self._library.graph.inputs], args, kwargs)
        made = self._library(list(given.values()))
        outputs = self._library.graph.outputs
        return made[0] if outputs == ["output"] else dict(zip(outputs, made, strict=True))

    def __repr__(self) -> str:
        inputs = ", ".join(value.name for value in self._library.graph.inputs)
        return f"PackagedModel({inputs} -> {', '.join(self._library.graph.outputs)})"
