"""Attention of a text with images in which a visual token sees its neighbours and the words before it, and some heads see words alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from accelpass.ir.attention.lowering.lower import Lowering, register_lowering
from accelpass.ir.attention.spec import steps
from accelpass.ir.attention.spec.block_select import MASKS
from accelpass.ir.attention.spec.spec import AttentionSpec, Select
from accelpass.ir.core.graph import value
from accelpass.ir.transform.sequence.prompt import HIDDEN
from accelpass.ir.transform.sequence.rows import rows_of

_OPERANDS = 2  # the last extras: which rows are words, and which are visual


@dataclass(frozen=True)
class Neighbours(Select):
    """What visual tokens, and what some heads, attend to.

    The node's last two extras are the rows of words and of visual tokens, ascending int64 ``(batch, rows)``. Visual tokens are
    whole images of ``height x width``, one after the other.

    Attributes:
        images: of a text; height, width: of one in visual tokens.
        reach: a visual token sees the visual ones at most so many rows and columns away; None for what the model lets it see.
        causal: of its neighbours, it sees those before it and itself alone.
        words_only: heads in which words see words alone, and visual tokens nothing.
        renormalised: visual keys take no part in the softmax of those heads; if not, their probability is lost.
    """

    part: ClassVar[str] = "neighbours"
    images: int
    height: int
    width: int
    reach: int | None
    causal: bool
    words_only: tuple[int, ...]
    renormalised: bool

    def heads(self, count: int) -> list[int]:
        """The other heads."""
        return [h for h in range(count) if h not in self.words_only]

    def pairs(self, heads: int, rows: int, columns: int, causal: bool) -> int | None:
        visual, reach = self.images * self.height * self.width, self.reach
        words, silent = columns - visual, len(self.words_only)
        near = rows * columns
        if reach is not None:
            of_rows = min(2 * reach, 2 * max(self.height, self.width) - 2) + 1
            near = words * columns + visual * (words + of_rows * self.width)
        return (heads - silent) * near + silent * words * (words if self.renormalised else columns)


def why_not(spec: AttentionSpec, node: fx.Node) -> str | None:
    """Why an attention cannot be computed so, but for its selection."""
    q, k = (value(n) for n in node.args[:2])
    if spec.kind == "cross" or q.dim() != 4 or k.dim() != 4:
        return "it is not one of (batch, heads, tokens, d) to itself"
    changed = [s.kind for s in spec.before if s.kind not in MASKS]
    if changed or spec.bias == "alibi":
        return f"a step {changed[0] if changed else 'alibi'} changes its scores"
    if spec.statistics or [s for s in spec.after if s.kind != "cast"]:
        return "its probabilities are read"
    if any(value(e).dim() > 2 and value(e).shape[-3] != 1 for e in node.args[3] if value(e).dim() != 2):
        return "its heads have masks of their own"
    return None


def attended(q: Tensor, k: Tensor, v: Tensor, extras: Sequence[Tensor], spec: AttentionSpec) -> Tensor:
    """The output ``(batch, heads, tokens, d_v)``; operands are as those of :func:`.op.attend`."""
    select, (*extras, words, visual) = spec.select, extras
    assert isinstance(select, Neighbours)
    every = torch.arange(k.shape[2], device=q.device).expand(q.shape[0], -1)
    own = _Masked(spec, extras, q.shape[2], k.shape[2])
    out = q.new_zeros((*q.shape[:3], v.shape[-1]))
    seeing, silent = select.heads(q.shape[1]), list(select.words_only)
    if seeing:
        qs, ks, vs = (_heads(x, seeing, n) for x, n in ((q, 1), (k, spec.groups), (v, spec.groups)))
        if select.reach is None:
            made = F.scaled_dot_product_attention(qs, ks, vs, own.seen(every, every), scale=spec.scale)
        else:
            seen = own.seen(words, every)
            of_words = F.scaled_dot_product_attention(rows_of(qs, words, 2), ks, vs, seen, scale=spec.scale)
            parts = [rows_of(x, rows, 2) for rows in (words, visual) for x in (ks, vs)]
            near = _near(select, rows_of(qs, visual, 2) * spec.scale, parts, own.seen(visual, words))
            made = joined(of_words, near, words, visual, 2)
        out = out.index_copy(1, torch.tensor(seeing, device=q.device), made)
    if silent:
        qs, ks, vs = (_heads(x, silent, n) for x, n in ((q, 1), (k, spec.groups), (v, spec.groups)))
        rows = words if select.renormalised else every
        scores = torch.matmul(rows_of(qs, words, 2), rows_of(ks, rows, 2).mT).float() * spec.scale
        paid = scores.masked_fill(own.seen(words, rows).logical_not(), torch.finfo(torch.float32).min).softmax(-1)
        if not select.renormalised:
            paid = rows_of(paid, words, 3)
        made = torch.matmul(paid.to(v.dtype), rows_of(vs, words, 2))
        blank = made.new_zeros((*made.shape[:2], visual.shape[1], made.shape[3]))
        out = out.index_copy(1, torch.tensor(silent, device=q.device), joined(made, blank, words, visual, 2))
    return out


def joined(of_words: Tensor, of_visual: Tensor, words: Tensor, visual: Tensor, dim: int) -> Tensor:
    """Rows of words and of visual tokens along ``dim``, each at its place."""
    order = torch.cat([words, visual], 1)
    at = torch.arange(order.shape[1], device=order.device).expand_as(order)
    return rows_of(torch.cat([of_words, of_visual], dim), torch.empty_like(order).scatter(1, order, at), dim)


@dataclass(frozen=True)
class _Masked:
    """What the model's own masks let queries see."""

    spec: AttentionSpec
    extras: Sequence[Tensor]
    queries: int
    keys: int

    def seen(self, queries: Tensor, keys: Tensor) -> Tensor:
        """Of these rows ``(batch, n)`` and ``(batch, m)``: bool ``(batch, 1, n, m)``."""
        before = queries.unsqueeze(-1) >= keys.unsqueeze(1)
        seen = (before if self.spec.causal else torch.ones_like(before)).unsqueeze(1)
        taken = []
        for extra in self.extras:
            whole = extra[(None,) * max(0, 4 - extra.dim())]
            whole = rows_of(whole, queries, 2) if whole.shape[2] == self.queries else whole
            taken.append(rows_of(whole, keys, 3) if whole.shape[3] == self.keys else whole)
        masks = [s for s in self.spec.before if s.kind in MASKS]
        none = torch.zeros(seen.shape, device=seen.device)
        return seen & (steps.apply(none, masks, taken) > HIDDEN)


