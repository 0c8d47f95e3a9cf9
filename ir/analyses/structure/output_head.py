"""The output head: the linear whose result, at most scaled, capped and sliced, is what the graph returns."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from dataclasses import dataclass

from torch import fx

from accelpass.ir.analyses.axes.flow import (
    CASTS,
    VIEWS,
    bare,
    constant,
    fixed,
    is_pointwise,
    output_nodes,
    scaled,
    tensors,
)
from accelpass.ir.analyses.structure.linear import Embedding, Linear, embeddings, linears
from accelpass.ir.attention.recognition.score_steps import number
from accelpass.ir.attention.spec.op import is_attention
from accelpass.ir.core.graph import aten, is_call, shape
from accelpass.ir.core.program import Program
from accelpass.ir.linear.op import EMBEDDING, LINEAR

_FAR = 12
_POOLS = (
    *(aten.mean, aten.select, aten.adaptive_avg_pool1d, aten.adaptive_avg_pool2d, aten.avg_pool2d, aten.amax),
    *(aten.index, aten.max, aten.sum, aten.gather, aten.logsumexp),
)


@dataclass(frozen=True)
class OutputHead:
    """What turns the last hidden state into logits.

    Attributes:
        linear: its site.
        node: what the graph returns.
        kind: ``vocabulary`` (the classes are the rows of the graph's token embedding) or ``classifier`` (one vector of
            logits for each input).
        size: logits per position.
        tied: the weight is also the embedding's.
        softcap: logits are ``softcap * tanh(logits / softcap)``; None without.
    """

    linear: Linear
    node: fx.Node
    kind: str
    size: int
    tied: bool
    softcap: float | None

    @property
    def path(self) -> str:
        return self.linear.path


def output_heads(program: Program) -> list[OutputHead]:
    """Heads whose logits the graph returns, in the order of its outputs, and does nothing else with."""
    return _heads(program, _only_returned)


def returned_logits(program: Program) -> list[fx.Node]:
    """What is returned of heads, plain ones and those whose weights a pass has packed, also where the graph itself reads it.

    A step that chooses the next token reads its logits itself.
    """
    plain = [head.node for head in _heads(program, lambda node: True)]
    packed = {n for n in program.graph.nodes if is_call(n, LINEAR)}
    tables = {int(shape(table.weight)[0]) for table in program.analysis(embeddings) if is_read_first(table)}
    tables |= {int(shape(n)[0]) for e in program.graph.nodes if is_call(e, EMBEDDING) for n in e.args[1][:1]}
    for out in output_nodes(program):
        behind = _behind(program, out, packed, lambda node: True)
        if behind is not None and out not in plain and shape(behind[0])[-1] in tables:
            plain.append(out)
    return plain


def _heads(program: Program, fits: Callable[[fx.Node], bool]) -> list[OutputHead]:
    sites = {site.node: site for site in program.analysis(linears)}
    tables = program.analysis(embeddings)
    found: dict[fx.Node, OutputHead] = {}
    for out in output_nodes(program):
        behind = _behind(program, out, sites, fits)
        if behind is None or behind[0] in found:
            continue
        site, cap = sites[behind[0]], behind[1]
        head = _head(program, site, out, cap, tables)
        if head is not None:
            found[site.node] = head
    return list(found.values())


def _behind(
    program: Program, node: fx.Node, sites: Collection[fx.Node], fits: Callable[[fx.Node], bool]
) -> tuple[fx.Node, float | None] | None:
    """The linear behind an output, and its soft cap; None where it does not fit."""
    cap, factor = None, None
    for _ in range(_FAR):
        if node in sites:
            return (node, cap) if fits(node) else None
        above = scaled(program, node)
        if above is not None:
            factor = next((c for c in map(number, node.args[:2]) if c is not None), None)
            if is_call(node, aten.div, aten.div_) and factor:
                factor = 1 / factor
            node = above
        elif is_call(node, aten.tanh, aten.tanh_) and isinstance(node.args[0], fx.Node):
            cap, node = factor, node.args[0]
        elif (is_call(node, *CASTS, *VIEWS, aten.slice, aten.select) and isinstance(node.args[0], fx.Node)) or (
            is_call(node, aten.add, aten.add_, aten.sub) and fixed(program, node.args[1])
        ):
            node = node.args[0]
        else:
            return None
    return None


def _only_returned(node: fx.Node) -> bool:
    """Every reader only views, scales or returns."""
    front, seen = [node], {node}
    while front:
        for user in front.pop().users:
            if user.op == "output" or user in seen:
                continue
            known = is_pointwise(user) or is_call(user, *CASTS, *VIEWS, aten.slice, aten.select)
            if not known or is_attention(user) or len(seen) > 4 * _FAR:
                return False
            seen.add(user)
            front.append(user)
    return True


def _head(
    program: Program, site: Linear, out: fx.Node, cap: float | None, tables: list[Embedding]
) -> OutputHead | None:
    tied = any(_same(program, site.weight, table.weight) for table in tables)
    if tied or any(int(shape(table.weight)[0]) == site.out_features for table in tables if is_read_first(table)):
        kind = "vocabulary"
    elif len(shape(site.node)) == 2 and _is_pooled(program, site.operand()):
        kind = "classifier"
    else:
        return None
    cap = cap if cap is not None and math.isfinite(cap) and cap > 0 else None
    return OutputHead(site, out, kind, site.out_features, tied, cap)


def _same(program: Program, a: fx.Node, b: fx.Node) -> bool:
    if a is b:
        return True
    held = program.tensors.value(a)
    return held is not None and held is program.tensors.value(b)


def is_read_first(table: Embedding) -> bool:
    """The table is looked up with ids that the user gives, not with positions that the graph counts."""
    node: object = table.indices
    for _ in range(_FAR):
        if not isinstance(node, fx.Node):
            return False
        if node.op == "placeholder":
            return True
        above = tensors(node)
        if len(above) != 1:
            return False
        node = above[0]
    return False


def _is_pooled(program: Program, node: fx.Node) -> bool:
    """What the classifier reads is one token, or one value over all of them."""
    for _ in range(2 * _FAR):
        node = bare(node)
        if is_call(node, *_POOLS):
            return True
        above = [n for n in tensors(node) if constant(program, n) is None]
        if is_call(node, aten.cat):
            return all(_is_pooled(program, n) for n in above)
        if node.op != "call_function" or len(above) != 1 or is_attention(node):
            return False
        node = above[0]
    return False
