"""Blocks whose change of the stream is taken from an earlier denoising step, as it was or extrapolated."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, fx

from accelpass.ir.core.graph import aten
from accelpass.ir.core.program import Program
from accelpass.ir.transform.steps import StepBlock, recall_new
from accelpass.passes.core.staged import FULL, Site, appending, put
from accelpass.passes.step_cache.base import StepPass, keep, kept

_KEEP, _KEEP_SLOPE, _USE, _USE_SLOPE = "full+delta", "full+delta+slope", "delta", "delta+slope"


@dataclass(frozen=True)
class DeltaCache(StepPass):
    """At most steps a block adds what it added at the last step that was computed.

    Ma et al., "Model Reveals What to Cache", ICCV 2025 (ProfilingDiT): the schedule and the delta of its released code, which
    overwrites the delta at each computed step (its paper writes an accumulation). Which blocks are cached is the caller's choice
    (``include``, ``exclude``): the profiling of the paper needs a segmentation of the image and is not part of this.
    With ``predict="taylor"`` the delta goes on as it last changed: the first order of TaylorSeer (arXiv 2503.06923),
    on the delta in place of the features.

    Attributes:
        start: steps before the first that is cached; they are computed in full.
        interval: every how many steps after that a block is computed; 1 equals the dense model.
        predict: ``delta`` as it was, or ``taylor``.
    """

    start: int = 6
    interval: int = 6
    predict: Literal["delta", "taylor"] = "delta"

    name: ClassVar[str] = "delta_cache"
    summary: ClassVar[str] = "blocks add what they added at an earlier denoising step"
    paper: ClassVar[str] = "arXiv:2504.03140"
    identity: ClassVar[dict[str, Any] | None] = {"interval": 1}

    def __post_init__(self) -> None:
        if self.start < 0:
            raise self.fail("start", "a number of steps, 0 or more")
        if self.interval < 1:
            raise self.fail("interval", "a number of steps, 1 or more")

    def places(self, blocks: Sequence[StepBlock]) -> list[Site]:
        return [Site(block.path, block) for block in blocks]

    def horizon(self) -> int:
        return self.start + 3 * self.interval + 1

    def action(self, step: int, site: str, branch: int = 0) -> str:
        since = step - self.start
        if since < 0 or self.interval == 1:
            return FULL
        slopes = self.predict == "taylor" and since >= self.interval  # the second computed step has one before it
        if since % self.interval == 0:
            return _KEEP_SLOPE if slopes else _KEEP
        return _USE_SLOPE if slopes else _USE

    @property
    def exact_age(self) -> bool:
        return self.predict == "taylor"  # a slope is a change over so many steps

    def shown(self, action: str) -> str:
        return "reuse" if action in (_USE, _USE_SLOPE) else FULL

    def operand(self, name: str, step: int) -> Tensor | None:
        if not name.endswith(":since"):
            return None
        return torch.tensor(float((step - self.start) % self.interval))

    def acted(self, program: Program, site: Site, action: str) -> str:
        streams, results = site.streams, site.results
        if action in (_KEEP, _KEEP_SLOPE):
            with appending(max(results)) as build:
                deltas = [build(aten.sub.Tensor, new, old) for new, old in zip(results, streams, strict=True)]
                if action == _KEEP_SLOPE:
                    before = kept(program, site, "delta", results)
                    changes = [build(aten.sub.Tensor, now, old) for now, old in zip(deltas, before, strict=True)]
                    slopes = [build(aten.div.Tensor, c, float(self.interval)) for c in changes]
                    keep(program, site, "slope", slopes, results)
            keep(program, site, "delta", deltas, results)
            return "the block, and what it adds"
        added: list[fx.Node] = kept(program, site, "delta", results)
        with appending(max(results)) as build:
            if action == _USE_SLOPE:
                since = recall_new(program, f"{site.path}:since", (), torch.float32)
                slopes = kept(program, site, "slope", results)
                added = [
                    build(aten.add.Tensor, d, build(aten.mul.Tensor, s, since))
                    for d, s in zip(added, slopes, strict=True)
                ]
            made = [build(aten.add.Tensor, old, delta) for old, delta in zip(streams, added, strict=True)]
        put(site, made)
        return "what it added at an earlier step"
