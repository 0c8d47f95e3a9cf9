"""What each token is worth for the last one, and which go on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx

from accelpass.ir.attention.spec import steps
from accelpass.ir.attention.spec.op import attend, spec_of
from accelpass.ir.attention.spec.spec import All, AttentionSpec
from accelpass.ir.core.graph import is_from_run_time
from accelpass.ir.core.program import Program
from accelpass.ir.transform.splice import inserted

_ROWS = 256
"""Queries whose scores are held at once."""


def kept(tokens: Any, share: float) -> Any:
    """How many of so many tokens, a number or a symbolic one, go on."""
    if share == 1:
        return tokens
    if isinstance(tokens, int):
        return max(1, int(share * tokens))
    return torch.sym_max(1, torch.sym_int(share * tokens))


def best(importance: Tensor, count: Any) -> Tensor:
    """The ``count`` most important tokens, the last always, of equal ones the first; ascending int64 ``(batch, count)``."""
    return highest(torch.cat([importance[:, :-1], torch.full_like(importance[:, -1:], float("inf"))], 1), count)


def highest(scores: Tensor, count: Any) -> Tensor:
    """The ``count`` highest scores of each row, of equal ones the first: ascending int64 ``(rows, count)``."""
    order = scores.sort(dim=-1, descending=True, stable=True).indices
    if is_from_run_time(count):  # a slice up to it would have a size that no one can tell from the number of scores
        return order.index_select(1, torch.arange(count, device=order.device)).sort(-1).values
    return order[:, :count].sort(-1).values


def some(count: Tensor, least: int, most: int) -> Any:
    """A number from ``least`` to ``most`` that a graph computes, as a size in it."""
    size = count.long().item()
    torch.ops.aten.sym_constrain_range_for_size.default(size, min=least, max=most)
    return size


def ranks(scores: Tensor) -> Tensor:
    """How many of a row are higher than each score, of equal ones how many of those come before: int64, of the scores' shape."""
    order = scores.sort(dim=-1, descending=True, stable=True).indices
    places = torch.arange(scores.shape[-1], device=scores.device).expand(scores.shape)
    return torch.zeros_like(order).scatter(-1, order, places)


def importance_in(program: Program, node: fx.Node, before: fx.Node) -> fx.Node:
    """The probabilities of the last query, mean over heads, float32 ``(batch, tokens)``."""
    q, k, v = node.args[:3]
    spec = spec_of(node)
    operands = [q, k, v, *node.args[3]]
    (made,) = inserted(program, before, lambda q, k, v, *extras: [last_row(q, k, v, extras, spec)], *operands)
    return made


def last_row(q: Tensor, k: Tensor, v: Tensor, extras: Sequence[Tensor], spec: AttentionSpec) -> Tensor:
    """The probabilities of the last of several queries, mean over heads: float32 ``(batch, k_tokens)``."""
    # The last query sees everything that a causal cut leaves to it.
    own = replace(spec, causal=False, select=All(), statistics=frozenset({"column_sums"}))
    _, found = attend(q[:, :, -1:], k, v, steps.of_last(extras, q.shape[2]), own)
    return found["column_sums"].sum(1) / q.shape[1]


@torch.library.custom_op("accelpass::attention_mass", mutates_args=())
def attention_mass(q: Tensor, k: Tensor, scale: float, causal: bool) -> Tensor:
    """The probability that each key gets of all queries and heads, float32 ``(batch, keys)``, in pieces: all scores are never there at once.

    Args:
        q: ``(batch, heads, tokens, d)``; k: ``(batch, kv_heads, tokens, d)``.
    """
    batch, heads, tokens, _ = q.shape
    keys = k.repeat_interleave(heads // k.shape[1], 1).mT
    found = torch.zeros(batch, tokens, device=q.device)
    at = torch.arange(tokens, device=q.device)
    for rows in at.split(_ROWS):
        scores = (q[:, :, rows] @ keys).float() * scale
        if causal:
            scores = scores.masked_fill(at > rows.unsqueeze(-1), -torch.inf)
        found += scores.softmax(-1).sum((1, 2))
    return found


@attention_mass.register_fake
def _(q: Tensor, k: Tensor, scale: float, causal: bool) -> Tensor:
    return q.new_empty((q.shape[0], k.shape[2]), dtype=torch.float32)
