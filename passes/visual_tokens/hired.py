"""HiRED: tiles of an image get tokens by how much of it the class token finds there (arXiv 2408.10945)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from accelpass.ir.analyses.structure.vision import Entry, Tower
from accelpass.ir.core.graph import value
from accelpass.ir.core.program import Program
from accelpass.ir.transform.sequence.prompt import NoPrompt
from accelpass.ir.transform.splice import inserted
from accelpass.passes.token_pruning.choice import ranks
from accelpass.passes.visual_tokens.arrangement import Arrangement
from accelpass.passes.visual_tokens.visual import Left, VisualFilter, class_attention


@dataclass(frozen=True)
class HiRED(VisualFilter):
    """A budget of visual tokens is shared out over the tiles of each image, and spent in each by the class token's attention.

    Arif et al., "HiRED: Attention-Guided Token Dropping for Efficient Inference of High-Resolution Vision-Language Models". The
    first tile is the whole image at low resolution: it gets ``alpha`` of the budget. Its patches that the class token attends to
    most in block ``first`` say how much of the image lies in which of the other tiles, and these share the rest accordingly. In
    each tile the patches go on to which the class token pays most in the tower's last block. An image of one tile has the
    whole budget. What rounding leaves over goes to the best of the patches that are left, so that the number is always the same
    (inferred).

    Patches are attributed to tiles by where they lie; the authors' code cuts the row-major list into pieces, which is the same
    for tiles that stand one above the other (``chunks``).

    Attributes:
        keep: share of all visual tokens that is read.
        alpha: share of these for the whole image; 1 reads nothing of the tiles.
        rows, columns: of the tiles behind the whole image; 1 and 1 for none: each image that the tower sees is one.
        first: block whose attention shares out the budget, from 0.
        chunks: attribute patches as the authors' code does.
    """

    keep: float = 0.2
    alpha: float = 0.5
    rows: int = 1
    columns: int = 1
    first: int = 0
    chunks: bool = False

    name: ClassVar[str] = "hired"
    summary: ClassVar[str] = "a budget of visual tokens over the tiles of an image, by the class token's attention"
    paper: ClassVar[str] = "HiRED, arXiv 2408.10945"
    identity: ClassVar[dict[str, Any] | None] = {"keep": 1.0}

    def __post_init__(self) -> None:
        if not 0 < self.keep <= 1:
            raise self.fail("keep", "a share above 0, at most 1 (1 leaves out nothing)")
        if not 0 <= self.alpha <= 1:
            raise self.fail("alpha", "a share from 0 to 1")
        for side in ("rows", "columns"):
            if getattr(self, side) < 1:
                raise self.fail(side, "a number of tiles, at least 1")
        if self.first < 0:
            raise self.fail("first", "the number of a block, from 0")

    @property
    def tiles(self) -> int:
        """Of one image, the whole image among them."""
        return 1 if self.rows * self.columns == 1 else 1 + self.rows * self.columns

    def leave(self, program: Program, tower: Tower, before: fx.Node) -> Left:
        plain = Arrangement.plain(value(tower.end).shape[0], tower.patches)
        return self._shared_out(program, tower, before, plain)

    def leave_units(self, program: Program, tower: Tower, entry: Entry, given: Arrangement) -> Left:
        return self._shared_out(program, tower, entry.node, given)

    def _shared_out(self, program: Program, tower: Tower, before: fx.Node, given: Arrangement) -> Left:
        images, units = given.images, len(given.members)
        if not tower.first:
            raise NoPrompt(
                f"{tower.path}: it has no class token, by whose attention tokens are chosen; use visionzip or fastv"
            )
        if self.first >= len(tower.blocks):
            raise NoPrompt(f"first={self.first}: {tower.path} has {len(tower.blocks)} blocks")
        if images % self.tiles:
            raise NoPrompt(
                f"{tower.path}: {images} tiles are no images of {self.tiles} (rows={self.rows}, columns={self.columns} and the "
                "whole image)"
            )
        if self.tiles > 1 and tower.grid is None:
            raise NoPrompt(f"{tower.path}: where its patches lie cannot be told")
        present = given.present
        there, total = int(present.view(-1, self.tiles * units).sum(1).min()), int(self.tiles * units * self.keep)
        if total < 1 or total >= there:
            raise NoPrompt(f"{tower.path}: {max(total, 0)} of {there} tokens of an image would be read")
        early = class_attention(program, tower, self.first, before)
        late = class_attention(program, tower, len(tower.blocks) - 1, before)
        regions = self.regions(tower.patches, tower.grid)
        region = tuple(regions[first] for first in given.members[:, 0].tolist())
        run: Any = partial(shared_out, self.tiles, total, self.alpha, region)
        if not given.is_plain:
            run = partial(_of_units, run, given.members.tolist(), present.tolist())
        return Left(inserted(program, before, run, early, late)[0])

    def regions(self, patches: int, grid: tuple[Any, Any] | None) -> tuple[int, ...]:
        """In which tile each patch of the whole image lies, from 0."""
        if self.tiles == 1 or grid is None:
            return (0,) * patches
        if self.chunks:
            return tuple(i // (patches // (self.tiles - 1)) for i in range(patches))
        high, wide = int(grid[0]), int(grid[1])
        return tuple(
            y * self.rows // high * self.columns + x * self.columns // wide for y in range(high) for x in range(wide)
        )


def _of_units(
    run: Callable[..., list[Tensor]],
    members: list[list[int]],
    present: list[list[bool]],
    early: Tensor,
    late: Tensor,
) -> list[Tensor]:
    """:func:`shared_out` of visual tokens that are made of ``members`` each, whose attention is the sum of theirs."""
    of, there = torch.tensor(members, device=late.device), torch.tensor(present, device=late.device)
    early, late = (scores[:, of].sum(-1).masked_fill(there.logical_not(), -1.0) for scores in (early, late))
    return run(early, late, there)


def shared_out(
    tiles: int,
    total: int,
    alpha: float,
    region: tuple[int, ...],
    early: Tensor,
    late: Tensor,
    there: Tensor | None = None,
) -> list[Tensor]:
    """Which patches go on: ascending int64 ``(images * total,)``, of all tiles one after the other.

    Args:
        early, late: what the class token pays the patches of each tile, ``(images * tiles, patches)``.
        there: which patches the text has places for; the others' attention is below 0. None for all.
    """
    patches = early.shape[1]
    scores = late.view(-1, tiles, patches)
    rank = ranks(scores)
    budget = torch.full(scores.shape[:2], min(total, patches), dtype=torch.int64, device=late.device)
    if tiles > 1:
        whole = min(int(total * alpha), patches)
        rest = min(total - whole, (tiles - 1) * patches)
        hot = ranks(early.view(-1, tiles, patches)[:, 0]) < int(patches * (1 - alpha))
        lies_in = torch.tensor(region, device=late.device).clamp_max(tiles - 2)
        found = torch.nn.functional.one_hot(lies_in, tiles - 1).to(torch.float32)
        counts = torch.matmul(hot.to(torch.float32), found)
        shares = counts / counts.sum(1, keepdim=True).clamp_min(1)
        budget = torch.cat([budget[:, :1] * 0 + whole, (shares * rest).long().clamp_max(patches)], 1)
    if there is not None:
        budget = torch.minimum(budget, there.sum(-1).view(budget.shape))
    chosen = rank < budget.unsqueeze(-1)
    # What rounding left over: the best of the others.
    order = torch.where(chosen, scores + 2 * scores.abs().amax((1, 2), keepdim=True) + 1, scores).flatten(1)
    at = order.sort(dim=1, descending=True, stable=True).indices[:, :total].sort(-1).values
    images = torch.arange(at.shape[0], device=at.device).unsqueeze(-1)
    return [(at + images * tiles * patches).flatten()]
