"""Lowerings of plain softmax attention to fused operators: torch's own over all keys, block-sparse over selected ones."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, fx

from accelpass.ir.attention.lowering.block_sparse import (
    BLOCK_SPARSE,
    FLOATS,
    KERNELS,
    band_blocks,
    cpu_rows,
    listed_blocks,
)
from accelpass.ir.attention.lowering.lower import Lowering, register_lowering
from accelpass.ir.attention.spec.block_select import BlockSelect, causal_form
from accelpass.ir.attention.spec.spec import All, AttentionSpec, Band, BlockList, Dense, Native, SinksAndWindow, Step
from accelpass.ir.core.graph import aten, known, value

_KERNEL_BLOCK = 128
"""Tokens of a band's block on a GPU: its tiles are as large or divide it."""


def _plain(spec: AttentionSpec, node: fx.Node) -> str | None:
    """Why a node is not ``(batch, heads, tokens, d)`` operands of one float dtype and one softmax, but for steps before."""
    q, k, v = (value(n) for n in node.args[:3])
    if not isinstance(spec.store, Dense) or not isinstance(spec.format, Native):
        return f"keys and values are kept as {spec.store.part}, {spec.format.part}"
    if any(t.dim() != 4 for t in (q, k, v)):
        return "operands are not (batch, heads, tokens, d)"
    if q.dtype not in FLOATS or not q.dtype == k.dtype == v.dtype:
        return f"operands are {q.dtype}, {k.dtype}, {v.dtype}, not of one float dtype"
    dtype = str(q.dtype).removeprefix("torch.")
    if spec.softmax.value not in (None, dtype, "float32") or (
        q.dtype == torch.float64 and spec.softmax.value == "float32"
    ):
        return f"its softmax is in {spec.softmax.value}"
    # A softmax in float32 goes back to the model's dtype, which a fused operator does by itself.
    after = [s for s in spec.after if s != Step("cast", value=dtype)]
    return f"a step {after[0].kind} follows its softmax" if after else None


def block_sparse_why_not(spec: AttentionSpec, node: fx.Node) -> str | None:
    """Why the block-sparse op cannot compute a node with this spec, or None if it can."""
    select = spec.select
    if isinstance(select, BlockSelect):
        spec = causal_form(spec, *(value(n).shape[-2] for n in node.args[:2]))
    if isinstance(select, SinksAndWindow):
        # With sinks, a block list would have to say which keys of a block are one.
        if select.sinks or not spec.causal:
            return (
                "sinks are not a band" if select.sinks else "the window of an attention that is not causal is no band"
            )
    elif not isinstance(select, Band | BlockList | BlockSelect):
        return f"selection {select.part} is not one of blocks"
    if spec.before:
        return f"a step {spec.before[0].kind} changes its scores"
    if not spec.statistics <= {"lse"}:
        return f"it does not compute {', '.join(sorted(spec.statistics - {'lse'}))}"
    why = _plain(spec, node)
    if why is not None:
        return why
    q, k = (value(n) for n in node.args[:2])
    sizes = [size for n in node.args[:3] for size in value(n).shape]
    if not isinstance(select, BlockSelect) and not all(isinstance(size, int) for size in sizes):
        return "a size is symbolic"
    if isinstance(select, BlockList) and select.per_head and len(select.blocks) != q.shape[1]:
        return f"{len(select.blocks)} lists for {q.shape[1]} heads"
    return "there are no tokens" if known(q.shape[2] == 0) or known(k.shape[2] == 0) else None


def _block_sparse(
    q: Tensor, k: Tensor, v: Tensor, extras: Sequence[Tensor], spec: AttentionSpec
) -> tuple[Tensor, dict[str, Tensor]]:
    """As ``attend``; a row without keys gives 0, also where the softmax is one that gives not-a-number."""
    select, rows, columns = spec.select, q.shape[2], k.shape[2]
    kernel = KERNELS.get(q.device.type)
    reach, order = -1, None
    if isinstance(select, BlockSelect):
        spec = causal_form(spec, rows, columns)
        blocks, counts, size, order = select.listed(q, k, spec)
    elif isinstance(select, BlockList):
        size = select.size
        blocks, counts = listed_blocks(select, rows, columns, q.device)
    else:
        assert isinstance(select, Band | SinksAndWindow)
        reach = select.reach if isinstance(select, Band) else select.window - 1
        reach = min(reach, max(rows, columns))  # of any size as an option, an int32 in a kernel
        size = cpu_rows(reach) if kernel is None else _KERNEL_BLOCK
        blocks, counts = band_blocks(rows, columns, reach, size, q.device)
    run = kernel or BLOCK_SPARSE
    out, lse = run(q, k, v, blocks, counts, size, reach, spec.causal, spec.scale, order)
    return out, {"lse": lse} if spec.statistics else {}


def _mask_why_not(spec: AttentionSpec, node: fx.Node) -> str | None:
    """Why the steps before the softmax are not one mask, as sdpa takes it."""
    if not spec.before:
        return None
    if len(spec.before) > 1:
        return f"steps {', '.join(s.kind for s in spec.before)} change its scores"
    (step,) = spec.before
    if spec.causal:
        return "sdpa takes no mask beside is_causal"
    boolean = step.kind in ("keep", "fill") and step.other is None and float(step.value) == float("-inf")
    additive = step.kind == "add" and step.value in (None, 1)
    if not boolean and not additive:
        return f"a step {step.shown()} changes its scores"
    extras = node.args[3]
    assert isinstance(extras, Sequence) and step.extra is not None
    mask = value(extras[step.extra])
    wanted = torch.bool if boolean else value(node.args[0]).dtype
    if mask.dtype != wanted or mask.dim() > 4:
        return f"its mask is {mask.dtype} in {mask.dim()} dimensions, not {wanted} in at most 4"
    return None


def _sdpa_why_not(spec: AttentionSpec, node: fx.Node) -> str | None:
    if not isinstance(spec.select, All):
        return f"selection {spec.select.part} is not known to sdpa"
    if spec.statistics:
        return f"sdpa does not give {', '.join(sorted(spec.statistics))}"
    return _mask_why_not(spec, node) or _plain(spec, node)


def _sdpa(
    q: Tensor, k: Tensor, v: Tensor, extras: Sequence[Tensor], spec: AttentionSpec
) -> tuple[Tensor, dict[str, Tensor]]:
    """As ``attend``; a row without keys gives 0, also where the softmax is one that gives not-a-number."""
    mask = None
    if spec.before:
        (step,) = spec.before
        assert step.extra is not None
        mask = extras[step.extra].logical_not() if step.kind == "fill" else extras[step.extra]
        mask = mask[(None,) * (4 - mask.dim())]
    out = aten.scaled_dot_product_attention.default(
        q, k, v, mask, 0.0, spec.causal, scale=spec.scale, enable_gqa=spec.groups > 1
    )
    return out, {}


register_lowering(Lowering("block_sparse", block_sparse_why_not, _block_sparse, rank=20, in_python=True))
register_lowering(Lowering("sdpa", _sdpa_why_not, _sdpa, rank=10))
