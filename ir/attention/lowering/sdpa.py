"""The ``scaled_dot_product_attention`` call that an unedited attention lowers back to, for passes that write it anew."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import fx

from accelpass.ir.attention.lowering.lower import is_as_inserted
from accelpass.ir.attention.recognition.detect import Attention
from accelpass.ir.attention.recognition.score_steps import argument
from accelpass.ir.core.graph import aten, value


@dataclass(frozen=True)
class SdpaCall:
    """One call inside the origin of a semantic node.

    Attributes:
        origin: what the node lowers to; its first placeholders are q, k and v of the semantic op, k and v not repeated.
        node: the call.
        mask: its mask in the origin, or None.
    """

    origin: fx.GraphModule
    node: fx.Node
    q: fx.Node
    k: fx.Node
    v: fx.Node
    mask: fx.Node | None
    causal: bool
    scale: float

    def argument(self, name: str) -> Any:
        """An argument of the call by its schema name."""
        return argument(self.node, name)

    def replace(self, new: fx.Node) -> None:
        """Let the origin return what ``new`` computes."""
        if new is not self.node:
            self.node.replace_all_uses_with(new)
            self.origin.graph.erase_node(self.node)
        self.origin.graph.eliminate_dead_code()
        self.origin.recompile()


def sdpa_call(attention: Attention) -> SdpaCall | str:
    """The call that computes ``attention``, or why it cannot be written anew."""
    node = attention.node
    if node is None or not is_as_inserted(node):
        return "another pass computes this attention"
    origin: fx.GraphModule = node.meta["attention_origin"]
    found = origin.graph.find_nodes(op="call_function", target=aten.scaled_dot_product_attention.default)
    if len(found) != 1:
        return "no scaled_dot_product_attention call computes it"
    (call,) = found
    q, k, v = origin.graph.find_nodes(op="placeholder")[:3]
    if argument(call, "query") is not q or value(q).dim() != 4:
        return "queries are rearranged in front of the attention"
    if argument(call, "dropout_p"):
        return "dropout is on"
    if value(k).dtype != value(q).dtype:
        return f"keys are {value(k).dtype}, queries {value(q).dtype}"
    scale = argument(call, "scale") or value(q).shape[-1] ** -0.5
    return SdpaCall(origin, call, q, k, v, argument(call, "attn_mask"), argument(call, "is_causal"), scale)
