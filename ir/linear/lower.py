"""From semantic linears to operators: a lowering of the weight's format for the device, or its definition, traced."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from accelpass.ir.core.graph import aten, call, is_call, known, shape, value
from accelpass.ir.core.program import Program
from accelpass.ir.linear.op import EMBEDDING, INPUT, LINEAR, MATRIX, is_linear, is_packed, linear_spec, operands_of
from accelpass.ir.linear.spec import LinearSpec, WeightFormat
from accelpass.ir.transform.splice import Tracer

Nodes = Sequence[fx.Node]
ROUNDED = "accelpass_rounded"
"""Key of a node's ``meta``: it holds the codes that the input of a linear was rounded to, whatever multiplies them."""


@dataclass(frozen=True)
class Emit:
    """Shorthand for emitting ATen calls in front of one node, with its provenance."""

    graph: fx.Graph
    like: fx.Node
    tracer: Tracer

    def __call__(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        return call(self.graph, self.like, target, *args, **kwargs)

    def traced(self, key: Any, function: Callable[..., Sequence[Tensor]], *operands: fx.Node) -> list[fx.Node]:
        """The results of a torch function; ``key`` is equal for functions that do the same."""
        return self.tracer.run(key, function, operands, self.like)

    def cast(self, x: fx.Node, dtype: torch.dtype) -> fx.Node:
        return x if value(x).dtype == dtype else self(aten.to.dtype, x, dtype)

    def plus(self, y: fx.Node, bias: fx.Node | None) -> fx.Node:
        return y if bias is None else self(aten.add.Tensor, y, bias)

    def finish(self, y: fx.Node) -> fx.Node:
        """``y`` in the original's dtype and shape."""
        y = self.cast(y, value(self.like).dtype)
        wanted = shape(self.like)
        if len(shape(y)) == len(wanted) and all(known(a == b) for a, b in zip(shape(y), wanted, strict=True)):
            return y
        return self(aten.reshape.default, y, [int(s) for s in wanted])  # a few rows alone: no size is symbolic


@dataclass(frozen=True)
class Lowering:
    """How one format is computed on one kind of device; the base traces the format's own definition.

    What is emitted need not have the shape and dtype of the node that it replaces: :meth:`Emit.finish` sees to that.
    """

    def linear(self, e: Emit, weight: WeightFormat, x: fx.Node, packed: Nodes, bias: fx.Node | None) -> fx.Node:
        """``x W^T + bias``; x may be the integers of an activation format, and the product is float32 then."""
        (y,) = e.traced(("linear", weight), lambda x, *packed: [weight.multiply(_wide(x), packed)], x, *packed)
        return e.plus(y, bias)

    def embedding(self, e: Emit, weight: WeightFormat, indices: fx.Node, packed: Nodes, dtype: torch.dtype) -> fx.Node:
        """Rows of W."""

        def rows(indices: Tensor, *packed: Tensor) -> list[Tensor]:
            return [weight.unpack([p[indices] for p in packed], dtype)]

        return e.traced(("embedding", weight, dtype), rows, indices, *packed)[0]

    def matrix(self, e: Emit, weight: WeightFormat, packed: Nodes, dtype: torch.dtype) -> fx.Node:
        """W itself."""
        return e.traced(("matrix", weight, dtype), lambda *packed: [weight.unpack(packed, dtype)], *packed)[0]


TRACED = Lowering()
_LOWERINGS: dict[tuple[str, str], Lowering] = {}


def register_lowering(format: type[WeightFormat], device: str, lowering: Lowering) -> None:
    """Offer a faster way to compute a format on a kind of device, ``cpu`` or ``cuda``.

    Raises:
        ValueError: there is one already.
    """
    if (format.part, device) in _LOWERINGS:
        raise ValueError(f"the format {format.part!r} has a lowering for {device!r} already")
    _LOWERINGS[format.part, device] = lowering


def lowering_of(weight: WeightFormat, device: str) -> Lowering:
    """What computes a format on a kind of device."""
    return _LOWERINGS.get((weight.part, device), TRACED)


def lower(program: Program) -> None:
    """Replace every semantic op on packed weights by operators."""
    tracer = make_plain(program)
    for node in [n for n in program.graph.nodes if is_packed(n)]:
        with program.graph.inserting_before(node), torch.no_grad():
            new = _lowered(Emit(program.graph, node, tracer))
        _replace(node, new)
    program.graph.eliminate_dead_code()
    program.gm.recompile()


def unpack_others(program: Program, formats: Collection[str], tracer: Tracer) -> list[str]:
    """Replace the semantic ops on weights in formats that are not named by their definition; returns which those were.

    So are those on weights that are chosen as a call tells. For a target that has forms of its own for some formats.
    """
    found = dict[str, None]()
    for node in [n for n in program.graph.nodes if is_packed(n)]:
        weight = linear_spec(node).weight
        if weight.part not in formats or any(_computed(n) for n in linear_spec(node).of_weight(operands_of(node))):
            with program.graph.inserting_before(node), torch.no_grad():
                new = _lowered(Emit(program.graph, node, tracer), TRACED)
            _replace(node, new)
            found[weight.shown()] = None
    return list(found)


def _computed(node: fx.Node) -> bool:
    """Whether a node is computed from an input of the graph."""
    return node.op == "placeholder" or any(map(_computed, node.all_input_nodes))


def make_plain(program: Program) -> Tracer:
    """Write what a spec has besides the weight's format around the product: rounding of the input, choice of a weight, residual.

    What is left are products of floats, or of the integers that inputs were rounded to, with one packed weight each.
    """
    tracer, rounded = Tracer(program), dict[Any, list[fx.Node]]()
    for node in [n for n in program.graph.nodes if is_linear(n) or is_call(n, INPUT)]:
        e = Emit(program.graph, node, tracer)
        with program.graph.inserting_before(node), torch.no_grad():
            if is_call(node, INPUT):
                x, known, text = node.args
                activation = LinearSpec.from_json(str(text)).activation
                new = e.cast(e(aten.mul.Tensor, *_codes(e, x, activation, known, rounded)), value(node).dtype)
            elif (spec := linear_spec(node)) != LinearSpec(spec.weight):
                new = _plain(e, spec, rounded)
            else:
                continue
        _replace(node, new)
    return tracer


def _codes(e: Emit, x: Any, activation: Any, known: Any, rounded: dict[Any, list[fx.Node]]) -> list[fx.Node]:
    """Integers of an input, and what they are to be multiplied by; once for all that read it so rounded."""
    key = (x, activation, *known)
    if key not in rounded:
        rounded[key] = e.traced(activation, lambda x, *known: activation.encode(x.float(), *known), x, *known)
        rounded[key][0].meta[ROUNDED] = True
    return rounded[key]


def _plain(e: Emit, spec: LinearSpec, rounded: dict[Any, list[fx.Node]]) -> fx.Node:
    x: Any = e.like.args[0]
    bias: Any = e.like.args[2]
    packed, text = spec.of_weight(operands_of(e.like)), LinearSpec(spec.weight).to_json()
    if (by := spec.by) is not None:
        packed, count = [*packed, *spec.of_choice(operands_of(e.like))], len(packed)
        packed = e.traced(by, lambda *given: by.select(given[:count], *given[count:]), *packed)
    if spec.activation is None and not spec.low_rank:
        return e(LINEAR, x, packed, bias, text)
    if (activation := spec.activation) is not None:
        codes, scale = _codes(e, x, activation, spec.of_activation(operands_of(e.like)), rounded)
        y = e(aten.mul.Tensor, e(LINEAR, codes, packed, None, text), scale)
    else:
        y = e(LINEAR, e.cast(x, torch.float32), packed, None, text)
    if spec.low_rank:
        (residual,) = e.traced("residual", _residual, x, *spec.of_residual(operands_of(e.like)))
        y = e(aten.add.Tensor, y, residual)
    return e.cast(e.plus(y, bias), value(e.like).dtype)


def _residual(x: Tensor, a: Tensor, b: Tensor) -> list[Tensor]:
    return [F.linear(F.linear(x.float(), a.float()), b.float())]


def _lowered(e: Emit, lowering: Lowering | None = None) -> fx.Node:
    node, spec = e.like, linear_spec(e.like)
    lowering = lowering or lowering_of(spec.weight, value(node).device.type)
    packed, first, dtype = spec.of_weight(operands_of(node)), node.args[0], value(node).dtype
    if node.target is MATRIX:
        return lowering.matrix(e, spec.weight, packed, dtype)
    assert isinstance(first, fx.Node)
    if node.target is EMBEDDING:
        return lowering.embedding(e, spec.weight, first, packed, dtype)
    bias: Any = node.args[2]
    return e.finish(lowering.linear(e, spec.weight, first, packed, bias))


def _replace(node: fx.Node, new: fx.Node) -> None:
    node.replace_all_uses_with(new)
    node.graph.erase_node(node)


def _wide(x: Tensor) -> Tensor:
    return x.float() if x.is_floating_point() else x
