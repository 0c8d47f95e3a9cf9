"""The base of passes that compute a block in one of several variants, chosen on the host at each call.

Such a pass says what is done where (``places``) and how (``acted``, once for each action that occurs). The backend cuts the
graph at its blocks, compiles each in every variant, and runs those that the policy chooses.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

from torch import Tensor, fx

from accelpass.ir.attention.lowering.lower import memory_order
from accelpass.ir.attention.recognition.insert import inverse
from accelpass.ir.core.graph import aten, call, value
from accelpass.ir.core.program import Program
from accelpass.ir.transform.resize import CannotResize
from accelpass.ir.transform.steps import BLOCK, NAME, Module, StepBlock
from accelpass.passes.core.base import Done, Pass, Skip, Take
from accelpass.passes.core.site_pass import Edits, SitePass

FULL = "full"


@dataclass(frozen=True, eq=False)
class Site:
    """Something that a call may compute in another way: a block, or one attention module of a block."""

    path: str
    block: StepBlock
    module: Module | None = None

    @property
    def streams(self) -> tuple[fx.Node, ...]:
        return self.block.inputs if self.module is None else self.module.streams

    @property
    def results(self) -> tuple[fx.Node, ...]:
        return self.block.outputs if self.module is None else self.module.results


@dataclass(frozen=True)
class PolicyPass(Pass):
    """Runs a model in stages: its policy chooses, for each call, in which of its variants each block is computed."""

    searching: ClassVar[bool] = False
    """A site that cannot do one action does the others all the same."""

    def stack(self, program: Program) -> Sequence[StepBlock]:
        """The blocks that the graph is cut at; none to leave it as one. Changes nothing."""
        return ()

    def unfit(self, program: Program) -> str | None:
        """Why no call of the model of this graph can be run in stages, whatever passes before this one change; None if it can."""
        return None

    @abstractmethod
    def places(self, blocks: Sequence[StepBlock]) -> list[Site]:
        """The sites, in the order in which the model runs them."""

    def chosen_places(self, blocks: Sequence[StepBlock]) -> list[Site]:
        """Those of :meth:`places` that the user's options admit."""
        return self.places(blocks)

    @abstractmethod
    def ways(self, paths: Sequence[str], can: Callable[[str], bool]) -> Iterable[tuple[str, ...]]:
        """The variants of a block: every combination of actions that may be chosen for its sites.

        Args:
            can: whether a site can do anything but :data:`FULL`.
        """

    def size(self, action: str) -> str:
        """Equal for actions whose values fit each other; empty for those that compute all rows of a call."""
        return ""

    def shown(self, action: str) -> str:
        """What a picture calls an action."""
        return action

    def run(self, call: StagedCall) -> tuple[Any, ...]:
        """The policy: run the stages of one call, and return the model's results."""
        for number in call.blocks:
            call.run(number, FULL)
        return call.results()


@dataclass(frozen=True)
class StagedPass(PolicyPass, SitePass):
    """Chooses, for each call and site, one of a few actions; :data:`FULL` is the model's own computation."""

    phase: ClassVar[str] = "attention"
    edits: ClassVar[frozenset[str]] = frozenset({"block.steps"})

    def chosen_places(self, blocks: Sequence[StepBlock]) -> list[Site]:
        return [site for site in self.places(blocks) if isinstance(self.wanted(site.path), Take)]

    @abstractmethod
    def acted(self, program: Program, site: Site, action: str) -> str:
        """Do it; returns what was done, for the report.

        Raises:
            CannotResize, SpecConflict: it cannot be done there; nothing that the graph returns has changed.
        """

    def asked(self, program: Program, site: Site) -> str:
        """The action of a site in this variant of the graph."""
        return program.actions.get(self.name, {}).get(site.path, FULL)

    def rewrite(self, site: Site, edit: Edits) -> Done | Skip | None:
        action = self.asked(edit.program, site)
        if action == FULL:
            return None
        try:
            return Done(self.acted(edit.program, site, action))
        except CannotResize as cause:
            return Skip(f"{action}: {cause}")


