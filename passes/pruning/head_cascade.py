"""SpAtten's cascade of heads: those whose outputs were smallest in all layers so far are computed in no later one (arXiv 2012.09852)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from accelpass.ir.analyses.structure.linear import linears
from accelpass.ir.attention.recognition.detect import detect
from accelpass.ir.core.graph import known, placeholders, value, written_inputs
from accelpass.ir.core.program import Program
from accelpass.ir.core.state import StateSpec
from accelpass.ir.kv.sites import KVSite, kv_sites
from accelpass.ir.transform.changed_axes import CannotShrink
from accelpass.ir.transform.kept import Picked
from accelpass.ir.transform.real_tokens import NoTokens, real_tokens
from accelpass.ir.transform.shrink import shrink
from accelpass.ir.transform.splice import inserted
from accelpass.passes.core.base import Done, Skip, Take, Verdict
from accelpass.passes.core.site_pass import Edits, SitePass
from accelpass.passes.kv_cache.base import NO_CACHE
from accelpass.passes.pruning.structured import Heads
from accelpass.passes.token_pruning.look import operands_of, visible


@dataclass(eq=False)
class Cascade:
    """What goes from layer to layer: how many heads of ``size`` go on, their numbers and their scores; None for all, and before the first.

    Attributes:
        real: which tokens are no padding, bool ``(batch, tokens)``; None before a mask was seen.
        cache: the first layer of the cache that remembers what the prompt chose; None without a cache.
    """

    cache: KVSite | None = None
    size: int = 0
    count: int | None = None
    rows: fx.Node | None = None
    score: fx.Node | None = None
    real: fx.Node | None = None

    @property
    def is_later(self) -> bool:
        """An earlier call has chosen."""
        return self.cache is not None and not self.cache.is_prompt


@dataclass(frozen=True)
class Layer:
    """The heads of one layer of several, ``number`` from 0; ``left``: the share of them that go on behind it."""

    heads: Heads
    number: int
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
    multiply one weight; padding counts as nothing (with a cache: what the last token may not see). Heads that share keys and
    values stay or go together, by the sum of their scores (inferred; the paper has no such heads). With an
    ``accelpass.KVCache`` the prompt chooses for all that comes after it (inferred; the paper's scores go on growing): each
    layer's cache holds its own heads alone, and later tokens attend by these. Their weights are multiplied whole, since cutting
    them for a token or a few would cost more than it saves.

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
        if _has_other_cache(program):
            return []
        sites = program.analysis(kv_sites)
        of = {linear.node: linear for linear in program.analysis(linears)}
        found = [a for a in program.analysis(detect) if a.node is not None and a.spec.kind != "cross"]
        cascade, rates = Cascade(sites[0] if sites else None), self.rates(len(found))
        return [
            Layer(Heads(a, None if a.o_proj is None else of.get(a.o_proj)), n, rate, n == len(found) - 1, cascade)
            for n, (a, rate) in enumerate(zip(found, rates, strict=True))
        ]

    def whole(self, program: Program, sites: Sequence[Layer]) -> str | None:
        if _has_other_cache(program):
            return f"it writes to a cache of another kind, which has room for all heads: {NO_CACHE}"
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
        return Take() if cascade.is_later else self._counted(site, program)

    def _counted(self, site: Layer, program: Program) -> Verdict:
        """Whether it can be told which tokens' outputs count."""
        out, cascade = value(site.heads.attention.node), site.cascade
        if out.dim() != 4:
            return Skip(f"its output is {out.dim()}-dimensional, not (batch, heads, tokens, d)")
        if site.heads.attention.spec.bias != "tensor":
            return Take()
        if cascade.cache is not None:
            return Take()  # those are that a prompt's last token may see, whatever the mask
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
        size = int(axis.size)
        assert cascade.count is not None
        if cascade.rows is not None:
            # A single token would copy more of the weights than it reads: these stay, and its cache has fewer heads.
            keep = Picked.by_node(cascade.rows, 0.0 if cascade.is_later else None)
            try:
                shrink(program, axis, keep, _cached(program, heads) if cascade.is_later else heads.region(program))
            except CannotShrink as cause:
                return Skip(str(cause))
        said = heads.said(size, cascade.count)
        if site.is_last:
            return Done(said)
        count = min(cascade.count, max(1, math.ceil(site.left * size)))
        if not cascade.is_later:
            self._score(site, edit, count)
        elif count < cascade.count:
            held = _remembered(edit, site, count)
            (cascade.rows,) = edit.run("recalled", _recalled, [held], placeholders(program.gm)[-1].next)
        cascade.count = count
        return Done(said)

    def _score(self, site: Layer, edit: Edits, count: int) -> None:
        """Add to what the heads gave, and choose ``count`` of those that are left."""
        program, cascade, attention = edit.program, site.cascade, site.heads.attention
        node = attention.node
        assert node is not None and cascade.count is not None
        if attention.spec.bias == "tensor" and cascade.real is None:
            operands, masks = operands_of(node)

            def seen(q: Tensor, k: Tensor, *extras: Tensor) -> list[Tensor]:
                return [visible(masks, q, k, extras)]

            (cascade.real,) = inserted(program, node.next, seen, *operands)
        real = cascade.real if attention.spec.bias == "tensor" else None
        more = [n for n in (real, cascade.score) if n is not None]
        after = node.next if real is None else max(node, real).next
        (cascade.score,) = inserted(program, after, _scored(attention.spec.groups, real is not None), node, *more)
        if count == cascade.count:
            return
        rows = [] if cascade.rows is None else [cascade.rows]
        after = cascade.score.next
        cascade.score, cascade.rows = inserted(program, after, _choice(count), cascade.score, *rows)
        if cascade.cache is not None:
            inserted(program, after, _noted, _remembered(edit, site, count), cascade.rows)


def _cached(program: Program, heads: Heads) -> frozenset[fx.Node]:
    """The attention and the layer of the cache that it reads."""
    site = next(s for s in kv_sites(program) if s.attention is heads.attention.node)
    read = [] if site.read is None else [site.read, *site.read.users]
    return frozenset({site.append, heads.attention.node, *read} - {None})


def _remembered(edit: Edits, site: Layer, count: int) -> fx.Node:
    """Where a cache keeps the numbers of the heads that go on behind a layer; of each sequence, as beams are reordered."""
    cache = site.cascade.cache
    assert cache is not None
    name = f"head_cascade.{site.number}"
    return edit.state(cache.count, StateSpec(name, (count,), torch.int64, "sequence", batched=True))


def _has_other_cache(program: Program) -> bool:
    return not program.analysis(kv_sites) and bool(written_inputs(program.graph))


def _noted(held: Tensor, rows: Tensor) -> list[Tensor]:
    held.copy_(rows.expand_as(held))
    return []


def _recalled(held: Tensor) -> list[Tensor]:
    return [held[0].clone()]


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
