"""One wide linear in place of several that read the same input: q/k/v, gate/up."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from accelpass.ir.analyses.linear import linears
from accelpass.ir.derived import Recipe
from accelpass.ir.graph import aten, call, is_call, module_path, shape, value
from accelpass.ir.program import Program
from accelpass.ir.weight_only_ops import int4_linear, int8_linear
from accelpass.passes.base import Done, Skip, Take, Verdict
from accelpass.passes.site_pass import Edits, SitePass

_PACKED = {int8_linear._opoverload: (1, 2), int4_linear._opoverload: (1, 2, 3)}
"""Op -> positions of the operands whose rows are output channels."""


_BIAS = {aten.linear.default: 2, int8_linear._opoverload: 3, int4_linear._opoverload: 4}
"""Op -> position of the bias."""


@dataclass(frozen=True)
class Siblings:
    """Linears that read one input, each with a weight of the same form."""

    nodes: tuple[fx.Node, ...]

    @property
    def path(self) -> str:
        """``layers.0.attn.{q,k,v}``."""
        paths = [module_path(n) or n.name for n in self.nodes]
        parent, _, last = paths[0].rpartition(".")
        return f"{parent}.{{{','.join([last, *(p.rpartition('.')[2] for p in paths[1:])])}}}".lstrip(".")


@dataclass(frozen=True)
class HorizontalFusion(SitePass):
    """Concatenate the rows of linears that read one input, multiply once, split the result.

    Each output is the same dot product as before, so results change at most by the order of float additions. Packed
    weights are concatenated instead of packed one by one, which costs nothing. Float weights would exist twice, because
    the module keeps its own, so they are fused only on request.

    Attributes:
        copy_weights: fuse float linears too, at the price of a second copy of their weights.
    """

    copy_weights: bool = False

    name: ClassVar[str] = "horizontal_fusion"
    phase: ClassVar[str] = "fusion"
    summary: ClassVar[str] = "q/k/v and gate/up as one linear"
    exact: ClassVar[bool] = True
    reads: ClassVar[frozenset[str]] = frozenset({"linear.weight"})
    nothing: ClassVar[str] = "no linears that read one input were found in this graph"

    def find(self, program: Program) -> list[Siblings]:
        groups: dict[tuple[Any, ...], list[fx.Node]] = {}
        float_sites = {
            s.node: s for s in program.analysis(linears) if s.kind == "linear" and is_call(s.node, aten.linear)
        }
        for node in program.graph.nodes:
            if node.target in _PACKED and program.tensors.is_constant(node.args[1]):
                q, bias = node.args[1], node.args[-2] if node.target is int4_linear._opoverload else node.args[3]
                same = (node.args[-1], node.args[3] is None) if node.target is int4_linear._opoverload else ()
                key = (node.target, node.args[0], bias is None, value(q).shape[1], *same)
                groups.setdefault(key, []).append(node)
            elif node in float_sites and node.args[1] is float_sites[node].weight:
                key = (node.target, node.args[0], len(node.args) < 3 or node.args[2] is None, value(node.args[1]).dtype)
                groups.setdefault(key, []).append(node)
        return [Siblings(tuple(nodes)) for nodes in groups.values() if len(nodes) > 1]

    def check(self, site: Siblings, program: Program) -> Verdict:
        nodes = site.nodes
        if len({n.args[1] for n in nodes}) < len(nodes):
            return Skip("two of the linears share one weight")
        if nodes[0].target is aten.linear.default and not self.copy_weights:
            size = sum(value(n.args[1]).numel() * value(n.args[1]).element_size() for n in nodes)
            return Skip(
                f"float weights would exist twice ({size / 1e6:.1f} MB); "
                "{'name': 'horizontal_fusion', 'copy_weights': True} does it all the same"
            )
        bias = _BIAS[nodes[0].target]
        if _is_given(nodes[0].args, bias) and not all(program.tensors.is_constant(n.args[bias]) for n in nodes):
            return Skip("a bias is not a constant")
        return Take()

    def rewrite(self, site: Siblings, edit: Edits) -> Done:
        nodes, program = site.nodes, edit.program
        first = nodes[0]
        operands: list[Any] = list(first.args)
        positions = [p for p in (*_PACKED.get(first.target, (1,)), _BIAS[first.target]) if _is_given(operands, p)]
        # One derivation for all operands, so that each weight is packed once and not once for each of q, scale, ...
        count = len(nodes)
        recipe = Recipe(
            ("horizontal_fusion", count, len(positions)),
            lambda *ts: tuple(torch.cat(ts[i : i + count]) for i in range(0, len(ts), count)),
        )
        rows = [n.args[p] for p in positions for n in nodes]
        names = [f"{operands[p].name}_fused" for p in positions]
        for position, fused in zip(positions, program.tensors.derive(rows, recipe, names), strict=True):
            operands[position] = fused
        widths = [int(shape(n.args[1])[0]) for n in nodes]
        with program.graph.inserting_before(first):
            fused = call(program.graph, first, first.target, *operands)
            start = 0
            parts = []
            for width in widths:
                parts.append(call(program.graph, first, aten.slice.Tensor, fused, -1, start, start + width))
                start += width
        for node, part in zip(nodes, parts, strict=True):
            edit.replace(node, part)
        return Done(f"{len(nodes)} linears of {'+'.join(map(str, widths))} rows as one")


def _is_given(operands: Sequence[Any], position: int) -> bool:
    return position < len(operands) and operands[position] is not None
