"""Aliases of tensors: which of them a graph can do without, and views that are made in place.

``detach``, ``alias`` and ``x[...]`` give a tensor object of its own on the same memory, with its own shape and gradient flag.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from accelpass.ir.core.graph import aten, value
from accelpass.ir.torch_private import FakeTensor

ALIASES = (aten.detach.default, aten.alias.default)


class NotAView(Exception):
    """An operator that changes a tensor object in a way that no view expresses."""


def functional_views(gm: fx.GraphModule) -> None:
    """Make in-place views (``t_``, ``unsqueeze_``) views: a tracer lets later uses of the tensor read the result anyway.

    Raises:
        NotAView: an input's own shape is changed, which the caller sees, or memory is exchanged (``set_``, ``resize_``).
    """
    for node in gm.graph.nodes:
        if node.op != "call_function" or torch.Tag.inplace_view not in getattr(node.target, "tags", ()):
            continue
        given = node.args[0]
        while _returns_operand(given) or _gives_operand(given):
            given = given.args[0]
        view = getattr(getattr(aten, node.target._opname[:-1], None), node.target._overloadname, None)
        if given.op != "call_function" or view is None or not view._schema.arguments[0].alias_info:
            raise NotAView(f"{node.target} changes {given.name} itself")
        node.target = view


def drop_aliases(gm: fx.GraphModule) -> None:
    """Remove aliases that only the graph itself sees; one that is returned stays what it is, not the tensor behind it."""
    for target in ALIASES:
        for node in gm.graph.find_nodes(op="call_function", target=target):
            if not any(user.op == "output" for same in _same_tensor(node) for user in same.users):
                node.replace_all_uses_with(node.args[0])
                gm.graph.erase_node(node)


def _same_tensor(node: fx.Node) -> list[fx.Node]:
    """``node``, and what writes to it in place return, which is the same tensor."""
    found = [node]
    for user in node.users:
        if user.args[:1] == (node,) and _returns_operand(user):
            found += _same_tensor(user)
    return found


def _gives_operand(node: fx.Node) -> bool:
    """Whether a call that need not copy, a cast to the dtype that is there already, gives the very tensor that it was given first."""
    operand = node.args[0] if node.op == "call_function" and node.args else None
    held = value(operand)
    if not isinstance(held, FakeTensor):
        return False
    with held.fake_mode, torch.no_grad():
        made = node.target(*fx.map_arg(node.args, value), **fx.map_arg(node.kwargs, value))
    return made is held


def _returns_operand(node: Any) -> bool:
    """Whether a call returns the very tensor that it was given first, and has written to."""
    schema = getattr(node.target, "_schema", None)
    if schema is None or not schema.arguments or not schema.returns:
        return False
    infos = schema.arguments[0].alias_info, schema.returns[0].alias_info
    return all(info is not None and info.is_write for info in infos)
