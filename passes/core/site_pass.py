"""The base of passes that rewrite one site after another: the loop, the user's choice of sites, and who may edit what."""

from __future__ import annotations

import itertools
from abc import abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

from torch import Tensor, fx

from accelpass.ir.core.derived import Recipe
from accelpass.ir.core.graph import call, replace
from accelpass.ir.core.program import Program
from accelpass.ir.core.state import StateSpec
from accelpass.ir.errors import SpecConflict
from accelpass.ir.transform.splice import Tracer
from accelpass.passes.core.base import Done, Record, SitePatterns, Skip, Take, Verdict

ASPECTS = {
    "attention.blocks": "which blocks of keys the queries of a prompt read",
    "attention.rows": "which rows of a cache are kept, and which are read",
    "attention.format": "how rows of a cache are written",
    "attention.heads": "which heads there are",
    "attention.kernel": "what computes the attention",
    "linear.weight": "how the weight is stored",
    "linear.kernel": "what computes the product",
    "mlp.channels": "which channels there are",
    "block.steps": "at which denoising steps it is computed, and how",
}
"""What several passes may want to change at one site. A pass may name others of its own."""


class Site(Protocol):
    """A place in the graph that a pass may rewrite.

    A site that stands for several (uses of one weight) has ``paths`` too: it is taken or left as a whole.
    """

    @property
    def path(self) -> str:
        """What a user calls it: the path of its module."""


@dataclass
class Edits:
    """How a site is rewritten: new nodes keep where the old ones came from, and what reads them knows how they lie.

    Attributes:
        by: the pass.
        number: sites of the graph that the pass took before this one.
        tracer: traces a plain torch function once for all places that are alike.
    """

    program: Program
    by: str
    tracer: Tracer
    number: int = 0

    def call(self, like: fx.Node, target: Any, *args: Any) -> fx.Node:
        """A call of an operator in front of ``like``, whose provenance it takes."""
        with self.program.graph.inserting_before(like):
            return call(self.program.graph, like, target, *args)

    def run(
        self, key: Any, function: Callable[..., Sequence[Tensor]], operands: Sequence[fx.Node], before: fx.Node
    ) -> list[fx.Node]:
        """What ``function`` computes from ``operands``, in front of ``before``; ``key`` is equal for equal functions."""
        return self.tracer.run((self.by, key), function, operands, before)

    def replace(self, old: fx.Node, new: fx.Node) -> None:
        """Let ``new`` be read in place of ``old``, which is erased."""
        replace(old, new)

    def derive(self, weights: Sequence[fx.Node], recipe: Recipe, names: Sequence[str]) -> list[fx.Node]:
        """Tensors made of weights, which follow these when they are swapped or loaded anew."""
        return self.program.tensors.derive(weights, recipe, names)

    def state(self, anchor: fx.Node, spec: StateSpec) -> fx.Node:
        """A tensor that is remembered between calls, and lives with ``anchor``."""
        return self.program.tensors.state(anchor, spec)


@dataclass(frozen=True)
class SitePass(SitePatterns):
    """A pass that says what its sites are, which it can take, and how one is rewritten. The loop is the same for all.

    Every site gets an answer in the report. Sites named in ``skip_sites``, or left out by ``include`` and ``exclude``, are not
    asked about. Two passes that edit one aspect of one site are refused, with both names.

    Class attributes:
        edits: aspects of a site that the pass changes (:data:`ASPECTS`, or a name of its own).
        reads: aspects that it looks at: it runs after passes of its phase that edit them.
        nothing: what a user is told where a graph has no site.
        model: what the graph as a whole is called in the report.
    """

    edits: ClassVar[frozenset[str]] = frozenset()
    reads: ClassVar[frozenset[str]] = frozenset()
    nothing: ClassVar[str] = "nothing of this kind was found in this graph"
    model: ClassVar[str] = "model"

    def __post_init__(self) -> None:
        self.check_sites()

    @abstractmethod
    def find(self, program: Program) -> Iterable[Any]:
        """What the pass is for, each a :class:`Site`, in the order in which they are rewritten."""

    def check(self, site: Any, program: Program) -> Verdict:
        """Whether a site can be taken; ``self`` has the options that ``sites`` gives for it."""
        return Take()

    @abstractmethod
    def rewrite(self, site: Any, edit: Edits) -> Done | Skip | None:
        """Rewrite a site, and say what was done; Skip if it cannot be, with the graph as it was.

        None where this variant of the graph has nothing to do there.
        """

    def aspects(self, site: Any) -> frozenset[str]:
        """What of :attr:`edits` is changed at this site."""
        return self.edits

    def whole(self, program: Program, sites: Sequence[Any]) -> str | None:
        """What is said of the graph as a whole, beside its sites."""
        return None if sites else self.nothing

    def apply(self, program: Program, record: Record) -> None:
        sites = [*self.find(program)]
        said = self.whole(program, sites)
        if said is not None:
            record.skip(self.model, said)
        edit = Edits(program, self.name, Tracer(program))
        for site in sites:
            paths: Sequence[str] = getattr(site, "paths", None) or [site.path]
            done: Verdict | Done | None = self._chosen(paths, record)
            here = self.at(paths)
            if isinstance(done, Take):
                done = judged(here, site, here.check(site, program))
            if isinstance(done, Take):
                edit.number = len(record.took)
                done = here.rewrite(site, edit)
                if isinstance(done, Done):
                    claim(program, self.name, here.aspects(site), paths)
            for number, path in enumerate(paths):
                if isinstance(done, Skip):
                    record.skip(path, done.why)
                elif isinstance(done, Done):
                    record.take(path, Done(f"shares the packed weight of {paths[0]}") if number else done)

    def _chosen(self, paths: Sequence[str], record: Record) -> Verdict:
        for path in paths:
            wanted = self.wanted(path, record)
            if isinstance(wanted, Skip):
                return wanted if len(paths) == 1 else Skip(f"{path} shares this weight and is {wanted.why}")
        return Take()


def judged(owner: SitePass, site: Any, verdict: Any) -> Verdict:
    """What a check returned.

    Raises:
        TypeError: neither Take nor Skip: a condition that was never called, or a bare bool.
    """
    if not isinstance(verdict, Take | Skip):
        raise TypeError(f"check() of {owner.name} returned {verdict!r} for {site.path}; return Take() or Skip(why)")
    return verdict


def claim(program: Program, name: str, aspects: Iterable[str], paths: Sequence[str]) -> None:
    """Note that a pass has edited aspects of a site.

    Raises:
        SpecConflict: another pass has; names both.
    """
    for aspect, path in itertools.product(sorted(aspects), paths):
        first = program.edited.setdefault((aspect, path), name)
        if first != name:
            meaning = f" ({ASPECTS[aspect]})" if aspect in ASPECTS else ""
            raise SpecConflict(
                f"{name!r} and {first!r} cannot both have {path}: each edits {aspect}{meaning}. Use one of the two there "
                "(include=, exclude= choose sites)."
            )
