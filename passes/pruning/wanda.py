"""Channels and heads that move little, weight by activation, are taken out (Wanda, arXiv 2306.11695)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, fx

from accelpass.ir.core.derived import Recipe
from accelpass.ir.core.program import Program
from accelpass.ir.errors import PassError
from accelpass.ir.transform.changed_axes import Carrier
from accelpass.ir.transform.tap import Tap, point_name
from accelpass.passes.core.base import Calibrated, Run, Skip
from accelpass.passes.pruning.structured import Channels, Site, StructuredPruning

_POINTS = {"channels": "act", "heads": "heads"}


@dataclass(frozen=True)
class Wanda(StructuredPruning, Calibrated):
    """Take out the channels of MLPs and the heads of attentions that contribute least: small weights that meet small activations.

    After Sun et al., "A Simple and Effective Pruning Approach for Large Language Models", section 3: a weight's score is its
    absolute value times the norm of the input that it meets, ``|W_ij| * ||X_j||``. Of whole channels and heads (inferred; An et al.,
    arXiv 2312.11983, call it Wanda-sp), the scores of their columns of the linear that reads them are summed. The norms
    come of ``accelpass.calibrate``; as in the paper no weight is updated.
    """

    fits_cache: ClassVar[bool] = False
    name: ClassVar[str] = "wanda"
    summary: ClassVar[str] = "channels of MLPs and heads with small weights times activations are taken out"
    paper: ClassVar[str] = "Wanda, arXiv 2306.11695"

    def calibrate(self, program: Program, run: Run) -> dict[str, Tensor]:
        taps = [Tap(kind, lambda x: x.float().square().flatten(0, -2).sum(0)) for kind in _POINTS.values()]
        gathered = run.gather(taps, "norms of activations")
        if not gathered:
            raise PassError("wanda found no MLP and no attention to calibrate")
        return {f"{self.name}/{point}": squares.sqrt() for point, squares in gathered.items()}

    def score(self, site: Site, found: Sequence[Carrier], program: Program) -> tuple[Recipe, Sequence[fx.Node]] | Skip:
        point = point_name(site.path, _POINTS["channels" if isinstance(site, Channels) else "heads"])
        norms = program.artefacts.get(f"{self.name}/{point}")
        if norms is None:
            return Skip(
                "the plan has no activations of it; make one with accelpass.calibrate(model, batches, passes=['wanda'])"
            )
        reader = next((c for c in found if site.reader is not None and c.weight is site.reader.weight), None)
        if reader is None:
            return Skip("the linear that reads it has no weight of its own")
        if len(norms) != reader.weight.meta["val"].shape[reader.dim]:
            return Skip(
                f"the plan has {len(norms)} activations for {reader.weight.meta['val'].shape[reader.dim]} columns"
            )

        def scores(weight: Tensor, norms: Tensor) -> tuple[Tensor]:
            along = [1] * weight.dim()
            along[reader.dim] = -1
            return (reader.rows(weight.float().abs() * norms.float().view(along)).sum(1),)

        held = program.tensors.artefact(reader.weight, [norms], [f"wanda_{point.replace('.', '_')}"])
        return Recipe(("wanda", reader.dim, reader.leaves), scores), [reader.weight, *held]
