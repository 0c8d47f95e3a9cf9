"""The rewritten graph as a module of its own: state that it writes to becomes inputs, and outputs, or is written in place."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.export import Dim
from torch.fx.experimental.symbolic_shapes import free_symbols
from torch.fx.graph import CodeGen

from accelpass.backends.export.capture import Captured
from accelpass.backends.export.errors import ExportError
from accelpass.ir.core.graph import argument_name, aten, known, placeholders, value
from accelpass.ir.core.state import StateSpec
from accelpass.ir.core.tensors import FromModule
from accelpass.ir.torch_private import tree_leaves


@dataclass(frozen=True)
class State:
    """A tensor that goes in as ``past.name`` and comes out as ``present.name``.

    Attributes:
        start: what goes in first.
        lifetime: see :class:`~accelpass.ir.core.derived.StateSpec`.
    """

    name: str
    start: Tensor
    fill: float
    lifetime: str = "sequence"

    @property
    def past(self) -> str:
        return f"past.{self.name}"

    @property
    def present(self) -> str:
        return f"present.{self.name}"


@dataclass
class Functional:
    """What is handed to torch's exporter.

    Attributes:
        gm: takes the tensors of ``inputs``, in order; returns those that ``outputs`` names.
        states: what it keeps from call to call; each is one of the inputs.
    """

    gm: fx.GraphModule
    inputs: dict[str, Tensor]
    outputs: list[str]
    states: list[State]

    def exported(self) -> torch.export.ExportedProgram:
        """The same, traced anew: functional, with the dimensions dynamic that are."""
        shapes = tuple(_dynamic(value(n)) for n in placeholders(self.gm))
        with torch.no_grad():
            return torch.export.export(self.gm, tuple(self.inputs.values()), dynamic_shapes=shapes, strict=False)


def functional(captured: Captured) -> Functional:
    """Flatten the graph's signature and turn written state into inputs and outputs, for a runtime that is not torch. The program is
    used up."""
    _without_fences(captured.program.graph)
    results, inputs, states, held = _flattened(captured)
    graph = captured.program.graph
    first = next(n for n in graph.nodes if n.op not in ("placeholder", "get_attr"))
    for node in held:
        with graph.inserting_before(first):
            copied = graph.call_function(aten.clone.default, (node,))
        copied.meta["val"] = value(node)
        node.replace_all_uses_with(copied, delete_user_cb=lambda user, copied=copied: user is not copied)
        results.append(copied)
    outputs = [*captured.outputs, *(s.present for s in states)]
    return Functional(_closed(captured, results), inputs, outputs, states)


def in_place(captured: Captured) -> Functional:
    """Flatten the graph's signature; state is an input that a call writes to. The program is used up.

    Views that ask Inductor to store a tensor stay: without them a norm is computed anew for each row of a product.
    """
    results, inputs, states, _ = _flattened(captured)
    return Functional(_closed(captured, results), inputs, list(captured.outputs), states)


def _closed(captured: Captured, results: list[Any]) -> fx.GraphModule:
    graph = captured.program.graph
    (output,) = graph.find_nodes(op="output")
    output.args = (tuple(results),)
    graph.set_codegen(CodeGen())
    graph.lint()
    # A module of its own: without the checks of the exported program's signature, and without tensors that the graph reads no
    # more (the floats behind packed weights).
    return fx.GraphModule(captured.program.gm, graph)


def _flattened(captured: Captured) -> tuple[list[Any], dict[str, Tensor], list[State], list[fx.Node]]:
    """The graph's results, its inputs with those of state at the end, the states and their nodes."""
    program, tensors = captured.program, captured.program.tensors
    assert isinstance(tensors, FromModule)
    gm, graph = program.gm, program.graph
    _clean(graph)
    (output,) = graph.find_nodes(op="output")
    results = _apart(graph, output, list(tree_leaves(output.args[0])))
    inputs = dict(captured.inputs)
    states: list[State] = []
    held: list[fx.Node] = []
    for index, node in enumerate(captured.counters):
        states.append(State(f"{index}.count", torch.zeros_like(captured.counts[index]), 0.0))
        held.append(node)
    last, read = placeholders(gm)[-1], set(graph.nodes)
    for node, (anchor, spec) in tensors.states.items():
        with graph.inserting_after(last):
            made = graph.placeholder(node.name)
        made.meta["val"] = value(node)
        node.replace_all_uses_with(made)
        start = getattr(gm, str(node.target)).clone()
        states.append(State(_state_name(captured, anchor, spec), start, spec.fill, spec.lifetime))
        held.append(made)
        if node in read:  # one that nothing reads has been cleaned away
            graph.erase_node(node)
        last = made
    inputs |= {state.past: state.start.clone() for state in states}
    return results, inputs, states, held


