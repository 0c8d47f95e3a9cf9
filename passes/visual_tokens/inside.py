"""The base of passes that take visual tokens out of a language model behind one of its first layers."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

from torch import Tensor, fx

from accelpass.ir.analyses.structure.block import Block
from accelpass.ir.analyses.structure.vision import Entry, chains, vision
from accelpass.ir.attention.spec.op import is_attention, spec_of
from accelpass.ir.core.graph import known, value, written_inputs
from accelpass.ir.core.program import Program
from accelpass.ir.errors import AccelpassError
from accelpass.ir.kv.sites import KVSite, kv_sites
from accelpass.ir.torch_private import assert_async
from accelpass.ir.transform.sequence.removal import Rows, ShrinkingSequence
from accelpass.ir.transform.steps import survived
from accelpass.ir.transform.tokens import CannotCut, stretches_between
from accelpass.passes.core.base import Done, Pass, Record, Skip
from accelpass.passes.kv_cache.base import NO_CACHE, cannot_store
from accelpass.passes.token_pruning.gone import keep_what_is_left, read_what_is_left


class NotPruned(AccelpassError):
    """Says why no visual token of a graph is taken out."""


@dataclass(frozen=True)
class VisualPruning(Pass):
    """The first layers of a language model read all tokens, the others fewer visual ones; text stays, at its own positions.

    What is taken out never comes back. Caches of the layers behind keep a row for each position, of which those of tokens that
    were taken out are neither written nor read.

    Attributes:
        layer: how many layers read all tokens, at least 1.
        keep: share of each text's visual tokens that the others read.
    """

    layer: int = 2
    keep: float = 0.5

    phase: ClassVar[str] = "attention"
    edits: ClassVar[frozenset[str]] = frozenset({"attention.rows"})
    for_prompts: ClassVar[bool] = True
    claims: ClassVar[dict[str, str]] = {
        "tokens": "layers of the language model read all tokens first, and then fewer visual ones"
    }

    def __post_init__(self) -> None:
        if self.layer < 1:
            raise self.fail("layer", "a number of layers that read all tokens, at least 1")
        if not 0 <= self.keep <= 1:
            raise self.fail("keep", "a share from 0 to 1 (1 takes out nothing)")

    @abstractmethod
    def score(self, program: Program, attention: fx.Node, before: fx.Node) -> fx.Node:
        """What each token is worth, ``(texts, tokens)``, by the attention of the last layer that reads all."""

    def apply(self, program: Program, record: Record) -> None:
        sites = kv_sites(program)
        is_prompt = not sites or sites[0].is_prompt
        if is_prompt:
            program.survivors = {}
        try:
            stack = self._stack(program, sites)
        except NotPruned as why:
            record.skip("model", str(why))
            return
        behind = [site for site in sites if _is_in(site, stack[self.layer :])]
        path = stack[self.layer - 1].path
        if not is_prompt:
            read_what_is_left(program, self, {1: behind})
            record.take(path, Done(f"{len(behind)} layers behind it read what is left"))
            return
        try:
            if isinstance(record.wants(path), Skip):
                raise NotPruned(f"{path} is named in skip_sites")
            rows, tokens, said = self._prune(program, stack)
        except (NotPruned, CannotCut) as why:
            record.skip("image", str(why))
            rows = None
        else:
            survived(program, path, rows, tokens)
            record.take(path, Done(said))
        paths = {site.path for site in behind}
        left = {} if rows is None else {1: rows}
        keep_what_is_left(program, self, {1: [site for site in kv_sites(program) if site.path in paths]}, left)

    def _stack(self, program: Program, sites: Sequence[KVSite]) -> list[Block]:
        """The blocks of the language model; that its tokens may leave is a matter of the model, the same in all its graphs."""
        attentions = {site.attention for site in sites}
        found = program.analysis(vision)
        towers = {block for tower in found.towers for block in tower.blocks}
        stacks = [c for c in chains(program) if c[0] not in towers and all(map(_attentions, c))]
        if sites:
            stacks = [c for c in stacks if attentions.issuperset(n for b in c for n in _attentions(b))]
        if len(stacks) != 1:
            raise NotPruned(f"{len(stacks)} stacks of blocks might be the language model's; one is needed")
        (stack,) = stacks
        if self.layer >= len(stack):
            raise NotPruned(f"layer={self.layer}: the language model has {len(stack)} layers; choose fewer")
        if not sites and written_inputs(program.graph):
            raise NotPruned(f"it writes to a cache of another kind: {NO_CACHE}")
        for site in sites:
            why = cannot_store(site)
            if why is not None:
                raise NotPruned(f"{site.path}: {why}")
        for node in (n for b in stack[self.layer :] for n in _attentions(b)):
            spec = spec_of(node)
            if spec.bias == "sliding_window" or spec.window or any(s.window for s in sites if s.attention is node):
                raise NotPruned(
                    f"{spec.site}: it sees a window of positions, which tokens that are taken out leave holes in"
                )
        return stack

    def _prune(self, program: Program, stack: Sequence[Block]) -> tuple[fx.Node, Any, str]:
        """Take tokens out of a prompt; which are left, of how many, and what was done."""
        entry = _entry(program)
        assert entry.mask is not None
        texts, tokens = value(stack[0].input).shape[:2]
        width = value(entry.node).shape[-1]
        count = value(entry.features).numel() // width
        if not isinstance(count, int) or not isinstance(texts, int):
            raise NotPruned("how many visual tokens and texts there are, only run time knows")
        if count % texts:
            raise NotPruned(f"{count} visual tokens of {texts} texts are not as many in each")
        each = count // texts
        left = int(each * self.keep)
        if left == each:
            raise NotPruned(f"keep={self.keep}: all of its {each} visual tokens go on")
        streams = [stack[0].input, stack[self.layer - 1].output, stack[-1].output]
        found = stretches_between(program, streams, [stack[: self.layer], stack[self.layer :]])
        run = ShrinkingSequence(program, found)
        importance = self.score(program, run.attentions[-1], run.anchor)
        (chosen,) = run.make(partial(_left, each, left), entry.mask, importance)
        before = set(program.graph.nodes)
        try:
            run.go_on(found[1], Rows(chosen))
        except CannotCut:
            for node in reversed([n for n in program.graph.nodes if n not in before]):
                program.graph.erase_node(node)
            raise
        run.finish()
        return chosen, tokens, f"{left} of {each} visual tokens go on to {len(stack) - self.layer} layers"


def _entry(program: Program) -> Entry:
    found = program.analysis(vision)
    if not found.entries:
        raise NotPruned("no image enters the text in this graph: text alone is read as it is")
    if len(found.entries) > 1:
        raise NotPruned(f"images enter the text in {len(found.entries)} places")
    (entry,) = found.entries
    if entry.mask is None:
        raise NotPruned(f"{entry.node.name} joins image and text: no mask says which tokens are visual")
    if not known(value(entry.mask).shape[1] == value(entry.node).shape[1]):
        raise NotPruned(f"{entry.mask.name} has not one place for each token")
    return entry


def _left(each: int, left: int, mask: Tensor, importance: Tensor) -> list[Tensor]:
    """The tokens that go on, ascending: all of the text, and of the visual ones the ``left`` that are worth most."""
    mask = mask.flatten(2)[:, :, 0] if mask.dim() > 2 else mask
    if mask.shape[0] > 1:
        assert_async(
            (mask.sum(1) == each).all(),
            "visual tokens are taken out of several texts: each must have the same number of them",
        )
    score = importance.masked_fill(mask.logical_not(), float("inf"))
    order = score.sort(dim=-1, descending=True, stable=True).indices
    return [order[:, : mask.shape[1] - (each - left)].sort(-1).values]


def _attentions(block: Block) -> list[fx.Node]:
    return [a.node for s in block.sublayers for a in s.attentions if a.node is not None and is_attention(a.node)]


def _is_in(site: KVSite, blocks: Sequence[Block]) -> bool:
    return any(site.attention in _attentions(block) for block in blocks)
