"""FlowCut: a vision tower lets go of patches layer by layer, by what flows from them to the class token so far (arXiv 2505.19536)."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from accelpass.ir.analyses.structure.vision import Entry, Tower, vision
from accelpass.ir.attention.spec.op import spec_of
from accelpass.ir.core.program import Program
from accelpass.ir.errors import PassError, PlanError
from accelpass.ir.transform.sequence.prompt import NoPrompt
from accelpass.ir.transform.sequence.removal import Rows, ShrinkingSequence
from accelpass.ir.transform.splice import all_or_nothing
from accelpass.ir.transform.tap import Tap
from accelpass.ir.transform.tokens import CannotCut, stretches_between
from accelpass.passes.core.base import Calibrated, Run
from accelpass.passes.token_pruning.choice import highest, some
from accelpass.passes.visual_tokens.arrangement import Arrangement
from accelpass.passes.visual_tokens.visual import Left, VisualFilter, attention_of


@dataclass(frozen=True)
class FlowCut(VisualFilter, Calibrated):
    """Patches leave a vision tower layer by layer, and those that are left at its end are what the language model reads.

    Tong et al., "FlowCut: Rethinking Redundancy via Information Flow for Efficient Vision-Language Models", NeurIPS 2025. In each
    layer a patch scores what the class token pays it, and how like their values are, each as a share, times the sum of its value's
    magnitudes; half of a score is that of the layers before. After every other layer, and before the last, patches of least
    score leave: the more, the more of the class token's attention is on few of them (low entropy), and at the end as many
    as must. Without a class token a patch scores what the mean of all queries pays it, times its value's magnitudes: the authors' rule
    for Qwen2-VL, there inside the tower (inferred).

    How many leave after a layer follows the entropy of each call's own attention, the most of its images: the sizes between
    layers are then only known at run time, and one graph computes all of them. With the entropies of a plan
    (``accelpass.calibrate``; the mean over its images, in the dense tower), or with ``entropy`` as a number, all sizes are
    known before, which compiles faster and is not the paper's. Its second stage in an early layer of the language model, for
    images in tiles, is a pass of its own.

    Where a projector makes one visual token of several patches, these stay or leave together, by the sum of their scores (inferred);
    the projector then runs on all patches, and what it makes of those that have left is not read.

    Attributes:
        keep: share of an image's patches that is read.
        entropy: of attention in every layer, over that of one that is spread evenly: 0 to 1; None for each call's own, or a plan's.

    Raises:
        OptionError: a share out of range.
    """

    keep: float = 0.11
    entropy: float | None = None

    name: ClassVar[str] = "flowcut"
    summary: ClassVar[str] = "patches leave a vision tower layer by layer, by what flows from them to its class token"
    paper: ClassVar[str] = "FlowCut, arXiv 2505.19536"
    identity: ClassVar[dict[str, Any] | None] = {"keep": 1.0}

    def __post_init__(self) -> None:
        if not 0 < self.keep <= 1:
            raise self.fail("keep", "a share above 0, at most 1 (1 leaves out nothing)")
        if self.entropy is not None and not 0 <= self.entropy <= 1:
            raise self.fail(
                "entropy", "a share from 0, all of the attention on one patch, to 1, or None for each call's own"
            )

    def goal(self, patches: int) -> int:
        """How many patches of an image are read."""
        return max(1, int(patches * self.keep))

    def schedule(self, patches: int, entropies: Sequence[float]) -> dict[int, int]:
        """By number of a block behind which patches leave: how many go on. The last block's entropy is not read."""
        left, goal, rest = patches, self.goal(patches), len(entropies) - 2
        counts = {}
        for number, entropy in enumerate(entropies[:-1]):
            more = rest - number
            if more % 2 == 0 and left > goal:
                gone = left - goal if more == 0 else round((left - goal) / math.sqrt(more) * (1 - entropy**2))
                if gone:
                    counts[number] = left = left - gone
        return counts

    def leave(self, program: Program, tower: Tower, before: fx.Node) -> Left:
        return self._leave(program, tower, None)

    def leave_units(self, program: Program, tower: Tower, entry: Entry, given: Arrangement) -> Left:
        if not bool(given.present.all()):
            raise NoPrompt(
                f"{entry.features.name}: an image has patches that are padding and have no place in the text"
            )
        return self._leave(program, tower, given)

    def _leave(self, program: Program, tower: Tower, given: Arrangement | None) -> Left:
        units = _Units.of(tower, given)
        choices = self._choices(program, tower, units)
        if not choices:
            raise NoPrompt(f"{tower.path}: all of its {tower.patches} patches are read")
        ends = [*choices, len(tower.blocks) - 1]
        streams = [tower.start, *(tower.blocks[n].output for n in ends)]
        limits = [0, *(n + 1 for n in ends)]
        try:
            with all_or_nothing(program):
                found = stretches_between(program, streams, [tower.blocks[a:b] for a, b in itertools.pairwise(limits)])
                run, score, went = ShrinkingSequence(program, found), None, list[fx.Node]()
                for stretch, choose in zip(found[1:], choices.values(), strict=True):
                    for attention in run.attentions:
                        flow = partial(_flow, tower.first, spec_of(attention).scale, spec_of(attention).groups)
                        (score,) = run.make(flow, *attention.args[:3], *([] if score is None else [score]))
                    assert score is not None
                    rows = [] if run.rows is None else [run.rows]
                    chosen, score = run.make(choose, score, *run.attentions[-1].args[:2], *rows)
                    run.go_on(stretch, Rows(chosen))
                    assert run.rows is not None
                    went += run.make(partial(_went, tower.first, tower.patches), run.rows)
                assert run.rows is not None
                (places,) = run.make(partial(_Units.places, units), run.rows)
                if given is None:
                    (stream,) = run.make(lambda stream: [stream[:, tower.first :]], run.stream)
                else:
                    run.finish()
        except CannotCut as cause:
            raise NoPrompt(str(cause)) from cause
        shown = {tower.blocks[n].path: place for n, place in zip(choices, went, strict=True)}
        return Left(places, stream if given is None else None, shown)

    def _choices(self, program: Program, tower: Tower, units: _Units) -> dict[int, Callable[..., list[Tensor]]]:
        """By number of a block behind which patches leave: what chooses, of scores, queries, keys and rows, those that go on."""
        entropies, blocks = self._entropies(program, tower), len(tower.blocks)
        if entropies is not None:
            counts = self.schedule(units.count, entropies)
            return {n: partial(_Units.choice, units, count) for n, count in counts.items()}
        goal, rest = self.goal(units.count), blocks - 2
        if goal == units.count or rest < 0:
            return {}
        choices: dict[int, Callable[..., list[Tensor]]] = {}
        for n in range(rest % 2, rest, 2) if units.count > 2 else ():  # torch knows no size that is 1 or 2
            choices[n] = partial(_Units.own_choice, units, goal, rest - n, spec_of(attention_of(tower, n)).scale)
        return {**choices, rest: partial(_Units.choice, units, goal)}

    # --- calibration

    def calibrate(self, program: Program, run: Run) -> dict[str, Tensor]:
        """``flowcut/entropy/<tower>``: of each block, the mean over all images, float32 ``(blocks,)``."""
        towers = [tower for tower in program.analysis(vision).towers if not tower.is_packed]
        if not towers:
            raise PassError(
                "flowcut: no vision tower of (images, tokens, channels) was recognised; calibrate with the model's images"
            )
        made = {}
        for tower in towers:
            specs = [spec_of(attention_of(tower, n)) for n in range(len(tower.blocks))]
            taps = [
                Tap(f"{s.site}.q", partial(_entropy, tower.first, s.scale), also=partial(_keys, s.site)) for s in specs
            ]
            found = run.gather(taps, "how attention is spread over patches")
            sums = [found[f"{s.site}.q"] for s in specs]
            made[f"flowcut/entropy/{tower.path}"] = torch.stack([total / images for total, images in sums])
        return made

    def _entropies(self, program: Program, tower: Tower) -> list[float] | None:
        """Of each block, if they are known before; None for each call's own."""
        found = program.artefacts.get(f"flowcut/entropy/{tower.path}")
        if found is None:
            return None if self.entropy is None else [self.entropy] * len(tower.blocks)
        if found.shape != (len(tower.blocks),) or not bool(((found >= 0) & (found <= 1.001)).all()):
            raise PlanError(
                f"flowcut: the plan has entropies of {list(found.shape)} for {tower.path}, and this tower has {len(tower.blocks)} "
                "blocks, of a number from 0 to 1 each; calibrate again with this model"
            )
        return [float(h) for h in found.clamp(0, 1)]


