"""``vmap`` written out: stretches of a graph that run once for all rows become the operations on whole tensors that they stand for.

Dynamo's graph holds a ``vmap`` as calls that open a level, mark dimensions and close it. What is computed between them reaches a
tracer only below the level, so each stretch is traced there, by itself, and its operations take the place of it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import fx
from torch.fx.experimental.proxy_tensor import make_fx

from accelpass.ir.torch_private import CLOSES_VMAP, OPENS_VMAP, closed_levels


@dataclass(frozen=True, eq=False)
class Stretch:
    """One outermost ``vmap`` of a graph.

    Attributes:
        nodes: all of it, in order; the first opens the level, the last closes it.
        inputs, outputs: what it reads of the graph before it, and what is read of it behind it.
    """

    nodes: list[fx.Node]
    inputs: list[fx.Node]
    outputs: list[fx.Node]


def stretches(graph: fx.Graph) -> list[Stretch]:
    found, nodes, depth = [], list[fx.Node](), 0
    for node in graph.nodes:
        is_call = node.op == "call_function"
        depth += is_call and node.target is OPENS_VMAP
        if depth:
            nodes.append(node)
        if depth and is_call and node.target is CLOSES_VMAP:
            depth -= 1
            if not depth:
                found.append(_stretch(nodes))
                nodes = []
    return found


def _stretch(nodes: Sequence[fx.Node]) -> Stretch:
    inside = set(nodes)
    inputs = dict.fromkeys(n for node in nodes for n in node.all_input_nodes if n not in inside)
    return Stretch(list(nodes), list(inputs), [n for n in nodes if any(u not in inside for u in n.users)])


def written_out(
    gm: fx.GraphModule, fakes: Sequence[Any], interpreter: Callable[[fx.GraphModule], fx.Interpreter]
) -> dict[fx.Node, tuple[Stretch, fx.GraphModule]]:
    """By the first node of each ``vmap``: what computes its outputs from its inputs, without one.

    Args:
        fakes: inputs of the graph; the fake mode is entered. interpreter: runs graphs as the caller does.
    """
    found = stretches(gm.graph)
    made: dict[fx.Node, tuple[Stretch, fx.GraphModule]] = {}
    if not found:
        return made
    before = _part(gm, [n for n in gm.graph.nodes if n in _needed(found)], [n for s in found for n in s.inputs])
    given = iter(interpreter(before).run(*fakes))
    for stretch in found:
        whole = fx.Graph()
        copies = {n: whole.placeholder(n.name) for n in stretch.inputs}
        for node in stretch.nodes:
            copies[node] = whole.node_copy(node, copies.__getitem__)
        whole.output(tuple(copies[n] for n in stretch.outputs))
        run = interpreter(fx.GraphModule(gm, whole)).run
        values = [next(given) for _ in stretch.inputs]
        with closed_levels():
            made[stretch.nodes[0]] = stretch, make_fx(lambda *a, run=run: run(*a))(*values)
    return made


def _needed(found: Sequence[Stretch]) -> set[fx.Node]:
    """All that inputs of stretches are computed from; of a stretch that one of them is computed by, the whole."""
    whole = {n: s for s in found for n in s.nodes}
    needed, front = set[fx.Node](), [n for s in found for n in s.inputs]
    while front:
        node = front.pop()
        if node not in needed:
            needed.add(node)
            front += [*node.all_input_nodes, *(whole[node].nodes if node in whole else [])]
    return needed


def _part(gm: fx.GraphModule, nodes: Sequence[fx.Node], ends: Sequence[fx.Node]) -> fx.GraphModule:
    """A graph of all inputs and of ``nodes``, which returns ``ends``."""
    part, wanted = fx.Graph(), set(nodes)
    copies: dict[fx.Node, fx.Node] = {}
    for node in gm.graph.nodes:
        if node.op == "placeholder" or node in wanted:
            copies[node] = part.node_copy(node, copies.__getitem__)
    part.output(tuple(copies[n] for n in ends))
    return fx.GraphModule(gm, part)
