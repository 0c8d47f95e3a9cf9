"""Of every four weights in a row two are stored (2:4 sparsity, arXiv 2104.08378), by size or by what they are multiplied with."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import ClassVar

from torch import Tensor

from accelpass.ir.analyses.structure.linear import Embedding, linears
from accelpass.ir.core.derived import Recipe
from accelpass.ir.core.graph import shape
from accelpass.ir.core.program import Program
from accelpass.ir.core.tensors import digest, placed
from accelpass.ir.errors import PassError, PlanError
from accelpass.ir.linear.half_sparse import TwoOfFour
from accelpass.ir.linear.spec import LinearSpec
from accelpass.passes.core.base import Calibrated, Run, Skip, Verdict
from accelpass.passes.core.site_pass import Edits
from accelpass.passes.quantization.bases.weight_only import NearestWeights, SharedWeight


@dataclass(frozen=True)
class TwoOfFourPass(NearestWeights, Calibrated):
    """Keep two of every four weights that one output multiplies with neighbouring inputs, and store nothing of the others.

    After Mishra et al., "Accelerating Sparse Deep Neural Networks", section 4.1: the two of largest magnitude stay. With a plan of
    ``accelpass.calibrate``, those of the largest magnitude times norm of their input (Sun et al., "A Simple and Effective Pruning Approach
    for Large Language Models", arXiv 2306.11695, section 3). Values and their places take 9/16 of float16's bytes, 17/32 of float32's.
    Weights are unpacked where they are multiplied, which costs time: this saves memory. A model that was not trained for it answers worse.
    """

    fits_cache: ClassVar[bool] = False
    name: ClassVar[str] = "two_of_four"
    summary: ClassVar[str] = "of every four weights in a row two are stored"
    paper: ClassVar[str] = "Mishra et al. 2021, arXiv 2104.08378; with a plan Wanda, arXiv 2306.11695"

    @property
    def spec(self) -> LinearSpec:
        return LinearSpec(TwoOfFour())

    def check(self, site: SharedWeight, program: Program) -> Verdict:
        if any(isinstance(use, Embedding) for use in site.uses) and site.is_multiplied:
            return Skip("its rows are embeddings, too, of which half would be gone")
        return super().check(site, program)

    def calibrate(self, program: Program, run: Run) -> dict[str, Tensor]:
        paths = {p for use in program.analysis(linears) if (p := program.tensors.path(use.weight)) is not None}
        if not paths:
            raise PassError(f"{self.name} found no linear to calibrate")
        squares: dict[str, Tensor] = {}

        def add(path: str, x: Tensor) -> None:
            own = x.detach().float().flatten(0, -2).square().sum(0).cpu()
            squares[path] = squares[path] + own if path in squares else own

        run({path: partial(add, path) for path in sorted(paths)}, "norms of inputs")
        return {f"{self.name}/{path}": total.sqrt() for path, total in squares.items()}

    def recipe(self, site: SharedWeight, edit: Edits) -> Recipe:
        plain = super().recipe(site, edit)
        path = edit.program.tensors.path(site.weight)
        norms = edit.program.artefacts.get(f"{self.name}/{path}")
        if norms is None or site.is_kernel:
            return plain
        wide = int(shape(site.weight)[-2 if site.transposed else -1])
        if norms.shape != (wide,):
            raise PlanError(f"{self.name}: the plan has {len(norms)} norms for {path}, which has {wide} input channels")
        form, transposed = TwoOfFour(), site.transposed

        def pack(weight: Tensor) -> tuple[Tensor, ...]:
            rows = weight.transpose(-1, -2).contiguous() if transposed else weight
            (own,) = placed(weight, [norms])
            return form.chosen(rows, rows.float().abs() * own)

        return Recipe((*plain.key, "norms", digest(norms)), pack)
