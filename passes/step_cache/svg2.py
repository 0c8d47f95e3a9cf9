"""Sparse VideoGen 2: tokens that are alike attend as blocks, in clusters that go on from step to step (arXiv 2505.18875)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from accelpass.ir.attention import Attention
from accelpass.ir.attention.lowering.clustered import ClusteredAttention, cannot_cluster
from accelpass.ir.attention.spec.op import spec_of
from accelpass.ir.core.graph import known, value
from accelpass.ir.core.program import Program
from accelpass.ir.transform.resize import CannotResize
from accelpass.ir.transform.splice import inserted
from accelpass.ir.transform.steps import StepBlock, recall_new
from accelpass.passes.core.site_pass import Edits
from accelpass.passes.core.staged import FULL, Site
from accelpass.passes.step_cache.base import joined_tokens, keep, refuse_edited, why_no_window
from accelpass.passes.step_cache.each_call import EachCall

_WARM_FIRST, _WARM, _FIRST, _NEXT = "full+clusters", "full+clusters+recalled", "clusters", "clusters+recalled"
_KEPT = ("queries", "keys")


@dataclass(frozen=True)
class SVG2(EachCall):
    """Each cluster of queries reads the clusters of keys that matter to it, as blocks; clusters are found by k-means at each step.

    Yang et al., "Sparse VideoGen2: Accelerate Video Generation with Sparse Attention via Semantic-Aware Permutation", NeurIPS 2025.
    Queries and keys of each head are clustered; what a cluster of queries pays a cluster of keys is estimated from their centroids
    and the latter's size; those are read that make up ``top_p`` of it. Tokens are put in the order of their clusters, which are
    filled up to blocks, so that what is not read is not computed. k-means begins at tokens drawn at random, and at a later step
    of a sampling run where it ended at the step before. Defaults are those of the authors' code for Wan 2.1 (50 steps).

    In a model that is no denoiser (an encoder, a vision tower) each call clusters anew (inferred). Attention that is causal or
    masked stays dense. Text that attends together with the video is in no cluster: it reads all, and all clusters read it, as the authors
    treat HunyuanVideo's prompt tokens; a prompt that is padded under a mask is masked attention.

    Attributes:
        q_clusters, k_clusters: how many, of each head; an attention of no more tokens than ``k_clusters`` is left as it is.
        top_p: share of the estimated softmax that is read; 1 equals the dense model.
        least: share of the clusters of keys that is always read, those that are paid most.
        start: denoising steps before the first that is sparse.
        dense_layers: share of the blocks, the first ones, that stay dense.
        begin, again: iterations of k-means at the first and at later sparse steps.
        warm: cluster in the dense steps too, so that the first sparse one goes on from there (HunyuanVideo).
        block: tokens of a block; clusters should hold more, as each is filled up to whole blocks.
        seed: of the tokens that k-means begins at.
        text: tokens of text in front of the video's, or behind them with a minus (``-256``: HunyuanVideo's order), in each attention.

    Raises:
        OptionError: a number out of range.
    """

    q_clusters: int = 300
    k_clusters: int = 1000
    top_p: float = 0.9
    least: float = 0.1
    start: int = 10
    dense_layers: float = 0.03
    begin: int = 50
    again: int = 2
    warm: bool = False
    block: int = 64
    seed: int = 0
    text: int = 0

    name: ClassVar[str] = "svg2"
    summary: ClassVar[str] = "tokens that are alike attend as blocks, between clusters found by k-means"
    paper: ClassVar[str] = "Sparse VideoGen 2, arXiv 2505.18875"
    identity: ClassVar[dict[str, Any] | None] = {"top_p": 1.0}

    def __post_init__(self) -> None:
        for option in ("q_clusters", "k_clusters", "begin", "again", "block"):
            if getattr(self, option) < 1:
                raise self.fail(option, "1 or more")
        if not 0 < self.top_p <= 1:
            raise self.fail("top_p", "a share above 0, up to 1, which reads all")
        for option in ("least", "dense_layers"):
            if not 0 <= getattr(self, option) <= 1:
                raise self.fail(option, "a share from 0 to 1")
        if self.start < 0:
            raise self.fail("start", "a number of steps, 0 or more")
        self.check_sites()

    def places(self, blocks: Sequence[StepBlock]) -> list[Site]:
        dense = math.floor(self.dense_layers * len(blocks))
        return [Site(m.path, b, m) for b in blocks[dense:] for m in b.modules]

    def why_not(self, attention: Attention) -> str | None:
        why = cannot_cluster(attention, self.text)
        if why is not None:
            return why
        assert attention.node is not None
        batch, _, tokens, _ = value(attention.node.args[0]).shape
        if not isinstance(batch, int):
            return "the size of its batch is not known when it is compiled, and centroids are kept for each sequence"
        shown = tokens - abs(self.text)
        if known(shown <= self.k_clusters):
            return f"its {shown} tokens are no more than the clusters of keys"
        return None

    def horizon(self) -> int:
        return self.start + 2

    def action(self, step: int, site: str, branch: int = 0) -> str:
        if step < self.start:
            return (_WARM if step else _WARM_FIRST) if self.warm else FULL
        return _NEXT if step > (0 if self.warm else self.start) else _FIRST

    def acted(self, program: Program, site: Site, action: str) -> str:
        assert site.module is not None and site.module.attention.node is not None
        attention = site.module.attention.node
        parts = joined_tokens(program, attention)
        text = self.text if parts else 0
        why = self.why_not(site.module.attention)
        if why is None:
            why = _wrong_text(parts, text) if text else why_no_window(program, site)
        if why is not None:
            raise CannotResize(why)
        refuse_edited(spec_of(attention), self.name)
        how, scale = self._how(text), spec_of(attention).scale
        before = []
        if action in (_WARM, _NEXT):
            for name, operand, count in zip(_KEPT, attention.args[:2], (how.queries, how.keys), strict=True):
                batch, heads, _, width = value(operand).shape
                shape = (batch * heads, count, width)
                before.append(recall_new(program, f"{site.path}:{name}", shape, torch.float32))
        iterations = self.again if before else self.begin
        is_dense = action in (_WARM_FIRST, _WARM)

        def run(q: Tensor, k: Tensor, v: Tensor, *centroids: Tensor) -> list[Tensor]:
            known = (centroids[0], centroids[1]) if centroids else None
            if is_dense:
                return [made for _, made in how.centroids(q, k, known, iterations)]
            return how(q, k, v, scale, known, iterations)

        *out, asking, asked = inserted(program, attention, run, *attention.args[:3], *before)
        if out:
            attention.replace_all_uses_with(out[0])
        for name, node in zip(_KEPT, (asking, asked), strict=True):
            keep(program, site, name, [node], [node])
        return "dense, and centroids for the next step" if is_dense else self._said()

    def once(self, attention: Attention, edit: Edits) -> str:
        assert attention.node is not None
        text = self.text if attention.kind == "joint" else 0
        node, how, scale, many = attention.node, self._how(text), spec_of(attention.node).scale, self.begin
        run = lambda q, k, v: how(q, k, v, scale, None, many)[:1]  # noqa: E731
        (out,) = edit.run((how, scale, many), run, node.args[:3], node)
        edit.replace(node, out)
        return self._said()

    def _how(self, text: int) -> ClusteredAttention:
        return ClusteredAttention(self.q_clusters, self.k_clusters, self.top_p, self.least, self.block, self.seed, text)

    def _said(self) -> str:
        return (
            f"{self.q_clusters} clusters of queries read those of {self.k_clusters} of keys that are {self.top_p:.0%} of "
            "their estimated attention"
        )


def _wrong_text(parts: Sequence[tuple[Any, Any]], text: int) -> str | None:
    """Why there are not so many tokens of text where they should be, in an attention of joined tokens; None if there are."""
    size = parts[0 if text > 0 else -1][1]
    if known(size == abs(text)):
        return None
    where = "in front" if text > 0 else "behind"
    return (
        f"text={text}, and its tokens are joined of {', '.join(str(n) for _, n in parts)}, of which {size} are {where}"
    )
