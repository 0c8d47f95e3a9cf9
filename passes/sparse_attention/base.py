"""The base of sparse attention: passes that say which blocks of keys the queries of a prompt read."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import fx

from accelpass.ir.attention import Attention, detect
from accelpass.ir.attention.lowering.fused import block_sparse_why_not
from accelpass.ir.attention.spec.block_select import BlockSelect, causal_form
from accelpass.ir.attention.spec.op import set_spec, spec_of
from accelpass.ir.core.graph import known, value
from accelpass.ir.core.program import Program
from accelpass.passes.core.base import Done, Skip, Take, Verdict
from accelpass.passes.core.site_pass import Edits, SitePass

_KINDS = {
    "cross": "queries and keys come from two sequences (cross attention); the method is for self-attention",
    "joint": "two streams attend jointly; the method is for self-attention of one",
    "channel": "channels attend to channels; the method is for tokens",
}


@dataclass(frozen=True)
class SparseAttention(SitePass):
    """Gives each causal self-attention of a prompt a selection of key blocks; sites are chosen by module path.

    Only where there are as many queries as keys: one token at a time reads the whole cache, which keeps all tokens in
    their order. A selection and a pass that keeps the prompt's tokens in its own way do not meet, as a prompt attends to
    what it has just computed.
    """

    phase: ClassVar[str] = "attention"
    edits: ClassVar[frozenset[str]] = frozenset({"attention.blocks"})
    reads: ClassVar[frozenset[str]] = frozenset({"attention.rows"})  # of the tokens that another pass leaves
    for_prompts: ClassVar[bool] = True
    nothing: ClassVar[str] = "no attention was recognised"

    @abstractmethod
    def selection(self, attention: Attention, tokens: Any) -> tuple[BlockSelect, str] | Skip:
        """What the queries of a site read and how a user is told, or why the site is left alone.

        Args:
            tokens: queries and keys, an int or symbolic.
        """

    def selected(self, attention: Attention, tokens: Any, program: Program) -> tuple[BlockSelect, str] | Skip:
        """As :meth:`selection`, of a method that looks at its plan (``program.artefacts``) too."""
        return self.selection(attention, tokens)

    def find(self, program: Program) -> list[Attention]:
        found: list[Attention] = program.analysis(detect)
        return found

    def check(self, site: Attention, program: Program) -> Verdict:
        why = cannot_select(site)
        return Take() if why is None else Skip(why)

    def rewrite(self, site: Attention, edit: Edits) -> Done | Skip:
        assert site.node is not None
        made = self.selected(site, value(site.node.args[0]).shape[2], edit.program)
        if isinstance(made, Skip):
            return made
        select, what = made
        spec = spec_of(site.node).edited(by=self.name, select=select)
        why = block_sparse_why_not(spec, site.node)
        if why is not None:
            return Skip(f"the block-sparse kernel cannot compute it: {why}")
        set_spec(site.node, spec)
        return Done(what)


def cannot_select(attention: Attention) -> str | None:
    """Why no blocks can be chosen for a causal prompt here, or None."""
    node = attention.node
    if not isinstance(node, fx.Node):
        return "it is no attention that passes can edit"
    if attention.kind in _KINDS:
        return _KINDS[attention.kind]
    q, k = (value(n) for n in node.args[:2])
    if q.dim() != 4:
        return "queries, keys and values are not (batch, heads, tokens, d)"
    rows, columns = q.shape[2], k.shape[2]
    if known(rows == 1):
        return "one token at a time: it attends to the whole cache, and decoding stays dense"
    if not known(rows == columns):
        return (
            f"{rows} queries read {columns} keys: the method is for whole prompts, whose queries and keys are as many. What "
            "comes after cached tokens stays dense; with a cache, a prompt is whole in an empty accelpass.KVCache"
        )
    spec = spec_of(node)
    if spec.bias == "sliding_window":
        return f"it sees its last {spec.window} tokens alone; the method is for attention to all earlier tokens"
    if spec.bias == "tensor":
        return (
            "its mask may be more than causal (padding, a window); the method needs a prompt without an attention_mask, "
            "or several of one length"
        )
    if not causal_form(spec, rows, columns).causal:
        return "it is not causal: tokens see those after them; the method is for causal attention"
    return None
