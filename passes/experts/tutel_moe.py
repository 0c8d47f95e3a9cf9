"""Experts that are given their own tokens, in place of weights that are copied for each token (Tutel, arXiv 2206.03382)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from accelpass.ir.analyses.axes.flow import CASTS, VIEWS, common_path
from accelpass.ir.analyses.structure.linear import ExpertStack, expert_products, is_grouped_product
from accelpass.ir.analyses.structure.moe import moes
from accelpass.ir.core.graph import aten, is_call, shape, through, value
from accelpass.ir.core.program import Program
from accelpass.ir.linear.experts import EXPERT_LINEAR
from accelpass.ir.linear.op import is_packed, linear_spec, operands_of
from accelpass.passes.core.base import Done, Skip, Take, Verdict
from accelpass.passes.core.site_pass import Edits, SitePass

REMEDY = "type: model.set_experts_implementation('batched_mm')"
_FAR = 8


@dataclass(frozen=True)
class Experts:
    """The products of one mixture.

    Attributes:
        chosen: by row, the number of its expert; of products in groups, where each expert's rows end; None if there is neither.
    """

    path: str
    products: tuple[ExpertStack, ...]
    chosen: fx.Node | None
    form: str


@dataclass(frozen=True)
class TutelMoE(SitePass):
    """Bring the tokens of an expert together, multiply them with its weight, and put the results back.

    After Hwang et al., "Tutel: Adaptive Mixture-of-Experts at Scale", section 3.1 (fast encode and decode): dispatch is a gather and a
    scatter. It replaces products for which each token's expert weights were copied, and lets packed experts be multiplied
    as they are. On one device there is no exchange between experts, so the paper's adaptive parallelism and overlap do not apply.

    A loop over experts breaks the graph before a pass sees it. transformers has another form of it:
    ``model.set_experts_implementation("batched_mm")``.

    Attributes:
        capacity_factor: 0 drops no token. Otherwise an expert takes ``k * int(capacity_factor * ceil(tokens / experts))`` tokens, first
            choices first and then the earlier ones; the others get nothing of it, and their other gates stay as they are.
    """

    capacity_factor: float = 0.0

    name: ClassVar[str] = "tutel_moe"
    phase: ClassVar[str] = "fusion"
    summary: ClassVar[str] = "experts are given their own tokens; no weight is copied for a token"
    paper: ClassVar[str] = "Tutel, arXiv 2206.03382"
    identity: ClassVar[dict[str, Any] | None] = {"capacity_factor": 0.0}
    edits: ClassVar[frozenset[str]] = frozenset({"linear.kernel"})
    reads: ClassVar[frozenset[str]] = frozenset({"linear.weight"})
    nothing: ClassVar[str] = (
        f"no experts in products were found; a loop over experts breaks the graph before a pass sees it: {REMEDY}"
    )

    def __post_init__(self) -> None:
        if self.capacity_factor < 0:
            raise self.fail("capacity_factor", "0, which drops no token, or a number above it")
        super().__post_init__()

    def find(self, program: Program) -> list[Experts]:
        grouped: dict[Any, list[ExpertStack]] = {}
        for product in program.analysis(expert_products):
            grouped.setdefault(_chosen(product), []).append(product)
        found = []
        for (form, chosen), products in grouped.items():
            path = common_path([p.path for p in products]) if len(products) > 1 else products[0].path.rpartition(".")[0]
            found.append(Experts(path, tuple(products), chosen, form))
        seen = {p.node for site in found for p in site.products}
        loops = [m for m in program.analysis(moes) if m.form == "loop" and seen.isdisjoint(m.nodes)]
        return [*found, *(Experts(m.path, (), None, "loop") for m in loops)]

    def check(self, site: Experts, program: Program) -> Verdict:
        if site.form == "loop":
            return Skip(f"its experts run one after the other; {REMEDY}")
        if site.chosen is None:
            return Skip("every token goes through every expert in one product")
        if program.frontend == "export":
            return Skip(
                "a file has no operator for tokens by expert, whose number only run time knows; experts stay in batched products"
            )
        for product in site.products:
            if value(product.weight).dtype != value(product.node.args[1 - product.side]).dtype:
                return Skip(f"weights are {value(product.weight).dtype}, and what they are multiplied with is not")
        if site.form == "groups":
            if self.capacity_factor:
                return Skip(f"tokens are sorted by expert already, so that none can be dropped by its choice; {REMEDY}")
            if not any(is_packed(p.weight) for p in site.products):
                return Skip("its tokens are brought together by expert already")
        elif self.capacity_factor:
            if len(shape(_choices(site))) != 2:
                return Skip("which choice of a token a row is of was not found")
            if _weighed(site) is None:
                return Skip("where results are multiplied with the router's gates was not found")
        return Take()

    def rewrite(self, site: Experts, edit: Edits) -> Done:
        ids, experts = site.chosen, int(shape(site.products[0].weight)[0])
        assert ids is not None
        kept = ""
        if site.form == "groups":
            rows = site.products[0].node
            (ids,) = edit.run("rows", _by_ends, [site.products[0].node.args[0], ids], rows)
        elif self.capacity_factor:
            ids = self._limited(site, edit, ids, experts)
            kept = f", at most {self.capacity_factor:g} of an even share each"
        for product in site.products:
            node, stack = product.node, product.weight
            x: Any = node.args[1 - product.side]
            dim = None if site.form == "groups" else (1 if product.side == 1 else -1)
            if dim is not None:
                x = edit.call(node, aten.squeeze.dim, x, dim)
            spec = linear_spec(stack).to_json() if is_packed(stack) else ""
            operands = operands_of(stack) if spec else [stack]
            made = edit.call(node, EXPERT_LINEAR, x, ids, operands, spec, product.transposed)
            if dim is not None:
                made = edit.call(node, aten.unsqueeze.default, made, dim)
            edit.replace(node, made)
        return Done(f"{experts} experts, {len(site.products)} products by expert{kept}")

    def _limited(self, site: Experts, edit: Edits, ids: fx.Node, experts: int) -> fx.Node:
        """The experts of rows, with none for those beyond an expert's capacity, whose gates become 0."""
        weighed = _weighed(site)
        assert weighed is not None
        product, gates = weighed
        first = site.products[0].node
        run = partial(_kept, experts=experts, factor=self.capacity_factor)
        (kept,) = edit.run(("kept", experts, self.capacity_factor), run, [_choices(site)], first)
        (limited,) = edit.run(
            ("ids", experts), lambda ids, kept: [torch.where(kept.reshape(-1), ids, experts)], [ids, kept], first
        )
        (own,) = edit.run(
            "gates", lambda gates, kept: [gates * kept.reshape(-1, 1).to(gates.dtype)], [gates, kept], product
        )
        product.replace_input_with(gates, own)
        return limited


