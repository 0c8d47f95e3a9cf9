"""Whether a weight is still the tensor that something was derived from, values included.

Three things can happen to a weight behind a compiled graph's back. It is written in place: its version rises. It is re-pointed
(``p.data = t``, ``module.float()``): another storage is behind it, possibly at the address of the old one. It is written
through ``p.data``, as merging an adapter does: nothing shows it but the values, so some of them are compared.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

PROBES = 8
"""Values of a weight that are compared, spread over its memory."""


class Stamp(NamedTuple):
    """What a weight was like.

    Attributes:
        pointer, version: of the tensor; a tensor made in inference mode has no version.
        storage: the memory itself, which an address does not identify once it was freed.
        probe: some of its values.
    """

    pointer: int
    version: int | None
    storage: weakref.ref[torch.UntypedStorage] | None
    probe: tuple[float, ...]

    def fits(self, tensor: Tensor) -> bool:
        """Whether ``tensor`` is as it was."""
        if tensor.data_ptr() != self.pointer or self.storage is None or self.storage() is not tensor.untyped_storage():
            return False
        if self.version is not None and tensor._version != self.version:
            return False
        return same_values(probes([tensor]), [self.probe])


VOID = Stamp(-1, None, None, ())
"""Fits nothing."""


def stamp(tensor: Tensor) -> Stamp:
    """The stamp of a tensor as it is now."""
    version = None if tensor.is_inference() else tensor._version
    (probe,) = probes([tensor])
    return Stamp(tensor.data_ptr(), version, weakref.ref(tensor.untyped_storage()), probe)


class Place(NamedTuple):
    """Where some values of a tensor lie in its storage, spread over what the tensor covers; as ``as_strided`` takes it."""

    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int

    @classmethod
    def of(cls, tensor: Tensor) -> Place | None:
        """None of a tensor that is empty, quantized, or whose memory was given back."""
        if not tensor.numel() or not tensor.untyped_storage().size() or tensor.is_quantized:
            return None
        span = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
        count = min(PROBES, span)
        step = span // count
        return cls((count,), (step,), int(tensor.storage_offset()) + step // 2)


def probes(tensors: Sequence[Tensor], places: Sequence[Place | None] | None = None) -> list[tuple[float, ...]]:
    """Some values of each tensor; none of one without a place. One copy for each dtype and device.

    Args:
        places: of each tensor, where they are known.
    """
    groups: dict[tuple[torch.dtype, torch.device], list[tuple[int, Tensor]]] = {}
    found: list[tuple[float, ...]] = [()] * len(tensors)
    with torch.no_grad():
        for index, tensor in enumerate(tensors):
            place = Place.of(tensor) if places is None else places[index]
            if place is not None:
                groups.setdefault((tensor.dtype, tensor.device), []).append((index, tensor.as_strided(*place)))
        for group in groups.values():
            values = torch.cat([view for _, view in group]).tolist()
            start = 0
            for index, view in group:
                found[index] = tuple(values[start : start + len(view)])
                start += len(view)
    return found


def same_values(now: Sequence[tuple[float, ...]], before: Sequence[tuple[float, ...]]) -> bool:
    """Whether probes are equal; NaN is equal to itself here."""
    return now == before or repr(now) == repr(before)
