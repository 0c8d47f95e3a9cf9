"""ToMe: in each block of a vision tower, the tokens that are most alike become one (arXiv 2210.09461)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from accelpass.ir.analyses.structure.block import Block
from accelpass.ir.analyses.structure.vision import PACKED, Tower, vision
from accelpass.ir.attention.spec.op import set_spec, spec_of
from accelpass.ir.attention.spec.spec import Step
from accelpass.ir.core.graph import value
from accelpass.ir.core.program import Program
from accelpass.ir.transform.sequence.removal import Merge, ShrinkingSequence
from accelpass.ir.transform.splice import inserted
from accelpass.ir.transform.steps import patches_went
from accelpass.ir.transform.tokens import CannotCut, stretches_between
from accelpass.passes.core.base import Done, Skip
from accelpass.passes.core.site_pass import Edits, SitePass


@dataclass(frozen=True)
class ToMe(SitePass):
    """Merge ``merge`` tokens in each block of a vision tower, between attention and MLP.

    Bolya et al., "Token Merging: Your ViT But Faster". Tokens are dealt alternately into two sets. Each of the first finds the
    one of the second whose key is most alike (cosine, the mean over heads); the ``merge`` best pairs become one token, the mean
    of what they are made of (section 3, appendix D). Attention counts a token as often as it has patches (proportional
    attention, equation 1). Class and register tokens are not merged. No more than half of the patches merge in one block.

    What follows the tower reads as many tokens as there were, each patch as the token that it went into (inferred, after the
    authors' token merging for Stable Diffusion, arXiv 2303.17604). All counts are known before, so the graph stays static.

    Attributes:
        merge: tokens that are merged in each block; 0 merges none. The paper takes 8 to 16 for 197 tokens of 12 blocks.
        proportional: add the logarithm of how many patches a key stands for to the scores.
    """

    merge: int = 8
    proportional: bool = True

    name: ClassVar[str] = "tome"
    phase: ClassVar[str] = "structure"
    summary: ClassVar[str] = "merge the tokens of a vision tower that are most alike, block by block"
    paper: ClassVar[str] = "Token Merging, arXiv 2210.09461"
    identity: ClassVar[dict[str, Any] | None] = {"merge": 0}
    edits: ClassVar[frozenset[str]] = frozenset({"tower.tokens"})
    nothing: ClassVar[str] = "no vision tower was recognised in this graph"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.merge < 0:
            raise self.fail("merge", "a number of tokens for each block, 0 for none")

    def find(self, program: Program) -> Sequence[Tower]:
        found: Sequence[Tower] = program.analysis(vision).towers
        return found

    def rewrite(self, site: Tower, edit: Edits) -> Done | Skip | None:
        tower = next(
            (t for t in self.find(edit.program) if t.path == site.path), site
        )  # an earlier tower's edits made it anew
        if tower.is_packed:
            return Skip(PACKED)
        if not isinstance(tower.tokens, int):
            return Skip(f"how many tokens an image has, only run time knows ({tower.tokens})")
        if not self.merge:
            return Skip("merge=0 merges no tokens")
        if tower.patches < 2:
            return Skip(f"{tower.patches} patch of an image cannot be merged with another")
        try:
            left = self._merged(edit.program, tower)
        except CannotCut as cause:
            return Skip(str(cause))
        return Done(f"{tower.tokens} tokens become {left} over {len(tower.blocks)} blocks")

    def _merged(self, program: Program, tower: Tower) -> int:
        streams = [tower.start, *(_after_attention(block) for block in tower.blocks)]
        if streams[-1] is not tower.end:
            streams.append(tower.end)
        found = stretches_between(program, streams, [*([b] for b in tower.blocks), []][: len(streams) - 1])
        run, size, went = ShrinkingSequence(program, found), None, list[fx.Node]()
        for stretch in found[1:]:
            tokens = value(run.stream).shape[1]
            count = min(self.merge, (tokens - tower.first) // 2)
            keys, first = run.attentions[-1].args[1], tower.first
            (place,) = run.make(partial(_placed, first, count), keys)
            went += run.make(partial(_went, first), place, *went[-1:])
            if size is None:
                size = run.make(lambda x: [torch.ones_like(x[..., :1], dtype=torch.float32)], run.stream)[0]
            merged, size = run.make(partial(merged_rows, count), run.stream, size, place)
            run.go_on(stretch, Merge(merged, place))
            if self.proportional and run.attentions:
                self._weigh(run, run.attentions, size)
        left = value(run.stream).shape[1]
        run.finish()
        for block, place in zip(tower.blocks, went, strict=True):
            patches_went(program, block.path, place)
        return int(left)

    @staticmethod
    def _weigh(run: ShrinkingSequence, attentions: Sequence[fx.Node], size: fx.Node) -> None:
        """Let keys count as often as they have patches."""
        for node in attentions:
            (bias,) = inserted(run.program, node, _weight, size, node.args[0])
            spec, extras = spec_of(node), list(node.args[3])
            steps = (Step("add", extra=len(extras)), *spec.steps)
            node.args = (*node.args[:3], [*extras, bias], *node.args[4:])
            set_spec(node, replace(spec, steps=steps, bias="tensor"))


def pairs(keys: Tensor, first: int, count: int) -> Tensor:
    """Into which row each token goes: int64 ``(images, tokens)``; tokens that are merged, with the one that they are merged into.

    Rows are ordered as in the paper's code: the ``first`` tokens, what is left of one half of the patches, the other half.

    Args:
        keys: ``(images, heads, tokens, d)``; count: how many tokens are merged.
    """
    k = torch.nn.functional.normalize(keys.float().mean(1), dim=-1)
    tokens = torch.arange(k.shape[1], device=k.device)
    one, other = tokens[(first + 1) // 2 * 2 :: 2], tokens[first // 2 * 2 + 1 :: 2]
    if not other.shape[0]:  # one patch is left
        return tokens.repeat(k.shape[0], 1)
    best, partner = torch.matmul(k[:, one], k[:, other].mT).max(-1)
    order = best.sort(dim=-1, descending=True, stable=True).indices
    gone, left = order[:, :count], order[:, count:].sort(-1).values
    place = tokens.repeat(k.shape[0], 1)  # the first tokens stay where they are
    behind = torch.arange(left.shape[1], device=k.device) + first
    place = place.scatter(1, one[left], behind.expand_as(left))
    there = torch.arange(other.shape[0], device=k.device) + first + left.shape[1]
    place = place.scatter(1, other.expand(k.shape[0], -1), there.expand(k.shape[0], -1))
    return place.scatter(1, one[gone], there[partner.gather(1, gone)])


def merged_rows(count: int, x: Tensor, size: Tensor, place: Tensor) -> list[Tensor]:
    """The mean of the rows that go into each place, each as often as it has patches; and how many patches that are.

    Args:
        count: how many rows are merged into others.
        x: ``(images, tokens, channels)``; size: of each row, float32 ``(images, tokens, 1)``.
    """
    rows = x.shape[1] - count
    at = place.unsqueeze(-1)
    whole = torch.zeros((x.shape[0], rows, 1), dtype=size.dtype, device=x.device).scatter_add(1, at, size)
    total = torch.zeros((x.shape[0], rows, x.shape[2]), dtype=size.dtype, device=x.device)
    total = total.scatter_add(1, at.expand_as(x), x * size)
    return [(total / whole).to(x.dtype), whole]


def _placed(first: int, count: int, keys: Tensor) -> list[Tensor]:
    return [pairs(keys, first, count)]


def _went(first: int, place: Tensor, *before: Tensor) -> list[Tensor]:
    """Into which row each patch went in this block and those before, ``(images, patches)``."""
    return [place.gather(1, before[0]) if before else place[:, first:]]


def _weight(size: Tensor, q: Tensor) -> list[Tensor]:
    return [size.log().to(q.dtype).mT.unsqueeze(1)]


def _after_attention(block: Block) -> fx.Node:
    """The stream between attention and MLP; after both where one branch holds them."""
    return next(s.output for s in block.sublayers if s.attentions)
