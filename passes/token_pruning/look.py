"""What the last token's queries are told of the prompt: its keys, and which of them are padding."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, fx

from accelpass.ir.attention.spec import steps
from accelpass.ir.attention.spec.block_select import MASKS
from accelpass.ir.attention.spec.op import spec_of
from accelpass.ir.attention.spec.spec import Step
from accelpass.ir.transform.sequence.prompt import HIDDEN

Choose = Callable[[Tensor, Tensor, Tensor], Tensor]


def operands_of(attention: fx.Node) -> tuple[list[fx.Node], tuple[Step, ...]]:
    """Queries, keys and extras of an attention, and those of its steps that mask keys."""
    q, k = attention.args[:2]
    extras = attention.args[3]
    assert isinstance(q, fx.Node) and isinstance(k, fx.Node) and isinstance(extras, list | tuple)
    return [q, k, *extras], tuple(s for s in spec_of(attention).before if s.kind in MASKS)


def chosen(choose: Choose, masks: Sequence[Step], q: Tensor, k: Tensor, extras: Sequence[Tensor]) -> list[Tensor]:
    """Which tokens are kept, and where they stand then.

    Args:
        q: ``(batch, heads, tokens, d)``; k: ``(batch, kv_heads, tokens, d)``.

    Returns:
        ``rows (batch, kept)``, ascending; their ``positions`` among the kept tokens, padding not counted; ``seen``, False
        where one is padding; ``moved (batch,)``, how many tokens that are no padding were left out; ``visible (batch,
        tokens)``, which are none.
    """
    seen = visible(masks, q, k, extras)
    rows = choose(q[:, :, -1], k, seen)
    kept = seen.gather(1, rows)
    positions = (kept.long().cumsum(1) - 1).clamp_min(0)
    return [rows, positions, kept, seen.long().sum(1) - kept.long().sum(1), seen]


def visible(masks: Sequence[Step], q: Tensor, k: Tensor, extras: Sequence[Tensor]) -> Tensor:
    """Which keys the last token may see, ``(batch, tokens)``."""
    batch, heads, tokens = q.shape[0], q.shape[1], k.shape[2]
    if not masks:
        return torch.ones((batch, tokens), dtype=torch.bool, device=q.device)
    none = torch.zeros((batch, heads, 1, tokens), dtype=q.dtype, device=q.device)
    scores = steps.apply(none, masks, steps.of_last(extras, q.shape[2]))
    return (scores > HIDDEN).any(1).squeeze(1)
