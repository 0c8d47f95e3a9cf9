"""Attention whose query heads share keys and values, without a copy of these for every query head."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from accelpass.ir.attention import Attention, detect, is_as_inserted
from accelpass.ir.graph import aten, value
from accelpass.ir.program import Program
from accelpass.passes.base import Done, Pass, Record, Skip, Take, Verdict

_ARGUMENTS = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
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
            verdict = _judge(attention)
            if isinstance(verdict, Skip):
                record.skip(attention.path, verdict.why)
                continue
            assert attention.node is not None
            saved = _grouped(attention.node.meta["attention_origin"], attention)
            what = f"{attention.heads} query heads read {attention.kv_heads} key/value heads; "
            record.take(attention.path, Done(f"{what}{saved / 1e3:.0f} kB a call are not copied"))


def _judge(attention: Attention) -> Verdict:
    node = attention.node
    if attention.spec.groups == 1:
        return Skip("every query head has keys and values of its own")
    if node is None or not is_as_inserted(node):
        return Skip("another pass computes this attention")
    call = _sdpa(node.meta["attention_origin"])
    if call is None:
        return Skip("the model writes its softmax out; only scaled_dot_product_attention groups heads")
    q, k, v = (value(n) for n in node.args[:3])
    if _argument(call, 0) is not next(iter(call.graph.nodes)) or q.dim() != 4:
        return Skip("queries are rearranged in front of the attention")
    if _argument(call, 1) is _argument(call, 2) or q.shape[-1] != v.shape[-1]:
        return Skip("keys and values are one tensor, or of different width")
    if q.device.type != "cpu" and (_argument(call, 3) is not None or q.dtype not in _HALF):
        return Skip(f"on {q.device.type} the fast kernels group heads in half precision and without a mask alone")
    if k.dtype != q.dtype:
        return Skip(f"keys are {k.dtype}, queries {q.dtype}")
    return Take()


def _sdpa(origin: fx.GraphModule) -> fx.Node | None:
    found = origin.graph.find_nodes(op="call_function", target=aten.scaled_dot_product_attention.default)
    return found[0] if len(found) == 1 else None


def _argument(call: fx.Node, position: int) -> Any:
    if position < len(call.args):
        return call.args[position]
    return call.kwargs.get(_ARGUMENTS[position])


def _grouped(origin: fx.GraphModule, attention: Attention) -> int:
    """Rewrite what the node lowers to; returns the bytes of the copies that are gone."""
    call = _sdpa(origin)
    assert call is not None
    q, k, v = origin.graph.find_nodes(op="placeholder")[:3]
    copied = sum(_bytes(_argument(call, i)) for i in (1, 2))
    call.args = (q, k, v, *call.args[3:])
    call.kwargs = {**{n: a for n, a in call.kwargs.items() if n not in _ARGUMENTS[:3]}, "enable_gqa": True}
    origin.graph.eliminate_dead_code()
    origin.recompile()
    return copied


def _bytes(node: fx.Node) -> int:
    """Bytes of a tensor; a symbolic size counts as it was when traced."""
    size = value(node).element_size()
    for length in value(node).shape:
        size *= length if isinstance(length, int) else length.node.hint or 1
    return int(size)
