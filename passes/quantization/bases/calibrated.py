"""The base of methods that learn from data how a weight is rounded: which weights they learn, and what their inputs are like."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from accelpass.ir.analyses.structure.convolution import Convolution
from accelpass.ir.analyses.structure.linear import Linear
from accelpass.ir.core.derived import Recipe
from accelpass.ir.core.graph import aten, shape, value
from accelpass.ir.core.program import Program
from accelpass.ir.core.tensors import digest, placed
from accelpass.ir.errors import PassError, PlanError
from accelpass.ir.linear.spec import Numbered, Selector
from accelpass.passes.core.base import BlockRun, Calibrated, Run, Take
from accelpass.passes.core.site_pass import Edits
from accelpass.passes.quantization.bases.weight_only import SharedWeight, WeightOnly


class InputMoments:
    """What the rows of a linear's input are like.

    Attributes:
        products: the sum of ``x x^T`` ``(in, in)``, on which the squared error of any change of the weight depends.
        peaks, sizes: the largest and the summed magnitude of each channel ``(in,)``.
        rows: how many rows were seen.
    """

    def __init__(self, site: SharedWeight) -> None:
        channels, device = site.uses[0].in_features, value(site.weight).device  # type: ignore[union-attr]
        self.products = torch.zeros(channels, channels, device=device)
        self.peaks, self.sizes = (torch.zeros(channels, device=device) for _ in range(2))
        self.rows = 0

    def begin(self, call: Mapping[str, Any]) -> None:
        """Learn of the model's arguments of the call that :meth:`see` is given inputs of next."""

    def see(self, x: Tensor) -> None:
        """Take in inputs ``(..., in)``."""
        flat = x.flatten(0, -2).float()
        self.products += flat.t() @ flat
        magnitudes = flat.abs()
        self.peaks = torch.maximum(self.peaks, magnitudes.amax(0))
        self.sizes += magnitudes.sum(0)
        self.rows += len(flat)

    @property
    def finite(self) -> bool:
        """Whether no input held NaN or infinity."""
        return bool(self.products.isfinite().all())

    def error(self, change: Tensor) -> Tensor:
        """The mean squared change of a row's outputs, summed over outputs, where W changes by ``change (out, in)``."""
        return ((change @ self.products) * change).sum() / max(1, self.rows)


class InputRange(InputMoments):
    """The largest magnitude of an input, in ``peaks`` ``(1,)``, and nothing else."""

    def __init__(self, site: SharedWeight) -> None:
        self.peaks = torch.zeros(1, device=value(site.weight).device)
        self.rows = 0

    def see(self, x: Tensor) -> None:
        self.peaks = torch.maximum(self.peaks, x.detach().float().abs().amax().reshape(1))
        self.rows += len(x)

    @property
    def finite(self) -> bool:
        return bool(self.peaks.isfinite().all())


@dataclass(frozen=True)
class Learnt:
    """What is kept of one weight: tensors for the plan, by name."""

    tensors: Mapping[str, Tensor]


