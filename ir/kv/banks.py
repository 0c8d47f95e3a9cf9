"""Rows of keys or values in memory, in any format, and attention's two products with them.

A bank is a few tensors ``(batch, kv_heads, rows, ...)``, one row a token. Products with one query row are loops that a
compiler vectorises over channels, in float32; nothing unpacked is written to memory.
"""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from accelpass.ir.attention.lowering.one_row import by_chunks, each_group, row_scores, row_sum
from accelpass.ir.attention.spec.spec import Format, Native
from accelpass.ir.core.state import StateSpec
from accelpass.ir.errors import GraphError
from accelpass.ir.kv.rows import PARTS, dequantize_rows, quantize_rows, row_bytes

Rows = Sequence[Tensor]
"""The tensors of a bank, or of as many rows in its format."""


class ValueFormat(ABC):
    """How stored values are read."""

    @abstractmethod
    def decode(self, rows: Rows, dtype: torch.dtype) -> Tensor:
        """The rows ``(batch, kv_heads, n, d)``."""

    @abstractmethod
    def mixed(self, weights: Tensor, rows: Rows) -> Tensor:
        """``weights @ v``: ``(batch, kv_heads, groups, n)`` float32 to ``(..., groups, d)``."""


class RowFormat(Format, ValueFormat):
    """A format that banks of keys or values can be written in."""

    @abstractmethod
    def states(self, name: str, heads: int, rows: int, width: int, dtype: torch.dtype) -> list[StateSpec]:
        """The buffers of ``rows`` rows."""

    @abstractmethod
    def encode(self, x: Tensor) -> list[Tensor]:
        """Rows ``(batch, kv_heads, n, d)`` in this format."""

    @abstractmethod
    def scores(self, q: Tensor, rows: Rows) -> Tensor:
        """``q @ k^T`` for one query row a head: ``q`` ``(batch, kv_heads, groups, d)`` float32; ``(..., groups, n)``."""


@dataclass(frozen=True)
class Floats(RowFormat):
    """As the model computes them: what a spec's ``Native`` stands for."""

    def states(self, name: str, heads: int, rows: int, width: int, dtype: torch.dtype) -> list[StateSpec]:
        return [buffer(name, (heads, rows, width), dtype)]

    def encode(self, x: Tensor) -> list[Tensor]:
        return [x]

    def decode(self, rows: Rows, dtype: torch.dtype) -> Tensor:
        return rows[0].to(dtype)

    def scores(self, q: Tensor, rows: Rows) -> Tensor:
        return row_scores(q, rows[0])

    def mixed(self, weights: Tensor, rows: Rows) -> Tensor:
        return row_sum(weights, rows[0])


EXACT = Floats()


