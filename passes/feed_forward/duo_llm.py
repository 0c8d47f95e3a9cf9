"""A small feed-forward layer beside each big one, for all tokens of a layer or for those that a router sends there (Duo-LLM)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from accelpass.ir.analyses.axes.flow import between
from accelpass.ir.analyses.structure.linear import Linear
from accelpass.ir.analyses.structure.mlp import Mlp, mlps
from accelpass.ir.core.graph import value
from accelpass.ir.core.program import Program
from accelpass.ir.errors import PassError, PlanError
from accelpass.ir.linear.experts import EXPERT_LINEAR
from accelpass.passes.core.base import Calibrated, CalibratedOnLoss, Done, Run, Skip, Study, Take, Verdict
from accelpass.passes.core.site_pass import Edits, SitePass
from accelpass.passes.feed_forward.fitting import fitted
from accelpass.passes.feed_forward.joint_training import trained
from accelpass.passes.feed_forward.small_mlp import ACTIVATIONS, small_mlp

ROUTES = ("big", "small", "skip", "router")


@dataclass(frozen=True)
class DuoLLM(SitePass, Calibrated, CalibratedOnLoss):
    """Compute a layer's feed-forward part in its own size, in a much smaller one, or not at all; for all tokens, or as a router says.

    After Alizadeh et al., "Duo-LLM: A Framework for Studying Adaptive Computation in Large Language Models". A layer that is ``small`` or
    ``skip`` has no big weights and no products with them. One with a ``router`` gives each token to the small or the big part, and
    the big one multiplies its own tokens alone; the small one's products are few, and are those of all. Keys and values are computed
    for all. A file (ONNX) computes both parts of all tokens.

    ``accelpass.calibrate`` fits the small parts to the outputs of the big ones, by least squares for the last linear, with the big
    one's most active channels before it (inferred), and routers to where the small part errs, within the budget (inferred: in place
    of the loss of the next token). With ``joint`` the small parts are then trained as in the paper's first stage: each token of each layer
    goes through either size by chance, and the loss is that of the next token. The paper trains the big parts with them, which here
    stay as they are; a model that was not trained so is worse for it.

    Attributes:
        route: ``big``, ``small``, ``skip`` or ``router``; ``sites`` says it for single layers, ``{"*.layers.3.mlp": {"route":
            "small"}}``.
        shrink: how many times fewer hidden channels the small part has.
        budget: share of the tokens that routers are fitted to send to the big parts.
        joint: how often all batches are run to train the small parts among the big ones; 0 leaves them as they were fitted.
    """

    route: str = "router"
    shrink: int = 16
    budget: float = 0.5
    joint: int = 0

    fits_cache: ClassVar[bool] = False
    name: ClassVar[str] = "duo_llm"
    phase: ClassVar[str] = "structure"
    summary: ClassVar[str] = "a small feed-forward layer for all tokens of a layer, or for those of a router"
    paper: ClassVar[str] = "Duo-LLM, arXiv 2410.10846"
    identity: ClassVar[dict[str, Any] | None] = {"route": "big"}
    edits: ClassVar[frozenset[str]] = frozenset({"mlp.channels"})
    reads: ClassVar[frozenset[str]] = frozenset({"block.steps"})
    nothing: ClassVar[str] = "no MLP was recognised in this graph"

    def __post_init__(self) -> None:
        if self.route not in ROUTES:
            raise self.fail("route", ", ".join(ROUTES))
        if self.shrink < 2:
            raise self.fail("shrink", "2 or more")
        if not 0 <= self.budget <= 1:
            raise self.fail("budget", "a share from 0 to 1")
        if self.joint < 0:
            raise self.fail("joint", "0 or more")
        super().__post_init__()

    def find(self, program: Program) -> list[Mlp]:
        return list(program.analysis(mlps))

    def check(self, site: Mlp, program: Program) -> Verdict:
        if self.route == "big":
            return Skip("it stays big")
        if why := _unfit(site):
            return Skip(why)
        if self.route == "skip":
            return Take()
        if self.learnt(site, program) is None:
            return Skip(
                "the plan has no small part of it; make one with accelpass.calibrate(model, batches, passes=['duo_llm'])"
            )
        return Take()

    def learnt(self, site: Mlp, program: Program) -> dict[str, Tensor] | None:
        """The small part's weights and the router by name.

        Raises:
            PlanError: they are of a layer of another size.
        """
        first = f"{self.name}/{site.path}/"
        found = {name.removeprefix(first): t for name, t in program.artefacts.items() if name.startswith(first)}
        if not found:
            return None
        width, out = site.up.in_features, site.down.out_features
        sizes = {"up": (width, 1), "gate": (width, 1), "router": (width, 1), "down": (out, 0), "bias": (out, 0)}
        for name, tensor in found.items():
            size, dim = sizes[name]
            if tensor.shape[dim] != size or ("gate" in found) != (site.gate is not None):
                raise PlanError(
                    f"{self.name}: the plan is not of this model: {name} of {site.path} is {list(tensor.shape)}"
                )
        return found

    def rewrite(self, site: Mlp, edit: Edits) -> Done:
        program, node = edit.program, site.node
        big = sum(_bytes(n) for n in {site.up.weight, site.down.weight, *([site.gate.weight] if site.gate else [])})
        if self.route == "skip":
            out = site.down.out_features
            (zeros,) = edit.run(("zeros", out), lambda x: [x.new_zeros((*x.shape[:-1], out))], [site.x], node)
            edit.replace(node, zeros)
            return Done("left out", big, 0)
        learnt = self.learnt(site, program)
        assert learnt is not None
        names = ["up", *(["gate"] if site.gate else []), "down", "bias", "router"]
        held = dict(zip(names, program.tensors.artefact(
            site.up.weight, [learnt[n] for n in names], [f"duo_{site.path}_{n}".replace(".", "_") for n in names]
        ), strict=True))  # fmt: skip
        small_bytes = sum(_bytes(held[n]) for n in names[:-1])
        weights = [held[n] for n in names[:-1]]
        gated = site.gate is not None
        if self.route == "small":
            run = partial(_small, activation=site.activation, gated=gated)
            (made,) = edit.run(("small", site.activation, gated), run, [site.x, *weights], node)
            edit.replace(node, made)
            return Done(
                f"small: {int(value(held['down']).shape[1])} of {site.down.in_features} channels", big, small_bytes
            )
        first = between(program, site.x, node)[0]
        (ids,) = edit.run("route", _route, [site.x, held["router"]], first)
        made = node
        if program.frontend != "export":  # a file has no operator for tokens by route; it computes both
            for linear in (site.up, *([site.gate] if site.gate else []), site.down):
                made = _of_routed(linear, ids, edit)
        readers = list(made.users)
        run = partial(_both, activation=site.activation, gated=gated)
        (both,) = edit.run(("both", site.activation, gated), run, [site.x, made, ids, *weights], min(readers))
        for user in readers:
            user.replace_input_with(made, both)
        return Done("each token by its router", big, big + small_bytes)

    def calibrate(self, program: Program, run: Run) -> dict[str, Tensor]:
        sites = [s for s in program.analysis(mlps) if _unfit(s) is None and program.tensors.path(s.down.weight)]
        if not sites:
            raise PassError(f"{self.name} found no MLP to make a small one of")
        found = fitted(program, run, sites, self.shrink, self.budget)
        return {f"{self.name}/{path}/{name}": t for path, made in found.items() for name, t in made.items()}

    @property
    def wants_loss(self) -> bool:
        return self.joint > 0

    def calibrate_on_loss(self, study: Study) -> dict[str, Tensor]:
        parts: dict[str, dict[str, Tensor]] = {}
        for key, tensor in study.learnt.items():
            path, _, name = key.removeprefix(f"{self.name}/").rpartition("/")
            if isinstance(self.wanted(path), Take):
                parts.setdefault(path, {})[name] = tensor
        made = trained(study, parts, self.joint)
        return {f"{self.name}/{path}/{name}": t for path, part in made.items() for name, t in part.items()}


def _unfit(site: Mlp) -> str | None:
    """Why an MLP gets no small part, or None."""
    if site.activation not in ACTIVATIONS:
        return f"its activation ({site.activation}) is none of {', '.join(ACTIVATIONS)}"
    if site.fused:
        return "one linear makes its gate and what that gates"
    if site.up.bias is not None or (site.gate is not None and site.gate.bias is not None):
        return "its first linear has a bias"
    if site.up.kind.endswith("conv") or site.down.kind.endswith("conv") or site.down.transposed:
        return f"its last linear is stored as a {site.down.kind}"
    if value(site.up.weight).dtype != value(site.x).dtype:
        return f"its weights are {value(site.up.weight).dtype}, and what they are multiplied with is not"
    return None


def _bytes(node: fx.Node) -> int:
    return int(value(node).numel() * value(node).element_size())


def _small(x: Tensor, *weights: Tensor, activation: str, gated: bool) -> list[Tensor]:
    up, *rest = weights
    gate = rest.pop(0) if gated else None
    return [small_mlp(x, activation, up, gate, *rest)]


def _route(x: Tensor, router: Tensor) -> list[Tensor]:
    """By token, 0 if it goes to the big part and 1 if it does not."""
    return [1 - F.linear(x, router).reshape(-1, 2).argmax(-1)]


def _of_routed(linear: Linear, ids: fx.Node, edit: Edits) -> fx.Node:
    """A linear of the tokens that its layer is given, and zeros for others."""

    def run(x: Tensor, ids: Tensor, weight: Tensor, *bias: Tensor) -> list[Tensor]:
        rows = EXPERT_LINEAR(x.reshape(-1, x.shape[-1]), ids, [weight.unsqueeze(0)], "", linear.transposed)
        made = rows.view(*x.shape[:-1], rows.shape[-1])
        return [made + bias[0] if bias else made]

    operands = [n for n in (linear.operand(), ids, linear.weight, linear.bias) if n is not None]
    (made,) = edit.run(("routed", linear.transposed, linear.bias is not None), run, operands, linear.node)
    edit.replace(linear.node, made)
    return made


def _both(x: Tensor, big: Tensor, ids: Tensor, *weights: Tensor, activation: str, gated: bool) -> list[Tensor]:
    (small,) = _small(x, *weights, activation=activation, gated=gated)
    return [torch.where(ids.view(*x.shape[:-1], 1) == 0, big, small)]
