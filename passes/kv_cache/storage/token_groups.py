"""Numbers in few bits, each channel for itself over a group of tokens: two bits, the sign alone, or ternary."""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from accelpass.ir.core.state import StateSpec
from accelpass.ir.kv.banks import buffer
from accelpass.ir.kv.rows import pack, to_half_precision, unpack
from accelpass.ir.kv.storage import Held

_TRITS = 5
"""Ternary digits in a byte: 3^5 = 243."""


@dataclass(frozen=True)
class GroupCodec(ABC):
    """Writes groups of tokens ``(batch, heads, groups, tokens, columns)`` as packed rows, and numbers of each group and channel.

    Attributes:
        columns: channels of a row.
        tokens: of a group.
    """

    per_byte: ClassVar[int]
    scales: ClassVar[tuple[str, ...]]
    columns: int
    tokens: int

    def states(self, name: str, heads: int, rows: int) -> list[StateSpec]:
        """Buffers of ``rows`` rows, a multiple of ``tokens``."""
        if not self.columns:
            return []
        codes = buffer(f"{name}.codes", (heads, rows, -(-self.columns // self.per_byte)), torch.uint8)
        size = (heads, rows // self.tokens, self.columns)
        return [codes, *(buffer(f"{name}.{scale}", size, torch.float16) for scale in self.scales)]

    def encode(self, groups: Tensor, valid: Tensor | None = None) -> dict[str, Tensor]:
        """Codes ``(batch, heads, groups, tokens, bytes)``, and scales ``(batch, heads, groups, columns)``.

        Args:
            groups: float32; valid: which tokens count, broadcast to ``(batch, heads, groups, tokens, 1)``; None for all.
        """
        if not self.columns:
            return {}
        made, scales = self._coded(groups, valid)
        wide = torch.nn.functional.pad(made.to(torch.uint8), (0, -self.columns % self.per_byte))
        return {"codes": self._packed(wide), **{n: t.half() for n, t in zip(self.scales, scales, strict=True)}}

    def decode(self, held: Held, name: str) -> Tensor:
        """Rows ``(batch, heads, rows, columns)`` in float32."""
        codes = self._unpacked(held[f"{name}.codes"])[..., : self.columns].float().unflatten(2, (-1, self.tokens))
        return self._read(codes, *(held[f"{name}.{s}"].float().unsqueeze(3) for s in self.scales)).flatten(2, 3)

    @abstractmethod
    def _coded(self, groups: Tensor, valid: Tensor | None) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Codes from 0, and scales as float16 has them."""

    @abstractmethod
    def _read(self, codes: Tensor, *scales: Tensor) -> Tensor:
        """What codes stand for."""

    def _packed(self, codes: Tensor) -> Tensor:
        return pack(codes, 8 // self.per_byte)

    def _unpacked(self, packed: Tensor) -> Tensor:
        return unpack(packed, 8 // self.per_byte)


class TwoBits(GroupCodec):
    """Four steps from the least to the largest of a group."""

    per_byte = 4
    scales = ("step", "low")

    def _coded(self, groups: Tensor, valid: Tensor | None) -> tuple[Tensor, tuple[Tensor, ...]]:
        low, high = groups, groups
        if valid is not None:
            low, high = (torch.where(valid, groups, far) for far in (torch.inf, -torch.inf))
        least = torch.nan_to_num(low.amin(3), posinf=0.0)  # of a group without tokens
        least = to_half_precision(least)
        step = to_half_precision((torch.nan_to_num(high.amax(3), neginf=0.0) - least).clamp_min(0) / 3)
        codes = (groups - least.unsqueeze(3)) / step.clamp_min(1e-8).unsqueeze(3)
        return codes.round().clamp(0, 3), (step, least)

    def _read(self, codes: Tensor, *scales: Tensor) -> Tensor:
        step, low = scales
        return codes * step + low


class Signs(GroupCodec):
    """The sign, times the mean magnitude of a group."""

    per_byte = 8
    scales = ("size",)

    def _coded(self, groups: Tensor, valid: Tensor | None) -> tuple[Tensor, tuple[Tensor, ...]]:
        return groups >= 0, (mean_size(groups, valid),)

    def _read(self, codes: Tensor, *scales: Tensor) -> Tensor:
        return (2 * codes - 1) * scales[0]


class Ternary(GroupCodec):
    """-1, 0 or 1 times the mean magnitude of a group; 0 below half of it. Five to a byte."""

    per_byte = _TRITS
    scales = ("size",)

    def _coded(self, groups: Tensor, valid: Tensor | None) -> tuple[Tensor, tuple[Tensor, ...]]:
        size = mean_size(groups, valid)
        small = groups.abs() < 0.5 * size.unsqueeze(3)
        return torch.where(small, 0.0, groups.sign()) + 1, (size,)

    def _read(self, codes: Tensor, *scales: Tensor) -> Tensor:
        return (codes - 1) * scales[0]

    def _packed(self, codes: Tensor) -> Tensor:
        return torch.stack([part * 3**at for at, part in enumerate(codes.chunk(_TRITS, -1))]).sum(0).to(torch.uint8)

    def _unpacked(self, packed: Tensor) -> Tensor:
        # By products, which are vectors where a compiler divides integers one by one; half a step off every bound, so that no rounding
        # crosses one.
        byte = packed.float() + 0.5
        above = [(byte * (1 / 3**at)).floor() for at in range(_TRITS + 1)]
        return torch.stack([one - 3 * more for one, more in itertools.pairwise(above)], -2).flatten(-2)


def mean_size(groups: Tensor, valid: Tensor | None) -> Tensor:
    """Of the tokens that count, ``(batch, heads, groups, columns)``, as float16 has it; 0 of none."""
    if valid is None:
        return to_half_precision(groups.abs().mean(3))
    weight = valid.to(groups.dtype)
    return to_half_precision((groups.abs() * weight).sum(3) / weight.sum(-2).clamp_min(1))
