"""Files appear whole or not at all: everything is written and checked in a folder beside the target, then moved."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import onnx_ir as ir

from accelpass.backends.onnx.errors import ExportError

LIMIT = 2_000_000_000
"""Bytes of weights beyond which they go into a file of their own; protobuf holds 2 GiB."""
SMALLEST = 1024
"""Bytes of a tensor that is worth a place in the file of weights; shapes and scalars stay where a reader sees them."""


def writable(path: str | os.PathLike[str]) -> Path:
    """The target of an export.

    Raises:
        ExportError: it cannot be written there; found out before minutes of work.
    """
    target = Path(path).expanduser()
    if target.suffix != ".onnx":
        raise ExportError(f"{target} does not end in .onnx; type: {target.name}.onnx")
    folder = target.absolute().parent
    if not folder.is_dir():
        raise ExportError(f"{target} cannot be written: there is no folder {folder}; make it first")
    if target.is_dir():
        raise ExportError(f"{target} is a folder; give the path of a file")
    try:
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".accelpass-"):
            pass
    except OSError as cause:
        raise ExportError(f"{target} cannot be written: {cause.strerror}: {folder}; choose another folder") from None
    return target


@contextmanager
def staged(target: Path) -> Iterator[Path]:
    """A folder beside ``target`` for files that belong together; they are moved to where it is if all goes well."""
    folder = Path(tempfile.mkdtemp(dir=target.absolute().parent, prefix=f".{target.stem}-"))
    try:
        yield folder
        # Weights first: a model that is there must find them.
        for file in sorted(folder.iterdir(), key=lambda f: (f.suffix == ".onnx", f.name)):
            os.replace(file, target.absolute().parent / file.name)
    except OSError as cause:
        raise ExportError(f"{target} cannot be written: {cause}; free some space or choose another folder") from cause
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def write(models: dict[str, ir.Model], folder: Path, data: str, external: bool | None) -> bool:
    """Write models under their names; weights of more than :data:`LIMIT` bytes, or on request, into the file ``data``.

    Models share the weights that are equal, so that a prompt's and a decoding step's file need one file of weights.

    Returns:
        Whether ``data`` was written.
    """
    tensors = [v for model in models.values() for v in model.graph.initializers.values()]
    size = sum(v.const_value.nbytes for v in tensors if v.const_value is not None)
    if external is None:
        external = size > LIMIT or len(models) > 1
    if external:
        _move_out(tensors, folder, data)
    for name, model in models.items():
        ir.save(model, folder / name)
    return external


def _move_out(values: list[ir.Value], folder: Path, data: str) -> None:
    """Let values hold tensors in the file ``data``, equal ones the same."""
    groups: dict[tuple[object, ...], list[ir.Value]] = {}
    for value in values:
        tensor = value.const_value
        if tensor is not None and tensor.nbytes >= SMALLEST:
            content = hashlib.sha256(tensor.tobytes()).hexdigest()
            groups.setdefault((str(tensor.dtype), tuple(tensor.shape), content), []).append(value)
    if not groups:
        return
    from onnx_ir.external_data import convert_tensors_to_external

    firsts = [group[0].const_value for group in groups.values()]
    made = convert_tensors_to_external([t for t in firsts if t is not None], folder, data)
    for group, tensor in zip(groups.values(), made, strict=True):
        for value in group:
            value.const_value = tensor
