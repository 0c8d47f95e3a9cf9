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
from accelpass.passes.quantization.bases.calibrated import Balanced, InputMoments, InputRange, Learnt, LearntRounding
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
        self.number = range_of(call, self.boundaries)

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


class RangeByTimestep(InputRange):
    """The largest magnitude of an input in each range of timesteps, ``peaks`` ``(ranges,)``."""

    def __init__(self, site: SharedWeight, boundaries: Sequence[float]) -> None:
        super().__init__(site)
        self.boundaries, self.number = boundaries, 0
        self.peaks = self.peaks.new_zeros(len(boundaries) + 1)
        self.calls = [0] * len(self.peaks)

    def begin(self, call: Mapping[str, Any]) -> None:
        self.number = range_of(call, self.boundaries)

    def see(self, x: Tensor) -> None:
        at = self.number
        self.peaks[at] = torch.maximum(self.peaks[at], x.detach().float().abs().amax())
        self.calls[at] += 1
        self.rows += len(x)


def range_of(call: Mapping[str, Any], boundaries: Sequence[float]) -> int:
    """The number of the range that a call's timestep is in; of several timesteps the largest tells.

    Raises:
        PassError: the call has none.
    """
    if not boundaries:
        return 0
    given = next((call[name] for name in TIMESTEP if call.get(name) is not None), None)
    if given is None:
        raise PassError(f"boundaries are of timesteps, and a call has none; name it as one of {', '.join(TIMESTEP)}")
    return sum(float(torch.as_tensor(given).float().max()) > b for b in boundaries)


@dataclass(frozen=True)
class ByTimestep(LearntRounding):
    """Base of passes that learn something for each range of timesteps; the graph finds the range of a call from its timestep.

    Attributes:
        boundaries: the last timestep of each range but the highest, ``(500,)`` for 0 to 500 and all above; of the model's own
            timesteps, which go to 1 in some. None: one range, of all.

    Class attributes:
        by_range: the part of the plan that has a row for each range.
    """

    boundaries: tuple[float, ...] = field(default=(), kw_only=True)

    for_all_sites: ClassVar[tuple[str, ...]] = ("boundaries",)
    by_range: ClassVar[str]

    def __post_init__(self) -> None:
        if any(not b > a for a, b in pairwise(self.boundaries)):
            raise self.fail("boundaries", "timesteps in ascending order")
        super().__post_init__()

    def has_ranges(self, site: SharedWeight, program: Program) -> bool:
        """Whether what is learnt of a site is learnt for each range."""
        return True

    def refuse_missing(self, calls: Sequence[int]) -> None:
        """Raise :class:`PassError` where a range was seen in no call."""
        if 0 in calls:
            edges = ("", *(f" above {b:g}" for b in self.boundaries)), (*(f" up to {b:g}" for b in self.boundaries), "")
            missed = list(calls).index(0)
            raise PassError(
                f"{self.name}: no calibration data has a timestep{edges[0][missed]}{edges[1][missed]}; give calls at steps of every range, "
                "or fewer boundaries"
            )

    def check(self, site: SharedWeight, program: Program) -> Verdict:
        sets, held = (self.learnt(site, program, part) for part in (self.by_range, "boundaries"))
        of = () if held is None else tuple(held.tolist())
        wanted = tuple(torch.tensor(self.boundaries).tolist()) if self.has_ranges(site, program) else ()
        if sets is not None and of != wanted:
            raise PlanError(
                f"{self.name}: the plan's {self.by_range} for {site.path} have boundaries={of}, and {self.boundaries} was asked for; "
                "calibrate with the options that you use"
            )
        if sets is not None and of and _timestep(program) is None:
            return Skip(
                f"its {self.by_range} differ by timestep, and no input of this graph tells it ({', '.join(TIMESTEP)}, a tensor); compile "
                "the whole model, or leave out boundaries"
            )
        return super().check(site, program)

    def number(self, program: Program) -> fx.Node:
        """The range of a call, int64 ``(1,)``, in front of everything that is computed."""
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


@dataclass(frozen=True)
class BalancedByTimestep(ByTimestep, Balanced):
    """Base of passes whose factors are of one range of timesteps, or of all.

    Each range needs data, and has a weight of its own, packed with its factors; one graph serves all steps. Any range's factors cancel in the product, whichever
    is read: what the choice changes is what rounding costs.

    Attributes:
        momentum: of the moving average over the data that a channel's peak is then; 0 takes the largest of all.
    """

    momentum: float = field(default=0.0, kw_only=True)

    for_all_sites: ClassVar[tuple[str, ...]] = ("boundaries", "momentum")
    by_range: ClassVar[str] = "factors"

    def __post_init__(self) -> None:
        if not 0 <= self.momentum < 1:
            raise self.fail("momentum", "0 up to below 1")
        super().__post_init__()

    def moments(self, site: SharedWeight, program: Program) -> InputMoments:
        return MomentsByTimestep(site, self.boundaries, self.momentum)

    def learn(self, weights: Sequence[Tensor], moments: InputMoments) -> list[Learnt]:
        assert isinstance(moments, MomentsByTimestep)
        self.refuse_missing(moments.calls)
        sets = []
        for peaks in moments.by_range:
            moments.peaks = peaks
            sets.append(self.factors(weights, moments))
        if not self.boundaries:
            return [Learnt({"factors": sets[0]})] * len(weights)
        edges_held = torch.tensor(self.boundaries)
        return [Learnt({"factors": torch.stack(sets), "boundaries": edges_held})] * len(weights)


def _timestep(program: Program) -> fx.Node | None:
    """The input that tells the timestep, if the graph has one."""
    node = user_input(program, *TIMESTEP)
    return node if node is not None and isinstance(value(node), Tensor) else None


_RANGE = "accelpass_range"
"""Key of a node's ``meta``: the boundaries of the ranges of timesteps that it numbers."""
