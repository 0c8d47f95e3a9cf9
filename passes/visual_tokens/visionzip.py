"""VisionZip: the tokens that the class token looks at, and a few that sum up the others (arXiv 2412.04467)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from accelpass.ir.analyses.structure.vision import Entry, Tower
from accelpass.ir.attention.spec.op import attend, spec_of
from accelpass.ir.attention.spec.spec import AttentionSpec
from accelpass.ir.core.graph import value
from accelpass.ir.core.program import Program
from accelpass.ir.transform.sequence.prompt import NoPrompt
from accelpass.ir.transform.splice import inserted
from accelpass.passes.token_pruning.choice import highest
from accelpass.passes.visual_tokens.arrangement import Arrangement
from accelpass.passes.visual_tokens.visual import Left, VisualFilter, attention_of, class_attention


@dataclass(frozen=True)
class VisionZip(VisualFilter):
    """Of each image the language model reads a share of tokens: dominant ones, and contextual ones merged from the rest.

    Yang et al., "VisionZip: Longer is Better but Not Necessary in Vision Language Models". Dominant are the patches to which the
    class token pays most in the tower's last block, the sum over heads, and the class token itself, which stands first
    (authors' code). Of the rest every so many-th is a contextual token; each other goes to the one whose key, the mean over
    heads, is most alike, and their mean is added to it (authors' code). A tower without a class token is ranked by what all
    patches together pay to each (paper, appendix).

    The merged tokens are put in the places of the dominant patches, and of those that others were merged into (inferred: the
    paper's text closes up, so places are nothing but an order).

    Attributes:
        keep: share of an image's tokens that is read, the class token counted.
        contextual: share of these that are contextual.
    """

    keep: float = 0.11
    contextual: float = 0.16

    name: ClassVar[str] = "visionzip"
    summary: ClassVar[str] = "a language model reads the visual tokens that the class token looks at, and merged others"
    paper: ClassVar[str] = "VisionZip, arXiv 2412.04467"
    identity: ClassVar[dict[str, Any] | None] = {"keep": 1.0}

    def __post_init__(self) -> None:
        if not 0 < self.keep <= 1:
            raise self.fail("keep", "a share above 0, at most 1 (1 leaves out nothing)")
        if not 0 <= self.contextual < 1:
            raise self.fail("contextual", "a share of what is kept, from 0, below 1")

    def counts(self, patches: int) -> tuple[int, int]:
        """Of an image with so many patches: dominant tokens (the class token among them), contextual ones."""
        kept = max(1, int(patches * self.keep))
        merged = min(int(kept * self.contextual), kept - 1)
        return kept - merged, merged

    def leave(self, program: Program, tower: Tower, before: fx.Node) -> Left:
        dominant, contextual = self._counted(tower, tower.patches)
        scores, keys = self._looked_at(program, tower, before)
        run = partial(zipped, tower.first, dominant, contextual)
        stream, places = inserted(program, before, run, tower.end, keys, scores)
        return Left(places, stream)

    def leave_units(self, program: Program, tower: Tower, entry: Entry, given: Arrangement) -> Left:
        """Of tokens that are made of several patches each: by the sums of their attention and the means of their keys.

        They are merged behind the projector, and the class token, which has no place there, is not read (inferred: the paper's
        models have a token for each patch).
        """
        if not bool(given.present.all()):
            raise NoPrompt(f"{tower.path}: images have padding, which has no place in the text; use hired or fastv")
        dominant, contextual = self._counted(tower, len(given.members))
        scores, keys = self._looked_at(program, tower, entry.node)
        width = value(entry.node).shape[-1]
        run = partial(_zipped_units, given, tower.first, width, dominant, contextual)
        stream, places = inserted(program, entry.node, run, entry.features, keys, scores)
        return Left(places, stream)

    def _counted(self, tower: Tower, tokens: int) -> tuple[int, int]:
        dominant, contextual = self.counts(tokens)
        if dominant + contextual >= tokens:
            raise NoPrompt(f"{tower.path}: all of its {tokens} patches are read")
        return dominant, contextual

    def _looked_at(self, program: Program, tower: Tower, before: fx.Node) -> tuple[fx.Node, fx.Node]:
        """What is paid to each patch, ``(images, patches)``, and the keys of all tokens in the last block."""
        node = attention_of(tower, -1)
        keys = node.args[1]
        assert isinstance(keys, fx.Node)
        if tower.first:
            return class_attention(program, tower, -1, before), keys
        operands = [*node.args[:3], *node.args[3]]
        return inserted(program, before, partial(_paid, spec_of(node)), *operands)[0], keys


def _zipped_units(
    given: Arrangement, first: int, width: int, dominant: int, contextual: int, features: Tensor, keys: Tensor, scores: Tensor
) -> list[Tensor]:  # fmt: skip
    """:func:`zipped` of the tokens behind a projector."""
    of = torch.tensor(given.members.tolist(), device=features.device)
    at = torch.tensor(given.place_of(), device=features.device)
    tokens = features.reshape(-1, width).index_select(0, at).view(given.images, -1, width)
    return zipped(0, dominant, contextual, tokens, keys[:, :, first:][:, :, of].mean(3), scores[:, of].sum(-1))


def zipped(first: int, dominant: int, contextual: int, x: Tensor, keys: Tensor, scores: Tensor) -> list[Tensor]:
    """The tokens that are left, ``(images, dominant + contextual, channels)``, and their places among all patches.

    Args:
        first: tokens in front of the patches.
        x: the tower's stream, ``(images, tokens, channels)``; keys: ``(images, heads, tokens, d)``; scores: ``(images, patches)``.
    """
    patches = x[:, first:]
    images, count, width = patches.shape
    top = highest(scores, dominant - bool(first))
    rest = torch.ones_like(scores, dtype=torch.bool).scatter(1, top, False)
    others = rest.long().sort(dim=1, descending=True, stable=True).indices[:, : count - top.shape[1]]
    metric = F.normalize(keys[:, :, first:].float().mean(1), dim=-1)
    kept = [x[:, :1]] if first else []
    kept.append(patches.gather(1, top.unsqueeze(-1).expand(-1, -1, width)))
    standing = top
    if contextual:
        step = max(1, others.shape[1] // contextual)
        at = torch.arange(0, others.shape[1], step, device=x.device)[:contextual]
        is_target = torch.zeros(others.shape[1], dtype=torch.bool, device=x.device).index_fill(0, at, True)
        away = is_target.long().sort(stable=True).indices[: others.shape[1] - contextual]
        targets, going = others[:, at], others[:, away]
        alike = torch.matmul(_rows(metric, going), _rows(metric, targets).mT)
        to = F.one_hot(alike.argmax(-1), contextual).to(x.dtype)
        sums = torch.matmul(to.mT, _rows(patches, going))
        kept.append(_rows(patches, targets) + sums / to.sum(1).clamp_min(1).unsqueeze(-1))
        standing = torch.cat([top, targets], 1)
    free = torch.ones_like(scores, dtype=torch.bool).scatter(1, standing, False)
    if first:  # the class token takes the place of a patch that is left out
        standing = torch.cat([standing, free.long().argmax(1, keepdim=True)], 1)
    places = standing.sort(-1).values + count * torch.arange(images, device=x.device).unsqueeze(-1)
    return [torch.cat(kept, 1), places.flatten()]


def _rows(x: Tensor, rows: Tensor) -> Tensor:
    return x.gather(1, rows.unsqueeze(-1).expand(-1, -1, x.shape[-1]))


def _paid(spec: AttentionSpec, q: Tensor, k: Tensor, v: Tensor, *extras: Tensor) -> list[Tensor]:
    """What all patches pay to each, summed over heads: ``(images, patches)``."""
    _, found = attend(q, k, v, extras, replace(spec, statistics=frozenset({"column_sums"})))
    return [found["column_sums"].sum(1)]
