"""One wide linear in place of several that read the same input: q/k/v, gate/up."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from accelpass.ir.analyses.structure.linear import linears
from accelpass.ir.core.derived import Recipe
from accelpass.ir.core.graph import aten, call, is_call, module_path, shape, value
from accelpass.ir.core.program import Program
from accelpass.ir.linear.op import is_linear, linear_spec, operands_of
from accelpass.passes.core.base import Done, Skip, Take, Verdict
from accelpass.passes.core.site_pass import Edits, SitePass


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
            if is_linear(node):
                spec, (x, operands, bias, text) = linear_spec(node), node.args
                # Of several weights in one stack, and of a residual, rows are not the only thing that differs.
                if spec.by is None and not spec.low_rank and all(map(program.tensors.is_constant, operands)):
                    width = spec.weight.width([value(o) for o in operands])
                    groups.setdefault((node.target, x, bias is None, text, width), []).append(node)
            elif node in float_sites and node.args[1] is float_sites[node].weight:
                plain = len(node.args) < 3 or node.args[2] is None
                groups.setdefault((node.target, node.args[0], plain, value(node.args[1]).dtype), []).append(node)
        return [Siblings(tuple(nodes)) for nodes in groups.values() if len(nodes) > 1]

    def check(self, site: Siblings, program: Program) -> Verdict:
        nodes = site.nodes
        if len({_rows_of(n)[0] for n in nodes}) < len(nodes):
            return Skip("two of the linears share one weight")
        # What another pass derived is not made at all where it is derived further.
        own = any(program.tensors.value(n.args[1]) is not None for n in nodes)
        if nodes[0].target is aten.linear.default and own and not self.copy_weights:
            size = sum(value(n.args[1]).numel() * value(n.args[1]).element_size() for n in nodes)
            return Skip(
                f"float weights would exist twice ({size / 1e6:.1f} MB); "
                "{'name': 'horizontal_fusion', 'copy_weights': True} does it all the same"
            )
        biases = [n.args[2] for n in nodes if len(n.args) > 2 and n.args[2] is not None]
        if not all(map(program.tensors.is_constant, biases)):
            return Skip("a bias is not a constant")
        return Take()

    def rewrite(self, site: Siblings, edit: Edits) -> Done:
        nodes, program = site.nodes, edit.program
        first = nodes[0]
        # One derivation for all operands, so that each weight is packed once and not once for each of q, scale, ...
        count, parts = len(nodes), [_rows_of(n) for n in nodes]
        recipe = Recipe(
            ("horizontal_fusion", count, len(parts[0])),
            lambda *ts: tuple(torch.cat(ts[i : i + count]) for i in range(0, len(ts), count)),
        )
        rows = [part[i] for i in range(len(parts[0])) for part in parts]
        joined = program.tensors.derive(rows, recipe, [f"{p.name}_fused" for p in parts[0]])
        widths = [int(shape(part[0])[0]) for part in parts]
        with program.graph.inserting_before(first):
            fused = call(program.graph, first, first.target, *_with_rows(first, joined))
            start = 0
            outputs = []
            for width in widths:
                outputs.append(call(program.graph, first, aten.slice.Tensor, fused, -1, start, start + width))
                start += width
        for node, output in zip(nodes, outputs, strict=True):
            edit.replace(node, output)
        return Done(f"{len(nodes)} linears of {'+'.join(map(str, widths))} rows as one")


def _rows_of(node: fx.Node) -> list[Any]:
    """The operands of a linear that have a row for each output: what its weight is made of, and its bias."""
    weight = operands_of(node) if is_linear(node) else [node.args[1]]
    return [*weight, *(a for a in node.args[2:3] if a is not None)]


def _with_rows(node: fx.Node, rows: list[fx.Node]) -> tuple[Any, ...]:
    """The arguments of a linear with other rows: the reverse of :func:`_rows_of`."""
    x, weight, *rest = node.args
    count = len(weight) if isinstance(weight, list | tuple) else 1
    bias = [rows[count] if len(rows) > count else None] if rest else []
    return (x, rows[:count] if is_linear(node) else rows[0], *bias, *rest[1:])
