"""The base of passes that change how a KVCache keeps its tokens: each says what an attention's storage is."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from accelpass.ir.attention.spec.op import set_spec, spec_of
from accelpass.ir.attention.spec.spec import AttentionSpec
from accelpass.ir.core.graph import value
from accelpass.ir.core.program import Program
from accelpass.ir.kv.sites import KVSite, kv_sites
from accelpass.ir.kv.storage import Query
from accelpass.passes.core.base import Done, Skip, Take, Verdict
from accelpass.passes.core.site_pass import Edits, SitePass

NO_CACHE = (
    "this graph appends to no accelpass.KVCache. A model with a key/value cache takes one as "
    "past_key_values=accelpass.KVCache(model, capacity=...)"
)


@dataclass(frozen=True)
class KVPass(SitePass):
    """Edits the storage, format or selection of each attention that reads a KVCache; sites are chosen by module path."""

    phase: ClassVar[str] = "cache"
    edits: ClassVar[frozenset[str]] = frozenset({"attention.rows"})
    nothing: ClassVar[str] = NO_CACHE

    @abstractmethod
    def edited(
        self, program: Program, site: KVSite, spec: AttentionSpec, number: int
    ) -> tuple[AttentionSpec, str] | Skip:
        """The new spec of a site and what was done, or why it is left alone; ``number`` sites of the graph came before."""

    def find(self, program: Program) -> list[KVSite]:
        found: list[KVSite] = program.analysis(kv_sites)
        return found

    def check(self, site: KVSite, program: Program) -> Verdict:
        why = cannot_store(site)
        return Take() if why is None else Skip(why)

    def rewrite(self, site: KVSite, edit: Edits) -> Done | Skip:
        assert site.attention is not None
        made = self.edited(edit.program, site, spec_of(site.attention), edit.number)
        if isinstance(made, Skip):
            return made
        spec, what = made
        set_spec(site.attention, spec)
        return Done(what)


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