@dataclass(frozen=True)
class LearntRounding(WeightOnly, Calibrated):
    """Base of passes that round weights as data tell; what they learn of a weight is in the plan, under its path.

    Data go through the model block by block, so that no more than one block's statistics are held. Weights that no data reach (a
    head that is tied to the embedding, experts) are rounded to the nearest.

    Class attributes:
        sequential: later blocks read what the ones before give with the weights that were learnt.
    """

    fits_cache: ClassVar[bool] = False
    sequential: ClassVar[bool] = False

    @abstractmethod
    def learn(self, weights: Sequence[Tensor], moments: InputMoments) -> list[Learnt]:
        """What is kept of each of the weights ``(out, in)``, float32, that read one input."""

    def calibrate(self, program: Program, run: Run) -> dict[str, Tensor]:
        # Weights that read one input are fitted together, if they have the same settings.
        groups: dict[tuple[fx.Node, str], dict[str, SharedWeight]] = {}
        for site in self.find(program):
            if (path := self._learns(site, program)) is not None:
                key = site.uses[0].operand(), repr(self.at(site.paths))  # type: ignore[union-attr]
                groups.setdefault(key, {})[path] = site
        learnt: dict[str, Tensor] = {}
        for block in run.blocks("inputs of linears", rest=bool(self.kernels(program))):
            # A text is read in every block: what one block has of such a group is fitted by itself.
            parts = ({p: s for p, s in group.items() if p in block.weights} for group in groups.values())
            inside = [part for part in parts if part]
            if (known := run.kept(block.number)) is None:
                known = self._block(program, inside, block)
                run.keep(block.number, known)
            learnt |= known
            for path, site in ((p, s) for group in inside for p, s in group.items() if self.sequential):
                prefix = f"{self.name}/{path}/"
                own = {n.removeprefix(prefix): t for n, t in known.items() if n.startswith(prefix)}
                weight = self.at(site.paths).values(own)
                block.put({path: weight.t() if site.transposed else weight})
        if not learnt:
            raise PassError(
                f"{self.name} found no linear to calibrate: include and exclude leave none, or no block has one"
            )
        return learnt

    def values(self, learnt: Mapping[str, Tensor]) -> Tensor:
        """The numbers ``(out, in)`` that a weight stands for, of a pass whose later blocks are to see them."""
        raise TypeError(f"{type(self).__name__} is sequential and does not define values()")

    def _block(self, program: Program, inside: Sequence[dict[str, SharedWeight]], block: BlockRun) -> dict[str, Tensor]:
        """What is learnt of one block's weights."""
        learnt: dict[str, Tensor] = {}
        moments = {next(iter(group)): self.moments(next(iter(group.values())), program) for group in inside}

        def begin(call: Mapping[str, Any]) -> None:
            for m in moments.values():
                m.begin(call)

        block.inputs({path: m.see for path, m in moments.items()}, begin)
        for group, seen in zip(inside, moments.values(), strict=True):
            for path, kept in self._fit(program, group, seen).items():
                learnt |= {f"{self.name}/{path}/{part}": t.contiguous() for part, t in kept.tensors.items()}
        return learnt

    def moments(self, site: SharedWeight, program: Program) -> InputMoments:
        """What gathers the input of a site."""
        return InputMoments(site)

    def _fit(self, program: Program, group: dict[str, SharedWeight], moments: InputMoments) -> dict[str, Learnt]:
        first = next(iter(group))
        if not moments.rows:
            raise PassError(f"{self.name}: no calibration data reach {first}")
        if not moments.finite:
            raise PassError(
                f"{self.name}: the inputs of {first} are not finite; look for NaN in the data and in the weights before it"
            )
        weights = []
        for site in group.values():
            w = program.tensors.value(site.weight)
            assert w is not None
            weights.append((w.t() if site.transposed else w.flatten(1)).detach().float())
        here = self.at(group[first].paths)
        return dict(zip(group, here.learn(weights, moments), strict=True))

    def _learns(self, site: SharedWeight, program: Program) -> str | None:
        """The path of a weight that has one use, a plain linear or a convolution, and is wanted."""
        use = site.uses[0]
        plain = isinstance(use, Linear) and use.select is None
        if len(site.uses) != 1 or not (plain or isinstance(use, Convolution)):
            return None
        wanted = all(isinstance(self.wanted(path), Take) for path in site.paths)
        taken = wanted and isinstance(self.at(site.paths).check(site, program), Take)
        return program.tensors.path(site.weight) if taken else None

    def learnt(self, site: SharedWeight, program: Program, part: str) -> Tensor | None:
        """What the plan holds of a weight; None where it was not calibrated."""
        return program.artefacts.get(f"{self.name}/{program.tensors.path(site.weight)}/{part}")

    def whole(self, program: Program, sites: Sequence[SharedWeight]) -> str | None:
        said = super().whole(program, sites)
        if said is None and not any(name.startswith(f"{self.name}/") for name in program.artefacts):
            return (
                "not calibrated, so every weight is rounded to the nearest: give accelpass.calibrate(model, batches, "
                f"['{self.name}']) as options={{'plan': ...}}"
            )
        return said