def _state_name(captured: Captured, anchor: fx.Node, spec: StateSpec) -> str:
    """After the cache layer that the state belongs to, or else the tensor of the model that it lives with."""
    if anchor in captured.counters:
        return f"{captured.counters.index(anchor)}.{spec.name.removeprefix('kv.')}"
    return f"{captured.program.tensors.path(anchor) or argument_name(anchor)}.{spec.name}"


def _apart(graph: fx.Graph, output: fx.Node, results: list[Any]) -> list[Any]:
    """A copy of each result that is an input, a weight, or an earlier result: in a file one value has one name."""
    found: list[Any] = []
    for result in results:
        if isinstance(result, fx.Node) and (result.op in ("placeholder", "get_attr") or result in found):
            with graph.inserting_before(output):
                copied = graph.call_function(aten.clone.default, (result,))
            copied.meta["val"] = value(result)
            result = copied
        found.append(result)
    return found


def _clean(graph: fx.Graph) -> None:
    """Remove assertions about metadata, which speak to torch alone."""
    for node in list(graph.nodes):
        if node.op == "call_function" and node.target is aten._assert_tensor_metadata.default:
            graph.erase_node(node)
    graph.eliminate_dead_code()


def _without_fences(graph: fx.Graph) -> None:
    """Remove the views that ask Inductor to store a tensor."""
    for node in graph.find_nodes(op="call_function", target=aten.as_strided.default):
        if _is_fence(node):
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)


def _is_fence(node: fx.Node) -> bool:
    given, made = value(node.args[0]), value(node)
    if len(given.shape) != len(made.shape) or not all(
        known(a == b) for a, b in zip(given.shape, made.shape, strict=True)
    ):
        return False
    same = all(known(a == b) for a, b in zip(given.stride(), made.stride(), strict=True))
    return same and known(given.storage_offset() == made.storage_offset())


def _dynamic(fake: Any) -> dict[int, Any] | None:
    if not isinstance(fake, Tensor):
        return None
    return {
        dim: Dim.AUTO for dim, size in enumerate(fake.shape) if isinstance(size, torch.SymInt) and free_symbols(size)
    } or None


def refuse_fixed(made: torch.export.ExportedProgram, names: list[str], wishes: Mapping[str, Any], who: str) -> None:
    """Raise :class:`ExportError` if a dimension that was to be dynamic has one size in the exported graph."""
    for name, node in zip(
        names, (n for n in made.graph.nodes if n.name in made.graph_signature.user_inputs), strict=True
    ):
        for dim in wishes.get(name, {}):
            size = node.meta["val"].shape[dim]
            if isinstance(size, int):
                raise fixed(name, dim, size, who)


def fixed(name: str, dim: int, size: Any, who: str) -> ExportError:
    """The error for a dynamic dimension that ``who`` fixes."""
    return ExportError(
        f"{who} fixes dimension {dim} of {name} at {size}, and dynamic_shapes asks for it to be dynamic. Leave that "
        f"dimension out of dynamic_shapes, or leave the pass out."
    )
