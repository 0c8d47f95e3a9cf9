"""Whole numbers of a few bits, as other tools pack them, and the formats of this library that hold the same numbers."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from accelpass.ir.errors import AccelpassError
from accelpass.ir.linear.formats import GROUP_SIZES, Grouped, Int2, Int3, Int4, Int6, Int8Groups
from accelpass.ir.linear.spec import LinearSpec
from accelpass.passes.quantization.prequantized import Stored


class CheckpointError(AccelpassError):
    """A checkpoint of an unknown format, damaged, or of another model; says what was seen and what is read."""


@dataclass(eq=False)
class Checkpoint:
    """What a file or folder holds, by the model's parameter path.

    Attributes:
        kind: ``gptq``, ``awq``, ``compressed-tensors`` or ``gguf``.
        weights: those in codes.
        floats: all others.
    """

    kind: str
    weights: dict[str, Stored] = field(default_factory=dict)
    floats: dict[str, Tensor] = field(default_factory=dict)


FORMATS: dict[int, type[Grouped]] = {2: Int2, 3: Int3, 4: Int4, 6: Int6, 8: Int8Groups}


def unpacked(words: Tensor, bits: int, count: int) -> Tensor:
    """``count`` codes of each row of int32 words ``(rows, words)``, whose bits are one stream from the lowest on; int32."""
    stream = (words.unsqueeze(-1) >> torch.arange(32, dtype=torch.int32)) & 1
    codes = stream.flatten(-2)[..., : count * bits].unflatten(-1, (count, bits))
    return (codes << torch.arange(bits, dtype=torch.int32)).sum(-1, dtype=torch.int32)


def grouped(codes: Tensor, scale: Tensor, zero: Tensor | None, bits: int, order: Tensor | None = None) -> Stored:
    """The stored form of ``W = (code - zero) * scale``.

    Args:
        codes: 0 to ``2 ** bits - 1``, ``(out, in)``, in the order in which they are stored.
        scale, zero: float32 ``(out, groups)``; no zero is half the range throughout.
        order: which input channel each column is of.
    """
    inputs, groups = codes.shape[1], scale.shape[1]
    if groups == 0 or inputs % groups:
        raise CheckpointError(f"{groups} groups do not divide {inputs} input channels")
    group = inputs // groups
    if zero is not None and bool((zero == 2 ** (bits - 1)).all()):
        zero = None  # the same numbers
    # Groups that are too large for the kernels are several with the same scale; so are those of a whole row.
    for fitting in sorted(GROUP_SIZES, reverse=True):
        if group % fitting == 0 and group > fitting:
            scale = scale.repeat_interleave(group // fitting, 1)
            zero = None if zero is None else zero.repeat_interleave(group // fitting, 1)
            group = fitting
    if group % 8:
        raise CheckpointError(f"groups of {group} channels are not read; those of a multiple of 8 are")
    form = FORMATS[bits](group, zero is None)
    return Stored(LinearSpec(form), form.written(codes.float().unflatten(-1, (-1, group)), scale, zero), order)


def with_minimum(codes: Tensor, scale: Tensor, least: Tensor, bits: int) -> Stored:
    """The stored form of ``W = code * scale + least``: ``zero = -least / scale``, so that W is the same to a rounding of float32."""
    flat = scale == 0  # all numbers of such a group are the least one
    scale, zero = torch.where(flat, least, scale), torch.where(flat, -1.0, -least / torch.where(flat, 1.0, scale))
    groups = codes.unflatten(-1, (scale.shape[1], -1))
    return grouped(torch.where(flat.unsqueeze(-1), 0, groups).flatten(-2), scale, zero, bits)
