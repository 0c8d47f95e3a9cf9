"""Words that are never needed are taken out of the embedding and of the output head."""

from __future__ import annotations

import hashlib
import itertools
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from accelpass.ir.analyses.axes.flow import CASTS, VIEWS
from accelpass.ir.analyses.structure.linear import Embedding, embeddings
from accelpass.ir.analyses.structure.output_head import OutputHead, is_read_first, output_heads
from accelpass.ir.core.derived import Recipe
from accelpass.ir.core.graph import aten, through, value
from accelpass.ir.core.program import Program
from accelpass.ir.errors import OptionError
from accelpass.ir.torch_private import FakeTensor
from accelpass.ir.transform.shrink import Shrunk
from accelpass.passes.core.base import Done, Skip, Take, Verdict
from accelpass.passes.core.site_pass import Edits, SitePass

FORMAT = 1


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

    def rewrite(self, site: Vocabulary, edit: Edits) -> Done:
        head, size = site.head.linear, site.head.size
        made: dict[fx.Node, tuple[fx.Node, fx.Node, fx.Node]] = {}

        def few(weight: fx.Node, transposed: bool = False) -> tuple[fx.Node, fx.Node, fx.Node]:
            if weight not in made:
                names = [f"{weight.name}_{what}" for what in ("kept", "ids", "rows")]
                rows, ids, places = edit.derive([weight], self._recipe(size, transposed), names)
                made[weight] = rows, ids, places
            return made[weight]

        rows, ids, _ = few(head.weight, head.transposed)
        bias = None if head.bias is None else few(head.bias)[0]
        narrow = edit.call(head.node, aten.linear.default, head.operand(), rows, bias)

        def spread(narrow: Tensor, ids: Tensor) -> list[Tensor]:
            gone = narrow.new_full((*narrow.shape[:-1], size), float("-inf"))
            return [gone.index_copy(-1, ids, narrow)]

        (logits,) = edit.run(("spread", size), spread, [narrow, ids], head.node)
        edit.replace(head.node, logits)
        for table in site.tables:
            kept, _, places = few(table.weight)
            looked = edit.call(
                table.node,
                aten.index_select.default,
                places,
                0,
                edit.call(table.node, aten.reshape.default, table.indices, [-1]),
            )
            at = edit.call(table.node, aten.view_as.default, looked, table.indices)
            edit.replace(table.node, edit.call(table.node, aten.embedding.default, kept, at))
        shrunk = tuple(self._told(edit.program, old, new[0]) for old, new in made.items())
        sizes = (sum(s.bytes_before for s in shrunk), sum(s.bytes_after for s in shrunk))
        return Done(f"{len(self.keep)} of {size} tokens", *sizes, shrunk=shrunk)

    def _recipe(self, size: int, transposed: bool) -> Recipe:
        ids = torch.tensor(sorted(self.keep))

        def made(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            if isinstance(weight, FakeTensor):
                shape = (len(ids), *(weight.shape[:1] if transposed else weight.shape[1:]))
                counts = (weight.new_empty(n, dtype=torch.long) for n in (len(ids), size))
                return (weight.new_empty(shape), *counts)  # type: ignore[return-value]
            own = ids.to(weight.device)
            missing = (
                len(ids) if self.unknown is None else sorted(self.keep).index(self.unknown)
            )  # behind the last row: an error
            places = torch.full((size,), missing, device=weight.device)
            places[own] = torch.arange(len(ids), device=weight.device)
            rows = weight.index_select(1, own).t() if transposed else weight.index_select(0, own)
            return rows.contiguous(), own, places

        digest = hashlib.sha1(ids.numpy().tobytes()).hexdigest()
        return Recipe(("vocabulary_prune", FORMAT, digest, self.unknown, size, transposed), made, first=True)

    def _told(self, program: Program, old: fx.Node, new: fx.Node) -> Shrunk:
        before, after = (tuple(int(s) for s in value(n).shape) for n in (old, new))
        sizes = [int(value(n).numel() * value(n).element_size()) for n in (old, new)]
        return Shrunk(program.tensors.path(old) or old.name, before, after, *sizes)
