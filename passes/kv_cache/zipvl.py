"""ZipVL: as many tokens as hold a share of the attention are important, another number in each layer (arXiv 2410.08584, ICCV 2025)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from accelpass.ir.attention.spec.spec import AttentionMass, AttentionSpec, Places, ScoreTap
from accelpass.ir.core.program import Program
from accelpass.ir.kv.sites import KVSite
from accelpass.ir.kv.storage import New
from accelpass.passes.core.base import Skip
from accelpass.passes.kv_cache.base import KVPass
from accelpass.passes.kv_cache.kv_quant import cannot_pack
from accelpass.passes.kv_cache.mikv import Tiers
from accelpass.passes.kv_cache.storage.heavy_hitters import HeavyHitters
from accelpass.passes.kv_cache.storage.lots import drawn


@dataclass(frozen=True)
class Probes(ScoreTap):
    """The probability that each key got of the ``last`` queries, and of about ``others`` more that are drawn by lot."""

    part: ClassVar[str] = "probes"
    last: int
    others: int
    seed: int

    @property
    def is_mass_of_one(self) -> bool:
        return True

    def among(self, queries: Tensor, end: Any) -> Tensor:
        """Which queries are probes, of a call after which there are ``end`` tokens."""
        return (queries >= end - self.last) | (drawn(queries, self.seed) * end < self.others)

    def __call__(self, scores: Tensor, at: Places) -> Tensor:
        left_out = self.among(at.queries, at.end).logical_not()
        return AttentionMass()(scores.masked_fill(left_out.unsqueeze(-1), float("-inf")), at)


@dataclass(frozen=True)
class ByMass(HeavyHitters):
    """The fewest tokens whose attention adds up to ``threshold`` of all, the same for all heads, and the newest besides.

    How many is told by sums of attention, which ones by means over the queries that could attend to them; ``heavy`` is the largest share
    there is room for. A score is what all queries of a prompt would have given by that mean, so that later queries add to it.
    """

    part: ClassVar[str] = "zipvl"
    mean: bool = field(default=True, kw_only=True)
    threshold: float = field(kw_only=True)

    def prompt_score(self, new: New) -> Tensor:
        assert isinstance(self.score, Probes)
        mass, place = self._mass(new), torch.arange(new.k.shape[2], device=new.k.device)
        probes = self.score.among(place, new.k.shape[2]).flip(0).cumsum(0).flip(0)  # at or after a token
        return (mass / probes.clamp_min(1) * (new.k.shape[2] - place)).expand(-1, new.k.shape[1], -1)

    def step_score(self, score: Tensor, mass: Tensor, positions: Tensor) -> Tensor:
        return score + mass.sum(1, keepdim=True)

    def settled(self, new: New, score: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        limit, newest = self.quota(new.total)
        if self.threshold >= 1:
            return torch.full_like(limit, 1 << 30), newest
        held = positions[:, :1] >= 0
        mass = (self._mass(new) if new.statistics else score[:, :1]).masked_fill(held.logical_not(), 0.0)
        sums = mass.sort(dim=-1, descending=True).values.cumsum(-1)
        count = (sums < self.threshold * sums[..., -1:] - 1e-6).sum(-1, keepdim=True) + 1
        rank = self.rank(score[:, :1], positions[:, :1], new.total).masked_fill(held.logical_not(), float("-inf"))
        important = rank.argsort(dim=-1, descending=True, stable=True).argsort(-1) < count
        kept = (important | self.pinned(positions[:, :1], new.total, newest)) & held
        return torch.minimum(torch.maximum(kept.sum((1, 2)), newest), limit), newest

    def _mass(self, new: New) -> Tensor:
        """What a prompt's tokens got, all heads together, ``(batch, 1, tokens)``."""
        return new.statistics[self.tap.key].sum(1, keepdim=True)


@dataclass(frozen=True)
class ByMassInTiers(ByMass, Tiers):
    """The same, with all other tokens in few bits, as MiKV keeps them."""

    part: ClassVar[str] = "zipvl_tiers"


@dataclass(frozen=True)
class ZipVL(KVPass):
    """Keep as many tokens as hold ``threshold`` of the attention, layer by layer; all others in few bits, or not at all.

    Attention is that of probes, the last queries of a prompt and some drawn by lot (each with the same chance, so that their number is
    about what was asked for: inferred). All heads of a layer have the same important tokens. This is the cache of the paper: its prompts
    attend to important tokens alone, here they attend to all, and probe rows cost nothing. Few bits are those of ``mikv``, by token
    with a balancer for channels (inferred: keys by channel); with ``kv_quant`` important tokens are rounded too, 4 bits in the paper's
    first version. While decoding, each query adds to the scores and one token leaves the important ones (the paper looks again every
    100 tokens). Where other tokens do not fit in, the least important leave first.

    Attributes:
        threshold: share of the attention that important tokens hold; 1 keeps everything. 0.975 is the paper's.
        rest: other tokens are kept in ``"few bits"``, the first version, or ``"dropped"``, the later one.
        bits: of the others: 2, 3 or 4.
        most: room for important tokens, as a share of the capacity: how many there are is known when a prompt has been read.
        newest: tokens that are kept as they are.
        last, others: probes: a prompt's last queries, and how many more.
        seed: of the lots.

    Raises:
        OptionError: a share outside (0, 1], other bits, a negative number of tokens, no probe.
    """

    name: ClassVar[str] = "zipvl"
    summary: ClassVar[str] = (
        "as many tokens of a KVCache as hold a share of the attention; the others in few bits, or none"
    )
    paper: ClassVar[str] = "ZipVL, arXiv 2410.08584"
    identity: ClassVar[dict[str, Any] | None] = {"threshold": 1.0, "most": 1.0}
    reads: ClassVar[frozenset[str]] = frozenset({"attention.format"})
    threshold: float = 0.975
    rest: Literal["few bits", "dropped"] = "few bits"
    bits: int = 2
    most: float = 0.6
    newest: int = 100
    last: int = 64
    others: int = 64
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("threshold", "most"):
            if not 0 < getattr(self, name) <= 1:
                raise self.fail(name, "a share above 0, at most 1")
        if self.bits not in (2, 3, 4):
            raise self.fail("bits", "2, 3 or 4")
        if self.last < 1:
            raise self.fail("last", "1 query or more")
        for name in ("newest", "others", "seed"):
            if getattr(self, name) < 0:
                raise self.fail(name, "0 or more")
        self.check_sites()

    def edited(
        self, program: Program, site: KVSite, spec: AttentionSpec, number: int
    ) -> tuple[AttentionSpec, str] | Skip:
        tap, amounts = Probes(self.last, self.others, self.seed), (float(self.most), self.newest)
        if self.rest == "dropped":
            store: ByMass = ByMass(*amounts, score=tap, threshold=self.threshold)
            others = "the others are dropped"
        else:
            why = cannot_pack(site, 2)
            if why is not None:
                return Skip(why)
            store = ByMassInTiers(*amounts, self.bits, score=tap, threshold=self.threshold)
            others = f"the others in {self.bits} bits"
        room = store.slots(site.capacity) - 1
        what = f"tokens with {self.threshold:.1%} of the attention, room for {room} of {site.capacity}; {others}"
        return spec.edited(by=self.name, store=store), what
