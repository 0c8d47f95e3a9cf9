"""Plain torch functions become part of a graph: traced on the fake values of the nodes they are given."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

from accelpass.ir.core.graph import fake_mode, refresh, value
from accelpass.ir.core.program import Program
from accelpass.ir.torch_private import OpOverload, let_graphs_compute_sizes, name_buffers

Plain = Callable[..., Tensor]
_PLAIN: dict[OpOverload, Plain] = {}
KEPT = ("nn_module_stack", "stack_trace", "source_fn_stack")


def trace(program: Program, run: Callable[..., Sequence[Tensor]], operands: Sequence[fx.Node]) -> fx.GraphModule:
    """``run`` in pre-dispatch ATen, for operands of these shapes. It may write to its arguments in place."""
    own: dict[fx.Node, Tensor] = {}
    for node in operands:
        fake = value(node)
        # Copies of one traced node have one fake tensor, and a trace knows its inputs by these: it would take two for one.
        own[node] = fake.detach() if any(fake is other for n, other in own.items() if n is not node) else fake
    return trace_on(program, run, [own[n] for n in operands])


def trace_on(program: Program, run: Callable[..., Sequence[Tensor]], fakes: Sequence[Tensor]) -> fx.GraphModule:
    """As :func:`trace`, for fake tensors that no node may have."""
    mode = fake_mode(program.gm)
    assert mode is not None
    let_graphs_compute_sizes(mode)
    with mode, torch.no_grad():
        return make_fx(run, pre_dispatch=True)(*fakes)


@contextmanager
def all_or_nothing(program: Program) -> Iterator[None]:
    """What is added to the graph inside is gone again if an error ends it; nothing that was there may read it by then."""
    before = set(program.graph.nodes)
    try:
        yield
    except Exception:
        for node in reversed([n for n in program.graph.nodes if n not in before]):
            program.graph.erase_node(node)
        raise


class Tracer:
    """Traces a function once for all places where it is called with operands that are laid out alike."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self._traced: dict[Any, fx.GraphModule] = {}

    def run(
        self, key: Hashable, function: Callable[..., Sequence[Tensor]], operands: Sequence[fx.Node], before: fx.Node
    ) -> list[fx.Node]:
        """Calls ``function`` in front of ``before``; ``key`` is equal for functions that do the same. Returns its results."""
        layouts = tuple((str(value(n).shape), str(value(n).stride()), value(n).dtype) for n in operands)
        which = (key, layouts, tuple(operands.index(n) for n in operands))
        if which not in self._traced:
            self._traced[which] = trace(self.program, function, operands)
        return splice(self.program, self._traced[which], operands, before)


def splice(program: Program, traced: fx.GraphModule, operands: Sequence[fx.Node], before: fx.Node) -> list[fx.Node]:
    """Copy a traced function's nodes in front of ``before``, whose provenance they take; returns its results."""
    graph = before.graph
    env: dict[fx.Node, Any] = dict(zip(traced.graph.find_nodes(op="placeholder"), operands, strict=True))
    results: list[fx.Node] = []
    with graph.inserting_before(before):
        for old in traced.graph.nodes:
            if old.op == "output":
                results = [env[n] for n in old.args[0]]
            elif old.op == "get_attr":
                env[old] = _constant(program, getattr(traced, str(old.target)))
            elif old.op != "placeholder":
                env[old] = graph.node_copy(old, env.__getitem__)
                env[old].meta = {"val": old.meta.get("val"), **{k: before.meta[k] for k in KEPT if k in before.meta}}
                if env[old].meta["val"] is None and _gives_something(old):
                    refresh(env[old])
    return results


def _gives_something(node: fx.Node) -> bool:
    schema = getattr(node.target, "_schema", None)  # an operator that only checks has no results
    return schema is None or bool(schema.returns)


def inserted(
    program: Program, before: fx.Node, run: Callable[..., Sequence[Tensor]], *operands: fx.Node
) -> list[fx.Node]:
    """What a plain torch function computes of nodes, in front of ``before``."""
    return splice(program, trace(program, run, operands), operands, before)


def plain_form(op: Any) -> Callable[[Plain], Plain]:
    """Say what a custom operator of one result computes, as a function of its arguments in torch's own operators."""

    def put(function: Plain) -> Plain:
        _PLAIN[op._opoverload] = function
        return function

    return put


def write_out(program: Program) -> None:
    """Let the graph compute custom operators by their plain forms: for files that know no such operator."""
    for node in [n for n in program.graph.nodes if n.op == "call_function" and n.target in _PLAIN]:
        function, at = _PLAIN[node.target], [i for i, a in enumerate(node.args) if isinstance(a, fx.Node)]

        def run(*tensors: Tensor, node: fx.Node = node, at: list[int] = at, function: Plain = function) -> list[Tensor]:
            given: list[Any] = list(node.args)
            for i, tensor in zip(at, tensors, strict=True):
                given[i] = tensor
            return [function(*given)]

        (made,) = inserted(program, node, run, *(n for n in node.args if isinstance(n, fx.Node)))
        node.replace_all_uses_with(made)
        program.graph.erase_node(node)


def _constant(program: Program, tensor: Tensor) -> fx.Node:
    """A tensor that the function made while it was traced (a list of blocks), as a buffer of the graph."""
    index = 0
    while hasattr(program.gm, f"_traced_constant{index}"):
        index += 1
    name = f"_traced_constant{index}"
    program.gm.register_buffer(name, tensor)
    if program.frontend == "dynamo":
        name_buffers(program.gm, program.gm)
    made = program.graph.get_attr(name)
    mode = fake_mode(program.gm)
    assert mode is not None
    made.meta["val"] = mode.from_tensor(tensor, static_shapes=True)
    return made
