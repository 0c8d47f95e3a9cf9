"""Channels and heads whose learned masks are mostly noise are taken out (VTrans, arXiv 2406.05276)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor, fx

from accelpass.ir.analyses.axes.axes import axes
from accelpass.ir.analyses.axes.flow import constant
from accelpass.ir.analyses.structure.linear import Linear
from accelpass.ir.core.derived import Recipe
from accelpass.ir.core.graph import shape
from accelpass.ir.core.program import Program
from accelpass.ir.core.tensors import digest, placed
from accelpass.ir.errors import PassError, PlanError
from accelpass.ir.transform.changed_axes import Carrier
from accelpass.ir.transform.kept import CHOSEN
from accelpass.ir.transform.tap import Tap, point_name
from accelpass.passes.core.base import CalibratedOnLoss, Done, Skip, Study, Take
from accelpass.passes.core.site_pass import Edits
from accelpass.passes.pruning.information_bottleneck import Masks, divergence, log_alpha, masked, sparsity
from accelpass.passes.pruning.structured import Channels, RowPruning, Site

NOT_LEARNT = "the plan has no masks of it; make one with accelpass.calibrate(model, batches, passes=['vtrans'])"
FORMAT = 1


@dataclass(frozen=True)
class VTrans(RowPruning, CalibratedOnLoss):
    """Take out the channels of MLPs and the heads of attentions whose masks, learned on data, carry more noise than signal.

    After Dutta et al., "VTrans: Accelerating Transformer Compression with Variational Information Bottleneck based Pruning", its form
    that trains masks alone, with the formulas of the authors' TVA-Prune: a unit's mask is ``N(mean, variance)``, the loss is that of the
    next token, a divergence from the prior and a Lagrangian of the expected size, and a unit stays where ``log variance - log mean^2``
    is below 0. Means of what stays go into the linear that reads it. Weights are not trained. Heads that share keys and values have one
    mask. The width of the stream, which the paper prunes as well, stays (its norms would be others).

    Attributes:
        sparsity: share of the weights of MLPs and attentions that training aims to take out.
        epochs: how often all batches are run; the paper has 4,000 sequences of 512 tokens.
        rate: of learning; 0 for the authors': 0.05, or 0.1 above a sparsity of one half.
        multiple: kept channels are filled up to a multiple of this, as formats that pack weights in groups want it.
    """

    sparsity: float = 0.5
    epochs: int = 1
    rate: float = 0.0
    multiple: int = 16

    name: ClassVar[str] = "vtrans"
    summary: ClassVar[str] = "channels of MLPs and heads whose learned masks are mostly noise are taken out"
    paper: ClassVar[str] = "VTrans, arXiv 2406.05276"

    def __post_init__(self) -> None:
        if not 0 < self.sparsity < 1:
            raise self.fail("sparsity", "a share between 0 and 1")
        for name in ("epochs", "multiple"):
            if getattr(self, name) < 1:
                raise self.fail(name, "1 or more")
        if not self.rate >= 0:
            raise self.fail("rate", "a number above 0, or 0 for the authors'")
        super().__post_init__()

    # --- training

    def calibrate_on_loss(self, study: Study) -> dict[str, Tensor]:
        masks: dict[str, Masks] = {}
        draw = torch.Generator().manual_seed(0)
        price = torch.zeros(2, requires_grad=True)  # the Lagrangian's, which go up where the loss goes down
        state: list[torch.optim.Optimizer] = []
        total = 0

        def taps(program: Program) -> list[Tap]:
            for site in self.find(program):
                point = _point(site)
                if point not in masks and isinstance(self.wanted(site.path), Take):
                    made = self._fresh(site, program, draw)
                    if made is not None:
                        masks[point] = made
            return [Tap(point, partial(masked, width=m.width), "replace", written=2) for point, m in masks.items()]

        def vectors() -> Mapping[str, Tensor]:
            return {f"{p}.{i}": v for p, m in masks.items() for i, v in enumerate(m.vectors())}

        for step, loss in enumerate(study.losses(taps, vectors, "masks", self.epochs), 1):
            if not masks:
                raise PassError(f"{self.name} found no MLP and no attention to calibrate")
            if not state:
                own = [t for m in masks.values() for t in (m.mean, m.log_variance)]
                rate = self.rate or (0.1 if self.sparsity > 0.5 else 0.05)
                state += [
                    torch.optim.AdamW(own, lr=rate, weight_decay=0.0),
                    torch.optim.AdamW([price], lr=0.1, maximize=True),
                ]
                total = max(1, round(len(study.batches) * (0.2 if self.sparsity > 0.6 else 0.1)))
            with torch.enable_grad():
                aim = self.sparsity * min(1.0, step / total)
                kept = sum(m.multiplier * divergence(m.mean, m.log_variance) for m in masks.values())
                over = sparsity(masks) - aim
                whole = loss + 1e-6 * kept + price[0] * over + price[1] * over.square()
                if not bool(torch.isfinite(whole)):
                    raise PassError(
                        f"{self.name}: the loss is no number any more; use a lower rate than {self.rate or 0.05}"
                    )
                for optimizer in state:
                    optimizer.zero_grad()
                whole.backward()
                for optimizer in state:
                    optimizer.step()
        return {
            f"{self.name}/{point}": torch.stack([m.mean.detach(), m.log_variance.detach()])
            for point, m in masks.items()
        }

    def _fresh(self, site: Site, program: Program, draw: torch.Generator) -> Masks | None:
        found = site.dimension(program)
        if len(found) != 1 or not isinstance(found[0].size, int) or site.reader is None:
            return None
        if program.analysis(axes).of(site.reader.operand())[-1].leaves[:1] != (found[0],):
            return None  # its units are in pieces
        units = found[0].size
        read, out = site.reader.in_features, site.reader.out_features
        if isinstance(site, Channels):
            linears = 2 + (site.mlp.gate is not None)
            return Masks.fresh(units, 1, linears * out, 1.0, draw)
        groups = site.attention.spec.groups
        return Masks.fresh(units, read // units, 2 * (1 + groups) * (read // units // groups) * out, 256.0, draw)

    # --- what a plan does

    def count(self, site: Site, size: int, program: Program) -> int | Skip:
        learnt = self.learnt(site, size, program)
        if learnt is None:
            return Skip(NOT_LEARNT)
        kept = max(1, int((log_alpha(*learnt) < 0).sum()))
        if isinstance(site, Channels):
            kept = min(size, -(-kept // self.multiple) * self.multiple)
        return kept

    def learnt(self, site: Site, size: int, program: Program) -> Tensor | None:
        """Means and logarithms of variances, ``(2, units)``.

        Raises:
            PlanError: the plan is for another number of units.
        """
        found = program.artefacts.get(f"{self.name}/{_point(site)}")
        if found is not None and found.shape != (2, size):
            raise PlanError(
                f"{self.name}: the plan has {list(found.shape)[-1]} masks for {site.path}, which has {size} units"
            )
        return found

    def score(self, site: Site, found: Sequence[Carrier], program: Program) -> tuple[Recipe, Sequence[fx.Node]] | Skip:
        learnt = self.learnt(site, int(site.dimension(program)[0].size), program)
        reader = next((c for c in found if site.reader is not None and c.weight is site.reader.weight), None)
        if learnt is None or reader is None:
            return Skip(NOT_LEARNT if learnt is None else "the linear that reads it has no weight of its own")
        if isinstance(reader.leaves[0], int) or reader.leaves[0][0] != CHOSEN:
            return Skip("the linear that reads it has its units in pieces")
        scores = -log_alpha(*learnt)
        return Recipe(("vtrans", FORMAT, digest(scores)), lambda weight: placed(weight, [scores])), [reader.weight]

    def rewrite(self, site: Site, edit: Edits) -> Done | Skip:
        reader, program = site.reader, edit.program
        assert reader is not None
        size = int(site.dimension(program)[0].size)
        learnt, count = self.learnt(site, size, program), self.count(site, size, program)
        assert learnt is not None and isinstance(count, int)
        done = super().rewrite(site, edit) if count < size else Done(f"all {size} stay, weighed by their means")
        if isinstance(done, Done):
            order = (-log_alpha(*learnt)).argsort(descending=True, stable=True)[:count].sort().values
            _weigh(reader, learnt[0][order], edit)
        return done


def _point(site: Site) -> str:
    return point_name(site.path, "act" if isinstance(site, Channels) else "heads")


def _weigh(reader: Linear, means: Tensor, edit: Edits) -> None:
    """Let a linear's weight be multiplied with the means of the units that it reads."""
    found = (constant(edit.program, arg) for arg in reader.node.args)
    weight = next(n for n in found if n is not None and len(shape(n)) == 2)
    dim = 0 if reader.transposed else 1

    def weighed(weight: Tensor) -> tuple[Tensor]:
        (own,) = placed(weight, [means])
        each = own.to(weight.dtype).repeat_interleave(weight.shape[dim] // len(means))
        return ((weight * (each if dim else each[:, None])).contiguous(),)

    recipe = Recipe(("vtrans.means", FORMAT, digest(means), dim), weighed, first=True)
    (made,) = edit.derive([weight], recipe, [f"{weight.name}_weighed"])
    for user in [u for u in weight.users if u is not made]:
        user.replace_input_with(weight, made)
