"""Puts one semantic node in the place of each attention, keeping what the model had as the node's origin."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx

from accelpass.ir.attention.recognition.detect import Attention, survey
from accelpass.ir.attention.recognition.effects import writes
from accelpass.ir.attention.recognition.region import Operand, dimension
from accelpass.ir.attention.recognition.score_steps import aten
from accelpass.ir.attention.spec.op import ATTENTION
from accelpass.ir.attention.spec.spec import AttentionSpec
from accelpass.ir.core.capture import from_dynamo
from accelpass.ir.core.graph import call, root, value
from accelpass.ir.core.program import Program
from accelpass.ir.transform.splice import KEPT

_SHOWN = {"keep": aten.ones.default, "fill": aten.zeros.default, "add": aten.zeros.default}
"""By what a step does with a mask: what makes one that lets every key through."""


def captured(gm: fx.GraphModule, inputs: Sequence[Any]) -> Program:
    """The program of a graph of Dynamo's, with its attentions as semantic nodes."""
    program = from_dynamo(gm, inputs)
    with torch.no_grad():
        insert(program)
    return program


def insert(program: Program) -> list[Attention]:
    """Replace each detected attention by an ``accelpass::attention`` node; returns the records, ``node`` set.

    The node's ``meta`` holds ``attention_origin`` (a GraphModule over q, k, v and the extras, in the op's layout) and
    ``attention_spec`` (the spec as inserted), from which ``lower`` gives back the model's own operators.
    """
    found = program.analysis(survey).attentions
    replaced: dict[fx.Node, fx.Node] = {}
    records: list[Attention] = []
    kept: list[fx.Node] = []
    for attention in found:
        if attention.match is None:  # a semantic node already
            records.append(attention)
            continue
        records.append(_insert_one(program, attention, replaced, kept))
    for node in sorted(kept, reverse=True):
        # Shared by two attentions (repeated keys, say): dead once both are replaced.
        if not node.users and not writes(node):
            program.graph.erase_node(node)
    program.gm.recompile()
    program.changed()
    return records


def _insert_one(
    program: Program, attention: Attention, replaced: dict[fx.Node, fx.Node], kept: list[fx.Node]
) -> Attention:
    graph, match = program.graph, attention.match
    assert match is not None
    now = [Operand(replaced.get(o.node, o.node), o.order) for o in (match.q, match.k, match.v)]
    extras = [replaced.get(n, n) for n in match.extras]
    spec, gone = _without_masks(attention.spec, len(extras))
    origin = _origin(attention, now, extras, gone)
    extras = [n for i, n in enumerate(extras) if i not in gone]
    attention = replace(attention, spec=spec)
    out = match.out
    with graph.inserting_before(out):
        operands = [_adapted(graph, o) for o in now]
        node = graph.call_function(ATTENTION, (*operands, extras, attention.spec.to_json()))
        node.meta.update({k: out.meta[k] for k in KEPT if k in out.meta})
        node.meta["val"] = _permuted(value(out), match.order)
        node.meta["attention_origin"] = origin
        node.meta["attention_spec"] = attention.spec.to_json()
        node.meta["attention_shared"] = shared(node)
        result = node
        if match.order is not None:
            result = call(graph, out, aten.permute.default, node, list(inverse(match.order)))
            result.meta["val"] = value(out)
            result.meta["attention_adapter"] = True
    out.replace_all_uses_with(result)
    replaced[out] = result
    kept += _remove(graph, match.region, out)
    return replace(
        attention, q=now[0].node, k=now[1].node, v=now[2].node, extras=tuple(extras), out=result, node=node, region=()
    )


def _without_masks(spec: AttentionSpec, count: int) -> tuple[AttentionSpec, dict[int, Any]]:
    """The spec without masks that are known to show every key; by number among the ``count`` extras, what makes one of these."""
    if spec.bias != "none":
        return spec, {}
    gone = {s.extra: _SHOWN[s.kind] for s in spec.steps if s.kind in _SHOWN and s.extra is not None and s.other is None}
    number = {old: new for new, old in enumerate(i for i in range(count) if i not in gone)}
    kept = [s for s in spec.steps if s.extra not in gone or s.extra is None]
    at = lambda i: None if i is None else number[i]  # noqa: E731
    return replace(spec, steps=tuple(replace(s, extra=at(s.extra), other=at(s.other)) for s in kept)), gone


def shared(node: fx.Node) -> tuple[int, ...]:
    """Which operands of a semantic node are one tensor: the origin cannot tell these apart."""
    bases = [base(n) for n in (*node.args[:3], *node.args[3])]
    return tuple(bases.index(n) for n in bases)


