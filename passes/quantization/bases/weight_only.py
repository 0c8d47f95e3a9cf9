"""The family's base: find the sites, decide, replace each linear, embedding and expert by its packed form."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import fx

from accelpass.ir.analyses.structure.convolution import Convolution, convolutions
from accelpass.ir.analyses.structure.linear import Embedding, ExpertStack, Linear, embeddings, expert_stacks, linears
from accelpass.ir.core.derived import Recipe, is_released
from accelpass.ir.core.graph import aten, call, replace, shape, through, value
from accelpass.ir.core.program import Program
from accelpass.ir.linear.op import EMBEDDING, INPUT, LINEAR, MATRIX
from accelpass.ir.linear.spec import Expert, LinearSpec, Selector
from accelpass.passes.core.base import Done, Skip, Take, Verdict
from accelpass.passes.core.site_pass import Edits, SitePass

Use = Linear | Embedding | ExpertStack | Convolution


@dataclass(frozen=True)
class SharedWeight:
    """A weight, and all that read it in this graph, in the order in which they run."""

    weight: fx.Node
    uses: tuple[Use, ...]

    @property
    def paths(self) -> tuple[str, ...]:
        return tuple(use.path for use in self.uses)

    @property
    def path(self) -> str:
        return self.paths[0]

    @property
    def transposed(self) -> bool:
        """Whether the weight is stored as (in, out)."""
        return any(use.transposed for use in self.uses if not isinstance(use, Embedding))

    @property
    def is_multiplied(self) -> bool:
        return not all(isinstance(use, Embedding) for use in self.uses)

    @property
    def is_kernel(self) -> bool:
        """Whether convolutions read it as they are, and not as linears."""
        return any(isinstance(use, Convolution) for use in self.uses)


@dataclass(frozen=True)
class WeightOnly(SitePass):
    """Base of passes that pack weights; a method says in which format, and how inputs are rounded if they are.

    A weight is packed only if every use of it can read the packed form: a second float copy would make the model larger,
    not smaller. A tied embedding is therefore packed together with the output head, or not at all.
    """

    phase: ClassVar[str] = "weights"
    edits: ClassVar[frozenset[str]] = frozenset({"linear.weight"})
    model: ClassVar[str] = "(model)"
    nothing: ClassVar[str] = "no linear layer with a constant weight was found in this graph"

    @property
    @abstractmethod
    def spec(self) -> LinearSpec:
        """What a linear that the pass takes computes."""

    def fits(self, use: Linear | ExpertStack | Convolution) -> Verdict:
        """Whether the spec can take a use of a weight, which is packed if all its uses can be taken."""
        if self.spec.activation is not None and isinstance(use, ExpertStack):
            return Skip("a batched product of experts, whose input is not rounded; int8_weights packs its weight")
        return self.spec.weight.check(use.in_features)

    def find(self, program: Program) -> list[SharedWeight]:
        found: dict[fx.Node, list[Use]] = {}
        kernels = self.kernels(program)
        whole = {use.node for use in kernels}
        for analysis in (linears, embeddings, expert_stacks):
            for use in program.analysis(analysis):
                if use.node not in whole:
                    found.setdefault(use.weight, []).append(use)
        for kernel in kernels:
            found.setdefault(kernel.weight, []).append(kernel)
        order = {n: i for i, n in enumerate(program.graph.nodes)}
        return [SharedWeight(w, tuple(sorted(uses, key=lambda u: order[u.node]))) for w, uses in found.items()]

    def kernels(self, program: Program) -> Sequence[Convolution]:
        """The convolutions that are sites. Those of others that are a linear over pixels or patches are named as left."""
        return ()

    def whole(self, program: Program, sites: Sequence[SharedWeight]) -> str | None:
        return None if any(site.is_multiplied for site in sites) else self.nothing

    def check(self, site: SharedWeight, program: Program) -> Verdict:
        weight, group = site.weight, site.uses
        if not site.is_multiplied:
            return Skip(
                "an embedding alone: rows are looked up, not multiplied, so packing would save bytes but no time"
            )
        for use in group:
            if isinstance(use, Linear) and use.kind.endswith("_conv"):
                return Skip(f"a {use.kind} keeps its float weight")
        if not value(weight).numel():
            return Skip("the weight has no entries")
        transposed = {s.transposed for s in group if not isinstance(s, Embedding)}
        if len(transposed) > 1:
            return Skip("the weight is used both as (out, in) and as (in, out)")
        if site.is_kernel and not all(isinstance(use, Convolution) for use in group):
            return Skip("the weight is used both as a convolution's kernel and as a matrix")
        if others := _other_readers(site):
            return Skip(f"{len(others)} other use(s) of the weight need its float form")
        if value(weight).dtype not in (torch.float32, torch.bfloat16, torch.float16):
            return Skip(f"the weight is {value(weight).dtype}; float32, bfloat16 and float16 are packed")
        verdicts = (self.fits(s) for s in group if not isinstance(s, Embedding))
        verdict = next((v for v in verdicts if isinstance(v, Skip)), Take())
        real = program.tensors.value(weight)
        if isinstance(verdict, Take) and real is not None and not is_released(real) and not _finite(real):
            return Skip("the weight holds NaN or infinity")
        return verdict

    def rewrite(self, site: SharedWeight, edit: Edits) -> Done | Skip:
        """Let every use read the packed weight; returns what that did to its bytes."""
        program, weight, group = edit.program, site.weight, site.uses
        graph = program.graph
        spec = self.spec
        names = [f"{weight.name}_{operand}" for operand in spec.weight.operands]
        packed = program.tensors.derive([weight], self.recipe(site, edit), names)
        form = f"{'x'.join(str(int(s)) for s in shape(weight))} {spec.weight.part}"
        done = Done(form, _bytes(weight), sum(map(_bytes, packed)))
        entries = {use.node: [use.node, *_way(use)][-1] for use in group}
        for use in group:
            with graph.inserting_before(use.node):
                if isinstance(use, Embedding):
                    dtype = value(use.node).dtype
                    new = call(graph, use.node, EMBEDDING, use.node.args[1], packed, spec.to_json(), dtype)
                elif isinstance(use, ExpertStack | Convolution):
                    user = entries[use.node]
                    if weight in user.all_input_nodes:  # not where another product has read it through the same gather
                        with graph.inserting_before(user):
                            w = call(graph, user, MATRIX, packed, spec.to_json(), value(weight).dtype)
                            if isinstance(use, Convolution):
                                w = call(graph, user, aten.reshape.default, w, [int(s) for s in shape(weight)])
                            if use.transposed:
                                w = call(graph, user, aten.transpose.int, w, -1, -2)
                        user.replace_input_with(weight, w)
                    if isinstance(use, Convolution) and spec.activation is not None:
                        x = call(graph, use.node, INPUT, use.operand(), self.known(site, edit), spec.to_json())
                        use.node.update_arg(0, x)
                    continue
                else:
                    by, told = self.choice(site, use, edit)
                    bias = (
                        through(use.bias, aten.to)
                        if program.tensors.is_constant(through(use.bias, aten.to))
                        else use.bias
                    )
                    read = LinearSpec(spec.weight, spec.activation, by).to_json()
                    operands = [*packed, *self.known(site, edit), *told]
                    new = call(graph, use.node, LINEAR, self.entering(site, use, edit), operands, bias, read)
                    new = self.leaving(site, use, new, edit)
            replace(use.node, new)
        return done

    def recipe(self, site: SharedWeight, edit: Edits) -> Recipe:
        """How a site's weight is packed: rounded to the nearest number of its format."""
        return self.spec.weight.recipe(site.transposed, site.is_kernel)

    def leaving(self, site: SharedWeight, use: Linear, product: fx.Node, edit: Edits) -> fx.Node:
        """What is read in place of a linear of the site, from its packed product."""
        return product

    def choice(self, site: SharedWeight, use: Linear, edit: Edits) -> tuple[Selector | None, list[fx.Node]]:
        """Which weight is read, where the packed ones are several, and what the choice needs."""
        return None if use.select is None else Expert(int(use.select.args[2])), []

    def known(self, site: SharedWeight, edit: Edits) -> list[fx.Node]:
        """What the rounding of a site's input needs besides the input."""
        return []

    def entering(self, site: SharedWeight, use: Linear, edit: Edits) -> fx.Node:
        """What a linear of the site multiplies."""
        return use.operand()


