"""One wide linear in place of several that read the same input: q/k/v, gate/up."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from accelpass.ir.analyses.linear import linears
from accelpass.ir.derived import Recipe
from accelpass.ir.graph import aten, call, is_call, module_path, shape, value
from accelpass.ir.linear.op import is_linear, linear_spec, operands_of
from accelpass.ir.program import Program
from accelpass.passes.base import Done, Pass, Record, Skip


@dataclass(frozen=True)
class HorizontalFusion(Pass):
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

    def apply(self, program: Program, record: Record) -> None:
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
        for (target, *_), nodes in groups.items():
            if len(nodes) < 2:
                continue
            if isinstance(wanted := record.wants(self._site(program, nodes)), Skip):
                record.skip(self._site(program, nodes), wanted.why)
            elif len({_rows_of(n)[0] for n in nodes}) < len(nodes):
                record.skip(self._site(program, nodes), "two of the linears share one weight")
            elif target is aten.linear.default and not self.copy_weights:
                size = sum(value(n.args[1]).numel() * value(n.args[1]).element_size() for n in nodes)
                record.skip(
                    self._site(program, nodes),
                    f"float weights would exist twice ({size / 1e6:.1f} MB); "
                    "{'name': 'horizontal_fusion', 'copy_weights': True} does it all the same",
                )
            else:
                self._fuse(program, record, nodes)

    def _fuse(self, program: Program, record: Record, nodes: list[fx.Node]) -> None:
        first = nodes[0]
        if (
            first.args[2:]
            and first.args[2] is not None
            and not all(map(program.tensors.is_constant, (n.args[2] for n in nodes)))
        ):
            record.skip(self._site(program, nodes), "a bias is not a constant")
            return
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
        site = self._site(program, nodes)
        for node, part in zip(nodes, outputs, strict=True):
            node.replace_all_uses_with(part)
            program.graph.erase_node(node)
        record.take(site, Done(f"{len(nodes)} linears of {'+'.join(map(str, widths))} rows as one"))

    @staticmethod
    def _site(program: Program, nodes: list[fx.Node]) -> str:
        paths = [module_path(n) or n.name for n in nodes]
        parent, _, last = paths[0].rpartition(".")
        return f"{parent}.{{{','.join([last, *(p.rpartition('.')[2] for p in paths[1:])])}}}".lstrip(".")


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
