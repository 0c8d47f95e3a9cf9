"""Fewer experts: some are taken out or merged with others, by a plan that an evolution finds (EEP, arXiv 2407.00945)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from accelpass.ir.analyses.axes.axes import axes
from accelpass.ir.analyses.axes.flow import CASTS, VIEWS, between
from accelpass.ir.analyses.structure.moe import MoE, moes
from accelpass.ir.core.graph import is_call
from accelpass.ir.core.program import Program
from accelpass.ir.errors import PassError, PlanError
from accelpass.ir.transform.changed_axes import CannotShrink
from accelpass.ir.transform.kept import Merge, Static
from accelpass.ir.transform.shrink import shrink
from accelpass.passes.core.base import Done, Judge, Judged, Pass, Skip, Take, Verdict
from accelpass.passes.core.site_pass import Edits, SitePass
from accelpass.passes.experts.eep_search import Evolution, Individual, selection
from accelpass.passes.experts.eep_trial import Trying, matrix_names
from accelpass.passes.experts.routing import probabilities, sliceable, unfit


@dataclass(frozen=True)
class EEP(SitePass, Judged):
    """Take experts out of a mixture, or merge them, so that fewer are stored; the router chooses among those that are left.

    After Liu et al., "Efficient Expert Pruning for Sparse Mixture-of-Experts Language Models": new expert j has the weights ``sum_e
    W_EM[j, e] * theta_e``, and a token's probabilities ``p`` become ``p W_RM^T`` before the largest k are chosen. No weight is
    trained: :func:`accelpass.search_by_score` evolves both matrices by a score that the user gives, first with whole experts alone
    (100 trials), then with real numbers (400 in all), and takes the best of the last 20 on other data. A plan is for one task; on others
    the model may be worse. Where all rows are single experts and the gates are divided by their sum, rows of the router go, too; otherwise
    it keeps its rows, and its probabilities are mapped. To let a token use fewer experts, lower the model's own
    ``num_experts_per_tok`` before the search.

    Attributes:
        keep: numbers of the experts that stay, the same in all layers (``sites`` names others); empty for those of the plan.
        experts: how many the search leaves in each layer.
        trials: candidates that the search scores.
        pruning_trials: of these, the first, which take whole experts alone.
        near: how far below the best score a parent of a crossover may be; of one that is changed alone three times as far.
    """

    keep: tuple[int, ...] = ()
    experts: int = 4
    trials: int = 400
    pruning_trials: int = 100
    near: float = 1.0

    name: ClassVar[str] = "eep"
    phase: ClassVar[str] = "structure"
    summary: ClassVar[str] = "experts are taken out or merged, by a plan that is evolved for a task"
    paper: ClassVar[str] = "EEP, arXiv 2407.00945"
    identity: ClassVar[dict[str, Any] | None] = {"keep": ()}
    edits: ClassVar[frozenset[str]] = frozenset({"experts.rows"})
    reads: ClassVar[frozenset[str]] = frozenset({"experts.stack"})
    nothing: ClassVar[str] = (
        "no mixture of experts was found; a loop over experts breaks the graph before a pass sees it: type "
        "model.set_experts_implementation('batched_mm')"
    )

    def __post_init__(self) -> None:
        if len(set(self.keep)) < len(self.keep) or any(number < 0 for number in self.keep):
            raise self.fail("keep", "numbers of experts from 0, each once")
        if self.experts < 1:
            raise self.fail("experts", "a number of experts, at least 1")
        if not 1 <= self.pruning_trials <= self.trials:
            raise self.fail("pruning_trials", f"a number from 1 to trials={self.trials}")
        if not self.near >= 0:
            raise self.fail("near", "a difference of scores, from 0")
        super().__post_init__()

    def find(self, program: Program) -> list[MoE]:
        return list(program.analysis(moes))

    def check(self, site: MoE, program: Program) -> Verdict:
        if why := unfit(program, site):
            return Skip(why)
        found = self.matrices(site, program)
        if found is None:
            return Skip(
                "no experts are named in keep, and there is no plan of it; make one with accelpass.search_by_score(model, score, "
                "passes=['eep'])"
            )
        count, merged = len(found[0]), selection(*found) is None
        if count < (site.top_k or 1):
            return Skip(f"{count} experts are fewer than the {site.top_k} that each token goes to")
        if merged and probabilities(program, site) is None:
            return Skip("its router chooses before there are probabilities, which the plan's merged experts need")
        return Skip("all experts stay") if count == site.experts and not merged else Take()

    def matrices(self, site: MoE, program: Program) -> tuple[Tensor, Tensor] | None:
        """What merges a site's experts and maps its router's probabilities, ``(new, experts)`` each.

        Raises:
            OptionError: ``keep`` names an expert that the model does not have.
            PlanError: the plan is for another number of experts.
        """
        if self.keep:
            if max(self.keep) >= site.experts:
                raise self.fail("keep", f"numbers below {site.experts}, the experts of {site.path}")
            one = torch.eye(site.experts)[sorted(self.keep)]
            return one, one
        found = [program.artefacts.get(name) for name in matrix_names(site.path)]
        if found[0] is None or found[1] is None:
            if any(name.startswith(f"{self.name}/") for name in program.artefacts):
                raise PlanError(f"{self.name}: the plan has no experts for {site.path}; it is of another model")
            return None
        for matrix in found:
            if matrix is None or matrix.dim() != 2 or matrix.shape != found[0].shape or matrix.shape[1] != site.experts:
                raise PlanError(
                    f"{self.name}: the plan has {[list(m.shape) for m in found if m is not None]} for {site.path}, which has "
                    f"{site.experts} experts; search again with this model"
                )
        return found[0], found[1]

    def rewrite(self, site: MoE, edit: Edits) -> Done | Skip:
        program, found = edit.program, self.matrices(site, edit.program)
        assert found is not None
        kept = selection(*found)
        whole = kept is not None and sliceable(program, site)
        start = site.router.node if whole else probabilities(program, site)
        if start is None:
            return Skip("its router's probabilities were not found")
        region = {*between(program, start, site.out), *([start] if whole else [])}
        stacks = [n for n in program.graph.nodes if is_call(n, *CASTS, *VIEWS) and n.args[0] in site.weights]
        (axis,) = program.analysis(axes).of(start)[-1].leaves
        keep = Merge.matrices(*found) if kept is None else Static.rows(kept)
        try:
            shrunk = shrink(program, axis, keep, {*region, *stacks}, contest=True)
        except CannotShrink as cause:
            return Skip(str(cause))
        sizes = (sum(s.bytes_before for s in shrunk), sum(s.bytes_after for s in shrunk))
        what = f"{keep.count} of {site.experts} experts" if kept else f"{site.experts} experts merged to {keep.count}"
        return Done(what, *sizes, shrunk=tuple(shrunk))

    # --- the search

    def judged(self, found: dict[str, Any]) -> Pass:
        return Trying(experts=self.experts, include=self.include, exclude=self.exclude, found=found)

    def search(self, found: Mapping[str, Any], judge: Judge, again: Judge, seed: int) -> dict[str, Tensor]:
        if not found:
            raise PassError(f"{self.name}: the model has no experts to take out: {self.nothing}")
        evolution = Evolution(found, self.experts, self.near, seed)
        for number in range(self.trials):
            one = evolution.selected() if number < self.pruning_trials else evolution.merged()
            evolution.add(one, judge(Trying.written(one)))
        best = max(evolution.best(20), key=lambda one: again(Trying.written(one)))
        return _named(best)


def _named(one: Individual) -> dict[str, Tensor]:
    pairs = ((zip(matrix_names(path), pair, strict=True)) for path, pair in one.items())
    return {name: matrix for pair in pairs for name, matrix in pair}
