"""Activations rounded to eight bits in front of the products of int8 weights (W8A8), as the standard writes it: ``QuantizeLinear`` ->
``DequantizeLinear`` with one scale and zero point a tensor (ONNX operators, "QuantizeLinear"; Jacob et al., 2018, arXiv 1712.05877).

The scales are static: ranges are those of the example call and of the calls that were given for calibration. The nodes are put
into the graph that torch runs too, so that the file is compared with what it says.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.ao.quantization.fx._decomposed  # defines the operators of quantized_decomposed
from torch import Tensor, fx

from accelpass.backends.export.errors import ExportError
from accelpass.backends.export.functional import Functional
from accelpass.ir.core.graph import aten, is_call, replace, value
from accelpass.ir.core.program import Program
from accelpass.ir.linear.formats import Int8
from accelpass.ir.linear.lower import ROUNDED
from accelpass.ir.linear.op import INPUT, is_linear, linear_spec, operands_of
from accelpass.ir.linear.spec import LinearSpec
from accelpass.passes.quantization.int8_static import Int8Static

_LEVELS = 255
_ROUND = torch.ops.quantized_decomposed


@dataclass
class StaticRanges:
    """Ranges of what is multiplied with packed weights, by the weight's name: those of a prompt serve the decoding step too.

    Attributes:
        calls: tensors of further calls, by input.
        found: the least and the largest number that each weight was multiplied with, 0 among them.
        effect: by how much rounding changes the outputs of the example call, relative to the largest.
    """

    calls: Sequence[Mapping[str, Tensor]] = ()
    found: dict[str, tuple[float, float]] = field(default_factory=dict)
    effect: float = 0.0

    def apply(self, made: Functional) -> str:
        """Put the nodes into ``made``; returns a note for the report.

        Raises:
            ExportError: there is no int8 linear, a weight is int4, or a call does not fit the graph.
        """
        graph = made.gm.graph
        nodes = [n for n in graph.nodes if is_linear(n)]
        if any(not value(n.args[0]).is_floating_point() for n in nodes):
            raise ExportError("activations='qdq' rounds what int8_dynamic rounds already; leave out one of the two")
        if any(not isinstance(linear_spec(n).weight, Int8) for n in nodes):
            raise ExportError(
                "activations='qdq' is for int8 weights, and int4_weights packed some; leave it out, or leave out the option"
            )
        if not nodes and self.found:
            return ""  # a step that computes none of them
        if not nodes:
            raise ExportError(
                "activations='qdq' rounds what is multiplied with int8 weights; add passes=['int8_weights']"
            )
        plain = self._watch(made)
        rounded: dict[tuple[fx.Node, tuple[float, float]], fx.Node] = {}
        for node in nodes:
            x, key = node.args[0], self.found[_weight(node)]
            assert isinstance(x, fx.Node)
            if (x, key) not in rounded:
                rounded[x, key] = _rounded(graph, node, x, *key)
            node.update_arg(0, rounded[x, key])
        graph.lint()
        made.gm.recompile()
        self.effect = max(self.effect, far := _far(_run(made, made.inputs), plain))
        calls = f" and {len(self.calls)} more" if self.calls else ", which is little to go by: give calibration calls"
        return (
            f"activations of {len(nodes)} linears are rounded to 8 bits, in ranges of the example call{calls}; on the example it "
            f"changes the outputs by {far:.1e} of the largest value"
        )

    def _watch(self, made: Functional) -> list[Tensor]:
        """Find the ranges that are not known yet; returns the outputs of the example call.

        The first graph sees all calls: it is a decoder's prompt, or a whole step. Examples of later ones begin with no state.
        """
        seen: dict[str, tuple[float, float]] = {}
        plain = _run(made, made.inputs, seen)
        for number, call in enumerate(() if self.found else self.calls):
            unknown = [name for name in call if name not in made.inputs]
            if unknown:
                names = ", ".join(made.inputs)
                raise ExportError(f"calibration[{number}] has {unknown[0]!r}, and the graph reads {names}")
            try:
                _run(made, {**made.inputs, **call}, seen)
            except RuntimeError as cause:
                raise ExportError(
                    f"calibration[{number}] does not fit the graph, whose sizes are the example call's but for those in "
                    f"dynamic_shapes: {' '.join(str(cause).split())[:200]}"
                ) from cause
        self.found = seen | self.found
        return plain


def write_static(program: Program) -> None:
    """Round inputs that have a known step by the standard's pair of operators; the products are of floats then.

    A step that a graph chooses (of ranges of timesteps) is left to what the format says of itself.
    """
    rounded: dict[tuple[fx.Node, float], fx.Node] = {}

    def pair(node: fx.Node, x: Any, step: fx.Node) -> fx.Node:
        size = float(getattr(program.gm, str(step.target))[0]) or 1.0
        if (x, size) not in rounded:
            rounded[x, size] = _pair(program.graph, node, x, (size, 128, 0, _LEVELS, torch.uint8), ROUNDED)
        return rounded[x, size]

    for node in list(program.graph.nodes):
        if is_call(node, INPUT) and _is_static(LinearSpec.from_json(node.args[2]), node.args[1]):
            replace(node, pair(node, node.args[0], *node.args[1]))
        if not is_linear(node):
            continue
        spec, operands = linear_spec(node), operands_of(node)
        if not _is_static(spec, spec.of_activation(operands)):
            continue
        rest = [*spec.of_weight(operands), *spec.of_residual(operands), *spec.of_choice(operands)]
        plain = dataclasses.replace(spec, activation=None).to_json()
        node.args = (pair(node, node.args[0], *spec.of_activation(operands)), rest, node.args[2], plain)


def _is_static(spec: LinearSpec, known: Sequence[fx.Node]) -> bool:
    return isinstance(spec.activation, Int8Static) and all(n.op == "get_attr" for n in known)


def effect_of_rounding(made: Functional) -> float:
    """By how much the rounding of inputs to integers, a pass's, changes the outputs of the example call, over the largest."""
    given = [made.inputs[name].clone() for name in made.inputs]
    with torch.no_grad():
        outputs = _Unrounded(made.gm).run(*given)
    return _far(_run(made, made.inputs), _own(made, outputs))