@dataclass(frozen=True)
class Balanced(LearntRounding):
    """Base of passes that divide input channels by factors, and multiply the weight by them before it is rounded.

    The product is the same; what rounding costs a channel is not. Linears that read one input have one set of factors, so that it is
    divided once. Factors are of the plan and weights are live: ones that are swapped or loaded anew are rounded as these were.
    """

    mixes: ClassVar[str] = ""
    """What :meth:`mixed` does, if it does anything."""

    def mixed(self, channels: Tensor) -> Tensor:
        """The last dimension of inputs and weights alike after they were divided: times an orthogonal matrix, which changes no product."""
        return channels

    @abstractmethod
    def factors(self, weights: Sequence[Tensor], moments: InputMoments) -> Tensor:
        """A factor above 0 for each input channel ``(in,)``; or several sets of them ``(sets, in)``, each with a weight of its own."""

    def number(self, program: Program) -> fx.Node:
        """Which of several sets a call reads, int64 ``(1,)``, in front of everything that is computed."""
        raise TypeError(f"{type(self).__name__} has several sets of factors and does not define number()")

    def learn(self, weights: Sequence[Tensor], moments: InputMoments) -> list[Learnt]:
        return [Learnt({"factors": self.factors(weights, moments)})] * len(weights)

    def recipe(self, site: SharedWeight, edit: Edits) -> Recipe:
        plain, factors = super().recipe(site, edit), self.learnt(site, edit.program, "factors")
        if factors is None:
            return plain
        width = shape(site.weight)[0 if site.transposed else 1]
        if factors.shape[-1] != width:
            raise PlanError(
                f"{self.name}: the plan has {factors.shape[-1]} factors for {site.path}, which reads {width} channels"
            )
        rows = 1 / self._shares(site, factors).float()

        def packed(w: Tensor, row: Tensor) -> tuple[Tensor, ...]:
            made = self.mixed((w.t() if site.transposed else w).float() * row)
            return plain.fn(made.t() if site.transposed else made)

        def balanced(w: Tensor) -> tuple[Tensor, ...]:
            (held,) = placed(w, [rows])
            if held.dim() == 1:
                return packed(w, held)
            return tuple(torch.stack(same) for same in zip(*(packed(w, row) for row in held), strict=True))

        return Recipe((*plain.key, "balanced", self._mix(width), tuple(factors.shape), digest(factors)), balanced)

    def choice(self, site: SharedWeight, use: Linear, edit: Edits) -> tuple[Selector | None, list[fx.Node]]:
        factors = self.learnt(site, edit.program, "factors")
        if factors is None or factors.dim() == 1:
            return super().choice(site, use, edit)
        return Numbered(), [self.number(edit.program)]

    def entering(self, site: SharedWeight, use: Linear, edit: Edits) -> fx.Node:
        x, factors = use.operand(), self.learnt(site, edit.program, "factors")
        if factors is None:
            return x
        mark = (self.name, self._mix(factors.shape[-1]), digest(factors))
        for user in x.users:
            if user.meta.get(_DIVIDED) == mark:
                return user
            if (known := user.meta.get(_MIXED)) is not None and known[0] == mark:
                return known[1]
        (shares,) = edit.program.tensors.artefact(
            site.weight, (self._shares(site, factors),), [f"{site.weight.name}_shares"]
        )
        first = min(use.node, *x.users)  # in front of all that read the input, for those that are divided alike
        if factors.dim() > 1:
            (shares,) = edit.run("chosen", _chosen, [shares, self.number(edit.program)], first)
        divided = edit.call(use.node, aten.mul.Tensor, x, shares)
        divided.meta[_DIVIDED] = mark
        if first < divided:
            first.prepend(divided)
        if self.mixes:
            place = divided.next
            (made,) = edit.run(mark[1], lambda x: [self.mixed(x.float()).to(x.dtype)], [divided], place)
            made.meta[_DIVIDED] = mark
            divided.meta.pop(_DIVIDED)
            divided.meta[_MIXED] = (mark, made)
            return made
        return divided

    def _mix(self, width: int) -> tuple[str, int]:
        return (self.mixes, width if self.mixes else 0)

    @staticmethod
    def _shares(site: SharedWeight, factors: Tensor) -> Tensor:
        """What the input is multiplied by, as it will be held: the weight's factors are the inverse of just these numbers."""
        return (1 / factors).to(value(site.weight).dtype)


def _chosen(sets: Tensor, number: Tensor) -> list[Tensor]:
    return [sets.index_select(0, number).squeeze(0)]


_MIXED = "accelpass_mixed"
"""Key of a node's ``meta``: by which pass and factors it divides, and what was made of it."""
_DIVIDED = "accelpass_divided"
"""Key of a node's ``meta``: by which pass and which factors it divides."""
