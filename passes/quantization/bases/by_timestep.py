"""Balanced rounding of denoisers whose inputs differ from step to step: factors, and weights, for each range of timesteps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from accelpass.ir.core.graph import value
from accelpass.ir.core.program import Program
from accelpass.ir.errors import PassError, PlanError
from accelpass.ir.transform.splice import inserted
from accelpass.ir.transform.steps import TIMESTEP, user_input
from accelpass.passes.core.base import Skip, Verdict
from accelpass.passes.quantization.bases.calibrated import Balanced, InputMoments, Learnt
from accelpass.passes.quantization.bases.weight_only import SharedWeight


class MomentsByTimestep(InputMoments):
    """Moments with the peaks of each range of timesteps.

    Attributes:
        boundaries: the last timestep of each range but the highest.
        momentum: of the moving average over calls of a channel's peak, the mean of the samples' own; 0: the largest of all.
        by_range: peaks ``(ranges, in)``.
        calls: how many calls each range was seen in.
    """

    def __init__(self, site: SharedWeight, boundaries: Sequence[float], momentum: float) -> None:
        super().__init__(site)
        self.boundaries, self.momentum, self.number = boundaries, momentum, 0
        self.by_range = self.peaks.new_zeros(len(boundaries) + 1, len(self.peaks))
        self.calls = [0] * len(self.by_range)

    def begin(self, call: Mapping[str, Any]) -> None:
        if not self.boundaries:
            return
        given = next((call[name] for name in TIMESTEP if call.get(name) is not None), None)
        if given is None:
            raise PassError(
                f"boundaries are of timesteps, and a call has none; name it as one of {', '.join(TIMESTEP)}"
            )
        self.number = sum(float(torch.as_tensor(given).float().max()) > b for b in self.boundaries)

    def see(self, x: Tensor) -> None:
        super().see(x)
        sizes, at = x.detach().float().abs(), self.number
        if self.momentum:
            peaks = (sizes.flatten(1, -2).amax(1) if x.dim() > 2 else sizes).mean(0)
            kept = self.momentum if self.calls[at] else 0.0
            self.by_range[at] = kept * self.by_range[at] + (1 - kept) * peaks
        else:
            self.by_range[at] = torch.maximum(self.by_range[at], sizes.flatten(0, -2).amax(0))
        self.calls[at] += 1


@dataclass(frozen=True)
class BalancedByTimestep(Balanced):
    """Base of passes whose factors are of one range of timesteps, or of all.

    Each range has a weight of its own, packed with its factors; the graph finds the range of a call from the timestep that it is given
    (of a batch with several, the largest), so that one graph serves all steps. Any range's factors cancel in the product, whichever
    is read: what the choice changes is what rounding costs.

    Attributes:
        boundaries: the last timestep of each range but the highest, ``(500,)`` for 0 to 500 and all above; of the model's own
            timesteps, which go to 1 in some. None: one set of factors for all. Each range needs data, and costs a packed weight.
        momentum: of the moving average over the data that a channel's peak is then; 0 takes the largest of all.
    """

    boundaries: tuple[float, ...] = field(default=(), kw_only=True)
    momentum: float = field(default=0.0, kw_only=True)

    for_all_sites: ClassVar[tuple[str, ...]] = ("boundaries", "momentum")

    def __post_init__(self) -> None:
        if any(not b > a for a, b in pairwise(self.boundaries)):
            raise self.fail("boundaries", "timesteps in ascending order")
        if not 0 <= self.momentum < 1:
            raise self.fail("momentum", "0 up to below 1")
        super().__post_init__()

    def moments(self, site: SharedWeight, program: Program) -> InputMoments:
        return MomentsByTimestep(site, self.boundaries, self.momentum)

    def learn(self, weights: Sequence[Tensor], moments: InputMoments) -> list[Learnt]:
        assert isinstance(moments, MomentsByTimestep)
        if 0 in moments.calls:
            edges = ("", *(f" above {b:g}" for b in self.boundaries)), (*(f" up to {b:g}" for b in self.boundaries), "")
            missed = moments.calls.index(0)
            raise PassError(
                f"{self.name}: no calibration data has a timestep{edges[0][missed]}{edges[1][missed]}; give calls at steps of every range, "
                "or fewer boundaries"
            )
        sets = []
        for peaks in moments.by_range:
            moments.peaks = peaks
            sets.append(self.factors(weights, moments))
        if not self.boundaries:
            return [Learnt({"factors": sets[0]})] * len(weights)
        edges_held = torch.tensor(self.boundaries)
        return [Learnt({"factors": torch.stack(sets), "boundaries": edges_held})] * len(weights)

    def check(self, site: SharedWeight, program: Program) -> Verdict:
        factors, held = (self.learnt(site, program, part) for part in ("factors", "boundaries"))
        of = () if held is None else tuple(held.tolist())
        if factors is not None and of != tuple(torch.tensor(self.boundaries).tolist()):
            raise PlanError(
                f"{self.name}: the plan's factors for {site.path} have boundaries={of}, and {self.boundaries} was asked for; calibrate "
                "with the options that you use"
            )
        if factors is not None and of and _timestep(program) is None:
            return Skip(
                f"its factors differ by timestep, and no input of this graph tells it ({', '.join(TIMESTEP)}, a tensor); compile the whole "
                "model, or leave out boundaries"
            )
        return super().check(site, program)

    def number(self, program: Program) -> fx.Node:
        for node in program.graph.nodes:
            if node.meta.get(_RANGE) == self.boundaries:
                return node
        given, boundaries = _timestep(program), self.boundaries
        assert given is not None
        first = next(n for n in program.graph.nodes if n.op not in ("placeholder", "get_attr"))

        def above(t: Tensor) -> list[Tensor]:
            largest = t.float().flatten().amax(0)
            return [torch.stack([largest > b for b in boundaries]).long().sum(0, keepdim=True)]

        (made,) = inserted(program, first, above, given)
        made.meta[_RANGE] = boundaries
        return made


def _timestep(program: Program) -> fx.Node | None:
    """The input that tells the timestep, if the graph has one."""
    node = user_input(program, *TIMESTEP)
    return node if node is not None and isinstance(value(node), Tensor) else None


_RANGE = "accelpass_range"
"""Key of a node's ``meta``: the boundaries of the ranges of timesteps that it numbers."""
