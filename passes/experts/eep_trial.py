"""The model while experts are searched: matrices are state, so that a candidate is written and nothing is compiled anew."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from accelpass.ir.analyses.structure.moe import MoE, moes
from accelpass.ir.core.graph import shape
from accelpass.ir.core.program import Program
from accelpass.ir.core.state import StateSpec
from accelpass.ir.errors import OptionError
from accelpass.passes.core.base import Done, Skip, Take, Verdict
from accelpass.passes.core.site_pass import Edits, SitePass
from accelpass.passes.experts.eep_search import Individual
from accelpass.passes.experts.routing import probabilities, unfit


@dataclass(frozen=True)
class Trying(SitePass):
    """Merge experts at each call by matrices that are written between calls; the rest have no probability.

    What is written is the difference from the matrices that keep the first experts, with which the model runs until then.

    Attributes:
        experts: how many are left.
        found: is told the number of experts by the path of each mixture.
    """

    experts: int = 4
    found: Any = field(default=None, compare=False)

    name: ClassVar[str] = "eep"
    phase: ClassVar[str] = "structure"
    summary: ClassVar[str] = "experts merged by matrices that a search writes"
    edits: ClassVar[frozenset[str]] = frozenset({"experts.rows"})

    def find(self, program: Program) -> list[MoE]:
        return list(program.analysis(moes))

    def check(self, site: MoE, program: Program) -> Verdict:
        why = unfit(program, site)
        if why is None and probabilities(program, site) is None:
            why = "its router chooses before there are probabilities"
        if why is not None:
            return Skip(why)
        if not (site.top_k or 1) <= self.experts <= site.experts:
            raise OptionError(
                f"eep: experts={self.experts} does not fit {site.path}, of whose {site.experts} experts a token goes to "
                f"{site.top_k}; use a number from {site.top_k} to {site.experts}"
            )
        return Take()

    def rewrite(self, site: MoE, edit: Edits) -> Done:
        program, size = edit.program, (self.experts, site.experts)
        merge, route = (
            edit.state(site.router.weight, StateSpec(name, size, torch.float32, "model"))
            for name in matrix_names(site.path)
        )
        scores = probabilities(program, site)
        assert scores is not None
        readers = list(scores.users)
        (mapped,) = edit.run(("route", size), _mapped, [scores, route], min(readers))
        for user in readers:
            user.replace_input_with(scores, mapped)
        for stack in site.weights:
            users = [u for u in stack.users if u.op == "call_function"]
            (sums,) = edit.run(("merge", size, len(shape(stack))), _sums, [stack, merge], min(users))
            for user in users:
                user.replace_input_with(stack, sums)
        self.found[site.path] = site.experts
        return Done(f"{site.experts} experts tried as {self.experts}")

    @staticmethod
    def written(one: Individual) -> dict[str, Tensor]:
        """What a candidate is tried by: values of the state, by name."""
        pairs = ((zip(matrix_names(path), pair, strict=True)) for path, pair in one.items())
        return {name: matrix - torch.eye(*matrix.shape) for pair in pairs for name, matrix in pair}


def matrix_names(path: str) -> tuple[str, str]:
    """What a plan calls the matrices of a mixture: of its experts, and of its router."""
    return f"eep/{path}/experts", f"eep/{path}/router"


def _matrix(written: Tensor) -> Tensor:
    return written + torch.eye(*written.shape, device=written.device)


def _mapped(scores: Tensor, route: Tensor) -> list[Tensor]:
    """Probabilities of the new experts, and of as many more that are never chosen."""
    own = scores @ _matrix(route).to(scores.dtype).t()
    return [F.pad(own, (0, route.shape[1] - route.shape[0]), value=float("-inf"))]


def _sums(stack: Tensor, merge: Tensor) -> list[Tensor]:
    """The new experts, and zeros for the rest."""
    dtype = torch.promote_types(stack.dtype, torch.float32)
    square = F.pad(_matrix(merge).to(dtype), (0, 0, 0, merge.shape[1] - merge.shape[0]))
    return [torch.tensordot(square, stack.to(dtype), dims=([1], [0])).to(stack.dtype)]
