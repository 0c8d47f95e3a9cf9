"""The base of passes that take visual tokens out of a language model behind one of its first layers."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

from torch import Tensor, fx

from accelpass.ir.analyses.structure.block import Block
from accelpass.ir.analyses.structure.vision import Entry, chains, vision
from accelpass.ir.attention.spec.op import is_attention
from accelpass.ir.core.graph import known, value
from accelpass.ir.core.program import Program
from accelpass.ir.errors import AccelpassError
from accelpass.ir.kv.sites import KVSite, kv_sites
from accelpass.ir.torch_private import assert_async
from accelpass.ir.transform.sequence.removal import Rows, ShrinkingSequence
from accelpass.ir.transform.splice import all_or_nothing
from accelpass.ir.transform.steps import survived
from accelpass.ir.transform.tokens import CannotCut, stretches_between
from accelpass.passes.core.base import Done, Pass, Record, Skip
from accelpass.passes.token_pruning.gone import keep_what_is_left, read_what_is_left, why_none_may_leave


class NotPruned(AccelpassError):
    """Says why no visual token of a graph is taken out."""


@dataclass(frozen=True)
class VisualPruning(Pass):
    """The first layers of a language model read all tokens, the others fewer visual ones; text stays, at its own positions.

    What is taken out never comes back. Caches of the layers behind keep a row for each position, of which those of tokens that
    were taken out are neither written nor read.

    Attributes:
        layer: how many layers read all tokens, at least 1.
    """

    layer: int = 2

    phase: ClassVar[str] = "attention"
    edits: ClassVar[frozenset[str]] = frozenset({"attention.rows"})
    for_prompts: ClassVar[bool] = True
    claims: ClassVar[dict[str, str]] = {
        "tokens": "layers of the language model read all tokens first, and then fewer visual ones"
    }

    def __post_init__(self) -> None:
        if self.layer < 1:
            raise self.fail("layer", "a number of layers that read all tokens, at least 1")

    @abstractmethod
    def left(self, each: int) -> int:
        """How many of each text's visual tokens go on.

        Raises:
            NotPruned: all of them; names the option.
        """

    def early(self, program: Program, record: Record, layers: Sequence[Block], sites: Sequence[KVSite]) -> None:
        """Rewrite the layers that read all tokens, once tokens have left behind them; ``sites`` are theirs."""

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
        behind = [site.path for site in sites if _is_in(site, stack[self.layer :])]
        if self.layer < len(stack):
            self._behind(program, record, stack, is_prompt, behind)
        else:
            record.skip("late layers", f"layer={self.layer}: the language model has {len(stack)} layers; choose fewer")
        first = [site for site in kv_sites(program) if site.path not in behind]
        self.early(program, record, stack[: self.layer], first)

    def _behind(
        self, program: Program, record: Record, stack: Sequence[Block], is_prompt: bool, behind: Sequence[str]
    ) -> None:
        """Let the layers behind read fewer tokens; ``behind`` are the paths of their caches."""
        path = stack[self.layer - 1].path
        sites = [site for site in kv_sites(program) if site.path in behind]
        if not is_prompt:
            read_what_is_left(program, self, {1: sites})
            record.take(path, Done(f"{len(sites)} layers behind it read what is left"))
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
        left = {} if rows is None else {1: rows}
        keep_what_is_left(program, self, {1: [site for site in kv_sites(program) if site.path in behind]}, left)

    def _stack(self, program: Program, sites: Sequence[KVSite]) -> list[Block]:
        """The blocks of the language model; that its tokens may leave is a matter of the model, the same in all its graphs."""
        attentions = {site.attention for site in sites}
        found = program.analysis(vision)
        towers = {block for tower in found.towers for block in tower.blocks}
        stacks = [c for c in chains(program) if c[0] not in towers and all(map(attentions_of, c))]
        if sites:
            stacks = [c for c in stacks if attentions.issuperset(n for b in c for n in attentions_of(b))]
        if len(stacks) != 1:
            raise NotPruned(f"{len(stacks)} stacks of blocks might be the language model's; one is needed")
        (stack,) = stacks
        why = why_none_may_leave(program, sites, [n for b in stack[self.layer :] for n in attentions_of(b)])
        if why is not None:
            raise NotPruned(why)
        return stack

    def _prune(self, program: Program, stack: Sequence[Block]) -> tuple[fx.Node, Any, str]:
        """Take tokens out of a prompt; which are left, of how many, and what was done."""
        mask, each = visual_places(program, value(stack[0].input).shape[0])
        left, tokens = self.left(each), value(stack[0].input).shape[1]
        streams = [stack[0].input, stack[self.layer - 1].output, stack[-1].output]
        found = stretches_between(program, streams, [stack[: self.layer], stack[self.layer :]])
        run = ShrinkingSequence(program, found)
        importance = self.score(program, run.attentions[-1], run.anchor)
        (chosen,) = run.make(partial(_left, each, left), mask, importance)
        with all_or_nothing(program):
            run.go_on(found[1], Rows(chosen))
        run.finish()
        return chosen, tokens, f"{left} of {each} visual tokens go on to {len(stack) - self.layer} layers"


@dataclass(frozen=True)
class VisualShare(VisualPruning):
    """A share of each text's visual tokens goes on.

    Attributes:
        keep: share of visual tokens that goes on; 1 takes out nothing.
    """

    keep: float = 0.5

    identity: ClassVar[dict[str, Any] | None] = {"keep": 1.0}

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.keep <= 1:
            raise self.fail("keep", "a share from 0 to 1 (1 takes out nothing)")

    def left(self, each: int) -> int:
        left = int(each * self.keep)
        if left == each:
            raise NotPruned(f"keep={self.keep}: all of its {each} visual tokens go on")
        return left


def entry_of(program: Program) -> Entry:
    """The one place where images enter the text, by a mask.

    Raises:
        NotPruned: there is none, or several; or no mask says which tokens are visual.
    """
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


def visual_places(program: Program, texts: Any) -> tuple[fx.Node, int]:
    """The mask that is True where a token is visual, and how many each text has.

    Raises:
        NotPruned: see :func:`entry_of`; or only run time knows the number, or texts have different ones.
    """
    entry = entry_of(program)
    assert entry.mask is not None
    count = value(entry.features).numel() // value(entry.node).shape[-1]
    if not isinstance(count, int) or not isinstance(texts, int):
        raise NotPruned("how many visual tokens and texts there are, only run time knows")
    if count % texts:
        raise NotPruned(f"{count} visual tokens of {texts} texts are not as many in each")
    return entry.mask, count // texts


def grid_of(program: Program, each: int) -> tuple[int, int]:
    """Rows and columns in which the ``each`` visual tokens of a text lie, those of its images one after the other.

    As the tower's patches do where there is one token for each; a square if not, of all tokens of a text as one image.

    Raises:
        NotPruned: they are no square; names the option that says.
    """
    entry = entry_of(program)
    tower = entry.tower
    if tower is not None and tower.grid is not None:
        high, wide = (size if isinstance(size, int) else 0 for size in tower.grid)
        tokens = value(entry.features).numel() // value(entry.node).shape[-1]
        if high * wide and known(tokens == value(tower.start).shape[0] * high * wide):
            return high, wide
    side = math.isqrt(each)
    if side * side != each:
        raise NotPruned(
            f"where the {each} visual tokens of a text lie cannot be told: they are no square; say it as grid="
        )
    return side, side


def _left(each: int, left: int, mask: Tensor, importance: Tensor) -> list[Tensor]:
    """The tokens that go on, ascending: all of the text, and of the visual ones the ``left`` that are worth most."""
    mask = by_token(mask, each)
    score = importance.masked_fill(mask.logical_not(), float("inf"))
    order = score.sort(dim=-1, descending=True, stable=True).indices
    return [order[:, : mask.shape[1] - (each - left)].sort(-1).values]


def by_token(mask: Tensor, each: int | None) -> Tensor:
    """A mask of visual tokens as ``(texts, tokens)``; several texts must have ``each`` of them, if it is said."""
    mask = mask.flatten(2)[:, :, 0] if mask.dim() > 2 else mask
    if mask.shape[0] > 1 and each is not None:
        assert_async(
            (mask.sum(1) == each).all(),
            "visual tokens are told from text in several texts: each must have the same number of them",
        )
    return mask


def attentions_of(block: Block) -> list[fx.Node]:
    return [a.node for s in block.sublayers for a in s.attentions if a.node is not None and is_attention(a.node)]


def _is_in(site: KVSite, blocks: Sequence[Block]) -> bool:
    return any(site.attention in attentions_of(block) for block in blocks)
