"""MoA: a span for each head, found from what masking costs the model's loss (arXiv 2406.14909, COLM 2025)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from accelpass.ir.attention.lowering.block_sparse import BLOCK_SPARSE, KERNELS
from accelpass.ir.attention.spec.block_select import not_a_prompt
from accelpass.ir.attention.spec.spec import AttentionSpec
from accelpass.ir.core.program import Program
from accelpass.ir.errors import OptionError, PassError, PlanError
from accelpass.passes.core.base import Attend, CalibratedOnLoss, Skip, Study
from accelpass.passes.sparse_attention.moa_profile import Profile, dense
from accelpass.passes.sparse_attention.moa_search import Problem, pareto, search_space
from accelpass.passes.sparse_attention.span_pass import SpanPass
from accelpass.passes.sparse_attention.spans import HeadSpans, Rule, density

Rules = dict[str, list[Rule]]
"""By site, a rule for each key/value head."""


@dataclass(frozen=True)
class MoA(SpanPass, CalibratedOnLoss):
    """Each head sees the first ``sinks`` tokens and its newest ``alpha + beta * N`` of a prompt of N tokens.

    Rules are those of a plan (:func:`accelpass.calibrate`), or ``alpha`` and ``beta`` here or in ``sites``. A KVCache keeps
    what the rule says at the end of the prompt, and room for an answer of ``reserve`` tokens. No weights are permuted:
    heads with one rule have a buffer of their own.

    Calibration: the influence of each entry of attention on the loss is profiled, at each length of the batches;
    a mixed-integer programme chooses one rule a key/value head, at most two a layer, with a mean density of at most ``density``
    at each length; of the choices that none beats at all lengths, the one with the least perplexity on other batches is the
    plan. Density is the share of the prompt that its last query sees, as in the authors' code. A rule's loss counts the
    query head of a group that it costs most (the card's maximum, taken of blocks).

    Attributes:
        density: bound of the mean over heads, at each length that is profiled.
        alpha, beta: the rule of all heads; None for those of the plan.
        step: of alpha among the rules that are searched; 1024 is the paper's, for prompts of 2k tokens or more.
        shares: beta is searched in steps of one ``shares``-th.

    Raises:
        OptionError: a density outside (0, 1], one of alpha and beta without the other, beta outside [0, 1], a span that is
            never positive, a step or shares below 1, sinks that are not a multiple of ``block``, a negative reserve; when
            compiled, neither a plan nor a rule.
        PlanError: when compiled, a plan for other heads.
    """

    name: ClassVar[str] = "moa"
    summary: ClassVar[str] = "prompts and a KVCache of first tokens and a window for each head, calibrated"
    paper: ClassVar[str] = "MoA, arXiv 2406.14909"
    identity: ClassVar[dict[str, Any] | None] = {"alpha": 0.0, "beta": 1.0}
    density: float = 0.5
    alpha: float | None = None
    beta: float | None = None
    step: int = 1024
    shares: int = 8

    def __post_init__(self) -> None:
        if not 0 < self.density <= 1:
            raise self.fail("density", "a share of the prompt above 0, at most 1")
        if (self.alpha is None) != (self.beta is None):
            given, other = ("alpha", "beta") if self.beta is None else ("beta", "alpha")
            raise self.fail(given, f"it together with {other}, or neither for the rules of a plan")
        if self.alpha is not None and self.beta is not None:
            if not 0 <= self.beta <= 1:
                raise self.fail("beta", "a share of the prompt from 0 to 1")
            if self.alpha <= 0 and self.beta == 0:
                raise self.fail("alpha", "a number above 0 where beta is 0")
        for name in ("step", "shares"):
            if getattr(self, name) < 1:
                raise self.fail(name, "1 or more")
        super().__post_init__()

    def rules(self, program: Program, path: str, kv_heads: int) -> Sequence[Rule] | Skip:
        if self.alpha is not None and self.beta is not None:
            return [(self.alpha, self.beta)]
        found = program.artefacts.get(artefact(path))
        if found is None:
            if any(name.startswith("moa/rules/") for name in program.artefacts):
                return Skip("the plan has no spans for it")
            raise OptionError(
                "moa needs a span for each head, and there is neither a plan nor alpha and beta. Calibrate once with plan = "
                "accelpass.calibrate(model, batches, passes=['moa']), and compile with options={'plan': plan}; or give "
                "every head one span: {'name': 'moa', 'alpha': 0, 'beta': 0.5}"
            )
        if found.shape != (kv_heads, 2):
            raise PlanError(
                f"moa: the plan has spans for {found.shape[0]} key/value heads of {path}, and this model has {kv_heads} there; "
                "calibrate again with this model"
            )
        return [(alpha, beta) for alpha, beta in found.tolist()]

    def calibrate_on_loss(self, study: Study) -> dict[str, Tensor]:
        """See the class. Beside the rules: ``moa/perplexity``, of the dense model and of the plan on the held-back batches."""
        profile = Profile(self.block)
        study.gradients(self._where_wanted(profile.attend), "influence of each block on the loss")
        if not profile.influence:
            reasons = [f"{path or 'an attention'}: {why}" for path, why in profile.skipped.items()]
            raise PassError(f"moa found no attention to calibrate: {'; '.join(reasons[:2]) or 'none is wanted'}")
        for site in profile.kv_heads.keys() & profile.skipped.keys():
            raise PassError(
                f"moa: {site} can be measured on some of the batches alone: {profile.skipped[site]}; leave those out, or give "
                "each prompt without padding"
            )
        best, least = None, float("inf")
        for number, rules in enumerate(found := self.search(profile)):
            worth = study.perplexity(self._where_wanted(self._masked(rules)), f"plan {number + 1} of {len(found)}")
            if worth < least:
                best, least = rules, worth
        if best is None:
            raise PassError("moa: the held-back batches have no finite perplexity under any plan")
        before = study.perplexity(self._where_wanted(_densely), "the dense model")
        made = {artefact(path): torch.tensor(of, dtype=torch.float64) for path, of in best.items()}
        return {**made, "moa/perplexity": torch.tensor([before, least], dtype=torch.float64)}

    def search(self, profile: Profile) -> list[Rules]:
        """The rules that no others beat at all lengths of a profile."""
        lengths = profile.lengths
        sites = list(profile.kv_heads)
        rules = search_space(lengths, self.step, self.shares)
        losses = [torch.cat([profile.losses(s, n, rules, self.sinks) for s in sites]).numpy() for n in lengths]
        densities = [[density(rule, n, self.sinks, self.block) for rule in rules] for n in lengths]
        heads = [profile.kv_heads[s] for s in sites]
        problem = Problem(np.stack(losses), np.array(densities), np.repeat(np.arange(len(sites)), heads), self.density)
        made = []
        for chosen in pareto(problem):
            parts = np.split(chosen, np.cumsum(heads)[:-1])
            made.append({s: [rules[r] for r in part] for s, part in zip(sites, parts, strict=True)})
        return made

    def _where_wanted(self, attend: Attend) -> Attend:
        """``attend`` at the sites that the patterns admit, the model's own at others."""

        def chosen(spec: AttentionSpec, q: Tensor, k: Tensor, v: Tensor) -> Tensor | None:
            return None if isinstance(self.wanted(spec.site), Skip) else attend(spec, q, k, v)

        return chosen

    def _masked(self, rules: Rules) -> Attend:
        """Attention with these spans."""

        def attend(spec: AttentionSpec, q: Tensor, k: Tensor, v: Tensor) -> Tensor | None:
            if spec.site not in rules:
                return None
            if why := not_a_prompt(spec, q, k):
                raise PassError(
                    f"moa: {spec.site} has spans, and in a held-back batch they cannot be tried: {why}; give each prompt "
                    "without padding"
                )
            each = [rule for rule in rules[spec.site] for _ in range(q.shape[1] // k.shape[1])]
            listed = HeadSpans(tuple(each), self.sinks, self.block).blocks(q, k, spec)
            run = KERNELS.get(q.device.type, BLOCK_SPARSE)
            return run(q, k, v, listed.blocks, listed.counts, self.block, -1, True, spec.scale, None)[0]

        return attend


def _densely(spec: AttentionSpec, q: Tensor, k: Tensor, v: Tensor) -> Tensor | None:
    return dense(q, k, v, spec.scale) if not_a_prompt(spec, q, k) is None else None


def artefact(path: str) -> str:
    """The name of a site's rules in a plan."""
    return f"moa/rules/{path}"