@dataclass(frozen=True)
class WithKernels(WeightOnly):
    """Base of passes that can pack kernels of convolutions, too.

    Attributes:
        convolutions: pack the kernels of convolutions (1d, 2d, 3d; patch embeddings among them) as the matrices ``(out,
            in / groups * size)`` that they are; they are unpacked where they are read.
    """

    convolutions: bool = field(default=False, kw_only=True)

    for_all_sites: ClassVar[tuple[str, ...]] = ("convolutions",)

    def kernels(self, program: Program) -> Sequence[Convolution]:
        return program.analysis(convolutions) if self.convolutions else ()


@dataclass(frozen=True)
class NearestWeights(WithKernels):
    """Base of passes that need no data, and round any weight by itself."""


def _bytes(node: fx.Node) -> int:
    return int(value(node).numel() * value(node).element_size())


def _finite(w: torch.Tensor) -> bool:
    # min and max carry NaN and infinity, in one pass over the weight and without a temporary of its size.
    low, high = w.detach().aminmax()
    return bool(torch.isfinite(low) & torch.isfinite(high))


def _way(use: Use) -> list[fx.Node]:
    """What lies between a use and its weight (casts, transposes, a gather of experts), the last reading the weight itself."""
    found, node = list[fx.Node](), use.weight_operand()
    while node is not use.weight:
        found.append(node)
        node = node.args[0]
    return found


def _other_readers(site: SharedWeight) -> list[fx.Node]:
    """Nodes that read the weight, or what is made of it on the way to a use, and are no use of it."""
    ways = [node for use in site.uses for node in _way(use)]
    known = {*ways, *(use.node for use in site.uses)}
    return [user for node in dict.fromkeys([site.weight, *ways]) for user in node.users if user not in known]
