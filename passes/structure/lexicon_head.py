"""The maximum over tokens of a head's scores, without the scores of all tokens (LexLIP, arXiv 2302.02908)."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from accelpass.ir.analyses.structure.pooled_head import PooledHead, pooled_heads
from accelpass.ir.core.graph import aten, hint, shape, value
from accelpass.ir.core.program import Program
from accelpass.ir.linear.largest import LINEAR_MAX, tiles, written
from accelpass.ir.linear.op import is_linear, linear_spec, operands_of
from accelpass.passes.core.base import Done, Skip, Take, Verdict
from accelpass.passes.core.site_pass import Edits, SitePass

PARTS = 32
"""Of the vocabulary, in a file: each is computed and reduced on its own."""


@dataclass(frozen=True)
class LexiconHead(SitePass):
    """Weights over a vocabulary, the maximum over a text's tokens of each word's score, a part of the vocabulary at a time.

    After Luo et al., "LexLIP: Lexicon-Bottlenecked Language-Image Pre-Training for Large-Scale Image-Text Retrieval", section 3.1:
    ``log(1 + max over tokens of relu(scores))``, with padding masked. Any pointwise steps before the maximum are taken whose operands
    are the same for all words (SPLADE's form, too). ``(batch, tokens, vocabulary)`` is never there. Words without a score above
    the others' need not be kept: ``topk`` leaves the largest weights of each text, which is what an inverted index holds.

    Attributes:
        topk: how many weights of a text are kept, the others are 0; None keeps all.
    """

    topk: int | None = None

    name: ClassVar[str] = "lexicon_head"
    phase: ClassVar[str] = "fusion"
    summary: ClassVar[str] = "the maximum over tokens of a vocabulary's scores, without the scores of all tokens"
    paper: ClassVar[str] = "LexLIP, arXiv 2302.02908"
    identity: ClassVar[dict[str, Any] | None] = {"topk": None}
    edits: ClassVar[frozenset[str]] = frozenset({"linear.kernel"})
    reads: ClassVar[frozenset[str]] = frozenset({"linear.weight"})
    nothing: ClassVar[str] = "no linear was found whose scores are only read for their maximum over tokens"

    def __post_init__(self) -> None:
        if self.topk is not None and self.topk < 1:
            raise self.fail("topk", "a number from 1, or None to keep all weights")
        super().__post_init__()

    def find(self, program: Program) -> list[PooledHead]:
        found: list[PooledHead] = program.analysis(pooled_heads)
        return found

    def check(self, site: PooledHead, program: Program) -> Verdict:
        if site.fault:
            return Skip(site.fault)
        if not is_linear(site.linear) and not program.tensors.is_constant(site.linear.args[1]):
            return Skip("the weight is no constant of the model")
        if is_linear(site.linear):
            if program.frontend == "export":
                return Skip("a file has no operator for the maximum of a packed linear; leave the weight as floats")
            spec = linear_spec(site.linear)
            if spec.by is not None or spec.low_rank:
                return Skip("one of several weights, or a residual of low rank: its rows are not apart")
        if written(site.steps, site.linear, site.beside) is None:
            return Skip(
                "a step between the scores and their maximum has an argument that is neither a number nor a tensor"
            )
        return Take()

    def rewrite(self, site: PooledHead, edit: Edits) -> Done:
        linear, beside = site.linear, site.beside
        steps = written(site.steps, linear, beside)
        assert steps is not None
        given = [*linear.args, None][:3]
        words = int(shape(linear)[-1])
        if edit.program.frontend == "export":
            run = partial(
                _in_parts, words=words, bias=given[2] is not None, steps=steps, dims=site.dims, keepdim=site.keepdim
            )
            operands = [n for n in given if isinstance(n, fx.Node)]
            key = (words, given[2] is not None, steps, site.dims, site.keepdim, len(beside))
            (made,) = edit.run(key, run, [*operands, *beside], site.result)
        else:
            spec = str(linear.args[3]) if is_linear(linear) else ""
            weights = operands_of(linear) if spec else [linear.args[1]]
            x, bias = given[0], given[2]
            made = edit.call(
                site.maximum, LINEAR_MAX, x, weights, bias, spec, beside, steps, list(site.dims), site.keepdim
            )
        scores, kept = value(linear), ""
        if self.topk is not None and self.topk < words:
            largest = edit.call(site.maximum, aten.topk.default, made, self.topk)
            values, at = (edit.call(site.maximum, operator.getitem, largest, n) for n in (0, 1))
            made = edit.call(
                site.maximum, aten.scatter.src, edit.call(site.maximum, aten.zeros_like.default, made), -1, at, values
            )
            kept = f", {self.topk} of them are kept"
        edit.replace(site.result, made)
        size = scores.element_size()
        for length in scores.shape:
            size *= hint(length)
        return Done(f"{words} words{kept}; {size / 1e6:.1f} MB of scores are not there at once")


def _in_parts(
    x: Tensor, weight: Tensor, *others: Tensor, words: int, bias: bool, steps: str, dims: tuple[int, ...], keepdim: bool
) -> list[Tensor]:
    own, beside = (others[0], others[1:]) if bias else (None, others)

    def scores(part: slice) -> Tensor:
        return F.linear(x, weight[part], None if own is None else own[part])

    return [torch.cat([*tiles(words, -(-words // PARTS), scores, beside, steps, dims, keepdim)], -1)]
