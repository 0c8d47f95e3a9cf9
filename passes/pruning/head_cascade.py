"""SpAtten's cascade of heads: those whose outputs were smallest in all layers so far are computed in no later one (arXiv 2012.09852)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor, fx

from accelpass.ir.analyses.structure.linear import linears
from accelpass.ir.attention.recognition.detect import detect
from accelpass.ir.core.graph import known, value, written_inputs
from accelpass.ir.core.program import Program
from accelpass.ir.kv.sites import kv_sites
from accelpass.ir.transform.changed_axes import CannotShrink
from accelpass.ir.transform.kept import Picked
from accelpass.ir.transform.real_tokens import NoTokens, real_tokens
from accelpass.ir.transform.shrink import shrink
from accelpass.ir.transform.splice import inserted
from accelpass.passes.core.base import Done, Skip, Take, Verdict
from accelpass.passes.core.site_pass import Edits, SitePass
from accelpass.passes.pruning.structured import Heads


@dataclass(eq=False)
class Cascade:
    """What goes from layer to layer: how many heads of ``size`` go on, their numbers and their scores; None for all, and before the first.

    Attributes:
        real: which tokens are no padding, bool ``(batch, tokens)``; None before a mask was seen.
    """

    size: int = 0
    count: int | None = None
    rows: fx.Node | None = None
    score: fx.Node | None = None
    real: fx.Node | None = None


@dataclass(frozen=True)
class Layer:
    """The heads of one layer of several, ``number`` from 0; ``left``: the share of them that go on behind it."""

    heads: Heads
    left: float
    is_last: bool
    cascade: Cascade = field(compare=False)

    @property
    def path(self) -> str:
        return self.heads.path


@dataclass(frozen=True)
class HeadCascade(SitePass):
    """Layer by layer, the heads whose outputs were smallest so far leave the model: no later layer has heads of their numbers.

    Wang et al., "SpAtten: Efficient Sparse Attention Architecture with Cascade Token and Head Pruning", HPCA 2021: cascade head
    pruning. A head's score is the sum of the absolute values of its output, over tokens, channels and the layers so far; of H
    heads ``ceil(r * H)`` go on from a layer, where r falls evenly from 1 behind the first layers to ``keep`` behind the last. A
    head that has left is computed nowhere: its rows of later layers' query, key, value and output weights are not multiplied.
    These are cut as the graph runs, which copies what is left of them, so it pays where many tokens come at once.

    Which heads go is chosen anew for each call, by all its tokens; sequences of one call choose together (inferred), as they
    multiply one weight; padding counts as nothing. Heads that share keys and values stay or go together, by the sum of their scores (inferred; the paper has
    no such heads). For encoders, and prompts without a cache.

    Attributes:
        keep: share of the heads that is left behind the last layer but for its own; 1 is the dense model.
        dense: share of the layers, the first ones, that have all heads (the paper's 30 %; inferred).

    Raises:
        OptionError: a share out of range.
    """

    keep: float = 0.75
    dense: float = 0.3

    name: ClassVar[str] = "head_cascade"
    phase: ClassVar[str] = "structure"
    summary: ClassVar[str] = "heads whose outputs were smallest in the layers so far are computed in no later layer"
    paper: ClassVar[str] = "SpAtten, arXiv 2012.09852"
    identity: ClassVar[dict[str, Any] | None] = {"keep": 1.0}
    edits: ClassVar[frozenset[str]] = frozenset({Heads.aspect})
    reads: ClassVar[frozenset[str]] = frozenset({"block.steps"})
    nothing: ClassVar[str] = "no attention was recognised in this graph"
    for_all_sites: ClassVar[tuple[str, ...]] = ("keep", "dense")

    def __post_init__(self) -> None:
        if not 0 < self.keep <= 1:
            raise self.fail("keep", "a share of the heads above 0, at most 1, which is the dense model")
        if not 0 <= self.dense <= 1:
            raise self.fail("dense", "a share of the layers from 0 to 1")
        super().__post_init__()

    def rates(self, layers: int) -> list[float]:
        """The share of all heads that goes on behind each layer; none leave behind the last."""
        first = math.ceil(self.dense * layers)
        falls = [1 + (self.keep - 1) / (layers - first) * (n - first + 1) for n in range(first, layers)]
        return [1.0] * first + falls

    def find(self, program: Program) -> list[Layer]:
        if _has_cache(program):
            return []
        of = {linear.node: linear for linear in program.analysis(linears)}
        found = [a for a in program.analysis(detect) if a.node is not None and a.spec.kind != "cross"]
        cascade, rates = Cascade(), self.rates(len(found))
        return [
            Layer(Heads(a, None if a.o_proj is None else of.get(a.o_proj)), rate, n == len(found) - 1, cascade)
            for n, (a, rate) in enumerate(zip(found, rates, strict=True))
        ]

    def whole(self, program: Program, sites: Sequence[Layer]) -> str | None:
        if _has_cache(program):
            return (
                "it keeps keys and values for later tokens, which would want those of heads that left; call the model without a "
                "cache (use_cache=False)"
            )
        return super().whole(program, sites)

    def check(self, site: Layer, program: Program) -> Verdict:
        heads, cascade = site.heads, site.cascade
        if heads.reader is None:
            return Skip("what reads the heads was not recognised")
        found = heads.dimension(program)
        if len(found) != 1 or not isinstance(found[0].size, int):
            return Skip("there is one head" if not found else "how its heads lie was not recognised")
        if cascade.count is None:
            cascade.count = cascade.size = found[0].size
        if found[0].size != cascade.size:
            return Skip(f"it has {found[0].size} heads with keys of their own, and the layers before {cascade.size}")
        return self._counted(site, program)

    def _counted(self, site: Layer, program: Program) -> Verdict:
        """Whether it can be told which tokens' outputs count."""
        out, cascade = value(site.heads.attention.node), site.cascade
        if out.dim() != 4:
            return Skip(f"its output is {out.dim()}-dimensional, not (batch, heads, tokens, d)")
        if site.heads.attention.spec.bias != "tensor":
            return Take()
        try:
            cascade.real = real_tokens(program)[0] if cascade.real is None else cascade.real
        except NoTokens as cause:
            return Skip(f"its mask may hide padding, which would be counted: {cause}")
        shape = value(cascade.real).shape
        if not known(shape[0] == out.shape[0]) or not known(shape[1] == out.shape[2]):
            return Skip("its mask may hide padding, and its tokens are not those of the call")
        return Take()

    def rewrite(self, site: Layer, edit: Edits) -> Done | Skip:
        program, cascade, heads = edit.program, site.cascade, site.heads
        (axis,) = heads.dimension(program)
        size, node = int(axis.size), heads.attention.node
        assert node is not None and cascade.count is not None
        if cascade.rows is not None:
            try:
                shrink(program, axis, Picked.by_node(cascade.rows), heads.region(program))
            except CannotShrink as cause:
                return Skip(str(cause))
        said = heads.said(size, cascade.count)
        if site.is_last:
            return Done(said)
        real = cascade.real if heads.attention.spec.bias == "tensor" else None
        more = [n for n in (real, cascade.score) if n is not None]
        scored = _scored(heads.attention.spec.groups, real is not None)
        (cascade.score,) = inserted(program, node.next, scored, node, *more)
        count = max(1, math.ceil(site.left * size))
        if count < cascade.count:
            rows = [] if cascade.rows is None else [cascade.rows]
            made = inserted(program, cascade.score.next, _choice(count), cascade.score, *rows)
            cascade.score, cascade.rows = made
            cascade.count = count
        return Done(said)


def _has_cache(program: Program) -> bool:
    return bool(program.analysis(kv_sites)) or bool(written_inputs(program.graph))


def _scored(groups: int, is_masked: bool) -> Any:
    def run(out: Tensor, *more: Tensor) -> list[Tensor]:
        """What heads, or groups of them, gave before and give here, ``(heads,)``; ``more``: which tokens count, the score before."""
        own = out.float().abs()
        if is_masked:
            own = own.masked_fill(more[0].logical_not()[:, None, :, None], 0.0)
        here = own.sum((0, 2, 3)).unflatten(0, (-1, groups)).sum(-1)
        return [here + more[-1] if len(more) > is_masked else here]

    return run


def _choice(count: int) -> Any:
    def run(score: Tensor, *rows: Tensor) -> list[Tensor]:
        """Scores and numbers of the heads that go on, ascending; of equal scores the first."""
        chosen = score.argsort(descending=True, stable=True)[:count].sort().values
        return [score[chosen], rows[0][chosen] if rows else chosen]

    return run
