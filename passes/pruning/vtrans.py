"""Channels, heads, layers and width whose learned masks are mostly noise are taken out (VTrans, arXiv 2406.05276)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from accelpass.ir.analyses.axes.axes import axes
from accelpass.ir.core.derived import Recipe
from accelpass.ir.core.graph import shape
from accelpass.ir.core.program import Program
from accelpass.ir.core.tensors import digest, placed
from accelpass.ir.errors import PassError, PlanError
from accelpass.ir.transform.changed_axes import CannotShrink, Carrier
from accelpass.ir.transform.kept import CHOSEN
from accelpass.ir.transform.tap import Tap, point_name
from accelpass.passes.core.base import CalibratedOnLoss, Done, Skip, Study, Take, Verdict
from accelpass.passes.core.site_pass import Edits
from accelpass.passes.pruning.information_bottleneck import Masks, divergence, log_alpha, masked, sparsity
from accelpass.passes.pruning.stream import Layer, Width, layers, read_elsewhere, weigh, weigh_value, widths
from accelpass.passes.pruning.structured import Channels, Heads, RowPruning, Site

KINDS: dict[str, Any] = {"channels": Channels, "heads": Heads, "layers": Layer, "width": Width}
NOT_LEARNT = "the plan has no masks of it; make one with accelpass.calibrate(model, batches, passes=['vtrans'])"
FORMAT = 1


@dataclass(frozen=True)
class VTrans(RowPruning, CalibratedOnLoss):
    """Take out the channels of MLPs and the heads of attentions whose masks, learned on data, carry more noise than signal.

    After Dutta et al., "VTrans: Accelerating Transformer Compression with Variational Information Bottleneck based Pruning", its form
    that trains masks alone, with the formulas of the authors' TVA-Prune: a unit's mask is ``N(mean, variance)``, the loss is that of the
    next token, a divergence from the prior and a Lagrangian of the expected size, and a unit stays where ``log variance - log mean^2``
    is below 0. Means of what stays go into the linear that reads it. Weights are not trained. Heads that share keys and values have one
    mask. One mask of the stream's width multiplies the embedding and all that attentions and MLPs add; a layer's multiplies what one of
    these adds. As in the authors' code, norms average over the channels that are left: masked and pruned model are one function.
    Width needs blocks whose norm comes first, and outputs that are not the stream itself.

    Attributes:
        units: what has masks, of ``channels``, ``heads``, ``layers`` and ``width``; the paper has all four.
        sparsity: share of the weights of MLPs and attentions that training aims to take out.
        epochs: how often all batches are run; the paper has 4,000 sequences of 512 tokens.
        rate: of learning; 0 for the authors': 0.05, or 0.1 above a sparsity of one half.
        multiple: kept channels are filled up to a multiple of this, as formats that pack weights in groups want it.
    """

    sparsity: float = 0.5
    units: tuple[str, ...] = ("channels", "heads")
    epochs: int = 1
    rate: float = 0.0
    multiple: int = 16

    name: ClassVar[str] = "vtrans"
    summary: ClassVar[str] = "channels of MLPs and heads whose learned masks are mostly noise are taken out"
    paper: ClassVar[str] = "VTrans, arXiv 2406.05276"
    for_all_sites: ClassVar[tuple[str, ...]] = ("units",)
    edits: ClassVar[frozenset[str]] = frozenset(kind.aspect for kind in KINDS.values())

    def __post_init__(self) -> None:
        if not 0 < self.sparsity < 1:
            raise self.fail("sparsity", "a share between 0 and 1")
        if not self.units or not set(self.units) <= set(KINDS):
            raise self.fail("units", f"some of {', '.join(KINDS)}")
        for name in ("epochs", "multiple"):
            if getattr(self, name) < 1:
                raise self.fail(name, "1 or more")
        if not self.rate >= 0:
            raise self.fail("rate", "a number above 0, or 0 for the authors'")
        super().__post_init__()

    # --- training

    def calibrate_on_loss(self, study: Study) -> dict[str, Tensor]:
        masks: dict[str, Masks] = {}
        spots: dict[str, list[Masks]] = {}  # by tapped point, what multiplies it
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
                        for place in (point, *(one.path for one in getattr(site, "layers", ()))):
                            spots.setdefault(place, []).append(made)
            _share(masks, program)
            return [
                Tap(place, partial(masked, widths=[m.width for m in own]), "replace", written=2 * len(own))
                for place, own in spots.items()
            ]

        def vectors() -> Mapping[str, Tensor]:
            every = {place: [v for m in own for v in m.vectors()] for place, own in spots.items()}
            return {f"{place}.{i}": v for place, given in every.items() for i, v in enumerate(given)}

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

    def _fresh(self, site: Site | Layer | Width, program: Program, draw: torch.Generator) -> Masks | None:
        if isinstance(site, Layer | Width):
            if site.why or not isinstance(of := shape(site.node)[-1], int):
                return None
            units = 1 if isinstance(site, Layer) else of
            return Masks.fresh(units, of // units, 0, 1.0 if units == 1 else 30.0, draw)
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

    def find(self, program: Program) -> list[Any]:
        whole = layers(program) if "layers" in self.units else []
        out = {one.of for one in whole if isinstance(self.wanted(one.path), Take) and self._goes(one, program)}
        rows = [site for site in super().find(program) if site.path not in out]
        every = [*rows, *whole, *(widths(program) if "width" in self.units else [])]
        return [site for site in every if isinstance(site, tuple(KINDS[unit] for unit in self.units))]

    def _goes(self, site: Layer, program: Program) -> bool:
        learnt = self.learnt(site, 1, program)
        return learnt is not None and not site.why and bool(log_alpha(*learnt) >= 0)

    def check(self, site: Any, program: Program) -> Verdict:
        if not isinstance(site, Layer | Width):
            shared = "" if site.reader is None else read_elsewhere(program, site.reader, rows=False)
            return Skip(shared) if shared else super().check(site, program)
        if site.why:
            return Skip(site.why)
        if isinstance(site, Width) and len(site.dimension(program)) != 1:
            return Skip("several axes are in one dimension here")
        writers = [site.writer] if isinstance(site, Layer) else [one.writer for one in site.layers]
        whys = [why for w in writers if w is not None and (why := read_elsewhere(program, w, rows=True))]
        return Skip(whys[0]) if whys else Take()

    def count(self, site: Site, size: int, program: Program) -> int | Skip:
        learnt = self.learnt(site, size, program)
        if learnt is None:
            return Skip(NOT_LEARNT)
        return self.filled(learnt, self.multiple if isinstance(site, Channels) else 1)

    def filled(self, learnt: Tensor, multiple: int) -> int:
        """How many units stay."""
        kept = max(1, int((log_alpha(*learnt) < 0).sum()))
        return min(learnt.shape[1], -(-kept // multiple) * multiple)

    def learnt(self, site: Site | Layer | Width, size: int, program: Program) -> Tensor | None:
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

    def rewrite(self, site: Any, edit: Edits) -> Done | Skip:
        if isinstance(site, Layer | Width):
            return self._layer(site, edit) if isinstance(site, Layer) else self._width(site, edit)
        reader, program = site.reader, edit.program
        assert reader is not None
        size = int(site.dimension(program)[0].size)
        learnt, count = self.learnt(site, size, program), self.count(site, size, program)
        assert learnt is not None and isinstance(count, int)
        done = super().rewrite(site, edit) if count < size else Done(f"all {size} stay, weighed by their means")
        if isinstance(done, Done):
            weigh(reader, learnt[0][best(learnt, count)], edit, rows=False)
        return done

    def _layer(self, site: Layer, edit: Edits) -> Done | Skip:
        learnt = self.learnt(site, 1, edit.program)
        if learnt is None:
            return Skip(NOT_LEARNT)
        assert site.writer is not None
        if self._goes(site, edit.program):
            site.leave_out()
            return Done("left out")
        weigh(site.writer, learnt[0], edit, rows=True)
        return Done("stays, weighed by its mean")

    def _width(self, site: Width, edit: Edits) -> Done | Skip:
        (axis,) = site.dimension(edit.program)
        size = int(axis.size)
        learnt = self.learnt(site, size, edit.program)
        if learnt is None:
            return Skip(NOT_LEARNT)
        rows = best(learnt, self.filled(learnt, self.multiple))
        try:
            shrunk = site.narrow(edit.program, rows.tolist()) if len(rows) < size else []
        except CannotShrink as cause:
            return Skip(str(cause))
        factors = learnt[0][rows]
        for layer in site.layers:
            if layer.writer is not None and not layer.writer.node._erased:
                weigh(layer.writer, factors, edit, rows=True)
        weigh_value(site.start, factors, edit)
        before, after = (sum(getattr(s, name) for s in shrunk) for name in ("bytes_before", "bytes_after"))
        return Done(f"{len(rows)} of {size} channels of the stream", before, after, shrunk=tuple(shrunk))


def _point(site: Any) -> str:
    if isinstance(site, Layer | Width):
        return site.path
    return point_name(site.path, "act" if isinstance(site, Channels) else "heads")


def best(learnt: Tensor, count: int) -> Tensor:
    """Numbers of the units with the least noise, ascending."""
    return (-log_alpha(*learnt)).argsort(descending=True, stable=True)[:count].sort().values


def _share(masks: Mapping[str, Masks], program: Program) -> None:
    """Let each sublayer's weights be counted once: by its units, else as a whole, else by the channels of the stream."""
    width = next((m for p, m in masks.items() if p.endswith("stream")), None)
    if width is not None:
        width.weights = 0
    for one in layers(program):
        units = masks.get(point_name(one.of, "act")) or masks.get(point_name(one.of, "heads"))
        whole = masks.get(one.path)
        if units is not None:
            units.beside = tuple(m for m in (whole, width) if m is not None)
        elif one.writer is not None:
            total = one.writer.in_features * one.writer.out_features * one.linears
            if whole is not None:
                whole.weights, whole.beside = round(total), () if width is None else (width,)
            elif width is not None:
                width.weights += round(total / len(width.mean))
