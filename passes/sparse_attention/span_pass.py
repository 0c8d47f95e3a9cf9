"""The base of passes that give each head a span: prompts read its blocks alone, a KVCache keeps its tokens alone."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from accelpass.ir.attention import Attention, detect, set_spec, spec_of
from accelpass.ir.attention.lowering.fused import block_sparse_why_not
from accelpass.ir.attention.spec.spec import Dense, Native
from accelpass.ir.core.graph import hint, value
from accelpass.ir.core.program import Program
from accelpass.ir.kv.sites import KVSite, kv_sites
from accelpass.passes.core.base import Done, Skip, Take, Verdict
from accelpass.passes.core.site_pass import Edits, SitePass
from accelpass.passes.kv_cache.base import cannot_store
from accelpass.passes.sparse_attention.base import cannot_select
from accelpass.passes.sparse_attention.span_cache import SpanRings
from accelpass.passes.sparse_attention.spans import HeadSpans, Rule, density, shown


@dataclass(frozen=True)
class SpanSite:
    """An attention, and where it reads a KVCache; None where no attention was recognised, or none reads the cache."""

    path: str
    attention: Attention | None
    cached: KVSite | None


@dataclass(frozen=True)
class SpanPass(SitePass):
    """A method says which rule each key/value head of a site has; the query heads of a group share it.

    Attributes:
        sinks: first tokens that are always seen, a multiple of ``block``.
        block: tokens of a block.
        reserve: tokens of an answer that the spans kept in a KVCache make room for.
    """

    phase: ClassVar[str] = "cache"
    edits: ClassVar[frozenset[str]] = frozenset({"attention.rows", "attention.blocks"})
    nothing: ClassVar[str] = "no attention was recognised"
    sinks: int = 64
    block: int = 64
    reserve: int = 1024

    def __post_init__(self) -> None:
        if self.block < 1:
            raise self.fail("block", "1 token or more")
        if self.sinks < 0 or self.sinks % self.block:
            raise self.fail("sinks", f"a multiple of block={self.block}, or 0")
        if self.reserve < 0:
            raise self.fail("reserve", "0 or more tokens")
        self.check_sites()

    @abstractmethod
    def rules(self, program: Program, path: str, kv_heads: int) -> Sequence[Rule] | Skip:
        """A rule for each key/value head of a site, or one for all; or why it is left alone."""

    def find(self, program: Program) -> list[SpanSite]:
        cached = {site.attention: site for site in program.analysis(kv_sites)}
        lost = [SpanSite(s.path, None, s) for s in program.analysis(kv_sites) if s.attention is None]
        return [*lost, *(SpanSite(a.path, a, cached.get(a.node)) for a in program.analysis(detect))]

    def aspects(self, site: SpanSite) -> frozenset[str]:
        cached, prompt = site.cached is not None, site.cached is None or site.cached.is_prompt
        return frozenset({"attention.rows"} if cached else ()) | frozenset({"attention.blocks"} if prompt else ())

    def check(self, site: SpanSite, program: Program) -> Verdict:
        if site.cached is not None:
            why = cannot_store(site.cached)
        else:
            assert site.attention is not None
            why = cannot_select(site.attention)
        return Take() if why is None else Skip(why)

    def rewrite(self, site: SpanSite, edit: Edits) -> Done | Skip:
        attention, cached = site.attention, site.cached
        assert attention is not None and attention.node is not None
        node = attention.node
        spec, (q, k) = spec_of(node), (value(n) for n in node.args[:2])
        rules = self.rules(edit.program, site.path, k.shape[1])
        if isinstance(rules, Skip):
            return rules
        of_heads = rules if len(rules) > 1 else [*rules] * k.shape[1]
        each = [rule for rule in of_heads for _ in range(q.shape[1] // k.shape[1])]  # of query heads
        said, tokens = [shown(rules)], hint(k.shape[2])
        is_prompt = cached is None or cached.is_prompt
        dense = cannot_select(attention) if is_prompt else None
        if is_prompt:
            select = HeadSpans(tuple(each if len(rules) > 1 else rules), self.sinks, self.block)
            selected = spec.edited(by=self.name, select=select)
            # A prompt attends to what it has just computed, however that is stored.
            dense = dense or block_sparse_why_not(replace(selected, store=Dense(), format=Native()), node)
            if dense is None:
                spec = selected
            elif cached is None:
                return Skip(dense)
            else:
                said.append(f"its prompt is dense: {dense}")
        if cached is not None:
            store = SpanRings(tuple(rules), self.sinks, self.block, self.reserve)
            spec = spec.edited(by=self.name, store=store)
            slots = sum(store.most(rule, cached.capacity) for rule in each) / len(each)
            said.append(f"at most {slots:.0f} of {cached.capacity} tokens a head are kept")
        set_spec(node, spec)
        densities = [density(rule, tokens, self.sinks, self.block) for rule in each]
        is_masked = is_prompt and dense is None
        return Done("; ".join(said), densities=tuple(densities), tokens=tokens) if is_masked else Done("; ".join(said))
