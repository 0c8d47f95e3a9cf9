"""Which tokens of a call are text, and which are padding that the caller's mask leaves out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from accelpass.ir.core.graph import placeholders, value
from accelpass.ir.core.program import Program
from accelpass.ir.errors import AccelpassError
from accelpass.ir.torch_private import source_name
from accelpass.ir.transform.splice import splice, trace

MASK = "attention_mask"


def has_padding(batch: Mapping[str, Any]) -> bool:
    """Whether a call's mask leaves out any token."""
    return not bool(torch.as_tensor(batch.get(MASK, 1)).all())


class NoTokens(AccelpassError):
    """A graph does not say which tokens are padding; says why."""


def real_tokens(program: Program) -> list[fx.Node]:
    """One value, bool ``(batch, tokens)``: True for the tokens of this call that are no padding. For ``Tap(also=real_tokens)``.

    It is read from the caller's ``attention_mask`` of (batch, tokens so far); without one, all tokens are real.

    Raises:
        NoTokens: there are neither token ids nor embeddings, or the mask is of another form.
    """
    given = [n for n in program.tensors.callers() if isinstance(n.meta.get("val"), Tensor)]
    masks = [n for n in given if MASK in (source_name(n) or n.name)]
    tokens = _tokens([n for n in given if n not in masks])
    if tokens is None:
        raise NoTokens("the graph has neither token ids (batch, tokens) nor embeddings (batch, tokens, width)")
    if masks and value(masks[0]).dim() != 2:
        raise NoTokens(f"{MASK} is {list(value(masks[0]).shape)}; give one of (batch, tokens)")

    def told(of: Tensor, *mask: Tensor) -> list[Tensor]:
        if not mask:
            return [torch.ones(of.shape[:2], dtype=torch.bool, device=of.device)]
        return [mask[0][:, mask[0].shape[1] - of.shape[1] :] != 0]  # of the tokens in a cache the mask tells, too

    operands = [tokens, *masks[:1]]
    return splice(program, trace(program, told, operands), operands, placeholders(program.gm)[-1].next)


def _tokens(given: Sequence[fx.Node]) -> fx.Node | None:
    """The input that has a row for each token: ids, or else embeddings."""
    for is_float, dims in ((False, 2), (True, 3)):
        for node in given:
            if value(node).is_floating_point() is is_float and value(node).dim() == dims:
                return node
    return None
