"""Semantic ops become ATen for Inductor, or Triton kernels on CUDA."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import fx

from accelpass.backends import weight_only_cpu
from accelpass.ir.graph import aten, call, value
from accelpass.ir.program import Program
from accelpass.ir.weight_only_ops import (
    int4_embedding,
    int4_linear,
    int4_matrix,
    int8_embedding,
    int8_linear,
    int8_matrix,
)

Lowering = Callable[[fx.Graph, fx.Node], fx.Node]


def _int8_embedding(graph: fx.Graph, node: fx.Node) -> fx.Node:
    indices, q, scale, dtype = node.args
    e = weight_only_cpu.Emit(graph, node)
    rows = e.cast(e(aten.embedding.default, q, indices), torch.float32)
    scales = e(aten.unsqueeze.default, e(aten.index.Tensor, scale, [indices]), -1)
    return e.cast(e(aten.mul.Tensor, rows, scales), dtype)


def _int4_embedding(graph: fx.Graph, node: fx.Node) -> fx.Node:
    indices, q, scale, zero, group, dtype = node.args
    e = weight_only_cpu.Emit(graph, node)
    taken = [None if t is None else e(aten.index.Tensor, t, [indices]) for t in (q, scale, zero)]
    return weight_only_cpu.unpacked(e, taken[0], taken[1], taken[2], group, dtype)


def _int8_matrix(graph: fx.Graph, node: fx.Node) -> fx.Node:
    q, scale, dtype = node.args
    e = weight_only_cpu.Emit(graph, node)
    wide = e.cast(q, torch.float32)
    return e.cast(e(aten.mul.Tensor, wide, e(aten.unsqueeze.default, scale, -1)), dtype)


def _int4_matrix(graph: fx.Graph, node: fx.Node) -> fx.Node:
    q, scale, zero, group, dtype = node.args
    return weight_only_cpu.unpacked(weight_only_cpu.Emit(graph, node), q, scale, zero, group, dtype)


def _on_cuda(op_name: str, cpu: Lowering) -> Lowering:
    """The Triton op for CUDA inputs, ``cpu`` for the rest; chosen here because Inductor traces Triton bodies anywhere."""

    def lower(graph: fx.Graph, node: fx.Node) -> fx.Node:
        if value(node).device.type != "cuda":
            return cpu(graph, node)
        import accelpass.backends.triton.weight_only_ops  # noqa: F401  # registers the op; asks for triton if it is missing

        target = getattr(torch.ops.accelpass, op_name).default
        return call(graph, node, target, *node.args)

    return lower


LOWERINGS: dict[torch._ops.OpOverload, Lowering] = {
    int8_linear._opoverload: _on_cuda("int8_linear_triton", weight_only_cpu.int8),
    int4_linear._opoverload: _on_cuda("int4_linear_triton", weight_only_cpu.int4),
    int8_embedding._opoverload: _int8_embedding,
    int4_embedding._opoverload: _int4_embedding,
    int8_matrix._opoverload: _int8_matrix,
    int4_matrix._opoverload: _int4_matrix,
}


def lower(program: Program) -> None:
    """Replace every semantic op that has a lowering; others keep their eager reference."""
    for node in list(program.graph.nodes):
        lowering = LOWERINGS.get(node.target)
        if lowering is None:
            continue
        with program.graph.inserting_before(node), torch.no_grad():
            new = lowering(program.graph, node)
        node.replace_all_uses_with(new)
        program.graph.erase_node(node)
    program.graph.eliminate_dead_code()
    program.gm.recompile()
