"""Models on disk: one file each, and one of weights that they share."""

from __future__ import annotations

import hashlib
from pathlib import Path

import onnx_ir as ir

LIMIT = 2_000_000_000
"""Bytes of weights beyond which they go into a file of their own; protobuf holds 2 GiB."""
SMALLEST = 1024
"""Bytes of a tensor that is worth a place in the file of weights; shapes and scalars stay where a reader sees them."""


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
