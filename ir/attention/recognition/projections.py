"""Where queries, keys and values come from: the linears that feed them, rotary embedding, self or cross."""

from __future__ import annotations

import operator
from dataclasses import dataclass

from torch import Tensor, fx

from accelpass.ir.attention.recognition.score_steps import aten
from accelpass.ir.core.graph import is_call, value
from accelpass.ir.core.program import Program

_LINEAR = (aten.linear, aten.addmm, aten.mm, aten.matmul, aten.bmm, aten.baddbmm, aten.conv1d, aten.conv2d, aten.conv3d)
_LINEAR_LIKE = (*_LINEAR, aten.convolution)
_ROTATIONS = (aten.cos, aten.sin, aten.neg, aten.view_as_complex, aten.polar, aten.complex)
_FAR = 160  # nodes visited between an operand and its projection; MLA with rope needs about 60
_BACK = 12  # unary operations between a projection's input and the stream it reads


@dataclass(frozen=True)
class Source:
    """What one operand (q, k or v) is computed from.

    Attributes:
        linears: the calls with a constant weight that feed it; several for MLA and for joint attention.
        inputs: what these read.
        rope: cosines, sines or a rotation were seen on the way.
        joined: two streams are concatenated on the way.
    """

    linears: tuple[fx.Node, ...]
    inputs: tuple[fx.Node, ...]
    rope: bool
    joined: bool


def linear_input(program: Program, node: fx.Node) -> fx.Node | None:
    """The activation that a linear-like call reads, if its weight is the model's."""
    if not is_call(node, *_LINEAR_LIKE):
        return None
    positions = (1, 2) if is_call(node, aten.addmm, aten.baddbmm) else (0, 1)
    activation, weight = (node.args[i] for i in positions)
    if not isinstance(activation, fx.Node) or not isinstance(weight, fx.Node):
        return None
    if is_constant(program, weight) and not is_constant(program, activation):
        return activation
    return None


def is_constant(program: Program, node: fx.Node) -> bool:
    """Model state, or a view or cast of it."""
    for _ in range(6):
        if program.tensors.is_constant(node):
            return True
        tensors = [n for n in node.all_input_nodes if isinstance(value(n), Tensor)]
        if node.op != "call_function" or len(tensors) != 1 or is_call(node, aten.embedding, *_LINEAR_LIKE):
            return False
        node = tensors[0]
    return False


def source_of(program: Program, operand: fx.Node, tokens: int = -2) -> Source:
    """Walk from an operand back to the projections that feed it."""
    linears: dict[fx.Node, fx.Node] = {}
    seen, front = {operand}, [operand]
    rope = joined = False
    while front and len(seen) < _FAR:
        node = front.pop(0)
        read = linear_input(program, node)
        if read is not None:
            linears[node] = read
            continue
        rope = rope or is_call(node, *_ROTATIONS)
        for parent in node.all_input_nodes:
            if parent not in seen and isinstance(value(parent), Tensor | tuple | list):
                seen.add(parent)
                front.append(parent)
    for node in seen:
        if is_call(node, aten.cat) and isinstance(value(node), Tensor) and _joins_streams(program, node, linears):
            joined = True
    found = tuple(sorted(linears))
    return Source(found, tuple(dict.fromkeys(linears[n] for n in found)), rope, joined)


def _joins_streams(program: Program, cat: fx.Node, linears: dict[fx.Node, fx.Node]) -> bool:
    """Each part of the concatenation is fed by linears that read another activation."""
    parts = cat.args[0]
    assert isinstance(parts, list | tuple)
    read = []
    for part in parts:
        if not isinstance(part, fx.Node):
            return False
        seen, front, inputs = {part}, [part], set()
        while front and len(seen) < _FAR:
            node = front.pop(0)
            if node in linears:
                inputs.add(stream(program, linears[node]))
                continue
            fresh = [p for p in node.all_input_nodes if p not in seen]
            seen.update(fresh)
            front.extend(fresh)
        read.append(inputs)
    return len(read) == 2 and bool(read[0]) and bool(read[1]) and not read[0] & read[1] and _along_tokens(cat)


def _along_tokens(cat: fx.Node) -> bool:
    dim = cat.args[1] if len(cat.args) > 1 else cat.kwargs.get("dim", 0)
    return isinstance(dim, int) and dim % value(cat).dim() != value(cat).dim() - 1


def stream(program: Program, node: fx.Node) -> fx.Node:
    """The value that ``node`` is a norm, view, cast or further projection of: what tells two streams apart."""
    return ancestry(program, node)[-1]


def ancestry(program: Program, node: fx.Node) -> list[fx.Node]:
    """``node`` and what it is computed from, as long as that is one activation and constants."""
    found = [node]
    for _ in range(_BACK * 3):
        if node.op != "call_function":
            break
        if is_call(node, aten.embedding):
            break
        parents = [
            n
            for n in node.all_input_nodes
            if isinstance(value(n), Tensor | tuple | list) and not is_constant(program, n)
        ]
        if len(parents) == 2 and is_call(node, aten.mul, aten.div, aten.sub):
            parents = _normalised(parents)  # a hand-written norm reads its input twice: x * rsqrt(mean(x * x))
        if len(parents) != 1:
            break
        node = parents[0]
        found.append(node)
    return found


def _normalised(parents: list[fx.Node]) -> list[fx.Node]:
    for x, statistic in (parents, parents[::-1]):
        node = statistic
        for _ in range(6):
            if node is x:
                return [x]
            above = [n for n in node.all_input_nodes if isinstance(value(n), Tensor | tuple | list)]
            if len(set(above)) != 1:
                break
            node = above[0]
        if node is x:
            return [x]
    return parents


def kind_of(program: Program, q: Source, k: Source, q_node: fx.Node, k_node: fx.Node) -> str:
    """Whether queries and keys read the same stream."""
    if q.joined and k.joined:
        return "joint"
    mine = {n for i in (q.inputs or (q_node,)) for n in ancestry(program, i)}
    theirs = {n for i in (k.inputs or (k_node,)) for n in ancestry(program, i)}
    if not q.inputs or not k.inputs:
        return "self" if mine & theirs else "unknown"
    return "self" if mine & theirs else "cross"


def output_projection(program: Program, out: fx.Node) -> fx.Node | None:
    """The first linear that reads the attention's output, through views, casts and gates."""
    front, seen = [out], {out}
    for _ in range(40):
        if not front:
            break
        node = front.pop(0)
        for user in node.users:
            if linear_input(program, user) is node:
                return user
            passes = is_call(
                user,
                *(
                    aten.transpose,
                    aten.mT,
                    aten.permute,
                    aten.reshape,
                    aten.view,
                    aten._unsafe_view,
                    aten.clone,
                    aten.to,
                ),
                *(aten.contiguous, aten.flatten, aten.mul, aten.slice, aten.squeeze, aten.unsqueeze, aten.type_as),
                *(aten.split_with_sizes, aten.split, aten.chunk, operator.getitem, aten.cat, aten.add, aten.div),
                *(aten.layer_norm, aten.dropout, aten.expand, aten.unflatten, aten.roll, aten.sub),
            )
            if passes and user not in seen:
                seen.add(user)
                front.append(user)
    return None
