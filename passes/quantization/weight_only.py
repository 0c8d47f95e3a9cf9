"""The family's base: find the sites, decide, replace each linear, embedding and expert by its packed form."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from accelpass.ir.analyses.linear import Embedding, ExpertStack, Linear, embeddings, expert_stacks, linears
from accelpass.ir.derived import is_released
from accelpass.ir.graph import aten, call, shape, through, value
from accelpass.ir.linear.op import EMBEDDING, LINEAR, MATRIX
from accelpass.ir.linear.spec import Expert, LinearSpec
from accelpass.ir.program import Program
from accelpass.passes.base import Done, Record, SitePatterns, Skip, Take, Verdict


@dataclass(frozen=True)
class WeightOnly(SitePatterns):
    """Base of passes that pack weights; a method says in which format, and how inputs are rounded if they are.

    A weight is packed only if every use of it can read the packed form: a second float copy would make the model larger,
    not smaller. A tied embedding is therefore packed together with the output head, or not at all.
    """

    phase: ClassVar[str] = "weights"

    def __post_init__(self) -> None:
        self.check_sites()

    @property
    @abstractmethod
    def spec(self) -> LinearSpec:
        """What a linear that the pass takes computes."""

    def check(self, site: Linear | ExpertStack) -> Verdict:
        """Whether the spec can take a site; a weight is packed if all sites that read it are taken."""
        return self.spec.weight.check(site.in_features)

    def apply(self, program: Program, record: Record) -> None:
        sites: dict[fx.Node, list[Linear | Embedding | ExpertStack]] = {}
        for analysis in (linears, embeddings, expert_stacks):
            for site in program.analysis(analysis):
                sites.setdefault(site.weight, []).append(site)
        if not any(isinstance(s, Linear | ExpertStack) for group in sites.values() for s in group):
            record.skip("(model)", "no linear layer with a constant weight was found in this graph")
        order = {n: i for i, n in enumerate(program.graph.nodes)}
        for weight, group in sites.items():
            group.sort(key=lambda s: order[s.node])
            here = self.at([s.path for s in group])
            verdict = here._judge(program, weight, group, record)
            done = here._rewrite(program, weight, group) if isinstance(verdict, Take) else None
            for number, site in enumerate(group):
                if isinstance(verdict, Skip):
                    record.skip(site.path, verdict.why)
                elif number == 0 and done is not None:
                    record.take(site.path, done)
                else:
                    record.take(site.path, Done(f"shares the packed weight of {group[0].path}"))

    def _judge(self, program: Program, weight: fx.Node, group: list[Any], record: Record) -> Verdict:
        for site in group:
            wanted = self.wanted(site.path, record)
            if isinstance(wanted, Skip):
                return wanted if len(group) == 1 else Skip(f"{site.path} shares this weight and is {wanted.why}")
        if not any(isinstance(s, Linear | ExpertStack) for s in group):
            return Skip(
                "an embedding alone: rows are looked up, not multiplied, so packing would save bytes but no time"
            )
        for site in group:
            if isinstance(site, Linear) and site.kind.endswith("_conv"):
                return Skip(f"a {site.kind} keeps its float weight")
        transposed = {s.transposed for s in group if not isinstance(s, Embedding)}
        if len(transposed) > 1:
            return Skip("the weight is used both as (out, in) and as (in, out)")
        readers = sum(len(self._entry_users(weight, s)) for s in group)
        if readers < len(weight.users):
            return Skip(f"{len(weight.users) - readers} other use(s) of the weight need its float form")
        if value(weight).dtype not in (torch.float32, torch.bfloat16, torch.float16):
            return Skip(f"the weight is {value(weight).dtype}; float32, bfloat16 and float16 are packed")
        verdicts = (self.check(s) for s in group if not isinstance(s, Embedding))
        verdict = next((v for v in verdicts if isinstance(v, Skip)), Take())
        real = program.tensors.value(weight)
        if isinstance(verdict, Take) and real is not None and not is_released(real) and not _finite(real):
            return Skip("the weight holds NaN or infinity")
        return verdict

    @staticmethod
    def _entry_users(weight: fx.Node, site: Any) -> list[fx.Node]:
        """The direct users of ``weight`` through which ``site`` reads it."""
        return [u for u in weight.users if u is site.node or _leads_to(u, site.node)]

    def _rewrite(self, program: Program, weight: fx.Node, group: list[Any]) -> Done:
        """Let every site read the packed weight; returns what that did to its bytes."""
        graph = program.graph
        spec = self.spec
        names = [f"{weight.name}_{operand}" for operand in spec.weight.operands]
        packed = program.tensors.derive([weight], spec.weight.recipe(_transposed(group)), names)
        form = f"{'x'.join(str(int(s)) for s in shape(weight))} {spec.weight.part}"
        done = Done(form, _bytes(weight), sum(map(_bytes, packed)))
        for site in group:
            with graph.inserting_before(site.node):
                if isinstance(site, Embedding):
                    dtype = value(site.node).dtype
                    new = call(graph, site.node, EMBEDDING, site.node.args[1], packed, spec.to_json(), dtype)
                elif isinstance(site, ExpertStack):
                    entry = self._entry_users(weight, site)
                    for user in entry:
                        with graph.inserting_before(user):
                            w = call(graph, user, MATRIX, packed, spec.to_json(), value(weight).dtype)
                            if site.transposed:
                                w = call(graph, user, aten.transpose.int, w, -1, -2)
                        user.replace_input_with(weight, w)
                    continue
                else:
                    by = None if site.select is None else Expert(int(site.select.args[2]))
                    bias = (
                        through(site.bias, aten.to)
                        if program.tensors.is_constant(through(site.bias, aten.to))
                        else site.bias
                    )
                    read = LinearSpec(spec.weight, spec.activation, by).to_json()
                    new = call(graph, site.node, LINEAR, site.operand(), packed, bias, read)
            site.node.replace_all_uses_with(new)
            graph.erase_node(site.node)
        return done


def _bytes(node: fx.Node) -> int:
    return int(value(node).numel() * value(node).element_size())


def _transposed(group: list[Any]) -> bool:
    return any(s.transposed for s in group if not isinstance(s, Embedding))


def _finite(w: torch.Tensor) -> bool:
    # min and max carry NaN and infinity, in one pass over the weight and without a temporary of its size.
    low, high = w.detach().aminmax()
    return bool(torch.isfinite(low) & torch.isfinite(high))


def _leads_to(node: fx.Node, target: fx.Node, depth: int = 4) -> bool:
    """Whether ``target`` reads ``node`` through a few views."""
    return depth > 0 and any(u is target or _leads_to(u, target, depth - 1) for u in node.users)
