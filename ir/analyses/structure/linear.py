"""Every place where activations meet a constant weight matrix, however the model spelled it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx

from accelpass.ir.core.graph import aten, is_call, module_path, shape, value
from accelpass.ir.core.program import Program
from accelpass.ir.linear.op import MATRIX, is_packed, operands_of

_TRANSPOSES = (aten.t, aten.transpose, aten.permute, aten.numpy_T)
CASTS = (aten.to, aten._to_copy, aten.contiguous, aten.clone)


@dataclass(frozen=True)
class Linear:
    """``y = x W^T + b`` with a constant W.

    Attributes:
        node: the call that makes y.
        x, weight, bias: its operands; ``weight`` is the node of the constant itself.
        path: the parameter path without its last part: ``model.layers.3.mlp.up_proj``.
        kind: ``linear``; ``conv1d`` (GPT-2's linear with W stored as (in, out)); ``matmul``; ``expert`` (one slice of a
            stack of experts); ``pointwise_conv`` (1x1); ``patch_conv`` (kernel equal to stride).
        in_features, out_features: sizes of W.
        transposed: W is stored as (in, out).
        select: for an expert, the node that takes its slice out of the stack.
    """

    node: fx.Node
    x: fx.Node
    weight: fx.Node
    bias: fx.Node | None
    path: str
    kind: str
    in_features: int
    out_features: int
    transposed: bool = False
    select: fx.Node | None = None

    def operand(self) -> fx.Node:
        """The input as it is now: ``x`` may have been replaced since by a rewrite of the layer before."""
        operand = self.node.args[1 if is_call(self.node, aten.addmm) else 0]
        assert isinstance(operand, fx.Node)
        return operand

    def weight_operand(self) -> fx.Node:
        """What is multiplied: the weight, or what casts, transposes and slices made of it."""
        return _read(self.node, 2 if is_call(self.node, aten.addmm) else 1)


@dataclass(frozen=True)
class Embedding:
    """Rows of a constant table taken by index."""

    node: fx.Node
    weight: fx.Node
    indices: fx.Node
    path: str

    def weight_operand(self) -> fx.Node:
        return _read(self.node, 0)


@dataclass(frozen=True)
class ExpertStack:
    """A batched product with a constant stack of expert weights, possibly gathered by expert index.

    Attributes:
        weight: the stack; of a packed one, the node that unpacks it.
        transposed: the stack is stored as (E, in, out).
        side: which operand of the product the weights are.
        gather: what takes one expert's weights for each row, if the stack is not read as a whole.
    """

    node: fx.Node
    weight: fx.Node
    path: str
    in_features: int
    transposed: bool
    side: int = 1
    gather: fx.Node | None = None

    def weight_operand(self) -> fx.Node:
        return _read(self.node, self.side)


def _read(node: fx.Node, position: int) -> fx.Node:
    operand = node.args[position]
    assert isinstance(operand, fx.Node)
    return operand


def linears(program: Program) -> list[Linear]:
    """All linear layers in graph order."""
    found = []
    for node in program.graph.nodes:
        if node.op == "call_function":
            site = _linear(program, node)
            if site is not None:
                found.append(site)
    return found


def embeddings(program: Program) -> list[Embedding]:
    """All embedding look-ups in graph order."""
    found = []
    for node in program.graph.find_nodes(op="call_function", target=aten.embedding.default):
        weight = _constant(program, node.args[0])
        if weight is not None:
            found.append(Embedding(node, weight, node.args[1], owner_of(program, weight, node)))
    return found


def expert_stacks(program: Program) -> list[ExpertStack]:
    """All batched products of activations with a constant stack, whole or gathered by expert."""
    return [product for product in program.analysis(expert_products) if not is_packed(product.weight)]


def expert_products(program: Program) -> list[ExpertStack]:
    """The same, with products that read a packed stack."""
    found = []
    for node in program.graph.nodes:
        if is_call(node, aten.bmm, aten.matmul) or is_grouped_product(node):
            stacks = (_stack(program, node, operand) for operand in (1, 0))
            stack = next((s for s in stacks if s is not None), None)
            if stack is not None:
                found.append(stack)
    return found


def _stack(program: Program, node: fx.Node, operand: int) -> ExpertStack | None:
    weight, gather = node.args[operand], None
    transposed = operand == 1  # a product sums over the second operand's last dimension but one, and the first's last
    while is_call(weight, *_TRANSPOSES, *CASTS, aten.index, aten.index_select):
        transposed ^= is_call(weight, *_TRANSPOSES) and _swaps_last_two(weight)
        gather = weight if is_call(weight, aten.index, aten.index_select) else gather
        weight = weight.args[0]
    if not isinstance(weight, fx.Node) or (operand == 0 and gather is None):
        return None
    owner = operands_of(weight)[0] if is_call(weight, MATRIX) else _constant(program, weight)
    if owner is None or len(shape(weight)) != 3:
        return None
    in_features = int(shape(weight)[-2 if transposed else -1])
    return ExpertStack(node, weight, owner_of(program, owner, node), in_features, transposed, operand, gather)


def is_grouped_product(node: object) -> bool:
    """``_grouped_mm``, or what transformers calls instead for dtypes that it does not take."""
    return isinstance(node, fx.Node) and node.op == "call_function" and "grouped_mm" in str(node.target)


def _swaps_last_two(node: fx.Node) -> bool:
    dims = len(shape(node))
    if is_call(node, aten.permute):
        return [d % dims for d in node.args[1]] == [*range(dims - 2), dims - 1, dims - 2]
    return {d % dims for d in node.args[1:3]} == {dims - 1, dims - 2} if len(node.args) > 2 else dims == 2


def _linear(program: Program, node: fx.Node) -> Linear | None:
    if is_call(node, aten.linear):
        x, w, bias = (*node.args, None)[:3]
        return _site(program, node, x, w, bias, stored_out_in=True)
    if is_call(node, aten.addmm) and not node.kwargs:
        bias, x, w = node.args
        if program.tensors.is_constant(bias):
            return _site(program, node, x, w, bias, stored_out_in=False)
    if is_call(node, aten.mm, aten.matmul) and len(node.args) == 2:
        return _site(program, node, node.args[0], node.args[1], None, stored_out_in=False)
    if is_call(node, aten.conv1d, aten.conv2d, aten.conv3d):
        return _convolution(program, node)
    return None


def _site(
    program: Program, node: fx.Node, x: fx.Node, w: Any, bias: fx.Node | None, stored_out_in: bool
) -> Linear | None:
    """A site if ``w`` is a constant matrix, looking through transposes, casts (autocast's) and expert slices."""
    if not isinstance(w, fx.Node) or not isinstance(value(w), Tensor) or value(w).dim() != 2:
        return None
    kind = "linear" if is_call(node, aten.linear) else "conv1d" if is_call(node, aten.addmm) else "matmul"
    select = None
    while True:
        if is_call(w, *_TRANSPOSES) and value(w).dim() == 2:
            w, stored_out_in = w.args[0], not stored_out_in
        elif is_call(w, *CASTS) and value(w).dtype.is_floating_point:
            w = w.args[0]
        elif select is None and is_call(w, aten.select) and w.args[1] == 0:
            select, w = w, w.args[0]
        else:
            break
    weight = _constant(program, w)
    if weight is None or program.tensors.is_constant(x) or not value(weight).dtype.is_floating_point:
        return None
    if select is not None:
        if len(shape(weight)) != 3:
            return None
        kind = "expert"
    out_features, in_features = (int(s) for s in (shape(weight)[-2:] if stored_out_in else shape(weight)[-2:][::-1]))
    owner = owner_of(program, weight, node)
    if select is not None:
        owner += f"[{select.args[2]}]"
    return Linear(node, x, weight, bias, owner, kind, in_features, out_features, not stored_out_in, select)


def _convolution(program: Program, node: fx.Node) -> Linear | None:
    x, w, bias, stride, padding, dilation, groups = (*node.args, *(None, 1, 0, 1, 1)[len(node.args) - 2 :])[:7]
    weight = _constant(program, w)
    if weight is None or groups != 1 or isinstance(padding, str):
        return None
    kernel = [int(s) for s in shape(weight)[2:]]
    spread = lambda v: list(v) * len(kernel) if len(_list(v)) == 1 else list(v)  # noqa: E731
    if any(spread(_list(padding))) or any(d != 1 for d in spread(_list(dilation))):
        return None
    if all(k == 1 for k in kernel) and all(s == 1 for s in spread(_list(stride))):
        kind = "pointwise_conv"
    elif kernel == spread(_list(stride)):
        kind = "patch_conv"
    else:
        return None
    out_features, in_features = int(shape(weight)[0]), int(shape(weight)[1:].numel())
    return Linear(node, x, weight, bias, owner_of(program, weight, node), kind, in_features, out_features)


def _constant(program: Program, node: object) -> fx.Node | None:
    return node if isinstance(node, fx.Node) and program.tensors.is_constant(node) else None


def owner_of(program: Program, weight: fx.Node, node: fx.Node) -> str:
    """What a user would call the site: the module path, which unlike the parameter path knows tied uses apart."""
    path = program.tensors.path(weight) or weight.name
    owner = path.rsplit(".", 1)[0] if path.endswith((".weight", ".kernel")) else path
    called = module_path(node)
    last = called.rsplit(".", 1)[-1]
    if called and last and not owner.endswith(called) and not called.endswith(owner) and "." not in called:
        return called  # a tied head runs under its own module but holds the embedding's parameter
    return owner


def _list(v: object) -> list[int]:
    return list(v) if isinstance(v, list | tuple) else [v]  # type: ignore[list-item]


def rows(x: fx.Node) -> int | None:
    """How many vectors a linear is applied to, or None if that is symbolic."""
    count = math.prod(shape(x)[:-1])  # Size.numel() would make a symbolic size a number, and the graph serve it alone
    return count if isinstance(count, int) else None