class _Unrounded(fx.Interpreter):
    """Runs a graph without the rounding of inputs to integers; what is beyond the codes is clipped as it was."""

    def __init__(self, gm: fx.GraphModule) -> None:
        super().__init__(gm)
        self.way = {step for node in gm.graph.nodes if ROUNDED in node.meta for step in _way(node)}

    def run_node(self, n: fx.Node) -> Any:
        if n.target is _ROUND.dequantize_per_tensor.default and n.args[0] in self.way:
            return self.env[n.args[0]]
        if n not in self.way:
            return super().run_node(n)
        if n.target is _ROUND.quantize_per_tensor.default:
            scale, zero, least, most = n.args[1:5]
            return self.env[n.args[0]].clamp((least - zero) * scale, (most - zero) * scale)
        plain = n.target in (aten.round.default, aten.to.dtype, aten._to_copy.default)
        return self.env[n.args[0]] if plain else super().run_node(n)


def _way(codes: fx.Node) -> list[fx.Node]:
    """From codes back to where they are rounded; empty where no operator is known to round."""
    found = [codes]
    while found[-1].target not in (aten.round.default, _ROUND.quantize_per_tensor.default):
        before = found[-1].args[0] if found[-1].args else None
        if not isinstance(before, fx.Node):
            return []
        found.append(before)
    return found


class _Watching(fx.Interpreter):
    def __init__(self, gm: fx.GraphModule, found: dict[str, tuple[float, float]]) -> None:
        super().__init__(gm)
        self.found = found

    def run_node(self, n: fx.Node) -> Any:
        if is_linear(n):
            least, most = (float(f) for f in self.env[n.args[0]].float().aminmax())
            low, high = self.found.get(_weight(n), (0.0, 0.0))
            self.found[_weight(n)] = min(low, least), max(high, most)
        return super().run_node(n)


def _run(
    made: Functional, inputs: Mapping[str, Tensor], found: dict[str, tuple[float, float]] | None = None
) -> list[Tensor]:
    given = [inputs[name].clone() for name in made.inputs]
    with torch.no_grad():
        outputs = made.gm(*given) if found is None else _Watching(made.gm, found).run(*given)
    return _own(made, outputs)


def _own(made: Functional, outputs: Sequence[Tensor]) -> list[Tensor]:
    """The model's outputs; state is no output of its."""
    return [t for name, t in zip(made.outputs, outputs, strict=True) if not name.startswith("present.")]


def _weight(node: fx.Node) -> str:
    q = operands_of(node)[0]
    return str(q.target) if isinstance(q, fx.Node) else str(q)


def _rounded(graph: fx.Graph, before: fx.Node, x: fx.Node, least: float, most: float) -> fx.Node:
    scale = max(most - least, 1e-8) / _LEVELS
    return _pair(graph, before, x, (scale, round(-least / scale), 0, _LEVELS, torch.uint8))


def _pair(
    graph: fx.Graph, before: fx.Node, x: fx.Node, setting: tuple[float, int, int, int, torch.dtype], mark: str = ""
) -> fx.Node:
    """x rounded and back; the setting is a scale, a zero point, the least and the largest code, and their dtype.

    ``mark`` is a key that the codes get in their ``meta``.
    """
    fake = value(x)
    with graph.inserting_before(before):
        wide = x
        if fake.dtype != torch.float32:
            wide = graph.call_function(torch.ops.aten._to_copy.default, (x,), {"dtype": torch.float32})
            wide.meta["val"] = fake.float()
        codes = graph.call_function(_ROUND.quantize_per_tensor.default, (wide, *setting))
        codes.meta |= {"val": fake.to(setting[-1])} | ({mark: True} if mark else {})
        back = graph.call_function(_ROUND.dequantize_per_tensor.default, (codes, *setting))
        back.meta["val"] = fake.float()
        if fake.dtype != torch.float32:
            back = graph.call_function(torch.ops.aten._to_copy.default, (back,), {"dtype": fake.dtype})
            back.meta["val"] = fake
    return back


def _far(got: Sequence[Tensor], want: Sequence[Tensor]) -> float:
    pairs = [(a.double(), b.double()) for a, b in zip(got, want, strict=True) if b.is_floating_point() and b.numel()]
    return max((float((a - b).abs().max() / b.abs().max().clamp_min(1e-30)) for a, b in pairs), default=0.0)
