"""Words that are never needed are taken out of the embedding and of the output head."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import fx

from accelpass.ir.analyses.axes.axes import Axis, axes
from accelpass.ir.analyses.axes.flow import CASTS, VIEWS
from accelpass.ir.analyses.structure.linear import Embedding, embeddings
from accelpass.ir.analyses.structure.output_head import OutputHead, is_read_first, output_heads
from accelpass.ir.core.graph import aten, through, value
from accelpass.ir.core.program import Program
from accelpass.ir.errors import OptionError
from accelpass.ir.transform.changed_axes import CannotShrink, with_weights
from accelpass.ir.transform.kept import Numbered
from accelpass.ir.transform.shrink import shrink_together
from accelpass.passes.core.base import Done, Skip, Take, Verdict
from accelpass.passes.core.site_pass import Edits, SitePass


@dataclass(frozen=True)
class Vocabulary:
    """An output head, and the embeddings that are looked up with ids of the same vocabulary."""

    head: OutputHead
    tables: tuple[Embedding, ...]

    @property
    def path(self) -> str:
        return self.head.path


@dataclass(frozen=True)
class VocabularyPrune(SitePass):
    """Keep the rows of some tokens alone, in the embedding and in the output head, tied or not.

    Callers see the ids and the shape of logits that they know: ids are mapped to rows inside the graph, and the logits of tokens that are
    gone are minus infinity, so that none is ever chosen. Of the kept tokens the logits are the model's own. An input token that is gone is
    an error, unless ``unknown`` names a token that it is read as. For a model of many languages that is used for one.

    Attributes:
        keep: ids of the tokens that stay; empty keeps all.
        unknown: the token, one of ``keep``, that others are read as; None lets a call with another token fail.
    """

    keep: tuple[int, ...] = ()
    unknown: int | None = None

    name: ClassVar[str] = "vocabulary_prune"
    phase: ClassVar[str] = "structure"
    summary: ClassVar[str] = "tokens that are not needed are taken out of embedding and output head"
    identity: ClassVar[dict[str, Any] | None] = {"keep": (), "unknown": None}
    edits: ClassVar[frozenset[str]] = frozenset({"head.rows"})
    nothing: ClassVar[str] = "the graph returns no logits over the words of an embedding"

    def __post_init__(self) -> None:
        ids = sorted(self.keep)
        if ids and ids[0] < 0:
            raise self.fail("keep", "ids of tokens, from 0")
        twice = next((a for a, b in itertools.pairwise(ids) if a == b), None)
        if twice is not None:
            raise self.fail("keep", f"each id once; {twice} is there twice")
        if self.unknown is not None and self.unknown not in self.keep:
            raise self.fail("unknown", "one of the ids of keep")
        super().__post_init__()

    def find(self, program: Program) -> list[Vocabulary]:
        tables = program.analysis(embeddings)
        found = []
        for head in program.analysis(output_heads):
            if head.kind == "vocabulary":
                same = [t for t in tables if int(value(t.weight).shape[0]) == head.size]
                found.append(
                    Vocabulary(head, tuple(t for t in same if t.weight is head.linear.weight or is_read_first(t)))
                )
        return found

    def check(self, site: Vocabulary, program: Program) -> Verdict:
        if not self.keep:
            return Skip("all tokens are kept (keep is empty)")
        if max(self.keep) >= site.head.size:
            last = site.head.size - 1
            raise OptionError(
                f"{self.name}: keep has the id {max(self.keep)}, and this model's ids go from 0 to {last}"
            )
        if len(self.keep) == site.head.size:
            return Skip("all tokens are kept")
        if site.head.linear.kind.endswith("conv"):
            return Skip(f"the head is a {site.head.linear.kind}")
        if through(site.head.node, *VIEWS, *CASTS, aten.slice, aten.select) is not site.head.linear.node:
            return Skip(
                "the logits are scaled or capped after the head, which would not leave those of tokens that are gone at minus infinity"
            )
        return Take()

    def rewrite(self, site: Vocabulary, edit: Edits) -> Done | Skip:
        program, size = edit.program, site.head.size
        known = program.analysis(axes)
        users: dict[Axis, list[fx.Node]] = {}  # one axis if the weight is one
        head = site.head.linear.node
        for node, dim in ((head, known.of(head)[-1]), *((t.node, known.of(t.weight)[0]) for t in site.tables)):
            if len(dim.leaves) != 1:
                return Skip(f"{node.name} has its tokens in pieces")
            users.setdefault(dim.leaves[0], []).append(node)
        keep = Numbered.of_all(sorted(self.keep), size, float("-inf"), self.unknown)
        try:
            shrunk = shrink_together(program, [(a, keep, with_weights(program, of)) for a, of in users.items()])
        except CannotShrink as cause:
            return Skip(str(cause))
        sizes = (sum(s.bytes_before for s in shrunk), sum(s.bytes_after for s in shrunk))
        return Done(f"{len(self.keep)} of {size} tokens", *sizes, shrunk=tuple(shrunk))
