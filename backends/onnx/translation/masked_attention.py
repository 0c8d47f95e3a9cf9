"""Attention that passes cut down, as ONNX's ``Attention`` with a mask (opset 23): no operator of the standard leaves keys out."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, fx
from torch.nn import functional as F

from accelpass.ir.attention.lowering.lower import Lowering, Lowerings
from accelpass.ir.attention.spec.block_select import BlockSelect, causal_form, changed_scores
from accelpass.ir.attention.spec.op import selection
from accelpass.ir.attention.spec.spec import All, AttentionSpec, Band, BlockList, Dense, SinksAndWindow
from accelpass.ir.core.graph import value

OPSET = 23
"""The first that has the operator."""


def lowerings(opset: int) -> Lowerings:
    """What edited attentions become: the operator where it fits, products and a softmax elsewhere."""
    return Lowerings(*([MASKED] if opset >= OPSET else []))


def _why_not(spec: AttentionSpec, node: fx.Node) -> str | None:
    q, k = (value(n) for n in node.args[:2])
    if q.dim() != 4 or k.dim() != 4:
        return "queries and keys are not (batch, heads, tokens, d)"
    if not isinstance(spec.store, Dense):
        return f"store {spec.store.part} is not known to it"
    if spec.statistics:
        return f"it gives no {', '.join(sorted(spec.statistics))}"
    if why := changed_scores(causal_form(spec, q.shape[2], k.shape[2])):
        return why
    if isinstance(spec.select, All | Band | SinksAndWindow | BlockList | BlockSelect):
        return None
    return f"selection {spec.select.part} is not known to it"


def _run(
    q: Tensor, k: Tensor, v: Tensor, extras: Sequence[Tensor], spec: AttentionSpec
) -> tuple[Tensor, dict[str, Tensor]]:
    rows, columns = q.shape[2], k.shape[2]
    plain = causal_form(spec, rows, columns)
    if isinstance(spec.select, BlockSelect):
        mask: Tensor | None = spec.select.mask(q, k, plain)
    else:
        mask = selection(spec.select, rows, columns, 0 if plain.causal else columns - rows, q)
    if mask is not None and plain.causal:
        mask = mask & torch.ones(rows, columns, dtype=torch.bool, device=q.device).tril()
    causal = plain.causal and mask is None
    out = F.scaled_dot_product_attention(q, k, v, mask, 0.0, causal, scale=spec.scale, enable_gqa=spec.groups > 1)
    return out, {}


MASKED = Lowering("ONNX Attention", _why_not, _run)