def _near(select: Neighbours, q: Tensor, parts: Sequence[Tensor], seen: Tensor) -> Tensor:
    """Visual tokens see their neighbours, and the words that the model lets them see (``seen``); keys and values of words, then of
    visual tokens, are ``parts``."""
    word_keys, word_values, keys, values = parts
    high, wide, least = select.height, select.width, torch.finfo(torch.float32).min
    reach = min(select.reach or 0, max(high, wide) - 1)
    grid = (-1, high, wide)

    def windows(x: Tensor) -> Tensor:
        """Of each row of an image, all of the rows that it sees: ``(batch, heads, images, height, rows * width, d)``."""
        padded = F.pad(x.unflatten(2, grid), (0, 0, 0, 0, reach, reach))
        return torch.stack([padded[:, :, :, at : at + high] for at in range(2 * reach + 1)], 4).flatten(4, 5)

    y, x = torch.arange(high, device=q.device), torch.arange(wide, device=q.device)
    there = y[:, None] + torch.arange(-reach, reach + 1, device=q.device)
    inside = ((there >= 0) & (there < high))[:, None, :, None]
    inside = inside & ((x[:, None] - x).abs() <= reach)[None, :, None]
    if select.causal:
        inside = inside & (y[:, None, None, None] * wide + x[:, None, None] >= there[:, None, :, None] * wide + x)
    tiles = q.unflatten(2, grid)
    close = torch.matmul(tiles, windows(keys).mT).float().masked_fill(inside.flatten(2).logical_not(), least)
    far = torch.matmul(q, word_keys.mT).float().masked_fill(seen.logical_not(), least)
    paid = torch.cat([close, far.unflatten(2, grid)], -1).softmax(-1).to(q.dtype)
    near = torch.matmul(paid[..., : close.shape[-1]], windows(values)).flatten(2, 4)
    return near + torch.matmul(paid[..., close.shape[-1] :].flatten(2, 4), word_values)


def _heads(x: Tensor, chosen: Sequence[int], groups: int) -> Tensor:
    """The rows of these query heads, of which ``groups`` share one of ``x``."""
    if groups == 1 and len(chosen) == x.shape[1]:
        return x
    return x.index_select(1, torch.tensor([h // groups for h in chosen], device=x.device))


def _why_not(spec: AttentionSpec, node: fx.Node) -> str | None:
    if not isinstance(spec.select, Neighbours):
        return f"selection {spec.select.part} is not known to it"
    return why_not(spec, node)


register_lowering(Lowering("neighbours", _why_not, lambda q, k, v, e, s: (attended(q, k, v, e, s), {}), rank=30))
