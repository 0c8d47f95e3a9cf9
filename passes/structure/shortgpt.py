"""Layers that change the stream least are taken out (ShortGPT, arXiv 2403.03853)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from accelpass.ir.core.program import Program
from accelpass.ir.errors import PassError
from accelpass.ir.transform.steps import decoder_stack
from accelpass.ir.transform.tap import Tap, point_name
from accelpass.ir.transform.tokens import CannotCut
from accelpass.passes.core.base import Calibrated, Run
from accelpass.passes.core.staged import Site
from accelpass.passes.structure.decoder_blocks import DecoderBlocks

INFLUENCE = "shortgpt/influence"


@dataclass(frozen=True)
class ShortGpt(DecoderBlocks, Calibrated):
    """Take whole layers out of a decoder, those with the least block influence.

    After Men et al., "ShortGPT: Layers in Large Language Models are More Redundant Than You Expect", section 3.1: the influence of a
    layer is 1 minus the mean cosine between the stream before and after it, over the tokens that ``accelpass.calibrate`` sees.
    Layer 0 always stays, as it tells how many tokens the cache holds (inferred). Nothing is trained afterwards.

    Attributes:
        remove: how many layers are taken out.
    """

    remove: int = 0

    fits_cache: ClassVar[bool] = False
    name: ClassVar[str] = "shortgpt"
    summary: ClassVar[str] = "layers that change the stream least are taken out"
    paper: ClassVar[str] = "ShortGPT, arXiv 2403.03853"
    identity: ClassVar[dict[str, Any] | None] = {"remove": 0}

    def __post_init__(self) -> None:
        if self.remove < 0:
            raise self.fail("remove", "a number of layers, from 0")
        super().__post_init__()

    def calibrate(self, program: Program, run: Run) -> dict[str, Tensor]:
        try:
            names = [point_name(block.path, "residual") for block in decoder_stack(program)]
        except CannotCut as cause:
            raise PassError(f"shortgpt: {cause}") from cause
        gathered = run.gather([Tap("residual", _cosines)], "block influence")
        missing = [name for name in names if name not in gathered]
        if missing:
            raise PassError(f"shortgpt: {missing[0]} was not seen")
        sums = torch.stack([gathered[name] for name in names])
        return {INFLUENCE: (1 - sums[:, 0] / sums[:, 1]).float()}

    def fixed(self, program: Program) -> bool:
        return True

    def spared(self, depth: int) -> Iterable[int]:
        return range(1, depth)

    def find(self, program: Program) -> list[Site]:
        if self.whole(program, ()) is not None:
            return []
        blocks = decoder_stack(program)
        out = set(self.least(program.artefacts[INFLUENCE], len(blocks)))
        return [Site(block.path, block) for block in blocks if block.number in out][::-1]

    def whole(self, program: Program, sites: Sequence[Site]) -> str | None:
        if not self.remove:
            return "no layer is to be taken out (remove=0)"
        if INFLUENCE not in program.artefacts:
            return "the plan has no block influence; make one with accelpass.calibrate(model, batches, passes=['shortgpt'])"
        return self.why_not(program)

    def least(self, influence: Tensor, depth: int) -> list[int]:
        """The layers to take out.

        Raises:
            OptionError: they are all that there are, or more.
        """
        if len(influence) != depth:
            raise PassError(f"shortgpt: the plan is for {len(influence)} layers, and this graph has {depth}")
        if self.remove >= depth:
            raise self.fail("remove", f"at most {depth - 1} of {depth} layers")
        order = influence[1:].argsort(stable=True) + 1
        return sorted(order[: self.remove].tolist())


def _cosines(before: Tensor, after: Tensor) -> Tensor:
    """``(2,)``: the sum of the cosines of all tokens, and how many tokens there are."""
    each = F.cosine_similarity(before.float(), after.float(), dim=-1)
    return torch.stack([each.sum(), torch.ones_like(each).sum()])