def _chosen(product: ExpertStack) -> tuple[str, fx.Node | None]:
    """The form of a product, and what says which rows an expert has."""
    if is_grouped_product(product.node):
        ends = product.node.args[2] if len(product.node.args) > 2 else product.node.kwargs.get("offs")
        return "groups", ends if isinstance(ends, fx.Node) else None
    if product.gather is None:
        return "dense", None
    given: Any = product.gather.args[1] if is_call(product.gather, aten.index) else [product.gather.args[2]]
    one = len(given) == 1 and isinstance(given[0], fx.Node) and len(shape(given[0])) == 1
    rows = len(shape(product.node)) == 3 and 1 in (shape(product.node)[1], shape(product.node)[2])
    return "rows", given[0] if one and rows else None


def _choices(site: Experts) -> fx.Node:
    """The experts of each token, ``(tokens, k)``."""
    return through(site.chosen, *VIEWS, *CASTS)


def _weighed(site: Experts) -> tuple[fx.Node, fx.Node] | None:
    """Where results are multiplied with the gates, ``(rows, 1)``, and these."""
    node = site.products[-1].node
    for _ in range(_FAR):
        users = list(node.users)
        if len(users) != 1:
            return None
        (user,) = users
        if is_call(user, aten.mul):
            other = user.args[1] if user.args[0] is node else user.args[0]
            fits = isinstance(other, fx.Node) and len(shape(other)) == 2 and shape(other)[1] == 1
            return (user, other) if fits else None
        if not is_call(user, *VIEWS, *CASTS, aten.add, aten.add_):
            return None
        node = user
    return None


def _kept(chosen: Tensor, experts: int, factor: float) -> list[Tensor]:
    """Whether each choice ``(tokens, k)`` is within its expert's capacity: first choices come first, then earlier tokens."""
    base = torch.zeros(experts, dtype=torch.long, device=chosen.device)
    places = []
    for rank in range(chosen.shape[1]):
        mine = F.one_hot(chosen[:, rank], experts)
        places.append(((mine.cumsum(0) - 1 + base) * mine).sum(1))
        base = base + mine.sum(0)
    even = (base.sum() // chosen.shape[1] + experts - 1) // experts
    capacity = chosen.shape[1] * (factor * even).floor()
    return [torch.stack(places, 1) < capacity]


def _by_ends(x: Tensor, ends: Tensor) -> list[Tensor]:
    """The experts of sorted rows, from where each expert's rows end."""
    return [torch.bucketize(torch.arange(x.shape[0], device=x.device), ends.long(), right=True)]
