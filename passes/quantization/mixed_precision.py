"""Mixed precision: which weights keep many bits and which few, chosen by an integer program from what each choice costs on data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from accelpass.ir.core.program import Program
from accelpass.ir.linear.formats import GROUP_SIZES
from accelpass.ir.linear.spec import LinearSpec
from accelpass.passes.core.base import Done, Run, Skip, Verdict
from accelpass.passes.core.site_pass import Edits
from accelpass.passes.quantization.bases.allocation import chosen, least_cost
from accelpass.passes.quantization.bases.calibrated import InputMoments, Learnt, LearntRounding
from accelpass.passes.quantization.bases.row_time import microseconds_of_row
from accelpass.passes.quantization.bases.weight_only import SharedWeight, WeightOnly
from accelpass.passes.quantization.weight_format import FORMATS, bits_of, format_named

FLOAT = "float"
"""The choice of leaving a weight as it is."""
CHOICES = (*FORMATS, FLOAT)
"""A plan holds the place of a choice among these, whatever was to choose from."""


@dataclass(frozen=True)
class MixedPrecision(LearntRounding):
    """Store each weight in the format that a budget of bits leaves it, so that the outputs of all linears change least.

    What a format costs a weight is the mean squared change of its linear's outputs on the data, by their mean square. An integer
    program picks one format for each weight: the least sum of costs whose bits are within the budget. HAWQ-V3 weighs a weight's own
    error by the trace of the loss's Hessian in place of the error of its outputs (inferred: the layer's own Hessian stands for it
    here, as in GPTQ).

    The budget is of bits, or of what may change, or of time: given ``change`` the fewest bits within it are chosen, given
    ``microseconds`` the least change within that time.

    Attributes:
        bits: the average of all weights that are decided on, scales counted.
        change: what the outputs of a linear may change on the average of all weights, squared and relative.
        microseconds: of one row through all weights that are decided on, one after the other, each format's time measured on this
            machine when the plan is made.
        choices: of ``int8``, ``int4``, ``int3``, ``fp8``, ``mxfp4``, ``nvfp4`` and ``float``.
        rest: the format of weights that no data reach: a head that is tied to the embedding, experts.
        group_size: of int4 and int3.
    """

    bits: float = 5.0
    change: float | None = None
    microseconds: float | None = None
    choices: tuple[str, ...] = ("int3", "int4", "int8")
    rest: str = "int8"
    group_size: int = 64

    name: ClassVar[str] = "mixed_precision"
    summary: ClassVar[str] = "each weight in the format that an integer program gives it under a budget of bits"
    paper: ClassVar[str] = "Yao et al. 2021, HAWQ-V3, arXiv 2011.10680, section 3.4"

    def __post_init__(self) -> None:
        if not self.choices or any(c not in CHOICES for c in self.choices):
            raise self.fail("choices", "some of " + ", ".join(CHOICES))
        if self.rest not in CHOICES:
            raise self.fail("rest", ", ".join(CHOICES))
        for option in ("bits", "change", "microseconds"):
            if (given := getattr(self, option)) is not None and not given > 0:
                raise self.fail(option, "a number above 0")
        if self.change is not None and self.microseconds is not None:
            raise self.fail("microseconds", "None beside change: one budget at a time")
        if self.group_size not in GROUP_SIZES:
            raise self.fail("group_size", "32, 64 or 128")
        super().__post_init__()

    @property
    def spec(self) -> LinearSpec:
        return LinearSpec(format_named("int8" if self.rest == FLOAT else self.rest, self.group_size))

    def learn(self, weights: Sequence[Tensor], moments: InputMoments) -> list[Learnt]:
        made = []
        for w in weights:
            size = moments.error(w).clamp_min(1e-30)
            costs, bits, taken = [], [], []
            for name in self.choices:
                form = None if name == FLOAT else format_named(name, self.group_size)
                fits = form is None or not isinstance(form.check(w.shape[1]), Skip)
                there = (
                    w
                    if form is None
                    else form.unpack(form.pack(w), torch.float32)
                    if fits
                    else w.new_full((), torch.inf)
                )
                costs.append(moments.error(there - w) / size if fits else torch.tensor(torch.inf))
                bits.append(32.0 * w.numel() if form is None else bits_of(form, w) if fits else torch.inf)
                wanted = fits and self.microseconds is not None
                taken.append(
                    microseconds_of_row(name, self.group_size, *w.shape) if wanted else 0.0 if fits else torch.inf
                )
            numbers = torch.tensor([[float(c) for c in costs], bits, taken], dtype=torch.float64)
            made.append(Learnt({"costs": numbers, "entries": torch.tensor(w.numel())}))
        return made

    def calibrate(self, program: Program, run: Run) -> dict[str, Tensor]:
        learnt = super().calibrate(program, run)
        paths = [key.split("/")[1] for key in learnt if key.endswith("/costs")]
        tables = {path: learnt[f"{self.name}/{path}/costs"] for path in paths}
        entries = sum(int(learnt[f"{self.name}/{path}/entries"]) for path in paths)
        if self.change is not None:
            picked = chosen(self.name, tables, 1, 0, self.change * len(tables), "change", len(tables))
        elif self.microseconds is not None:
            picked = chosen(self.name, tables, 0, 2, self.microseconds, "microseconds")
        else:
            picked = least_cost(self.name, tables, self.bits * entries, entries)
        return {f"{self.name}/{p}/choice": torch.tensor(CHOICES.index(self.choices[i])) for p, i in picked.items()}

    def check(self, site: SharedWeight, program: Program) -> Verdict:
        choice = self._choice(site, program)
        if choice == FLOAT:
            return Skip("the plan leaves it as it is")
        return super().check(site, program) if choice is None else self._stored(choice).check(site, program)

    def rewrite(self, site: SharedWeight, edit: Edits) -> Done | Skip:
        return self._stored(self._choice(site, edit.program) or self.rest).rewrite(site, edit)

    def _choice(self, site: SharedWeight, program: Program) -> str | None:
        """What the plan has for a weight; ``rest`` of one that it does not know, None where there is no plan."""
        found = self.learnt(site, program, "choice")
        if found is not None:
            return CHOICES[int(found)]
        return self.rest if any(name.startswith(f"{self.name}/") for name in program.artefacts) else None

    def _stored(self, choice: str) -> _Stored:
        return _Stored(form=choice, group_size=self.group_size)


@dataclass(frozen=True)
class _Stored(WeightOnly):
    """Packs one weight in one format."""

    form: str = "int8"
    group_size: int = 64
    name: ClassVar[str] = "mixed_precision"

    @property
    def spec(self) -> LinearSpec:
        return LinearSpec(format_named(self.form, self.group_size))
