"""The base of methods that evict by a score: budgets of heads and layers, when tokens leave, and what is observed."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Literal

from accelpass.ir.attention.spec.spec import AttentionSpec, LastQueries, ScoreTap
from accelpass.ir.core.program import Program
from accelpass.ir.kv.sites import KVSite, kv_sites
from accelpass.passes.core.base import Skip
from accelpass.passes.kv_cache.base import KVPass
from accelpass.passes.kv_cache.storage.heavy_hitters import HeavyHitters
from accelpass.passes.kv_cache.storage.rotation import Tables, give_unrotated
from accelpass.passes.kv_cache.storage.slots import Amount, check_budget, check_recent, divided, said


@dataclass(frozen=True)
class Evicting(KVPass):
    """A method that keeps the newest tokens and those of the largest score, for each key/value head on its own.

    A method gives its :attr:`tap`; everything else is here. Scores of query heads that share a key are summed (inferred), each
    sequence of a batch has its own (inferred). Budgets are shares of the prompt's length, fixed at its end, or ``tokens``;
    tokens that are added in one piece to a cache that is not empty set them anew, from all tokens so far (inferred).

    Attributes:
        budget: share of the prompt that is kept; 1 keeps everything.
        recent: share of the budget for the newest tokens, at least one of which stays; the rest is for the largest scores.
        tokens: how many tokens of each head are kept, in place of a share of the prompt.
        sinks: first tokens of the text that are kept besides.
        evicts: one token leaves for each that comes (``"each token"``), or tokens leave when a prompt ends and the answer is
            kept (``"after the prompt"``), as far as ``answer`` goes.
        answer: tokens of an answer that a cache which evicts after the prompt has room for; then one leaves for each.
        window: scores are of the attention of so many last queries of a prompt alone, SnapKV's observation window (arXiv
            2404.14469, section 3), whose tokens are kept if ``recent`` covers them. None: of all queries.
        kernel: a prompt's scores are pooled over so many neighbours, an odd number, so that what stands beside an important
            token stays too (SnapKV: 5 or 7); 1 does not pool.
        pooling: by their ``"mean"`` or their ``"max"``.
        heads: the heads of a layer have ``"even"`` budgets, or an ``"adaptive"`` one together, which the largest scores of all
            of them share (AdaKV, arXiv 2407.11550). A cache has the same bytes; a step reads each row once for each head.
        safeguard: with adaptive heads, the share of its even budget that each head has at least; AdaKV's is 0.2.
        pyramid: the first layer's budget for large scores is ``2 - 1 / pyramid`` times the even one, the last layer's
            ``1 / pyramid`` times, those between on a line (PyramidKV, arXiv 2406.02069, whose value is 20; shares of tokens in
            place of its integer steps, inferred). Layers of different sizes share no code, so compiling takes longer. None: even.
        positions: keys have the position of the ``"text"``, or of the ``"cache"``: the rows that are left are numbered anew
            when they are read, as in StreamingLLM (arXiv 2309.17453, section 3.2).

    Raises:
        OptionError: an option out of range.

    Class attributes:
        store: how tokens are kept.
    """

    store: ClassVar[type[HeavyHitters]] = HeavyHitters
    budget: float = 0.2
    recent: float = 0.5
    tokens: int | None = None
    sinks: int = 0
    evicts: Literal["each token", "after the prompt"] = "each token"
    answer: int = 256
    window: int | None = None
    kernel: int = 1
    pooling: Literal["mean", "max"] = "mean"
    heads: Literal["even", "adaptive"] = "even"
    safeguard: float = 0.2
    pyramid: float | None = None
    positions: Literal["text", "cache"] = "text"

    def __post_init__(self) -> None:
        check_budget(self, self.budget, self.tokens)
        check_recent(self, self.recent)
        if self.sinks < 0:
            raise self.fail("sinks", "0 or more first tokens")
        if self.answer < 1:
            raise self.fail("answer", "1 token or more")
        if self.window is not None and self.window < 1:
            raise self.fail("window", "the last 1 or more queries of a prompt, or None for all")
        if self.kernel < 1 or self.kernel % 2 == 0:
            raise self.fail("kernel", "an odd number of tokens; 1 does not pool")
        if not 0 <= self.safeguard <= 1:
            raise self.fail("safeguard", "a share of a head's even budget between 0 and 1")
        if self.pyramid is not None and self.pyramid < 1:
            raise self.fail("pyramid", "1 (even) or more; PyramidKV has 20")
        self.check_sites()

    @property
    @abstractmethod
    def tap(self) -> ScoreTap:
        """What a token gets of the attention of a call's queries; a token's score is the sum."""

    def at_site(self, program: Program, site: KVSite) -> Evicting | Skip:
        """The method as it is at one site, where a plan has something for that; or why it leaves the site alone."""
        return self

    def amounts(self, program: Program, site: KVSite) -> tuple[Amount, Amount]:
        """How much of a site is kept by score, and how much newest."""
        heavy, recent = divided(self.budget, self.recent, self.tokens)
        if self.pyramid is not None:
            sites = program.analysis(kv_sites)
            heavy = on_pyramid(heavy, recent, self.pyramid, sites.index(site), len(sites))
        return heavy, recent

    def storage(self, heavy: Amount, recent: Amount, tables: Tables | None) -> HeavyHitters:
        """How tokens are kept, ``heavy`` by their score and ``recent`` newest."""
        return self.store(
            heavy,
            recent,
            score=self.tap if self.window is None else LastQueries(self.tap, self.window),
            sinks=self.sinks,
            kernel=self.kernel,
            pooling=self.pooling,
            answer=self.answer if self.evicts == "after the prompt" else 0,
            shares=self.safeguard if self.heads == "adaptive" else None,
            tables=tables,
        )

    def edited(
        self, program: Program, site: KVSite, spec: AttentionSpec, number: int
    ) -> tuple[AttentionSpec, str] | Skip:
        here = self.at_site(program, site)
        if isinstance(here, Skip):
            return here
        tables = None
        if self.positions == "cache":
            found = give_unrotated(program, site)
            if isinstance(found, str):
                return Skip(f"positions='cache': {found}")
            tables = found
        store = here.storage(*here.amounts(program, site), tables)
        slots = store.slots(site.capacity) - 1
        what = f"{slots} of {site.capacity} tokens a head at most, {said(self.budget, self.tokens)}"
        return spec.edited(by=self.name, store=store), what


def on_pyramid(heavy: Amount, recent: Amount, steepness: float, layer: int, layers: int) -> Amount:
    """A layer's part for large scores, so that all layers together have ``layers * heavy``."""
    most = heavy * (2 - 1 / steepness)
    if isinstance(heavy, float):
        most = min(most, 1.0 - recent)
    along = layer / (layers - 1) if layers > 1 else 0.5
    made = most - along * 2 * (most - heavy)
    return made if isinstance(heavy, float) else round(made)
