"""The base of sparse attention whose heads differ: what selections cost each head on calibration data, and the plan of it."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from accelpass.ir.attention import Attention, AttentionSpec
from accelpass.ir.attention.lowering.block_sparse import BLOCK_SPARSE, KERNELS
from accelpass.ir.attention.spec.block_select import BlockSelect, causal_form, not_a_prompt
from accelpass.ir.core.graph import value
from accelpass.ir.core.program import Program
from accelpass.ir.errors import PassError, PlanError
from accelpass.passes.core.base import Attend, CalibratedOnLoss, Skip, Study
from accelpass.passes.sparse_attention.base import SparseAttention


def computed(select: BlockSelect, spec: AttentionSpec, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """A prompt's attention over what is selected, and the share of the causal blocks that each head reads, float64 ``(heads,)``."""
    plain = causal_form(spec, q.shape[2], k.shape[2])
    listed = select.listed(q, k, plain)
    run = KERNELS.get(q.device.type, BLOCK_SPARSE)
    out, _ = run(q, k, v, listed.blocks, listed.counts, listed.size, -1, True, spec.scale, listed.order)
    count = listed.counts.shape[1]
    read = listed.counts.double().sum(1) / (count * (count + 1) / 2)
    return out, read.expand(q.shape[1]) if len(read) == 1 else read.view(-1, q.shape[1]).mean(0)


def dense(spec: AttentionSpec, q: Tensor, k: Tensor, v: Tensor) -> Tensor | None:
    """All earlier keys; None if it is no prompt's attention."""
    if not_a_prompt(spec, q, k) is not None:
        return None
    return F.scaled_dot_product_attention(
        q, k, v, is_causal=True, scale=spec.scale, enable_gqa=q.shape[1] != k.shape[1]
    )


@dataclass
class Trials:
    """What each of several selections does to each head; fill it with :meth:`attend`.

    Attributes:
        errors: by site, squared error of the output relative to the dense one, summed over calls: float64 ``(heads, candidates)``.
        read: by site, the share of blocks that is read, summed likewise.
        calls: by site, how many.
        tokens: of the longest prompt.
        skipped: by site, why a call could not be measured.
    """

    candidates: Sequence[BlockSelect]
    errors: dict[str, Tensor] = field(default_factory=dict)
    read: dict[str, Tensor] = field(default_factory=dict)
    calls: dict[str, int] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    tokens: int = 0

    def attend(self, spec: AttentionSpec, q: Tensor, k: Tensor, v: Tensor) -> Tensor | None:
        exact = dense(spec, q, k, v)
        if exact is None:
            self.skipped[spec.site] = str(not_a_prompt(spec, q, k))
            return None
        self.tokens = max(self.tokens, q.shape[2])
        self.calls[spec.site] = self.calls.get(spec.site, 0) + 1
        for table in (self.errors, self.read):
            table.setdefault(spec.site, torch.zeros(q.shape[1], len(self.candidates), dtype=torch.float64))
        whole = exact.double().square().sum((0, 2, 3))
        for number, select in enumerate(self.candidates):
            made, read = computed(select, spec, q, k, v)
            away = (made - exact).double().square().sum((0, 2, 3)) / whole.clamp_min(1e-30)
            self.errors[spec.site][:, number] += away.cpu()
            self.read[spec.site][:, number] += read.cpu()
        return exact


@dataclass(frozen=True)
class HeadPlan(SparseAttention, CalibratedOnLoss):
    """Sparse attention whose heads have numbers of their own in a plan; without one, all have those of the options.

    Class attributes:
        planned: what a plan calls them.
        width: how many numbers a head has.
    """

    planned: ClassVar[str]
    width: ClassVar[int]

    @abstractmethod
    def of_heads(self, rows: Tensor) -> tuple[BlockSelect, str]:
        """The selection of an attention whose heads have these numbers ``(heads, width)``, and how a user is told."""

    def selected(self, attention: Attention, tokens: Any, program: Program) -> tuple[BlockSelect, str] | Skip:
        rows = program.artefacts.get(self.artefact(attention.path))
        if rows is None:
            made = self.selection(attention, tokens)
            if isinstance(made, Skip) or not any(n.startswith(self.artefact("")) for n in program.artefacts):
                return made
            return made[0], f"{made[1]}, as the plan has no {self.planned} for it"
        assert attention.node is not None
        heads = value(attention.node.args[0]).shape[1]
        if rows.shape != (heads, self.width) or not bool(rows.isfinite().all()):
            raise PlanError(
                f"{self.name}: the plan has {self.planned} of {list(rows.shape)} for {attention.path}, and this model has "
                f"{heads} heads there, of {self.width} finite numbers each; calibrate again with this model"
            )
        return self.of_heads(rows)

    def artefact(self, path: str) -> str:
        """The name of a site's numbers in a plan."""
        return f"{self.name}/{self.planned}/{path}"

    # --- calibration

    def tried(self, study: Study, candidates: Sequence[BlockSelect], what: str) -> Trials:
        """Measure selections on the calibration data.

        Raises:
            PassError: there is no attention to measure, or one that some of the data have in another form.
        """
        trials = Trials(candidates)
        study.gradients(self.where_wanted(trials.attend), what)
        if not trials.calls:
            reasons = [f"{path or 'an attention'}: {why}" for path, why in trials.skipped.items()]
            raise PassError(
                f"{self.name} found no attention to calibrate: {'; '.join(reasons[:2]) or 'none is wanted'}"
            )
        for site in trials.calls.keys() & trials.skipped.keys():
            raise PassError(
                f"{self.name}: {site} can be measured on some of the batches alone: {trials.skipped[site]}; leave those out, "
                "or give each prompt without padding"
            )
        return trials

    def perplexity(self, study: Study, rows: Mapping[str, Tensor] | None, what: str) -> float:
        """Of the held-back data, with these numbers by site; of the dense model if None."""

        def attend(spec: AttentionSpec, q: Tensor, k: Tensor, v: Tensor) -> Tensor | None:
            if rows is None or spec.site not in rows or not_a_prompt(spec, q, k) is not None:
                return dense(spec, q, k, v)
            return computed(self.of_heads(rows[spec.site])[0], spec, q, k, v)[0]

        return study.perplexity(self.where_wanted(attend), what)

    def where_wanted(self, attend: Attend) -> Attend:
        """``attend`` at the sites that the patterns admit, the model's own at others."""

        def chosen(spec: AttentionSpec, q: Tensor, k: Tensor, v: Tensor) -> Tensor | None:
            return None if isinstance(self.wanted(spec.site), Skip) else attend(spec, q, k, v)

        return chosen

    def made(self, rows: Mapping[str, Tensor], before: float, after: float) -> dict[str, Tensor]:
        """The tensors of a plan; perplexity is of the dense model and of the plan, on the held-back data."""
        found = {self.artefact(path): of.double() for path, of in rows.items()}
        return {**found, f"{self.name}/perplexity": torch.tensor([before, after], dtype=torch.float64)}


def most_within(most: int, is_within: Callable[[int], bool]) -> int:
    """The largest number up to ``most`` that is within a bound, by halving: of two, the smaller is within if the larger is."""
    low, high = 0, most
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if is_within(middle) else (low, middle - 1)
    return low
