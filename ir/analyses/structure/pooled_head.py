"""Heads whose scores of all tokens are only there for their maximum over the tokens: lexicon and multi-label heads."""

from __future__ import annotations

import operator
from dataclasses import dataclass

from torch import fx

from accelpass.ir.analyses.axes.flow import VIEWS, between, is_pointwise
from accelpass.ir.analyses.structure.linear import linears
from accelpass.ir.core.graph import aten, is_call, module_path, mutates, shape, value
from accelpass.ir.core.program import Program
from accelpass.ir.linear.op import is_linear

_FAR = 16


@dataclass(frozen=True)
class PooledHead:
    """A linear, what is done to each of its scores, and the maximum over tokens of that.

    Attributes:
        path: the module of the linear.
        linear: ``aten.linear`` or the semantic linear; its scores are ``(batch, tokens, words)``.
        steps: pointwise operations between, in graph order.
        maximum: the reduction; what it gives is ``result``.
        dims: that it reduces; never the last.
        keepdim: whether they stay as 1.
        result: the maxima.
        fault: why it cannot be computed word by word, or empty.
    """

    path: str
    linear: fx.Node
    steps: tuple[fx.Node, ...]
    maximum: fx.Node
    dims: tuple[int, ...]
    keepdim: bool
    result: fx.Node
    fault: str = ""

    @property
    def beside(self) -> list[fx.Node]:
        """What the steps read besides the scores: masks."""
        own = {self.linear, *self.steps}
        return list(dict.fromkeys(n for step in self.steps for n in step.all_input_nodes if n not in own))


def pooled_heads(program: Program) -> list[PooledHead]:
    """All of them, in graph order."""
    paths = {site.node: site.path for site in program.analysis(linears)}
    found = []
    for node in program.graph.nodes:
        if is_call(node, aten.amax, aten.max) and isinstance(node.args[0], fx.Node) and len(node.args) > 1:
            linear = _above(node.args[0])
            if linear is not None:
                found.append(_head(program, node, linear, paths.get(linear) or module_path(linear) or linear.name))
    return [head for head in found if head is not None]


def _above(node: fx.Node) -> fx.Node | None:
    """The linear that a pointwise chain begins with: of several operands, the one with as many dimensions and words."""
    for _ in range(_FAR):
        if is_linear(node) or is_call(node, aten.linear):
            return node if len(shape(node)) > 2 else None
        if not is_pointwise(node) or is_call(node, *VIEWS):
            return None
        like = [n for n in node.all_input_nodes if getattr(value(n), "shape", None) == value(node).shape]
        if not like:
            return None
        node = next((n for n in like if is_pointwise(n) or is_linear(n) or is_call(n, aten.linear)), like[0])
    return None


def _head(program: Program, node: fx.Node, linear: fx.Node, path: str) -> PooledHead | None:
    rank = len(shape(linear))
    given = node.args[1] if isinstance(node.args[1], list | tuple) else [node.args[1]]
    if not given or not all(isinstance(dim, int) for dim in given):
        return None
    dims = tuple(sorted(int(dim) % rank for dim in given))
    if rank - 1 in dims:
        return None
    steps = tuple(n for n in between(program, linear, node) if n is not node)
    result, fault = node, ""
    if is_call(node, aten.max):
        parts = {user.args[1]: user for user in node.users if is_call(user, operator.getitem)}
        if 1 in parts or 0 not in parts:
            fault = "the positions of the maxima are read, too"
        else:
            result = parts[0]
    keepdim = bool(node.args[2]) if len(node.args) > 2 else False
    head = PooledHead(path, linear, steps, node, dims, keepdim, result)
    return PooledHead(path, linear, steps, node, dims, keepdim, result, fault or _fault(head))


def _fault(head: PooledHead) -> str:
    inside = {*head.steps, head.maximum}
    for node in (head.linear, *head.steps):
        readers = [user for user in node.users if user not in inside]
        if readers:
            return f"the scores of all tokens are read by {readers[0].name}, too"
    for step in head.steps:
        if not is_pointwise(step) or any(len(written.users) > 1 for written in mutates(step)):
            return f"{step.name} ({step.target}) is no operation on each score by itself"
    for other in head.beside:
        sizes = shape(other)
        if len(sizes) and sizes[-1] != 1:
            return f"{other.name} has a value for each word"
    return ""
