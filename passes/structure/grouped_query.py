"""Attention whose query heads share keys and values, without a copy of these for every query head."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from accelpass.ir.attention import Attention, SdpaCall
from accelpass.ir.core.graph import hint, value
from accelpass.passes.core.base import Done, Skip, Take, Verdict
from accelpass.passes.core.site_pass import Edits
from accelpass.passes.structure.sdpa_rewrite import SdpaRewrite

_HALF = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class GroupedQuery(SdpaRewrite):
    """Let ``scaled_dot_product_attention`` group the query heads (``enable_gqa``) where the model repeats keys and values.

    The repeated heads of a cache are copied for every token otherwise, which costs more than the attention itself. Each
    output is the same sum as before.
    """

    name: ClassVar[str] = "grouped_query"
    reads: ClassVar[frozenset[str]] = frozenset({"attention.kernel"})
    summary: ClassVar[str] = "keys and values shared by query heads are read, not copied for each head"

    def suitable(self, attention: Attention, sdpa: SdpaCall) -> Verdict:
        if attention.spec.groups == 1:
            return Skip("every query head has keys and values of its own")
        key, values = (sdpa.argument(name) for name in ("key", "value"))
        if key is sdpa.k:
            return Skip("the model groups its heads already")
        if key is values or value(sdpa.q).shape[-1] != value(sdpa.v).shape[-1]:
            return Skip("keys and values are one tensor, or of different width")
        q = value(sdpa.q)
        if q.device.type != "cpu" and (sdpa.mask is not None or q.dtype not in _HALF):
            return Skip(f"on {q.device.type} the fast kernels group heads in half precision and without a mask alone")
        return Take()

    def written(self, attention: Attention, sdpa: SdpaCall, edit: Edits) -> Done:
        copied = sum(_bytes(sdpa.argument(name)) for name in ("key", "value"))
        sdpa.node.args = (sdpa.q, sdpa.k, sdpa.v, *sdpa.node.args[3:])
        sdpa.node.kwargs = {**sdpa.node.kwargs, "enable_gqa": True}
        sdpa.replace(sdpa.node)
        what = f"{attention.heads} query heads read {attention.kv_heads} key/value heads"
        return Done(f"{what}; {copied / 1e3:.0f} kB a call are not copied")


def _bytes(node: fx.Node) -> int:
    """Bytes of a tensor; a symbolic size counts as it was when traced."""
    size = value(node).element_size()
    for length in value(node).shape:
        size *= hint(length) or 1
    return int(size)
