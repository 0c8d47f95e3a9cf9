"""Keys and values as few numbers of the layer's input, with the newest tokens as they are: the storage of CSKV."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from accelpass.ir.attention.lowering.one_row import row_sum
from accelpass.ir.core.state import StateSpec
from accelpass.ir.kv.banks import EXACT, RowFormat, Rows, ValueFormat, buffer
from accelpass.ir.kv.rows import pack, row_bytes, to_half_precision, unpack
from accelpass.ir.kv.storage import Held, Layout, New, Query, Segment, Storage

BLOCK = 32
"""Tokens whose latent keys are rounded together, channel by channel."""


@dataclass(frozen=True)
class LowRank(Storage):
    """Latent keys and values of all tokens, ``x A``, and exact ones of the last ``window``.

    Keys are reconstructed before the rotary embedding and rotated again, each by its own position: the model's cosines and
    sines are kept for all positions, once for all layers. Values are never reconstructed: probabilities are applied to the
    latents, and their sum is projected.

    Attributes:
        rank_k, rank_v: numbers a token.
        bits: 16 for the model's dtype, else 4 or 8: keys by channel over 32 tokens, values by token.
        tables: name, width and dtype of what the model's rotation reads of each position (cosines, sines).

    A call hands it (``New.given``) the latents of its tokens, ``latent_k`` and ``latent_v`` ``(batch, tokens, rank)``, the
    factors ``factor_k``, ``factor_v`` ``(rank, kv_heads * d)``, biases, the tables' rows ``(1 or batch, 1, tokens, width)``,
    and as ``New.functions["rotate"]`` the model's own path from projected keys ``(batch, tokens, kv_heads, d)`` and tables to
    ``(batch, kv_heads, tokens, d)``.
    """

    part: ClassVar[str] = "cskv"
    knows_held: ClassVar[bool] = True
    rank_k: int
    rank_v: int
    window: int
    bits: int
    tables: tuple[tuple[str, int, str], ...]

    def states(self, layout: Layout, format: RowFormat) -> list[StateSpec]:
        heads, padded = layout.kv_heads, -(-layout.capacity // BLOCK) * BLOCK
        exact = [
            buffer("window_keys", (heads, self.window, layout.width), layout.dtype),
            buffer("window_values", (heads, self.window, layout.value_width), layout.dtype),
        ]
        if self.bits == 16:
            latent = [
                buffer("latent_keys", (padded, self.rank_k), layout.dtype),
                buffer("latent_values", (padded, self.rank_v), layout.dtype),
            ]
            return [*exact, *latent]
        blocks = padded // BLOCK
        return [
            *exact,
            buffer("latent_keys.codes", (padded, row_bytes(self.rank_k, self.bits)), torch.uint8),
            buffer("latent_keys.step", (blocks, self.rank_k), torch.float16),
            buffer("latent_keys.low", (blocks, self.rank_k), torch.float16),
            buffer("latent_values.codes", (padded, row_bytes(self.rank_v, self.bits)), torch.uint8),
            buffer("latent_values.step", (padded, 1), torch.float16),
            buffer("latent_values.low", (padded, 1), torch.float16),
            buffer("block_keys", (BLOCK, self.rank_k), torch.float32),
        ]

    def shared(self, layout: Layout) -> list[StateSpec]:
        return [buffer(name, (layout.capacity, width), getattr(torch, dtype)) for name, width, dtype in self.tables]

    def fill(self, held: Held, new: New, layout: Layout, format: RowFormat) -> None:
        tokens = new.k.shape[2]
        at = new.count[0] + torch.arange(tokens, device=new.count.device)
        if new.leads:
            for name, *_ in self.tables:
                rows = new.given[name].flatten(1, 2)
                held[name].index_copy_(1, at, rows.expand(held[name].shape[0], -1, -1).to(held[name].dtype))
        # A prompt longer than the window writes its last tokens alone; its first ones go to the place of the oldest kept.
        for name, x in (("window_keys", new.k), ("window_values", new.v)):
            ring = held[name]
            newest = self._on_ring(new.total)
            brought = newest >= new.count.unsqueeze(-1)
            index = (newest - new.count.unsqueeze(-1)).clamp_min(0)[:, None, :, None]
            taken = x.gather(2, index.expand(-1, x.shape[1], -1, x.shape[3]))
            ring.copy_(torch.where(brought[:, None, :, None], taken.to(ring.dtype), ring))
        self._store(held, new.given["latent_k"], new.given["latent_v"], at, new)

    def _on_ring(self, end: Tensor) -> Tensor:
        """The newest position before ``end`` that falls on each place of the window's ring, ``(batch, window)``."""
        last, place = end.unsqueeze(-1) - 1, torch.arange(self.window, device=end.device)
        return last - (last - place) % self.window

    def _store(self, held: Held, k: Tensor, v: Tensor, at: Tensor, new: New) -> None:
        if self.bits == 16:
            held["latent_keys"].index_copy_(1, at, k.to(held["latent_keys"].dtype))
            held["latent_values"].index_copy_(1, at, v.to(held["latent_values"].dtype))
            return
        codes, step, low = _rounded(v.float(), self.bits, -1)
        for name, made in (("codes", codes), ("step", step.half()), ("low", low.half())):
            held[f"latent_values.{name}"].index_copy_(1, at, made)
        # The block that is not full yet lives on as it is; whatever blocks this call touches are rounded anew.
        padded = held["latent_keys.codes"].shape[1]
        one = isinstance(k.shape[1], int) and k.shape[1] == 1
        begin = new.count[0] // BLOCK * BLOCK
        ring, inside = held["block_keys"], torch.arange(BLOCK, device=at.device)
        if one:
            ring.index_copy_(1, at % BLOCK, k.float())
            blocks = torch.where((inside <= at % BLOCK).unsqueeze(-1), ring, ring[:, :1]).unsqueeze(1)
            touched, rows = begin // BLOCK + torch.arange(1, device=at.device), begin + inside
        else:
            whole = k.new_zeros((k.shape[0], padded, k.shape[2]), dtype=torch.float32)
            whole = whole.index_copy(1, (begin + inside).clamp_max(padded - 1), ring).index_copy(1, at, k.float())
            index = torch.arange(padded, device=at.device).view(-1, BLOCK)
            present = (index < new.total[0]).unsqueeze(-1)
            blocks = whole.unflatten(1, (-1, BLOCK))
            blocks = torch.where(present, blocks, blocks[:, :, :1])
            last = (new.total[0] - 1) // BLOCK
            ring.copy_(blocks.index_select(1, last.unsqueeze(0)).squeeze(1))
            touched, rows = index[:, 0] // BLOCK, index.flatten()
        codes, step, low = _rounded(blocks, self.bits, 2)
        step, low = step.squeeze(2), low.squeeze(2)
        for name, made, where, unit in (
            ("codes", codes.flatten(1, 2), rows, 1),
            ("step", step.half(), touched, BLOCK),
            ("low", low.half(), touched, BLOCK),
        ):
            buffer = held[f"latent_keys.{name}"]
            before = buffer.index_select(1, where)
            is_new = (where * unit >= begin).unsqueeze(-1)
            buffer.index_copy_(1, where, torch.where(is_new, made, before))

    def extend(self, held: Held, new: New, query: Query, layout: Layout, format: RowFormat) -> Tensor:
        """Newest tokens from the window, older ones from the latents."""
        several = not query.one
        before = {n: held[n].clone() for n in ("window_keys", "window_values")} if several else held
        self.fill(held, new, layout, format)
        # Of several tokens each sees those of this call as they are, and the window as it was before them.
        end = new.count if several else new.total
        heads = layout.kv_heads
        at = self._on_ring(end).unsqueeze(1).expand(-1, heads, -1)
        window = Segment(EXACT, [before["window_keys"]], [before["window_values"]], at, at >= 0)
        segments = [window]
        if several:
            segments.append(Segment(EXACT, [new.k], [new.v], new.positions))
        keys = self._keys(held, new, layout)
        rows = keys.shape[2]
        older = (torch.arange(rows, device=end.device) < (end - self.window).unsqueeze(-1)).unsqueeze(1)
        latent = self._latent(held, "latent_values")[:, : layout.capacity]
        factor = Factored(new.given["factor_v"], new.given.get("bias_v"), heads)
        segments.append(Segment(EXACT, [keys], [latent], None, older, value_format=factor))
        return query.attend(*segments).out

    def _latent(self, held: Held, name: str) -> Tensor:
        """``(batch, capacity, rank)``."""
        if self.bits == 16:
            return held[name]
        codes = unpack(held[f"{name}.codes"], self.bits).float()
        step, low = (held[f"{name}.{part}"].float() for part in ("step", "low"))
        if name == "latent_keys":
            blocks = codes.unflatten(1, (-1, BLOCK))
            return (blocks * step.unsqueeze(2) + low.unsqueeze(2)).flatten(1, 2)
        return codes * step + low

    def _keys(self, held: Held, new: New, layout: Layout) -> Tensor:
        """All keys up to the capacity as attention reads them, ``(batch, kv_heads, capacity, d)``."""
        latent = self._latent(held, "latent_keys")[:, : layout.capacity]
        flat = torch.matmul(latent.to(new.given["factor_k"].dtype), new.given["factor_k"])
        if "bias_k" in new.given:
            flat = flat + new.given["bias_k"]
        split = flat.unflatten(-1, (layout.kv_heads, layout.width))
        return new.functions["rotate"](split, *(held[name].unsqueeze(1) for name, *_ in self.tables))


