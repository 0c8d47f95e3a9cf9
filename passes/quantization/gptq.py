"""GPTQ: columns of a weight are rounded one after another, and the columns still to come make up for the error."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from accelpass.ir.core.derived import Recipe
from accelpass.ir.core.graph import shape
from accelpass.ir.core.tensors import digest
from accelpass.ir.errors import PassError, PlanError
from accelpass.ir.linear.formats import Grouped, Int3
from accelpass.ir.linear.spec import LinearSpec
from accelpass.passes.core.site_pass import Edits
from accelpass.passes.quantization.bases.calibrated import InputMoments, Learnt, LearntRounding
from accelpass.passes.quantization.bases.stored_codes import codes_of, probe
from accelpass.passes.quantization.bases.weight_only import SharedWeight
from accelpass.passes.quantization.int4_weights import Int4Weights

_COLUMNS = 128
"""Columns after which the rest of the matrix is updated at once (the paper's lazy batches, section 3.3, step 2)."""


@dataclass(frozen=True)
class GPTQ(LearntRounding, Int4Weights):
    """Store weights as int4 with codes that keep the layer's outputs on the data, not the weights themselves.

    Each block is fitted to what the blocks before give with their rounded weights. Codes are of the plan, for the weights that the
    model had: with others a plan is refused.

    Attributes:
        bits: 4, or 3, for which there is no kernel: a weight is unpacked where it is multiplied.
        damping: share of the mean of the Hessian's diagonal that is added to it.
        order: round columns by the size of their Hessian entry, largest first (the authors' ``act_order``); groups are then made of
            the columns as they stand in the weight, with the scales of the weight before any rounding.
        group_size, symmetric, search, scales: see ``int4_weights``.
    """

    bits: int = 4
    damping: float = 0.01
    order: bool = False

    name: ClassVar[str] = "gptq"
    summary: ClassVar[str] = "int4 weights, each column's rounding error made up for by the columns after it"
    paper: ClassVar[str] = "Frantar et al. 2023, GPTQ, arXiv 2210.17323, algorithm 1"
    sequential: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.bits not in (3, 4):
            raise self.fail("bits", "3 or 4")
        if self.bits == 3 and self.scales != "float32":
            raise self.fail("scales", "'float32' with bits=3")
        if not 0 < self.damping <= 1:
            raise self.fail("damping", "a number above 0, up to 1")
        super().__post_init__()

    @property
    def spec(self) -> LinearSpec:
        return LinearSpec(Int3(self.group_size, self.symmetric)) if self.bits == 3 else super().spec

    def learn(self, weights: Sequence[Tensor], moments: InputMoments) -> list[Learnt]:
        inverse, dead, order = self._inverse(moments.products)
        return [self._rounded(w, inverse, dead, order) for w in weights]

    def _inverse(self, products: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The upper Cholesky factor of the inverse Hessian, which channels no data reach, and the order of columns."""
        hessian = products.double()
        diagonal = hessian.diagonal()
        dead = diagonal == 0
        diagonal[dead] = 1
        order = diagonal.argsort(descending=True) if self.order else torch.arange(len(hessian), device=hessian.device)
        hessian = hessian[order][:, order]
        hessian.diagonal().add_(self.damping * hessian.diagonal().mean())
        try:
            inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian))
            return torch.linalg.cholesky(inverse, upper=True).float(), dead, order
        except torch.linalg.LinAlgError as cause:
            raise PassError(
                f"gptq: a Hessian is not positive definite with damping={self.damping}; use a larger one"
            ) from cause

    def _rounded(self, weight: Tensor, inverse: Tensor, dead: Tensor, order: Tensor) -> Learnt:
        form = self.spec.weight
        assert isinstance(form, Grouped)
        w = torch.where(dead, 0.0, weight)
        scale, zero = self.grid(form.grouped(w))
        w, codes = w[:, order], torch.empty_like(w)
        for start in range(0, w.shape[1], _COLUMNS):
            end = min(start + _COLUMNS, w.shape[1])
            errors = torch.zeros_like(w[:, start:end])
            for column in range(start, end):
                group = int(order[column]) // form.group_size
                if not self.order and column % form.group_size == 0:  # of the columns as they are by now
                    rest = w[:, column : column + form.group_size].unsqueeze(1)
                    found = self.grid(rest)
                    scale[:, group] = found[0][:, 0]
                    if zero is not None and found[1] is not None:
                        zero[:, group] = found[1][:, 0]
                grid = (scale[:, group : group + 1], None if zero is None else zero[:, group : group + 1])
                here = w[:, column].reshape(-1, 1, 1)
                code = form.codes(here, *grid)
                codes[:, column] = code[:, 0, 0]
                error = (here - form.meant(code, *grid))[:, 0, 0] / inverse[column, column]
                w[:, column:end] -= error.unsqueeze(1) * inverse[column, column:end]
                errors[:, column - start] = error
            w[:, end:] -= errors @ inverse[start:end, end:]
        grouped = form.grouped(codes[:, order.argsort()])
        packed = form.written(grouped, scale, zero)
        kept = dict(zip(form.operands, packed, strict=True)) | {"probe": probe(weight)}
        return Learnt(kept)

    def values(self, learnt: Mapping[str, Tensor]) -> Tensor:
        form = self.spec.weight
        return form.unpack([learnt[operand] for operand in form.operands], torch.float32)

    def recipe(self, site: SharedWeight, edit: Edits) -> Recipe:
        plain, form = super().recipe(site, edit), self.spec.weight
        assert isinstance(form, Grouped)
        kept = {part: self.learnt(site, edit.program, part) for part in ("q", "scale", "zero", "probe")}
        q, scale, zero, known = kept.values()
        if q is None or scale is None or known is None:
            return plain
        packed = [t for t in (q, scale, zero) if t is not None]
        outputs, inputs = (int(s) for s in (shape(site.weight)[::-1] if site.transposed else shape(site.weight)))
        if (q.shape[0], form.width(packed)) != (outputs, inputs):
            raise PlanError(
                f"{self.name}: the plan's codes for {site.path} are not those of a weight of {outputs} x {inputs}"
            )
        if (scale.shape[1], zero is None) != (inputs // form.group_size, form.symmetric):
            raise PlanError(
                f"{self.name}: the plan's codes for {site.path} have groups of {inputs // scale.shape[1]}, "
                f"{'no' if zero is None else 'with'} zero points, which is not {form.shown()}; calibrate with the options that you use"
            )
        again = f"{self.name}: {site.path} is not the weight that the plan was made for (it was trained, merged or loaded since); run accelpass.calibrate again"
        return Recipe((*plain.key, "gptq", *map(digest, packed)), codes_of(packed, known, site.transposed, again))