def _paid(first: int, scale: float, q: Tensor, k: Tensor) -> Tensor:
    """What the class token, or without one the mean of all queries, pays each patch: float32 ``(images, patches)``."""
    query = q[:, :, :1] if first else q.mean(2, keepdim=True)
    keys = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
    return (torch.matmul(query.float(), keys.float().mT) * scale).softmax(-1)[:, :, 0, first:].mean(1)


def _flow(first: int, scale: float, groups: int, q: Tensor, k: Tensor, v: Tensor, *before: Tensor) -> list[Tensor]:
    """The score of each patch so far, float32 ``(images, patches)``."""
    paid, values = _paid(first, scale, q, k), v.float()
    size = values.repeat_interleave(groups, 1).mean(1)[:, first:].abs().sum(-1)
    score = paid * size
    if first:
        like = torch.matmul(values[:, :, :1], values.mT).softmax(-1)[:, :, 0, first:].mean(1)
        least = torch.finfo(torch.float32).tiny
        score = (paid / paid.sum(-1, True).clamp_min(least) + like / like.sum(-1, True).clamp_min(least)) * size
    return [0.5 * before[0] + 0.5 * score if before else score]


@dataclass(frozen=True)
class _Units:
    """The least that stays or leaves: patches, or the patches of one visual token.

    Attributes:
        first: tokens in front of the patches.
        count: of an image; each: patches of one.
        of_patch: the unit of each patch; empty where a unit is a patch.
    """

    first: int
    count: int
    each: int = 1
    of_patch: tuple[int, ...] = ()

    @classmethod
    def of(cls, tower: Tower, given: Arrangement | None) -> _Units:
        if given is None:
            return cls(tower.first, tower.patches)
        count, each = given.members.shape
        unit = torch.full((tower.patches,), -1)
        unit[given.members] = torch.arange(count).unsqueeze(-1)
        if (unit < 0).any():
            raise NoPrompt(f"{tower.path}: some of its patches are in no visual token")
        return cls(tower.first, count, each, tuple(unit.tolist()))

    def own_choice(
        self, goal: int, more: int, scale: float, score: Tensor, q: Tensor, k: Tensor, *rows: Tensor
    ) -> list[Tensor]:
        """As :meth:`choice`, of as many units as this call's entropies leave, ``more`` layers before the goal."""
        entropy, left = _spread(_paid(self.first, scale, q, k)), score.new_ones(score.shape[1]).sum() / self.each
        gone = ((left - goal) / math.sqrt(more) * (1 - entropy**2)).round().amax()
        gone = gone.nan_to_num(0.0)  # an image of NaN is no size: its results show it, and none leave here
        return self.choice(some((left - gone).clamp_min(goal), goal, self.count), score, q, k, *rows)

    def choice(self, count: Any, score: Tensor, q: Tensor, k: Tensor, *rows: Tensor) -> list[Tensor]:
        """The tokens that go on, ascending, those before the patches among them; and the scores of the patches."""
        best = highest(score if self.each == 1 else self._in_best(count, score, *rows), count * self.each)
        front = torch.arange(self.first, device=score.device).expand(score.shape[0], -1)
        return [torch.cat([front, best + self.first], 1), score.gather(1, best)]

    def _in_best(self, count: Any, score: Tensor, *rows: Tensor) -> Tensor:
        """1 for each patch of the ``count`` units with the highest sums, 0 for others."""
        unit = self._unit(*rows) if rows else score.new_tensor(self.of_patch).long().expand_as(score)
        total = score.new_zeros(score.shape[0], self.count).scatter_add(1, unit, score)
        there = torch.zeros_like(total).scatter(1, unit, 1.0) > 0
        best = highest(total.masked_fill(there.logical_not(), -torch.inf), count)
        return torch.zeros_like(total).scatter(1, best, 1.0).gather(1, unit)

    def _unit(self, rows: Tensor) -> Tensor:
        """The unit of each patch that is left, ``(images, left)``."""
        patches = rows[:, self.first :] - self.first
        return patches if not self.of_patch else rows.new_tensor(self.of_patch)[patches]

    def places(self, rows: Tensor) -> list[Tensor]:
        """The units that are left, of all images one after the other, ascending."""
        unit = self._unit(rows).sort(-1).values[:, :: self.each]
        own = torch.arange(rows.shape[0], device=rows.device).unsqueeze(-1) * self.count
        return [(unit + own).flatten()]


