"""Following a value through a graph: past casts and views, back to a constant, and between two nodes."""

from __future__ import annotations

import operator
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, fx

from accelpass.ir.core.graph import aten, is_call, mutates, placeholders, root, through, value
from accelpass.ir.core.program import Program

CASTS = (
    *(aten.to, aten._to_copy, aten.type_as, aten.contiguous, aten.clone, aten.alias, aten.detach),
    *(aten.lift_fresh_copy, aten.dropout, aten.dropout_, aten.feature_dropout),
)
VIEWS = (
    *(aten.view, aten.reshape, aten._unsafe_view, aten.flatten, aten.unflatten, aten.squeeze, aten.unsqueeze),
    *(aten.transpose, aten.permute, aten.t, aten.mT, aten.numpy_T, aten.movedim, aten.expand, aten.expand_as),
    *(aten.view_as, aten.reshape_as, aten.swapaxes),
)
SPLITS = (aten.chunk, aten.split, aten.split_with_sizes, aten.unbind, aten.tensor_split)
_ARITHMETIC = (aten.add, aten.add_, aten.sub, aten.sub_, aten.mul, aten.mul_, aten.div, aten.div_)
_COMPOSITE = (aten.square, aten.relu6, aten.mish, aten.hardswish, aten.selu, aten.expand_as, aten.float_power)
_FAR = 8  # casts, views and slices between a use of a constant and the constant


def bare(node: fx.Node, *passed: object) -> fx.Node:
    """What ``node`` is a cast or a copy of; ``passed`` are further operations to look through."""
    return through(node, *CASTS, *passed)


def tensors(node: fx.Node) -> list[fx.Node]:
    """The inputs that are tensors, or tuples of them."""
    return [n for n in node.all_input_nodes if isinstance(value(n), Tensor | tuple | list)]


def constant(program: Program, node: object) -> fx.Node | None:
    """The model tensor that ``node`` is a cast, a view or a slice of."""
    for _ in range(_FAR):
        if not isinstance(node, fx.Node):
            return None
        if program.tensors.is_constant(node):
            return node
        if not is_call(node, *CASTS, *VIEWS, aten.slice, aten.select):
            return None
        node = node.args[0]
    return None


def fixed(program: Program, node: Any) -> bool:
    """True for a number, and for what only constants of the model are computed into."""
    if not isinstance(node, fx.Node) or not isinstance(value(node), Tensor):
        return True
    for _ in range(_FAR):
        if program.tensors.is_constant(node) or node.op == "get_attr":
            return True
        above = tensors(node)
        if node.op != "call_function" or len(above) > 1:
            return False
        if not above:
            return is_call(node, aten.full, aten.scalar_tensor, aten.ones, aten.zeros)
        node = above[0]
    return False


def is_pointwise(node: fx.Node) -> bool:
    """True if each element of the result depends on one element of each operand."""
    if node.op != "call_function" or is_call(node, *VIEWS):
        return False
    tags = getattr(node.target, "tags", ())
    return torch.Tag.pointwise in tags or is_call(node, *_ARITHMETIC, *_COMPOSITE, *CASTS)


def scaled(program: Program, node: fx.Node) -> fx.Node | None:
    """The operand that ``node`` multiplies (or divides) by a number or a constant of the model."""
    if not is_call(node, aten.mul, aten.mul_, aten.div, aten.div_) or len(node.args) < 2:
        return None
    a, b = node.args[:2]
    if isinstance(a, fx.Node) and fixed(program, b):
        return a
    if isinstance(b, fx.Node) and fixed(program, a) and is_call(node, aten.mul, aten.mul_):
        return b
    return None


def positions(program: Program) -> dict[fx.Node, int]:
    """Where each node stands in the graph."""
    return {node: i for i, node in enumerate(program.graph.nodes)}


def between(program: Program, start: fx.Node, end: fx.Node) -> list[fx.Node]:
    """The nodes computed from ``start`` that ``end`` is computed from, ``end`` among them, in graph order.

    Empty if ``end`` does not depend on ``start``.
    """
    place = program.analysis(positions)
    first = place[start]
    seen, front = {end}, [end]
    while front:
        for parent in front.pop().all_input_nodes:
            if parent not in seen and place[parent] > first:
                seen.add(parent)
                front.append(parent)
    inside: set[fx.Node] = {start}
    for node in sorted(seen, key=place.__getitem__):
        if any(p in inside for p in node.all_input_nodes):
            inside.add(node)
    if end not in inside:
        return []
    inside.discard(start)
    return sorted(inside, key=place.__getitem__)


def reached_from(program: Program, *starts: fx.Node) -> set[fx.Node]:
    """``starts``, and every call that is computed from them or writes what is."""
    seen = set(starts)
    for node in program.graph.nodes:
        if node.op == "call_function" and not seen.isdisjoint(node.all_input_nodes):
            seen.add(node)
    return seen


def output_nodes(program: Program) -> list[fx.Node]:
    """What the graph returns."""
    return [n for out in program.graph.find_nodes(op="output") for n in out.all_input_nodes]


def writes(program: Program) -> dict[fx.Node, list[fx.Node]]:
    """By graph input: the calls that write to it, in order."""
    inputs: dict[fx.Node, list[fx.Node]] = {n: [] for n in placeholders(program.gm)}
    for node in program.graph.nodes:
        for written in mutates(node):
            base = root(written)
            if base in inputs:
                inputs[base].append(node)
    return {base: found for base, found in inputs.items() if found}


def is_part(node: fx.Node) -> bool:
    """True for one piece of a split tensor, or a slice."""
    if is_call(node, aten.slice):
        return True
    return is_call(node, operator.getitem) and is_call(node.args[0], *SPLITS)


def common_path(paths: Iterable[str]) -> str:
    """The module that holds all of ``paths``."""
    parts = [p.split(".") for p in paths if p]
    if not parts:
        return ""
    shared = []
    for names in zip(*parts, strict=False):
        if len(set(names)) > 1:
            break
        shared.append(names[0])
    return ".".join(shared)
