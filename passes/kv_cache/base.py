"""The base of passes that change how a KVCache keeps its tokens: each says what an attention's storage is."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from accelpass.ir.attention.block_select import BlockSelect
from accelpass.ir.attention.op import set_spec, spec_of
from accelpass.ir.attention.spec import AttentionSpec
from accelpass.ir.errors import SpecConflict
from accelpass.ir.graph import value
from accelpass.ir.kv.sites import KVSite, kv_sites
from accelpass.ir.kv.storage import Query
from accelpass.ir.program import Program
from accelpass.passes.base import Done, Record, SitePatterns, Skip

NO_CACHE = (
    "this graph appends to no accelpass.KVCache. A model with a key/value cache takes one as "
    "past_key_values=accelpass.KVCache(model, capacity=...)"
)


EVICTS = "one chooses rows by position in a full cache, the other evicts rows"
"""Why a pass that evicts and one that selects rows do not go together, for :func:`refuse`."""


@dataclass(frozen=True)
class KVPass(SitePatterns):
    """Edits the storage, format or selection of each attention that reads a KVCache; sites are chosen by module path."""

    phase: ClassVar[str] = "cache"

    @abstractmethod
    def edited(
        self, program: Program, site: KVSite, spec: AttentionSpec, number: int
    ) -> tuple[AttentionSpec, str] | str:
        """The new spec of a site and what was done, or why it is left alone; ``number`` sites of the graph came before."""

    def apply(self, program: Program, record: Record) -> None:
        sites = program.analysis(kv_sites)
        if not sites:
            record.skip("model", NO_CACHE)
        for site in sites:
            wanted = self.wanted(site.path, record)
            if isinstance(wanted, Skip):
                record.skip(site.path, wanted.why)
                continue
            why = cannot_store(site)
            if why is not None:
                record.skip(site.path, why)
                continue
            assert site.attention is not None
            chosen = self.at([site.path])
            before = spec_of(site.attention)
            made = chosen.edited(program, site, before, len(record.took))
            if isinstance(made, str):
                record.skip(site.path, made)
                continue
            spec, what = made
            set_spec(site.attention, spec)
            record.take(site.path, Done(what))


def cannot_store(site: KVSite) -> str | None:
    """Why no pass may change how a site keeps its tokens, or None."""
    if site.attention is None:
        return site.why
    spec = spec_of(site.attention)
    if site.window:
        return f"it sees its last {site.window} tokens alone; all are kept"
    operands = [value(n) for n in site.attention.args[:3]]
    if any(t.dim() != 4 for t in operands):
        return "queries, keys and values are not (batch, heads, tokens, d)"
    if not site.is_prompt and spec.causal:
        return "is_causal over a cache that is longer than the call means another mask than the model's"
    # A prompt alone could be stored, but the tokens after it could not attend to it.
    return Query.why_not(spec)


def refuse(spec: AttentionSpec, part: str, by: str, why: str) -> None:
    """Raise :class:`SpecConflict` if another pass has edited ``part`` of the spec, which ``by`` cannot work with.

    Blocks that a prompt reads are no such selection: what is stored is the same.
    """
    if part == "select" and isinstance(spec.select, BlockSelect):
        return
    for owner, edited in spec.edits:
        if edited == part and owner != by:
            raise SpecConflict(
                f"{by!r} and {owner!r} cannot both have {spec.site or 'this attention'}: {why}. Use one of the two there "
                "(include=, exclude= choose sites)."
            )
