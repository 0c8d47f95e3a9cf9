"""What a graph costs: FLOPs and bytes of every node as sympy expressions in the symbolic sizes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import Tensor, fx

from accelpass.ir.attention.spec.block_select import causal_form
from accelpass.ir.attention.spec.op import is_attention, spec_of
from accelpass.ir.attention.spec.selected import selected_pairs
from accelpass.ir.attention.spec.spec import All
from accelpass.ir.core.graph import aten, hint, value
from accelpass.ir.core.program import Program
from accelpass.ir.linear.op import LINEAR
from accelpass.ir.torch_private import tree_leaves


@dataclass(frozen=True)
class Cost:
    """Of one node, or of a whole graph.

    Attributes:
        flops: of products alone; a multiply-add counts as two.
        read, written: bytes of the tensors that the call takes and makes, as if nothing were fused.
        state: bytes of the mutated tensors among those read.
    """

    flops: sympy.Expr = sympy.S.Zero
    read: sympy.Expr = sympy.S.Zero
    written: sympy.Expr = sympy.S.Zero
    state: sympy.Expr = sympy.S.Zero

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            self.flops + other.flops, self.read + other.read, self.written + other.written, self.state + other.state
        )


def costs(program: Program) -> dict[fx.Node, Cost]:
    """The cost of every call in graph order; views and shape arithmetic cost nothing."""
    return {node: _cost(node) for node in program.graph.nodes if node.op == "call_function"}


def total(program: Program) -> Cost:
    """The sum over the graph."""
    return sum(program.analysis(costs).values(), Cost())


def at_compiled_sizes(program: Program, expression: sympy.Expr) -> int:
    """The expression at the sizes that the graph was traced with."""
    return int(expression.subs(_hints(program)))


def weight_bytes(program: Program) -> int:
    """Bytes of the constants that the graph reads, each counted once; declared state is not among them."""
    sizes = (
        value(node).numel() * value(node).element_size()
        for node in program.graph.nodes
        if node.users and program.tensors.is_constant(node) and not program.tensors.is_state(node)
    )
    return int(sum(sizes))


def _cost(node: fx.Node) -> Cost:
    made = [t for t in tree_leaves(value(node)) if isinstance(t, Tensor)]
    schema = getattr(node.target, "_schema", None)
    if not made or schema is None or _is_view(schema):
        return Cost()
    taken = [value(a) for a in node.all_input_nodes if isinstance(value(a), Tensor)]
    changed = [value(a) for a, s in zip(node.args, schema.arguments, strict=False) if _is_written(s)]
    rule = _RULES.get(node.target) or (_attention if is_attention(node) else None)
    return Cost(
        flops=rule(node) if rule else sympy.Integer(0),
        read=sum((_bytes(t) for t in taken), sympy.Integer(0)),
        written=sum((_bytes(t) for t in made), sympy.Integer(0)),
        state=sum((_bytes(t) for t in changed if isinstance(t, Tensor)), sympy.Integer(0)),
    )


def _is_written(argument: Any) -> bool:
    return argument.alias_info is not None and argument.alias_info.is_write


def _is_view(schema: Any) -> bool:
    return any(r.alias_info is not None and not r.alias_info.is_write for r in schema.returns)


def _size(size: Any) -> sympy.Expr:
    return size.node.expr if isinstance(size, torch.SymInt) else sympy.Integer(int(size))


def _numel(tensor: Tensor) -> sympy.Expr:
    return sympy.Mul(*map(_size, tensor.shape))


def _bytes(tensor: Tensor) -> sympy.Expr:
    return _numel(tensor) * tensor.element_size()


def _linear(node: fx.Node) -> sympy.Expr:
    return 2 * _numel(value(node.args[0])) * _size(value(node).shape[-1])


def _product(first: int) -> Callable[[fx.Node], sympy.Expr]:
    def rule(node: fx.Node) -> sympy.Expr:
        return 2 * _numel(value(node)) * _size(value(node.args[first]).shape[-1])

    return rule


def _convolution(node: fx.Node) -> sympy.Expr:
    weight = value(node.args[1])
    return 2 * _numel(value(node)) * _numel(weight) / _size(weight.shape[0])


def _attention(node: fx.Node) -> sympy.Expr:
    q, k, v = (value(a) for a in node.args[:3])
    pairs = _numel(q) / _size(q.shape[-1]) * _size(k.shape[-2])
    if is_attention(node) and not isinstance(spec_of(node).select, All):
        pairs = _selected(node, pairs)
    return 2 * pairs * (_size(q.shape[-1]) + _size(v.shape[-1]))


def _selected(node: fx.Node, pairs: sympy.Expr) -> sympy.Expr:
    """The (query, key) pairs of an edited attention; all of them where a size is symbolic or the selection unknown.

    What a causal cut leaves out counts, as it does for the same attention with all keys: a selection costs the share of
    the causal pairs that it leaves.
    """
    q, k = (value(a) for a in node.args[:2])
    heads, rows, columns = (q.shape[-3] if q.dim() > 2 else 1), q.shape[-2], k.shape[-2]
    if not all(isinstance(size, int) for size in (heads, rows, columns)):
        return pairs
    spec = causal_form(spec_of(node), rows, columns)
    found = selected_pairs(spec.select, heads, rows, columns, spec.causal)
    whole = selected_pairs(All(), heads, rows, columns, spec.causal)
    return pairs if found is None or not whole else pairs / whole * found


_RULES: dict[Any, Callable[[fx.Node], sympy.Expr]] = {
    aten.linear.default: _linear,
    LINEAR: _linear,
    aten.mm.default: _product(0),
    aten.matmul.default: _product(0),
    aten.bmm.default: _product(0),
    aten.addmm.default: _product(1),
    aten.baddbmm.default: _product(1),
    aten.conv1d.default: _convolution,
    aten.conv2d.default: _convolution,
    aten.conv3d.default: _convolution,
    aten.scaled_dot_product_attention.default: _attention,
}


def _hints(program: Program) -> dict[sympy.Symbol, int]:
    """The value that each symbolic size had when the graph was traced; of sizes from run time the most."""
    found: dict[sympy.Symbol, int] = {}
    for node in program.graph.nodes:
        held = value(node)
        for size in held.shape if isinstance(held, Tensor) else [held]:
            if isinstance(size, torch.SymInt) and size.node.expr.is_Symbol and (seen := hint(size)) is not None:
                found[size.node.expr] = int(seen)
    return found
