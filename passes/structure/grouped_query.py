"""Attention whose query heads share keys and values, without a copy of these for every query head."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from accelpass.ir.attention import Attention, SdpaCall, detect, sdpa_call
from accelpass.ir.graph import value
from accelpass.ir.program import Program
from accelpass.passes.base import Done, Pass, Record

_HALF = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class GroupedQuery(Pass):
    """Let ``scaled_dot_product_attention`` group the query heads (``enable_gqa``) where the model repeats keys and values.

    The repeated heads of a cache are copied for every token otherwise, which costs more than the attention itself. Each
    output is the same sum as before.
    """

    name: ClassVar[str] = "grouped_query"
    phase: ClassVar[str] = "kernels"
    summary: ClassVar[str] = "keys and values shared by query heads are read, not copied for each head"
    exact: ClassVar[bool] = True

    def apply(self, program: Program, record: Record) -> None:
        for attention in program.analysis(detect):
            call = _suitable(attention)
            if isinstance(call, str):
                record.skip(attention.path, call)
                continue
            copied = sum(_bytes(call.argument(i)) for i in (1, 2))
            call.node.args = (call.q, call.k, call.v, *call.node.args[3:])
            call.node.kwargs = {**call.node.kwargs, "enable_gqa": True}
            call.replace(call.node)
            what = f"{attention.heads} query heads read {attention.kv_heads} key/value heads"
            record.take(attention.path, Done(f"{what}; {copied / 1e3:.0f} kB a call are not copied"))


def _suitable(attention: Attention) -> SdpaCall | str:
    if attention.spec.groups == 1:
        return "every query head has keys and values of its own"
    call = sdpa_call(attention)
    if isinstance(call, str):
        return call
    if call.argument(1) is call.k:
        return "the model groups its heads already"
    if call.argument(1) is call.argument(2) or value(call.q).shape[-1] != value(call.v).shape[-1]:
        return "keys and values are one tensor, or of different width"
    q = value(call.q)
    if q.device.type != "cpu" and (call.mask is not None or q.dtype not in _HALF):
        return f"on {q.device.type} the fast kernels group heads in half precision and without a mask alone"
    return call


def _bytes(node: fx.Node) -> int:
    """Bytes of a tensor; a symbolic size counts as it was when traced."""
    size = value(node).element_size()
    for length in value(node).shape:
        size *= length if isinstance(length, int) else length.node.hint or 1
    return int(size)
