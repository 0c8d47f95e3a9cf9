"""The region of one attention, and what looks through its operands' layout: transposes, merged or repeated heads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from accelpass.ir.attention.recognition.contraction import same_sizes
from accelpass.ir.attention.recognition.score_steps import argument, aten, leading, permutation_of, readings
from accelpass.ir.attention.spec.spec import Step
from accelpass.ir.core.graph import is_call, known, value


class NoMatch(Exception):
    """Not an attention, or one that the IR has no words for; the message is for the user."""


class NoAttention(NoMatch):
    """A softmax without the two products of an attention: a router's, a classifier's."""


@dataclass(frozen=True)
class Operand:
    """A region input: ``node`` permuted by ``order`` (None: as it is) has the op's layout."""

    node: fx.Node
    order: tuple[int, ...] | None = None

    def shape(self) -> tuple:
        sizes = value(self.node).shape
        return tuple(sizes) if self.order is None else tuple(sizes[i] for i in self.order)


@dataclass
class Match:
    """A region and what it computes.

    Attributes:
        region: its nodes, ``out`` among them.
        order: ``out`` permuted by it has the op's layout; None: it has it already.
    """

    q: Operand
    k: Operand
    v: Operand
    out: fx.Node
    region: set[fx.Node]
    order: tuple[int, ...] | None = None
    groups: int = 1
    scale: float = 1.0
    causal: bool = False
    steps: list[Step] = field(default_factory=list)
    extras: list[fx.Node] = field(default_factory=list)

    def extra(self, node: fx.Node) -> int:
        """Index of a tensor that a step reads; a mask that is only spread over the scores is read as it was before."""
        if is_call(node, aten.expand_as) and node.args[1] in self.region:
            self.region.add(node)
            node = node.args[0]
        if node not in self.extras:
            self.extras.append(node)
        return self.extras.index(node)

    def inputs(self) -> list[fx.Node]:
        return [self.q.node, self.k.node, self.v.node, *self.extras]


def unmerge(found: Match) -> None:
    """Look through views of query and key that merge batch and heads, where values and output keep them apart."""
    lead = value(found.v.node).shape[:-2]
    sources = []
    for operand in (found.q, found.k):
        node, passed = operand.node, []
        order = permutation_of(node) if operand.order is not None else None
        if order is not None:
            if tuple(order[i] for i in operand.order or ()) != tuple(range(len(order))):
                return
            passed.append(node)
            node = node.args[0]
        elif operand.order is not None:
            return
        views = [r for r in readings(node) if r.kind == "view"]
        if value(node).dim() == len(lead) + 2 or not views or not same_sizes(value(views[0].source).shape[:-2], lead):
            return
        sources.append((views[0].source, [*passed, node]))
    merged = leading(value(found.q.node).shape[:-2])
    if merged is None:
        return
    (q, q_nodes), (k, k_nodes) = sources
    found.q, found.k = Operand(q), Operand(k)
    found.region.update([*q_nodes, *k_nodes])
    found.steps.insert(0, Step("view", value=tuple(merged)))
    if found.steps[1].kind == "view":  # merged and split again with nothing between
        del found.steps[:2]


def grow(found: Match, operands: tuple[fx.Node, ...]) -> None:
    """Take the transposes that only turn an operand's layout into the region."""
    for name, given in zip("qkv", operands, strict=True):
        operand: Operand = getattr(found, name)
        if operand.order is None:
            continue
        passed, node = [], given
        while is_call(node, aten.clone, aten.contiguous):
            passed.append(node)
            node = node.args[0]
        order = permutation_of(node)
        if order is not None and tuple(order[i] for i in operand.order) == tuple(range(len(order))):
            found.region.update([*passed, node])
            setattr(found, name, Operand(node.args[0]))


def peel_groups(found: Match) -> None:
    """Look through a repetition of key and value heads, if both have the same; set how many query heads share one."""
    k, v = _unrepeated(found.k), _unrepeated(found.v)
    if k is not None and v is not None and k[1] == v[1]:
        found.k, found.v = Operand(k[0]), Operand(v[0])
        found.region.update([*k[2], *v[2]])
    q_shape, k_shape = found.q.shape(), found.k.shape()
    if len(q_shape) < 3 or len(k_shape) != len(q_shape):
        return
    heads, kv_heads = q_shape[-3], k_shape[-3]
    if known(heads == kv_heads):
        return
    if isinstance(heads, int) and isinstance(kv_heads, int) and kv_heads and heads % kv_heads == 0:
        found.groups = heads // kv_heads


def _unrepeated(operand: Operand) -> tuple[fx.Node, int, list[fx.Node]] | None:
    """(tensor with fewer heads, repetitions, nodes that repeat it) if ``operand`` repeats each head in place."""
    node = operand.node
    if operand.order is not None or value(node).dim() < 3:
        return None
    passed: list[fx.Node] = []

    def skip(node: fx.Node) -> fx.Node:
        while len(node.all_input_nodes) == 1 and any(r.kind == "same" for r in readings(node)):
            passed.append(node)
            node = node.args[0]
        return node

    node = skip(node)
    rank = value(node).dim()
    if is_call(node, aten.repeat_interleave):
        times, dim = argument(node, "repeats"), argument(node, "dim")
        if isinstance(times, int) and isinstance(dim, int) and dim % rank == rank - 3:
            return node.args[0], times, [*passed, node]
        return None
    if not is_call(node, aten.reshape, aten.view, aten._unsafe_view, aten.flatten):
        return None
    passed.append(node)
    wide = skip(node.args[0])
    if not is_call(wide, aten.expand, aten.repeat) or value(wide).dim() != rank + 1:
        return None
    passed.append(wide)
    thin = skip(wide.args[0])
    if not is_call(thin, aten.unsqueeze) or value(thin).dim() != rank + 1:
        return None
    passed.append(thin)
    source = skip(thin.args[0])
    if thin.args[1] % (rank + 1) != rank - 2:
        return None
    old, times = value(source).shape, value(wide).shape[-3]
    if not isinstance(times, int) or not same_sizes(value(wide).shape, (*old[:-2], times, *old[-2:])):
        return None
    if not same_sizes(value(node).shape, (*old[:-3], old[-3] * times, *old[-2:])):
        return None
    return source, times, passed


def dimension(wanted: Any, inputs: Sequence[fx.Node]) -> tuple[int, int, int] | None:
    """(input, dimension, divisor) of a tensor's size that gives ``wanted``: batch is batch * heads // heads."""
    for index, given in enumerate(inputs):
        for dim, size in enumerate(value(given).shape):
            if known(size == wanted):
                return index, dim, 1
    for index, given in enumerate(inputs):
        for dim, size in enumerate(value(given).shape):
            if isinstance(size, torch.SymInt) and isinstance(wanted, torch.SymInt):
                times = (size.node.hint or 0) // (wanted.node.hint or 1)
                if times > 1 and known(size == wanted * times):
                    return index, dim, times
    return None


def is_size(node: fx.Node, inputs: list[fx.Node]) -> bool:
    """Whether a number can be computed from the operands' shapes."""
    if dimension(value(node), inputs) is not None:
        return True
    parents = node.all_input_nodes
    return (
        node.op == "call_function"
        and bool(parents)
        and all(not isinstance(value(p), Tensor) and is_size(p, inputs) for p in parents)
    )