def base(node: Any) -> Any:
    """The tensor behind a layout adapter."""
    return node.args[0] if isinstance(node, fx.Node) and node.meta.get("attention_adapter") else node


def inverse(order: tuple[int, ...]) -> tuple[int, ...]:
    """The permutation that undoes ``order``."""
    return tuple(order.index(i) for i in range(len(order)))


def _permuted(tensor: Tensor, order: tuple[int, ...] | None) -> Tensor:
    return tensor if order is None else tensor.permute(order)


def _adapted(graph: fx.Graph, operand: Operand) -> fx.Node:
    if operand.order is None:
        return operand.node
    node = call(graph, operand.node, aten.permute.default, operand.node, list(operand.order))
    node.meta["attention_adapter"] = True
    return node


def _remove(graph: fx.Graph, region: set[fx.Node], out: fx.Node) -> list[fx.Node]:
    """Erase what nothing outside needs; returns what stays because something does."""
    ordered = sorted(region)
    live = {n for n in ordered if n is not out and any(u not in region for u in n.users)}
    grown = True
    while grown:
        before = len(live)
        live |= {p for n in live for p in n.all_input_nodes if p in region}
        bases = {root(n) for n in live}
        live |= {n for n in ordered if any(root(w) in bases for w in writes(n))}
        grown = len(live) > before
    for node in reversed(ordered):
        if node not in live:
            graph.erase_node(node)
    return sorted(live)


def _origin(
    attention: Attention, operands: list[Operand], extras: list[fx.Node], gone: Mapping[int, Any]
) -> fx.GraphModule:
    """The region as a module over the semantic node's operands; of those of ``gone`` it makes one element itself.

    Transpositions that only serve the op's layout are marked, so that ``lower`` can cancel them. Each node remembers
    the name that it had: what is still alive in the graph under that name is not computed twice.
    """
    match = attention.match
    assert match is not None
    graph = fx.Graph()
    env: dict[fx.Node, fx.Node] = {}
    inputs = []
    for name, operand in zip("qkv", operands, strict=True):
        inputs.append(_placeholder(graph, name, _permuted(value(operand.node), operand.order)))
    for index, extra in enumerate(extras):
        if index in gone:
            env[extra] = _one_element(graph, extra, gone[index])
            continue
        inputs.append(_placeholder(graph, f"extra_{index}", value(extra)))
        env[extra] = inputs[-1]
    for operand, given in zip(operands, inputs, strict=False):
        if operand.order is None:
            env[operand.node] = given
        else:
            env[operand.node] = call(graph, operand.node, aten.permute.default, given, list(inverse(operand.order)))
            env[operand.node].meta["attention_adapter"] = True
    for node in sorted(match.region):
        for parent in node.all_input_nodes:
            if parent not in env:
                env[parent] = _size(graph, parent, inputs, env)
        copy = graph.node_copy(node, env.__getitem__)
        copy.meta = {k: node.meta[k] for k in ("val", *KEPT) if k in node.meta}
        copy.meta["attention_was"] = node.name
        env[node] = copy
    result = env[match.out]
    if match.order is not None:
        result = call(graph, match.out, aten.permute.default, result, list(match.order))
        result.meta["attention_adapter"] = True
    graph.output(result)
    return fx.GraphModule(torch.nn.Module(), graph)


def _one_element(graph: fx.Graph, like: fx.Node, made: Any) -> fx.Node:
    tensor = value(like)
    with getattr(tensor, "fake_mode", None) or nullcontext():
        return call(graph, like, made, [1] * tensor.dim(), dtype=tensor.dtype, device=tensor.device)


def _placeholder(graph: fx.Graph, name: str, fake: Tensor) -> fx.Node:
    node = graph.placeholder(name)
    node.meta["val"] = fake
    return node


def _size(graph: fx.Graph, node: fx.Node, inputs: list[fx.Node], env: dict[fx.Node, fx.Node]) -> fx.Node:
    """A symbolic size that the region reads, found again among the operands' dimensions."""
    wanted: Any = value(node)
    assert not isinstance(wanted, Tensor), f"{node.name} is read by an attention, but is not an operand of it"
    place = dimension(wanted, inputs)
    if place is not None:
        index, dim, divisor = place
        found = call(graph, node, aten.sym_size.int, inputs[index], dim)
        if divisor > 1:
            found = call(graph, node, operator.floordiv, found, divisor)
        found.meta.update(val=wanted, attention_was=node.name)
        return found
    for parent in node.all_input_nodes:  # the match made sure that this ends at sizes of operands
        if parent not in env:
            env[parent] = _size(graph, parent, inputs, env)
    found = graph.node_copy(node, env.__getitem__)
    found.meta = {"val": wanted, "attention_was": node.name}
    return found
