"""The base of passes that drop tokens between blocks: which blocks, how many stay, and what each layer's cache does then."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor, fx

from accelpass.ir.attention.spec import steps
from accelpass.ir.attention.spec.op import attend, is_attention, set_spec, spec_of
from accelpass.ir.attention.spec.spec import All, AttentionSpec
from accelpass.ir.core.graph import value, written_inputs
from accelpass.ir.core.program import Program
from accelpass.ir.kv.layer import give
from accelpass.ir.kv.sites import KVSite, kv_sites
from accelpass.ir.transform.splice import splice, trace
from accelpass.ir.transform.steps import recall_new, remember
from accelpass.ir.transform.tokens import CannotCut, Cut, decoder_blocks
from accelpass.passes.core.base import Done, Pass, Record
from accelpass.passes.core.site_pass import claim
from accelpass.passes.kv_cache.base import NO_CACHE, cannot_store
from accelpass.passes.token_pruning.rows_at_positions import RowsAtPositions

CUT = "token_cut"
"""Key of a program's ``gm.meta``: the :class:`~accelpass.ir.transform.tokens.Cut` that was made before the passes ran."""


@dataclass(frozen=True)
class TokenPruning(Pass):
    """Drops tokens after some blocks of a decoder, by a score of each token for the last one."""

    phase: ClassVar[str] = "attention"
    edits: ClassVar[frozenset[str]] = frozenset({"attention.rows"})
    reads: ClassVar[frozenset[str]] = frozenset({"attention.blocks"})
    claims: ClassVar[dict[str, str]] = {"tokens": "each layer chooses the tokens that the next one reads"}

    @abstractmethod
    def prunes(self, layers: int) -> dict[int, float]:
        """By number of the block after which tokens leave (never the last): the share of tokens that goes on.

        Raises:
            OptionError: it names a block that a model of so many layers does not have.
        """

    def ends(self, program: Program) -> dict[int, float]:
        """As :meth:`prunes`, for this graph; empty if no token can leave, which :meth:`why_not` says."""
        return {} if self.why_not(program) else self.prunes(len(decoder_blocks(program)))

    def why_not(self, program: Program) -> str | None:
        """Why no token of this graph can be dropped, or None."""
        try:
            found = decoder_blocks(program)
        except CannotCut as cause:
            return str(cause)
        sites = program.analysis(kv_sites)
        attentions = [n for n in program.graph.nodes if is_attention(n)]
        if not attentions:
            return "no attention was recognised"
        if not sites and written_inputs(program.graph):
            return f"it writes to a cache of another kind: {NO_CACHE}"
        tokens = value(found[0].input).shape[1]
        if not sites and isinstance(tokens, int) and tokens == 1:
            return "one token at a time without an accelpass.KVCache: there is nothing to drop"
        for node in attentions:
            spec = spec_of(node)
            if spec.kind == "cross" or value(node).dim() != 4:
                return f"{spec.site}: its attention is not one of a decoder's tokens to each other"
            if spec.bias == "sliding_window" or (spec.window or 0):
                return f"{spec.site}: it sees a window of positions, which dropped tokens would leave holes in"
            if not sites and not (spec.causal or spec.bias == "causal") and not _masked(node):
                return f"{spec.site}: it is not causal, so no token stands for what is to come"
        for site in sites:
            why = cannot_store(site)
            if why is not None:
                return f"{site.path}: {why}"
        return None

    def apply(self, program: Program, record: Record) -> None:
        made: Cut | None = program.gm.meta.get(CUT)
        if made is None:
            record.skip("model", self.why_not(program) or "tokens can leave this graph nowhere")
            return
        sites = {site.attention: site for site in program.analysis(kv_sites)}
        for stretch in made.stretches:
            last = stretch is made.stretches[-1]
            for node in stretch.attentions:
                scored = node is stretch.attentions[-1] and not last
                if node in sites:
                    self._store(program, made, stretch.number, sites[node], scored)
                elif scored:
                    remember(program, importance_name(stretch.number), _importance(program, node))
            shown = f"{stretch.blocks[0]} to {stretch.blocks[-1]}" if len(stretch.blocks) > 1 else stretch.blocks[0]
            record.take(shown, Done(self.shown(stretch.number, len(made.stretches))))

    @abstractmethod
    def shown(self, stretch: int, stretches: int) -> str:
        """What is done in one stretch of blocks, for the report."""

    def _store(self, program: Program, made: Cut, number: int, site: KVSite, scored: bool) -> None:
        """Keep the layer's tokens at their positions, and tell the storage which they are."""
        node = site.attention
        assert node is not None
        spec = spec_of(node)
        claim(program, self.name, self.edits, [site.path])
        set_spec(node, spec.edited(by=self.name, store=RowsAtPositions(scored)))
        if site.is_prompt and scored:
            remember(program, importance_name(number), _importance(program, node))
        if number == 0:
            return
        batch = value(node).shape[0]
        tokens = value(site.new[0]).shape[2]
        named = {"rows": recall_new(program, f"positions:{number}", (batch, tokens), torch.int64)}
        named["advance"] = recall_new(program, f"advance:{number}", (), torch.int64)
        if not site.is_prompt:
            named["keep"] = recall_new(program, f"keep:{number}", (batch, site.capacity), torch.bool)
        give(site.append, named, {})


def importance_name(stretch: int) -> str:
    """Under which name a graph remembers what each token is worth after a stretch."""
    return f"importance:{stretch}"


def _masked(node: fx.Node) -> bool:
    """A mask is computed from the call (padding), which HF gives causal models alone along with causality."""
    return bool(spec_of(node).before) and spec_of(node).bias == "tensor"


def _importance(program: Program, node: fx.Node) -> fx.Node:
    """The probabilities of the last query, mean over heads, float32 ``(batch, tokens)``."""
    q, k, v = node.args[:3]
    extras = list(node.args[3])
    spec = spec_of(node)

    def run(q: Tensor, k: Tensor, v: Tensor, *extras: Tensor) -> list[Tensor]:
        return [last_row(q, k, v, extras, spec)]

    operands = [q, k, v, *extras]
    (made,) = splice(program, trace(program, run, operands), operands, node.next)
    return made


def last_row(q: Tensor, k: Tensor, v: Tensor, extras: Sequence[Tensor], spec: AttentionSpec) -> Tensor:
    """The probabilities of the last of several queries, mean over heads: float32 ``(batch, k_tokens)``."""
    # The last query sees everything that a causal cut leaves to it.
    own = replace(spec, causal=False, select=All(), statistics=frozenset({"column_sums"}))
    _, found = attend(q[:, :, -1:], k, v, steps.of_last(extras, q.shape[2]), own)
    return found["column_sums"].sum(1) / q.shape[1]
