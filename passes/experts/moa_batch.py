"""The attentions of a mixture computed as one (BAM, arXiv 2408.08274)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from accelpass.ir.attention.lowering.lower import give_origin
from accelpass.ir.attention.recognition.experts import AttentionExperts, attention_experts
from accelpass.ir.attention.spec.op import ATTENTION, spec_of
from accelpass.ir.core.derived import Recipe
from accelpass.ir.core.graph import aten, draws, is_call, mutates, root, shape, value, written_inputs
from accelpass.ir.core.program import Program
from accelpass.passes.core.base import Done, Skip, Take, Verdict
from accelpass.passes.core.site_pass import Edits, SitePass

FORMAT = 1


@dataclass(frozen=True)
class MoABatch(SitePass):
    """Compute attentions that are experts of one layer as one attention with the heads of all.

    After Zhang et al., "BAM! Just Like That: Simple and Efficient Parameter Upcycling for Mixture of Experts", section 3.2: every
    token goes through all attention experts, whose results a router weighs. Experts that share keys and values become
    query groups of one attention, which reads one cache once, so that passes for caches take it; experts with keys of their own are
    more heads. Where each has a cache of its own, it is left alone. Projections stay as they are: ``horizontal_fusion`` brings those of
    the queries together. Every result is the same sum as before.

    Attributes:
        copy_weights: the results, weighed, go through all output projections in one product, at the price of a second copy of
            float weights; a pass that packs weights packs the one matrix.
    """

    copy_weights: bool = False

    name: ClassVar[str] = "moa_batch"
    phase: ClassVar[str] = "structure"
    summary: ClassVar[str] = "the attention experts of a mixture as one attention with all their heads"
    paper: ClassVar[str] = "BAM, arXiv 2408.08274"
    exact: ClassVar[bool] = True
    reads: ClassVar[frozenset[str]] = frozenset({"attention.heads"})
    nothing: ClassVar[str] = (
        "no attentions were found whose results a router weighs and adds; those of tokens that a loop picks break the graph before a "
        "pass sees them"
    )

    def find(self, program: Program) -> list[AttentionExperts]:
        return list(program.analysis(attention_experts))

    def check(self, site: AttentionExperts, program: Program) -> Verdict:
        if site.why:
            return Skip(site.why)
        written = written_inputs(program.graph)
        for node in _later(site):
            if mutates(node) or draws(node) or any(root(n) in written for n in node.all_input_nodes):
                return Skip(
                    f"between its attentions a tensor is read that the graph writes to, such as a cache ({node.name})"
                )
        return Take()

    def rewrite(self, site: AttentionExperts, edit: Edits) -> Done:
        nodes, count = site.nodes, len(site.nodes)
        first, spec = nodes[0], spec_of(nodes[0])
        for node in _later(site):
            first.prepend(node)
        if site.shared:
            keys = list(first.args[1:3])
            key: tuple[int, ...] = spec.groups, count
            join: Callable[..., list[Tensor]]
            part: Callable[..., list[Tensor]]
            join, part = partial(_grouped, groups=spec.groups), partial(_ungrouped, experts=count, groups=spec.groups)
            spec = replace(spec, groups=spec.groups * count)
        else:
            key = tuple(int(shape(n)[-3]) for n in nodes)
            keys = [edit.run("heads", _side_by_side, [n.args[at] for n in nodes], first)[0] for at in (1, 2)]
            join, part = _side_by_side, partial(_apart, heads=key)
        (q,) = edit.run(("queries", site.shared, key), join, [n.args[0] for n in nodes], first)
        # It is called as the first expert, whose module the cache layer that it reads is known by.
        made = edit.call(first, ATTENTION, q, *keys, list(first.args[3]), spec.to_json())
        give_origin(edit.program, made)
        parts = edit.run(("parts", site.shared, key), part, [made], first)
        for node, own in zip(nodes, parts, strict=True):
            edit.replace(node, own)
        what = f"{count} attentions as one of {shape(q)[-3]} query heads and {shape(keys[0])[-3]} key/value heads"
        return self._projected(site, edit, what) if self.copy_weights else Done(what)

    def _projected(self, site: AttentionExperts, edit: Edits, what: str) -> Done:
        """Let one product stand for all output projections, if they are plain ones."""
        linears, gates = [t.projection for t in site.terms], [t.gate for t in site.terms]
        for one, gate in zip(linears, gates, strict=True):
            plain = is_call(one.node, aten.linear) and one.node.args[1] is one.weight and one.bias is None
            if not plain or gate is None or value(gate).dtype != value(one.node).dtype:
                return Done(f"{what}; output projections stay apart, as they are no plain linears of one gate each")
        recipe = Recipe(("moa_batch", FORMAT, len(linears)), lambda *weights: (torch.cat(weights, 1),))
        (weight,) = edit.derive([t.weight for t in linears], recipe, [f"{linears[0].weight.name}_experts"])
        operands = [*(t.operand() for t in linears), *(g for g in gates if g is not None)]
        (weighed,) = edit.run(("weighed", len(linears)), _weighed, operands, site.out)
        result = edit.call(site.out, aten.linear.default, weighed, weight)
        for other in site.others:
            result = edit.call(site.out, aten.add.Tensor, other, result)
        edit.replace(site.out, result)
        size = int(value(weight).numel() * value(weight).element_size())
        return Done(f"{what}, and {len(linears)} output projections as one", size, size)


def _later(site: AttentionExperts) -> list[fx.Node]:
    """What comes after the first expert's attention and is computed for the other experts' attentions, in graph order."""
    first, *rest = site.nodes
    found: set[fx.Node] = set()
    front: list[Any] = [n for node in rest for n in node.all_input_nodes]
    while front:
        node = front.pop()
        if node not in found and first < node:
            found.add(node)
            front += node.all_input_nodes
    return sorted(found)


def _side_by_side(*given: Tensor) -> list[Tensor]:
    return [torch.cat(given, -3)]


def _apart(x: Tensor, heads: Sequence[int]) -> list[Tensor]:
    return list(x.split(list(heads), -3))


def _grouped(*queries: Tensor, groups: int) -> list[Tensor]:
    """Queries ``(..., kv_heads * groups, tokens, d)`` of each expert, those that read one key side by side."""
    return [torch.cat([q.unflatten(-3, (-1, groups)) for q in queries], -3).flatten(-4, -3)]


def _ungrouped(x: Tensor, experts: int, groups: int) -> list[Tensor]:
    return [part.flatten(-4, -3) for part in x.unflatten(-3, (-1, experts * groups)).split(groups, -3)]


def _weighed(*given: Tensor) -> list[Tensor]:
    """What projections read ``(..., channels)`` times the gates ``(..., 1)``, all experts in one row."""
    half = len(given) // 2
    return [torch.cat([x * gate for x, gate in zip(given[:half], given[half:], strict=True)], -1)]