@dataclass(frozen=True)
class Quantized(RowFormat):
    """Asymmetric integers with a step and a lowest value for each token, head and group of channels (:mod:`.rows`).

    Attributes:
        bits: 2, 3, 4 or 8.
        groups: groups of channels in a row; 2 as in MiKV, so that a rotary pair's halves have one each.
    """

    part: ClassVar[str] = "quantized"
    bits: int = 4
    groups: int = 2

    def states(self, name: str, heads: int, rows: int, width: int, dtype: torch.dtype) -> list[StateSpec]:
        scales = (heads, rows, self.groups)
        return [
            buffer(f"{name}.codes", (heads, rows, row_bytes(width, self.bits)), torch.uint8),
            buffer(f"{name}.step", scales, torch.float16),
            buffer(f"{name}.low", scales, torch.float16),
        ]

    def encode(self, x: Tensor) -> list[Tensor]:
        return list(quantize_rows(x, self.bits, x.shape[-1] // self.groups))

    def decode(self, rows: Rows, dtype: torch.dtype) -> Tensor:
        codes, step, low = rows
        width = codes.shape[-1] * 8 // self.bits
        return dequantize_rows(codes, step, low, self.bits, width // self.groups).to(dtype)

    def scores(self, q: Tensor, rows: Rows) -> Tensor:
        codes, step, low = rows
        group = q.shape[-1] // self.groups
        steps, lows = step.float(), low.float()

        def one_head(q: Tensor) -> Tensor:
            total = None
            for g in range(self.groups):
                part = q[..., g * group : (g + 1) * group]
                products = [
                    (q[..., None, c.channel : c.channel + c.size] * c.of(codes)).sum(-1) * c.weight
                    for c in self._chunks(q.shape[-1])
                    if c.group == g
                ]
                term = _sum(products) * steps[..., g] + part.sum(-1, keepdim=True) * lows[..., g]
                total = term if total is None else total + term
            assert total is not None
            return total

        return each_group(q, one_head)

    def mixed(self, weights: Tensor, rows: Rows) -> Tensor:
        return by_chunks(weights, rows, self._mixed)

    def _mixed(self, weights: Tensor, rows: Rows) -> Tensor:
        codes, step, low = rows
        width = codes.shape[-1] * 8 // self.bits
        steps, lows = step.float(), low.float()

        def one_head(weights: Tensor) -> Tensor:
            out = []
            for g in range(self.groups):
                scaled = (weights * steps[..., g]).unsqueeze(-1)
                offset = (weights * lows[..., g]).sum(-1, keepdim=True)
                by_channel: dict[int, list[Tensor]] = {}
                for c in self._chunks(width):
                    if c.group == g:
                        product = (scaled * c.of(codes)).sum(-2) * c.weight
                        by_channel.setdefault(c.channel, []).append(product)
                # The parts of a 3-bit code begin at the same channels, in pieces of different size.
                out.append(_overlaid(by_channel) + offset)
            return torch.cat(out, -1)

        return each_group(weights, one_head)

    def _chunks(self, width: int) -> Iterator[_Chunk]:
        """Runs of channels whose codes are contiguous bytes under one shift, none across two groups."""
        group, start, shift = width // self.groups, 0, 0
        for bits in PARTS[self.bits]:
            size = width * bits // 8
            for plane in range(8 // bits):
                for at in range(0, size, min(size, group)):
                    channel = plane * size + at
                    run = min(size, group)
                    yield _Chunk(start + at, run, plane * bits, 2**bits - 1, 2**shift, channel, channel // group)
            start, shift = start + size, shift + bits


@dataclass(frozen=True)
class _Chunk:
    byte: int
    size: int
    shift: int
    mask: int
    weight: int
    channel: int
    group: int

    def of(self, codes: Tensor) -> Tensor:
        return ((codes[..., self.byte : self.byte + self.size] >> self.shift) & self.mask).float()


def _overlaid(pieces: dict[int, list[Tensor]]) -> Tensor:
    """Pieces, by their first channel, side by side; where several cover a channel, their sum."""
    ends = sorted({c + p.shape[-1] for c, ps in pieces.items() for p in ps} | set(pieces))
    columns = []
    for low, high in itertools.pairwise(ends):
        covering = [p[..., low - c : high - c] for c, ps in pieces.items() for p in ps if c <= low < c + p.shape[-1]]
        columns.append(_sum(covering))
    return columns[0] if len(columns) == 1 else torch.cat(columns, -1)


def _sum(terms: Sequence[Tensor]) -> Tensor:
    total = terms[0]
    for term in terms[1:]:
        total = total + term
    return total


def row_format(format: Format) -> RowFormat:
    """The row format that a spec's format stands for."""
    if isinstance(format, Native):
        return EXACT
    if isinstance(format, RowFormat):
        return format
    raise GraphError(f"the format {format.part} does not say how a row is written; make it a RowFormat")


def buffer(name: str, shape: tuple[int, ...], dtype: torch.dtype, fill: float = 0.0) -> StateSpec:
    """State of one cache layer, one for each sequence."""
    return StateSpec(f"kv.{name}", shape, dtype, "sequence", fill, batched=True)


def put_rows(bank: Rows, at: Tensor, rows: Rows) -> None:
    """Write rows ``(batch, kv_heads, n, ...)`` at their places ``at``, int64 ``(batch, kv_heads, n)``."""
    batch = torch.arange(at.shape[0], device=at.device)[:, None, None]
    head = torch.arange(at.shape[1], device=at.device)[:, None]
    for held, new in zip(bank, rows, strict=True):
        held.index_put_((batch, head, at), new.to(held.dtype))


def taken_rows(rows: Rows, at: Tensor) -> list[Tensor]:
    """The rows ``at``, int64 ``(batch, kv_heads, n)``, of each head."""
    out = []
    for held in rows:
        index = at[..., None].expand(*at.shape, held.shape[-1])
        out.append(held.gather(2, index))
    return out
