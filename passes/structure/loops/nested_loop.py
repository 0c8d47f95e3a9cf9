"""A loop inside a decode step, unrolled into the step's one graph: a sampler that runs for each token (VoxCPM's local diffusion)."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from accelpass.ir.analyses.recurrence import Loop, constants, scheduled_loops
from accelpass.ir.core.derived import Recipe
from accelpass.ir.core.graph import aten, draws, is_call, mutates, root, value
from accelpass.ir.core.program import Program
from accelpass.passes.core.base import Done, Skip, Take, Verdict
from accelpass.passes.core.site_pass import Edits, SitePass

_ROWWISE = (aten.linear, aten.silu, aten.gelu, aten.relu, aten.tanh, aten.layer_norm)
"""What computes each entry of a batch by itself, from one tensor."""


@dataclass(frozen=True)
class NestedLoop(SitePass):
    """Compute once what a sampler inside a step computes in each of its trips, and once for both halves of guidance.

    The shape of VoxCPM (released code, no arXiv id): a step of the decoder holds a short diffusion loop, which the capture unrolls. Of
    the trips, three things are taken out. What follows from constants and parameters alone (time embeddings, step sizes) is
    computed once for these weights and held beside them, as long as it takes no more memory than they do. What does not change from trip
    to trip (the condition's projection, the batch of guidance) is computed in the first one. And what both halves of a guided
    batch read alike (the noisy patch) goes through linears and activations as one half. Finite scalar quantization needs nothing here:
    tanh, rounding and scaling are one kernel between two linears already.

    A loop that ends by a value on the host is no part of the graph, so that there is nothing to unroll.
    """

    name: ClassVar[str] = "nested_loop"
    phase: ClassVar[str] = "structure"
    summary: ClassVar[str] = "a sampler inside a decode step: times, conditions and shared halves are computed once"
    paper: ClassVar[str] = "VoxCPM, github.com/OpenBMB/VoxCPM"
    exact: ClassVar[bool] = True
    edits: ClassVar[frozenset[str]] = frozenset({"loop.invariants"})
    nothing: ClassVar[str] = "no stretch of this graph runs several times on what it gave, with the same parameters"

    def __post_init__(self) -> None:
        self.check_sites()

    def find(self, program: Program) -> list[Loop]:
        return list(program.analysis(scheduled_loops))

    def check(self, site: Loop, program: Program) -> Verdict:
        if site.writes:
            return Skip("each trip writes to a tensor that outlives it: what it reads is not the same in all trips")
        return Take()

    def rewrite(self, site: Loop, edit: Edits) -> Done | Skip:
        program, trips = edit.program, [n for nodes in site.iterations for n in nodes]
        held = _held(program, edit, trips)
        merged = _merged(program.graph, set(trips))
        halved = _halved(program, edit, [n for n in trips if n not in merged])
        program.graph.eliminate_dead_code(lambda n: n.op != "call_function" or not _pure(n))
        if not (held or merged or halved):
            return Skip("each trip reads only what the one before it gave, so that nothing can be taken out")
        said = [
            f"{held} of its constants held beside the weights" if held else "",
            f"{len(merged)} nodes computed in the first trip alone" if merged else "",
            f"{halved} nodes for one half of the guidance" if halved else "",
        ]
        return Done(
            f"{site.trips} trips of {len(site.iterations[0])} nodes in one graph: {', '.join(filter(None, said))}"
        )


def _pure(node: fx.Node) -> bool:
    if node.target is operator.getitem:
        return True
    if getattr(node.target, "namespace", None) != "aten" or draws(node) or mutates(node):
        return False
    return not is_call(node, aten.empty, aten.alias)


def _held(program: Program, edit: Edits, trips: Sequence[fx.Node]) -> int:
    """Hold what trips read of :func:`constants`: how many tensors."""
    fixed = constants(program)
    wanted = dict.fromkeys(a for n in trips for a in n.all_input_nodes if a in fixed)
    count = 0
    for node in wanted:
        cone = _cone(node, fixed)
        sources = [s for s in dict.fromkeys(a for n in cone for a in n.all_input_nodes) if s not in fixed]
        anchors = sources or _anchors(program, trips)
        if not anchors or all(_is_view(n) for n in cone):
            continue
        if value(node).numel() > sum(value(s).numel() for s in anchors):
            continue
        fn, key = _function(node, cone, sources)
        (made,) = edit.derive(anchors, Recipe(("nested_loop", key), fn), [f"{node.name}_held"])
        node.replace_all_uses_with(made)
        count += 1
    return count


def _anchors(program: Program, trips: Sequence[fx.Node]) -> list[fx.Node]:
    """A parameter with which constants live that are made of none."""
    return next(([a] for n in trips for a in n.all_input_nodes if program.tensors.is_constant(a)), [])


def _cone(node: fx.Node, fixed: frozenset[fx.Node]) -> list[fx.Node]:
    found, todo = {node}, [node]
    while todo:
        for before in todo.pop().all_input_nodes:
            if before in fixed and before not in found:
                found.add(before)
                todo.append(before)
    return sorted(found)


def _is_view(node: fx.Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return schema is not None and bool(schema.returns) and schema.returns[0].alias_info is not None


def _function(node: fx.Node, cone: Sequence[fx.Node], sources: Sequence[fx.Node]) -> tuple[Any, str]:
    """What makes a constant of its sources, and the text that tells it from others."""
    graph = fx.Graph()
    env = {s: graph.placeholder(f"source{i}") for i, s in enumerate(sources)}
    for old in cone:
        env[old] = graph.create_node("call_function", old.target, *fx.map_arg((old.args, old.kwargs), env.__getitem__))
    graph.output(env[node])
    run = fx.GraphModule(torch.nn.Module(), graph)

    def fn(*given: Tensor) -> tuple[Tensor, ...]:
        return (run(*given[: len(sources)]).contiguous(),)

    return fn, run.code


def _merged(graph: fx.Graph, trips: set[fx.Node]) -> set[fx.Node]:
    """Let a node of a trip that does what an earlier node did be that one: which ones were."""
    written = {root(a) for n in graph.nodes for a in mutates(n)}
    seen: dict[Any, fx.Node] = {}
    gone: set[fx.Node] = set()
    for node in graph.nodes:
        if (
            node.op != "call_function"
            or not node.users
            or not _pure(node)
            or any(root(a) in written for a in (node, *node.all_input_nodes))
        ):
            continue
        key = str((node.target, node.args, sorted(node.kwargs.items())))
        first = seen.setdefault(key, node)
        if first is not node and node in trips:
            node.replace_all_uses_with(first)
            gone.add(node)
    return gone


def _halved(program: Program, edit: Edits, nodes: Sequence[fx.Node]) -> int:
    """Compute from one half what reads two equal ones, and double the result: how many nodes."""
    count = 0
    for node in nodes:
        if not is_call(node, *_ROWWISE) or not node.users or node.args[0].op != "call_function":
            continue
        both = node.args[0]
        if not is_call(both, aten.cat) or (len(both.args) > 1 and both.args[1] != 0) or value(both).dim() < 2:
            continue
        half = both.args[0]
        others = [a for a in node.all_input_nodes if a is not both]
        if len(half) != 2 or half[0] is not half[1] or not all(map(program.tensors.is_constant, others)):
            continue
        one = edit.call(node, node.target, half[0], *node.args[1:])
        node.replace_all_uses_with(edit.call(node, aten.cat.default, [one, one]))
        count += 1
    return count
