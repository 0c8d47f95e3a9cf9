"""Stages: stretches of a graph that are compiled by themselves, and the code that equal ones share."""

from __future__ import annotations

import operator
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from accelpass.ir.core.graph import aten, is_call, value
from accelpass.ir.torch_private import FakeTensorMode, TracingContext, tracing

Fn = Callable[..., Any]
Compile = Callable[[fx.GraphModule, list[Any]], Fn]
Ref = tuple[str, Any]
"""Where a value comes from: ``argument`` (position), ``derived`` (what, which), ``recalled`` (name), ``held`` (a tensor),
``value`` (the name of the node that computes it), ``literal`` (itself)."""


@dataclass(frozen=True, eq=False)
class Held:
    """A tensor that a graph itself holds."""

    tensor: Tensor


@dataclass(frozen=True, eq=False)
class Stage:
    """A compiled stage, in one of its variants.

    Attributes:
        given: where its arguments come from; made: names of what it returns.
        keeps: what later calls recall, by name.
        layouts: how values lie in memory that it reads or makes, and what it recalls, by name.
        size: equal for stages whose values fit each other; see :meth:`PolicyPass.size`.
        flops: of the stage; ``attention`` those of attention's products alone.
    """

    fn: Fn
    given: tuple[Ref, ...]
    made: tuple[str, ...]
    keeps: tuple[tuple[str, Ref], ...] = ()
    layouts: Mapping[str, Hashable] = field(default_factory=dict)
    flops: int = 0
    attention: int = 0
    size: str = ""

    @property
    def reads(self) -> list[Ref]:
        """All that must be there for it: its arguments, and what it keeps though nothing in it computes it."""
        own = {("value", name) for name in self.made}
        return [*dict.fromkeys((*self.given, *(ref for _, ref in self.keeps if ref not in own)))]


@dataclass
class Part:
    """A stretch of the graph as a module of its own, what it is given, and what it hands on."""

    gm: fx.GraphModule
    given: list[fx.Node]
    made: list[fx.Node]

    @property
    def computes(self) -> bool:
        """Whether it does more than to hand on what it is given."""
        return not all(is_call(n, aten.alias) for n in self.gm.graph.nodes if n.op == "call_function")


@dataclass
class Code:
    """Compiled code by what it computes; equal parts are compiled once."""

    compile_part: Compile
    known: dict[Hashable, Fn] = field(default_factory=dict)

    def of(self, part: Part, mode: FakeTensorMode) -> Fn:
        key = key_of(part)
        if key not in self.known:
            with tracing(TracingContext(mode)):
                given = [value(n) for n in part.given]
                self.known[key] = self.compile_part(part.gm, given) if part.computes else part.gm.forward
        return self.known[key]


def part_of(nodes: Sequence[fx.Node], wanted: frozenset[str] = frozenset()) -> Part:
    """A stretch of the graph by itself; ``wanted`` names nodes that it hands on though nothing here reads them."""
    inside = set(nodes)
    given = list(dict.fromkeys(p for n in nodes for p in n.all_input_nodes if p not in inside))
    made = [n for n in nodes if n.name in wanted or any(u not in inside for u in n.users)]
    graph = fx.Graph()
    env: dict[fx.Node, fx.Node] = {}
    for node in given:
        env[node] = graph.placeholder(node.name)
        env[node].meta = {"val": value(node)}
    for node in nodes:
        env[node] = graph.node_copy(node, env.__getitem__)
    graph.output(tuple(env[n] for n in made))
    return Part(fx.GraphModule(torch.nn.Module(), graph), given, made)


def key_of(part: Part) -> Hashable:
    """Equal for parts that the same code can run: the same calls on tensors that are laid out and overlap alike."""
    nodes = list(part.gm.graph.nodes)
    number = {n: f"%{i}" for i, n in enumerate(nodes)}
    storages = [value(n).untyped_storage()._cdata if isinstance(value(n), Tensor) else n for n in part.given]
    overlap = tuple(storages.index(s) for s in storages)
    calls = tuple(
        (n.op, n.target if n.op == "call_function" else "", str(fx.map_arg((n.args, n.kwargs), number.__getitem__)))
        for n in nodes
    )
    return calls, overlap, tuple(layout(value(n)) for n in nodes if n.op != "output")


def layout(held: Any) -> Hashable:
    if isinstance(held, Tensor):
        sizes = (tuple(map(_plain, each)) for each in (held.shape, held.stride()))
        return *sizes, held.dtype, held.device, _plain(held.storage_offset())
    if isinstance(held, tuple | list):
        return tuple(map(layout, held))
    return type(held).__name__, _plain(held) if isinstance(held, int | float | bool | str | torch.SymInt) else None


def _plain(size: Any) -> Any:
    """A size, by name if it is symbolic, so that comparing two adds no guard."""
    return str(size) if isinstance(size, torch.SymInt) else size


def attribute(gm: fx.GraphModule, node: fx.Node) -> Any:
    """What a ``get_attr`` node stands for."""
    return operator.attrgetter(str(node.target))(gm)