@dataclass(frozen=True, eq=False)
class Factored(ValueFormat):
    """Values that are latents ``(batch, n, rank)`` of all heads; a head's row is ``latent @ factor`` of its channels."""

    factor: Tensor
    bias: Tensor | None
    heads: int

    def decode(self, rows: Rows, dtype: torch.dtype) -> Tensor:
        whole = torch.matmul(rows[0].to(self.factor.dtype), self.factor)
        whole = whole if self.bias is None else whole + self.bias
        return whole.unflatten(-1, (self.heads, -1)).transpose(1, 2).to(dtype)

    def mixed(self, weights: Tensor, rows: Rows) -> Tensor:
        summed = row_sum(weights, rows[0].unsqueeze(1))
        factor = self.factor.float().unflatten(-1, (self.heads, -1)).transpose(0, 1)
        out = torch.matmul(summed, factor)
        if self.bias is None:
            return out
        # The bias is part of every row: it counts as much as the rows do.
        return out + weights.sum(-1, keepdim=True) * self.bias.float().view(self.heads, 1, -1)


def _rounded(x: Tensor, bits: int, dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """Packed codes, step and lowest value (float32, exact in float16) along ``dim``, which is kept as 1."""
    low = to_half_precision(x.amin(dim, keepdim=True))
    step = to_half_precision((x.amax(dim, keepdim=True) - low) / (2**bits - 1))
    codes = ((x - low) / step.clamp_min(1e-8)).round().clamp(0, 2**bits - 1)
    return pack(codes.to(torch.uint8), bits), step, low
