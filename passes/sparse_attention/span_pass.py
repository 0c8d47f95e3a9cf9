"""The base of passes that give each head a span: prompts read its blocks alone, a KVCache keeps its tokens alone."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from accelpass.ir.attention import Attention, detect, set_spec, spec_of
from accelpass.ir.attention.fused import block_sparse_why_not
from accelpass.ir.attention.spec import Dense, Native
from accelpass.ir.graph import hint, value
from accelpass.ir.kv.sites import KVSite, kv_sites
from accelpass.ir.program import Program
from accelpass.passes.base import Done, Record, SitePatterns, Skip
from accelpass.passes.kv_cache.base import EVICTS, cannot_store, refuse
from accelpass.passes.sparse_attention.base import cannot_select
from accelpass.passes.sparse_attention.span_cache import SpanRings
from accelpass.passes.sparse_attention.spans import HeadSpans, Rule, density, shown


@dataclass(frozen=True)
class SpanPass(SitePatterns):
    """A method says which rule each key/value head of a site has; the query heads of a group share it.

    Attributes:
        sinks: first tokens that are always seen, a multiple of ``block``.
        block: tokens of a block.
        reserve: tokens of an answer that the spans kept in a KVCache make room for.
    """

    phase: ClassVar[str] = "cache"
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
    def rules(self, program: Program, path: str, kv_heads: int) -> Sequence[Rule] | str:
        """A rule for each key/value head of a site, or one for all; or why it is left alone."""

    def apply(self, program: Program, record: Record) -> None:
        sites = kv_sites(program)
        cached = {site.attention: site for site in sites if site.attention is not None}
        for site in sites:
            if site.attention is None:
                record.skip(site.path, site.why)
        for attention in program.analysis(detect):
            wanted = self.wanted(attention.path, record)
            made = (
                wanted.why if isinstance(wanted, Skip) else self._edit(program, attention, cached.get(attention.node))
            )
            if isinstance(made, str):
                record.skip(attention.path, made)
            else:
                record.take(attention.path, made)

    def _edit(self, program: Program, attention: Attention, site: KVSite | None) -> Done | str:
        node, chosen = attention.node, self.at([attention.path])
        assert node is not None
        spec, (q, k) = spec_of(node), (value(n) for n in node.args[:2])
        dense = cannot_select(attention) if site is None or site.is_prompt else None
        why = cannot_store(site) if site is not None else dense
        if why is not None:
            return why
        rules = chosen.rules(program, attention.path, k.shape[1])
        if isinstance(rules, str):
            return rules
        of_heads = rules if len(rules) > 1 else [*rules] * k.shape[1]
        each = [rule for rule in of_heads for _ in range(q.shape[1] // k.shape[1])]  # of query heads
        said, tokens = [shown(rules)], hint(k.shape[2])
        if site is None or site.is_prompt:
            select = HeadSpans(tuple(each if len(rules) > 1 else rules), chosen.sinks, chosen.block)
            selected = spec.edited(by=self.name, select=select)
            # A prompt attends to what it has just computed, however that is stored.
            dense = dense or block_sparse_why_not(replace(selected, store=Dense(), format=Native()), node)
            if dense is None:
                spec = selected
            elif site is None:
                return dense
            else:
                said.append(f"its prompt is dense: {dense}")
        if site is not None:
            refuse(spec, "select", self.name, EVICTS)
            store = SpanRings(tuple(rules), chosen.sinks, chosen.block, chosen.reserve)
            spec = spec.edited(by=self.name, store=store)
            slots = sum(store.most(rule, site.capacity) for rule in each) / len(each)
            said.append(f"at most {slots:.0f} of {site.capacity} tokens a head are kept")
        set_spec(node, spec)
        densities = [density(rule, tokens, chosen.sinks, chosen.block) for rule in each]
        is_masked = (site is None or site.is_prompt) and dense is None
        return Done("; ".join(said), densities=tuple(densities), tokens=tokens) if is_masked else Done("; ".join(said))
