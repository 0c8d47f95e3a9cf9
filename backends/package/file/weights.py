"""The file of weights: each tensor once, however many graphs read it."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor

from accelpass.backends.package.file.manifest import Weight

_ALIGNED = 64
"""Bytes: what the widest vector instructions like, and what Inductor assumes of a constant."""


class Weights:
    """Tensors on their way into a package."""

    def __init__(self) -> None:
        self.found: dict[str, Weight] = {}
        self._known: dict[tuple[str, tuple[int, ...], bytes], str] = {}
        self._parts: list[bytes] = []
        self._size = 0

    def add(self, tensors: Mapping[str, Tensor]) -> dict[str, str]:
        """By name, what each tensor is called in the file; equal ones are one."""
        return {name: self._one(name, tensor) for name, tensor in tensors.items()}

    def content(self) -> bytes:
        """The file."""
        return b"".join(self._parts)

    def _one(self, name: str, tensor: Tensor) -> str:
        content = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        dtype = str(tensor.dtype).removeprefix("torch.")
        key = (dtype, tuple(tensor.shape), hashlib.sha256(content).digest())
        if key not in self._known:
            called = name
            while called in self.found:
                called += "_"
            self._known[key] = called
            self.found[called] = Weight(dtype, list(tensor.shape), self._size)
            padding = bytes(-len(content) % _ALIGNED)
            self._parts += [content, padding]
            self._size += len(content) + len(padding)
        return self._known[key]
