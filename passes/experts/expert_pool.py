"""Experts that several layers share are one stack, joined once (ReXMoE, arXiv 2510.17483)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from accelpass.ir.core.derived import Recipe
from accelpass.ir.core.graph import aten, is_call, module_path, shape, value
from accelpass.ir.core.program import Program
from accelpass.passes.core.base import Done, Skip, Take, Verdict
from accelpass.passes.core.site_pass import Edits, SitePass

FORMAT = 1


@dataclass(frozen=True)
class Pool:
    """Stacks of weights that layers join.

    Attributes:
        paths: the layers, and where in them.
        nodes: where they are joined; the results are equal.
        stacks: what is joined, in order.
    """

    paths: tuple[str, ...]
    nodes: tuple[fx.Node, ...]
    stacks: tuple[fx.Node, ...]

    @property
    def path(self) -> str:
        return self.paths[0]


@dataclass(frozen=True)
class ExpertPool(SitePass):
    """Join the experts of adjacent layers once for all layers that share them, not at each call of each layer.

    After "ReXMoE: Reusing Experts with Minimal Overhead in Mixture-of-Experts": a layer chooses among its own experts and its
    neighbours'. The joined stack is one tensor made of the model's weights, which follows these: it is packed once, is one initializer of an
    ONNX file, and several layers read it. The method is one of quality, for a model that was trained with it: it makes no model faster than
    the same one with experts of its own.
    """

    name: ClassVar[str] = "expert_pool"
    phase: ClassVar[str] = "structure"
    summary: ClassVar[str] = "experts that layers share are joined once, not at each call"
    paper: ClassVar[str] = "ReXMoE, arXiv 2510.17483"
    exact: ClassVar[bool] = True
    edits: ClassVar[frozenset[str]] = frozenset({"experts.stack"})
    nothing: ClassVar[str] = "no layer joins stacks of weights"

    def find(self, program: Program) -> list[Pool]:
        grouped: dict[Any, list[fx.Node]] = {}
        for node in program.graph.nodes:
            if is_call(node, aten.cat) and all(isinstance(n, fx.Node) for n in node.args[0]):
                stacks, dim = tuple(node.args[0]), node.args[1] if len(node.args) > 1 else 0
                if len(stacks) > 1 and all(program.tensors.path(n) and len(shape(n)) == 3 for n in stacks):
                    grouped.setdefault((stacks, dim), []).append(node)
        return [
            Pool(tuple(f"{module_path(n) or 'model'}.{n.name}" for n in nodes), tuple(nodes), stacks)
            for (stacks, _), nodes in grouped.items()
        ]

    def check(self, site: Pool, program: Program) -> Verdict:
        if not all(map(program.tensors.is_constant, site.stacks)):
            return Skip("a stack is written to by the graph")
        first = site.nodes[0]
        if len(first.args) > 1 and first.args[1] not in (0, -3):
            return Skip(f"weights are joined along dimension {first.args[1]}, and experts are the first")
        return Take()

    def rewrite(self, site: Pool, edit: Edits) -> Done:
        recipe = Recipe(("expert_pool", FORMAT, len(site.stacks)), _joined)
        (pool,) = edit.derive(site.stacks, recipe, [f"{site.stacks[0].name}_pool"])
        for node in site.nodes:
            edit.replace(node, pool)
        size = int(value(pool).numel() * value(pool).element_size())
        return Done(f"{int(shape(pool)[0])} experts of {len(site.stacks)} layers in one stack", size, size)


def _joined(*stacks: Tensor) -> tuple[Tensor, ...]:
    return (torch.cat(stacks),)
