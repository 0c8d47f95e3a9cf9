"""What attentions are tapped at: the probabilities of all queries, and what each key gets of the scores."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, fx

from accelpass.ir.attention.spec.op import attention_probabilities, masked_scores, spec_of, want
from accelpass.ir.attention.spec.spec import All, Places, ScoreTap
from accelpass.ir.attention.spec.steps import of_last
from accelpass.ir.core.graph import value
from accelpass.ir.core.program import Program
from accelpass.ir.transform.splice import splice, trace

_OUTSIDE = ("sink", "drop", "view")
"""Steps after which scores are no longer ``(batch, heads, queries, keys)``."""


def probabilities_of(program: Program, node: fx.Node) -> fx.Node:
    """What an attention weighs values with, ``(batch, heads, queries, keys)``; computed beside it, which stays as it is."""
    spec = spec_of(node)

    def run(q: Tensor, k: Tensor, *extras: Tensor) -> list[Tensor]:
        return [attention_probabilities(q, k, extras, spec)]

    return _beside(program, node, run)


def mass_of(program: Program, node: fx.Node, tap: ScoreTap, by: str) -> tuple[fx.Node, fx.Node]:
    """What a tap gives each key, float32 ``(batch, kv_heads, keys)``, and the semantic node, which may be another now.

    A tap that reads a call's last queries alone is computed of these, beside the attention. One that reads all becomes a statistic of the
    attention, which is then computed block of rows by block of rows.
    """
    spec, last = spec_of(node), tap.rows
    outside = any(s.kind in _OUTSIDE for s in spec.steps) or not isinstance(spec.select, All)
    if last is None or outside or any(value(n).dim() != 4 for n in node.args[:2]):
        found = want(node, tap.key, by=by)
        again = found.args[0]
        assert isinstance(again, fx.Node)
        return found, again

    def run(q: Tensor, k: Tensor, *extras: Tensor) -> list[Tensor]:
        rows, columns = q.shape[-2], k.shape[-2]
        own = q[..., -last:, :]
        first = rows - own.shape[-2]
        scores = masked_scores(own, k, of_last(extras, rows, last), spec, first).float().unflatten(1, (-1, spec.groups))
        query = torch.arange(own.shape[-2], device=q.device) + first + (0 if spec.causal else columns - rows)
        return [tap(scores, Places(query, torch.arange(columns, device=q.device), columns))]

    return _beside(program, node, run), node


def _beside(program: Program, node: fx.Node, run: object) -> fx.Node:
    extras = node.args[3]
    assert isinstance(extras, Sequence)
    operands = [*node.args[:2], *extras]
    (made,) = splice(program, trace(program, run, operands), operands, node)  # type: ignore[arg-type]
    return made