def _went(first: int, patches: int, rows: Tensor) -> list[Tensor]:
    """Into which row of the stream each patch went, ``(images, patches)``; -1 where it has left."""
    place = torch.full((rows.shape[0], first + patches), -1, dtype=torch.int64, device=rows.device)
    here = torch.arange(rows.shape[1], device=rows.device).expand(rows.shape[0], -1)
    return [place.scatter(1, rows, here)[:, first:]]


def _entropy(first: int, scale: float, q: Tensor, k: Tensor) -> Tensor:
    """Entropies of all images of a call, over that of even attention, and how many images: float32 ``(2,)``."""
    found = _spread(_paid(first, scale, q, k))
    return torch.stack([found.sum(), found.new_tensor(float(q.shape[0]))])


def _spread(paid: Tensor) -> Tensor:
    """Entropy of attention, over that of attention that is spread evenly: ``(images,)``."""
    share = paid / paid.sum(-1, True)
    even = torch.ones_like(share).sum(-1).clamp_min(2).log()
    return -(share * share.clamp_min(1e-12).log()).sum(-1) / even


def _keys(path: str, program: Program) -> list[Any]:
    """The keys that an attention of a tower reads."""
    towers: Sequence[Tower] = program.analysis(vision).towers
    nodes = [attention_of(tower, n) for tower in towers for n in range(len(tower.blocks))]
    return [node.args[1] for node in nodes if spec_of(node).site == path]
