"""Selections made of blocks of keys, for each head on its own: the base of sparse attention.

A method is a subclass that says which blocks: from the sizes alone (static, a plan), or estimated from queries and keys
(dynamic). Everything else (kernels, masks, cost) is common.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from accelpass.ir.attention.spec.faults import WrongResult, shape_said
from accelpass.ir.attention.spec.spec import AttentionSpec, Select
from accelpass.ir.core.graph import known

MASKS = ("keep", "fill", "add")
"""Steps that hide keys."""
_SAID = {"none": "none", "sliding_window": "a sliding window", "tensor": "one of its own, as for padding"}
"""Kinds of a spec's mask, in words."""


class Blocks(NamedTuple):
    """Listed key blocks, as ``block_sparse_attention`` takes them.

    ``tables`` is 1 (all heads read the same), heads, or batch * heads.

    Attributes:
        blocks: int32 ``(tables, q_blocks, most)``: for each query block the key blocks that it reads, ascending.
        counts: int32 ``(tables, q_blocks)``: how many of them are valid.
        size: tokens of a block.
        order: int32 ``(tables of its own, places)``: the key that stands at each place, if the blocks are of reordered
            keys; -1 at a place that holds none, where there are more places than keys. None where keys keep their order.
            Causality is by token, not by place.
    """

    blocks: Tensor
    counts: Tensor
    size: int
    order: Tensor | None = None

    @staticmethod
    def of(chosen: Tensor, size: int, order: Tensor | None = None) -> Blocks:
        """The lists of a boolean grid ``(tables, q_blocks, k_blocks)``, True where a block is read."""
        at = torch.arange(chosen.shape[-1], device=chosen.device)
        blocks = torch.where(chosen, at, at.shape[0]).sort(-1).values.clamp_max(at.shape[0] - 1)
        return Blocks(blocks.int(), chosen.sum(-1, dtype=torch.int32), size, order)


class BlockSelect(Select, ABC):
    """Which blocks of keys each query attends to.

    ``blocks`` is plain torch code that the compiler traces, also with symbolic numbers of tokens.
    """

    @abstractmethod
    def blocks(self, q: Tensor, k: Tensor, spec: AttentionSpec) -> Blocks:
        """The lists for q ``(batch, heads, n, d)`` and k ``(batch, kv_heads, m, d)``; the attention itself cuts them to
        what is causal, if the spec is. A causal mask of the model is ``spec.causal`` here (:func:`causal_form`)."""

    def mask(self, q: Tensor, k: Tensor, spec: AttentionSpec) -> Tensor:
        """The same as a boolean mask ``(batch or 1, heads or 1, n, m)``, True where a query attends; the reference."""
        return listed_mask(self.listed(q, k, spec), q.shape[1], q.shape[2], k.shape[2])

    def listed(self, q: Tensor, k: Tensor, spec: AttentionSpec) -> Blocks:
        """What :meth:`blocks` gives.

        Raises:
            WrongResult: it is of another form than :class:`Blocks` says.
        """
        made = self.blocks(q, k, spec)
        if not isinstance(made, Blocks) or not isinstance(made.blocks, Tensor) or not isinstance(made.counts, Tensor):
            raise WrongResult(self, "blocks", f"it returned {type(made).__name__}, no Blocks of tensors")
        for name, tensor, dims in (("blocks", made.blocks, 3), ("counts", made.counts, 2)):
            if tensor.dim() != dims or tensor.dtype != torch.int32:
                wanted = f"(tables, q_blocks{', most' if dims == 3 else ''}) int32"
                raise WrongResult(self, "blocks", f"{name} is {shape_said(tensor)}, and {wanted} is needed")
        return made

    def pairs(self, heads: int, rows: int, columns: int, causal: bool) -> int | None:
        """How many (query, key) pairs are attended to in all heads of one sequence; None if only the data tells."""
        return None


def causal_form(spec: AttentionSpec, rows: Any, columns: Any) -> AttentionSpec:
    """The same spec with ``causal`` in the place of a mask that is known to be causal.

    Only where there are as many queries as keys: sdpa's ``causal`` counts queries from the first key.
    """
    if spec.causal or spec.bias != "causal" or not known(rows == columns):
        return spec
    return replace(spec, causal=True, steps=tuple(s for s in spec.steps if s.kind not in MASKS))


def not_a_prompt(spec: AttentionSpec, q: Tensor, k: Tensor) -> str | None:
    """Why an attention is not a plain causal one of a prompt over itself, or None; sizes may be symbolic."""
    if q.dim() != 4 or k.dim() != 4:
        return "queries and keys are not (batch, heads, tokens, d)"
    plain = causal_form(spec, q.shape[2], k.shape[2])
    if not plain.causal or not known(q.shape[2] == k.shape[2]):
        return f"it is not a causal attention of a prompt over itself (its mask is {_SAID.get(spec.bias, spec.bias)})"
    return changed_scores(plain)


def changed_scores(plain: AttentionSpec) -> str | None:
    """What a spec does to its scores besides scale, causality and softmax, or None."""
    changes = [s.kind for s in (*plain.before, *plain.after) if s.kind != "cast"]
    return f"its scores go through {changes[0]!r}" if changes else None


def grid_of(blocks: Tensor, counts: Tensor, q_blocks: int, k_blocks: int) -> Tensor:
    """Lists as booleans ``(tables, q_blocks, k_blocks)``; query blocks beyond those of the lists have none."""
    valid = torch.arange(blocks.shape[2], device=blocks.device) < counts.unsqueeze(-1)
    at = blocks.long().masked_fill(valid.logical_not(), k_blocks)  # one column more, for entries that are none
    found = torch.zeros(len(blocks), q_blocks, k_blocks + 1, dtype=torch.bool, device=blocks.device)
    return found.scatter(2, at, True)[..., :k_blocks]


def places_of(order: Tensor, tokens: int) -> Tensor:
    """Where each of so many tokens stands in an order ``(tables, places)`` that may have places without one."""
    place = torch.arange(order.shape[1], device=order.device).expand(order.shape)
    at = torch.where(order < 0, tokens, order.long())
    found = torch.zeros(len(order), tokens + 1, dtype=place.dtype, device=order.device)
    return found.scatter(1, at, place)[:, :tokens]


def listed_mask(listed: Blocks, heads: int, rows: int, columns: int) -> Tensor:
    """Listed blocks as a boolean mask ``(batch or 1, heads or 1, rows, columns)``, without the causal cut."""
    blocks, counts, size, order = listed
    tables, q_blocks = blocks.shape[:2]
    places = columns if order is None else order.shape[1]
    grid = grid_of(blocks, counts, q_blocks, -(-places // size))
    full = grid.repeat_interleave(size, 1).repeat_interleave(size, 2)[:, :rows, :places]
    if order is not None:
        place = places_of(order, columns).unsqueeze(1)
        tables = max(len(full), len(place))
        full, place = (t.repeat(tables // len(t), 1, 1) for t in (full, place))
        full = full.gather(2, place.expand(-1, rows, -1))
    return full.unsqueeze(0) if tables == 1 else full.unflatten(0, (-1, heads))
