"""The base of passes that give each head a span: prompts read its blocks alone, a KVCache keeps its tokens alone."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from accelpass.ir.attention import Attention, detect, set_spec, spec_of
from accelpass.ir.graph import hint, value
from accelpass.ir.kv.sites import KVSite, kv_sites
from accelpass.ir.program import Program
from accelpass.passes.base import Done, Record, SitePatterns, Skip
from accelpass.passes.kv_cache.base import EVICTS, cannot_store, refuse
from accelpass.passes.sparse_attention.span_cache import SpanRings
from accelpass.passes.sparse_attention.spans import HeadSpans, Rule, density, not_a_prompt, shown


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
        cached = {site.attention: site for site in kv_sites(program)}
        for site in cached.values():
            if site.attention is None:
                record.skip(site.path, site.why)
        for attention in program.analysis(detect):
            wanted = self.wanted(attention.path)
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
        dense = not_a_prompt(spec, q, k) if site is None or site.is_prompt else None
        why = cannot_store(site) if site is not None else dense
        if why is not None:
            return why
        rules = chosen.rules(program, attention.path, k.shape[1])
        if isinstance(rules, str):
            return rules
        said = [shown(rules)]
        densities: tuple[float, ...] = ()
        if site is None or site.is_prompt:
            if dense is None:
                of_queries = rules if len(rules) == 1 else [r for r in rules for _ in range(q.shape[1] // k.shape[1])]
                select = HeadSpans(tuple(of_queries), chosen.sinks, chosen.block)
                spec = spec.edited(by=self.name, select=select)
                each = of_queries if len(of_queries) > 1 else list(rules) * q.shape[1]
                densities = tuple(density(r, hint(k.shape[2]), chosen.sinks, chosen.block) for r in each)
            else:
                said.append(f"its prompt is dense: {dense}")
        if site is not None:
            refuse(spec, "select", self.name, EVICTS)
            store = SpanRings(tuple(rules), chosen.sinks, chosen.block, chosen.reserve)
            spec = spec.edited(by=self.name, store=store)
            all_rules = list(rules) * (k.shape[1] if len(rules) == 1 else 1)
            slots = sum(store.most(rule, site.capacity) for rule in all_rules) / len(all_rules)
            said.append(f"at most {slots:.0f} of {site.capacity} tokens a head are kept")
        set_spec(node, spec)
        return Done("; ".join(said), densities=densities)