class StagedCall(Protocol):
    """One call of a model that was cut into stages, as a policy sees it; what precedes the blocks has run."""

    @property
    def blocks(self) -> range:
        """Numbers of the blocks."""

    @property
    def held(self) -> int:
        """Tokens that the key/value cache held before the call."""

    def path(self, number: int) -> str:
        """Of a block, where it is in the model."""

    def run(self, number: int, action: str) -> None:
        """Run a block in one of its variants.

        Raises:
            PassError: it was not compiled in that variant, or for tensors of other sizes than those that were given.
        """

    def give(self, name: str, tensor: Tensor) -> None:
        """What blocks that run from now on find under a name that a rewritten site recalls."""

    def value(self, name: str) -> Tensor:
        """A value that a stage has made, by its name in all variants."""

    def stream(self, number: int) -> Tensor:
        """What a block has handed on; of -1, what the first one reads."""

    def counter(self, number: int) -> Tensor:
        """The counter of the cache layer that a block appends to, with which its state lives."""

    def went_on(self, path: str, kept: Tensor, tokens: int) -> None:
        """Tell which of so many tokens went on from a module: positions, ascending, ``(batch, kept)``."""

    def early(self, number: int) -> tuple[Any, ...]:
        """The model's results, were this block, which ran last, the end of the stack."""

    def results(self) -> tuple[Any, ...]:
        """The model's results, after all blocks."""


@contextmanager
def appending(node: fx.Node) -> Iterator[Callable[..., fx.Node]]:
    """Nodes made inside come after ``node``, in the order in which they are made; yields what calls an operator."""
    graph = node.graph
    with graph.inserting_after(node):
        end = graph.call_function(aten.alias.default, (node,))
    with graph.inserting_before(end):
        yield lambda target, *args: call(graph, node, target, *args)
    if BLOCK in node.meta and end.prev is not node:
        end.prev.meta[BLOCK] = node.meta.pop(BLOCK)  # what was made belongs to the block that ended here
    graph.erase_node(end)


def laid_out(node: fx.Node, like: fx.Node) -> fx.Node:
    """``node`` in memory as ``like`` is: what reads it, in this block or the next, was captured for that."""
    if value(node).stride() == value(like).stride():
        return node
    order = memory_order(value(like)) or tuple(range(value(like).dim()))
    with appending(node) as build:
        stored = build(aten.contiguous.default, build(aten.permute.default, node, order))
        return build(aten.permute.default, stored, inverse(order))


def put(site: Site, new: Sequence[fx.Node]) -> None:
    """Let ``new`` be the site's results.

    Raises:
        CannotResize: something reads a result before the new one is there.
    """
    new = [laid_out(node, old) for old, node in zip(site.results, new, strict=True)]
    readers = [
        [user for user in old.users if user not in _made_from(old, node)]
        for old, node in zip(site.results, new, strict=True)
    ]
    for old, node, others in zip(site.results, new, readers, strict=True):
        if node.op != "placeholder" and any(user < node for user in others):
            raise CannotResize(f"{old.name} is read before the last of the site's results is there")
    for old, node, others in zip(site.results, new, readers, strict=True):
        old.replace_all_uses_with(node, delete_user_cb=others.__contains__)
        if old is not node and NAME in old.meta:
            node.meta[NAME] = old.meta.pop(NAME)
    ends = [old.meta.pop(BLOCK) for old in site.results if BLOCK in old.meta]
    if ends:
        max(new).meta[BLOCK] = ends[0]


def _made_from(old: fx.Node, new: fx.Node) -> set[fx.Node]:
    """What ``new`` is computed with after ``old``, ``new`` included."""
    made, front = {new}, [new]
    while front:
        for before in front.pop().all_input_nodes:
            if old < before and before not in made:
                made.add(before)
                front.append(before)
    return made
