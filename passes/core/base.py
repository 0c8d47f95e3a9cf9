"""What a pass is: a frozen dataclass of typed options, a phase, and ``apply``."""

from __future__ import annotations

import fnmatch
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields, replace
from typing import Any, ClassVar, Protocol, Self, get_type_hints

import torch
from torch import Tensor

from accelpass.ir.attention.spec.spec import AttentionSpec
from accelpass.ir.core.program import Program
from accelpass.ir.core.verdict import Skip as Skip
from accelpass.ir.core.verdict import Take as Take
from accelpass.ir.core.verdict import Verdict as Verdict
from accelpass.ir.errors import OptionError
from accelpass.ir.transform.shrink import Shrunk
from accelpass.ir.transform.tap import Tap
from accelpass.passes.core.fields import nearest, typed

PHASES = ("structure", "attention", "cache", "weights", "fusion", "kernels", "schedule")


@dataclass(frozen=True)
class Done:
    """What was done at one site, with the bytes of its weights before and after.

    ``densities``: of an attention, the share of its keys that the last query of each head reads in a prompt of ``tokens``.
    ``shrunk``: the weights that have fewer rows or columns now.
    """

    what: str
    bytes_before: int = 0
    bytes_after: int = 0
    densities: tuple[float, ...] = ()
    tokens: int = 0
    shrunk: tuple[Shrunk, ...] = ()


@dataclass
class Record:
    """What one pass did to one graph, site by site."""

    name: str
    took: dict[str, Done] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    difference: float | None = None
    """Largest relative change of an output, measured in debug mode; None where it was not."""
    leave: frozenset[str] = frozenset()
    """Sites that the user wants left alone (``options={"skip_sites": ...}``); ask :meth:`wants`."""

    def wants(self, site: str) -> Verdict:
        """Whether the pass may take a site; every pass asks this before it rewrites one."""
        return Skip("named in skip_sites") if site in self.leave else Take()

    def skip(self, site: str, why: str) -> None:
        self.skipped[self._unique(site, self.skipped)] = why

    def take(self, site: str, done: Done) -> None:
        self.took[self._unique(site, self.took)] = done

    @staticmethod
    def _unique(site: str, taken: dict[str, Any]) -> str:
        name, number = site, 2
        while name in taken:
            name, number = f"{site} #{number}", number + 1
        return name


@dataclass(frozen=True)
class Pass:
    """Base of every pass. Subclasses are frozen dataclasses whose fields are the user's options.

    Class attributes:
        name: what a user types; lower case, no version, no author.
        phase: one of :data:`PHASES`; the manager sorts by it.
        summary: one line for ``accelpass passes``.
        paper: the published source, or ``""`` for plain compiler work.
        exact: the result equals the dense model's up to the order of float additions.
        identity: options at which it does, of a pass that is not exact; None if there are none (rounded weights). The
            conformance kit holds each pass to them.
        after, before: names of passes of the same phase that must run earlier or later.
        excludes: names of passes that this one cannot be combined with, and why.
        edits, reads: aspects of sites; see :class:`accelpass.passes.SitePass`. Who reads runs after who edits.
        claims: what the pass assumes of the model as a whole, by aspect, in words that a user reads: two passes that say different
            things of one aspect cannot be combined.
        reads_back: with a key/value cache it reads numbers back on the host at each step, so that no file can hold it.
        for_prompts: it acts on prompts whose keys and values stand in an ``accelpass.KVCache``, or in none.
        by_step: which graph runs is chosen on the host, from the number of the denoising step.
    """

    name: ClassVar[str]
    phase: ClassVar[str]
    summary: ClassVar[str]
    paper: ClassVar[str] = ""
    exact: ClassVar[bool] = False
    identity: ClassVar[dict[str, Any] | None] = None
    after: ClassVar[tuple[str, ...]] = ()
    before: ClassVar[tuple[str, ...]] = ()
    excludes: ClassVar[dict[str, str]] = {}
    edits: ClassVar[frozenset[str]] = frozenset()
    reads: ClassVar[frozenset[str]] = frozenset()
    claims: ClassVar[dict[str, str]] = {}
    reads_back: ClassVar[bool] = False
    for_prompts: ClassVar[bool] = False
    by_step: ClassVar[bool] = False

    def bound(self, artefacts: Mapping[str, Tensor], device: torch.device) -> Pass:
        """The pass with the tensors of its plan, where it reads them before it sees a graph.

        Raises:
            PlanError: it cannot do without, and there are none.
        """
        return self

    @property
    def cache_mark(self) -> str:
        """What tells a cache that the pass has filled from others, so that nothing else goes on with it; empty if nothing must."""
        return ""

    def apply(self, program: Program, record: Record) -> None:
        """Rewrite ``program.graph``; put every site into ``record`` as taken, or skipped with a reason."""
        raise TypeError(f"{type(self).__name__} does not define apply()")

    @classmethod
    def from_options(cls, given: dict[str, Any]) -> Pass:
        """Build the pass from what a user typed; names the nearest field on a mistake."""
        known = [f.name for f in fields(cls)]
        for key in given:
            if key not in known:
                raise OptionError(f"{cls.name}: unknown option {key!r}{nearest(key, known)}; known: {', '.join(known)}")
        hints = get_type_hints(cls)
        values = {}
        for f in fields(cls):
            if f.name in given:
                values[f.name] = typed(given[f.name], hints[f.name], f"{cls.name}: option {f.name!r}")
            elif f.default is MISSING and f.default_factory is MISSING:
                raise OptionError(f"{cls.name}: option {f.name!r} is required")
        return cls(**values)

    def fail(self, field_name: str, legal: str) -> OptionError:
        """The error for a field out of range."""
        return OptionError(f"{self.name}: {field_name}={getattr(self, field_name)!r} is not supported; use {legal}")


@dataclass(frozen=True)
class SitePatterns(Pass):
    """Mix-in: choose sites by path with shell patterns, ``*.mlp.*`` or a whole part such as ``lm_head``.

    Attributes:
        include, exclude: which sites are taken at all.
        sites: other settings for some of them, ``{"*.down_proj": {"group_size": 32}}``; later patterns win.

    Class attributes:
        for_all_sites: options that say what a site is, and cannot differ between sites.
    """

    for_all_sites: ClassVar[tuple[str, ...]] = ()

    include: tuple[str, ...] = ("*",)
    exclude: tuple[str, ...] = ()
    sites: dict[str, Any] = field(default_factory=dict)

    def wanted(self, path: str, record: Record | None = None) -> Verdict:
        """Whether the patterns admit a site, and the user's ``skip_sites`` if there is a ``record``."""
        if not _matches(path, self.include):
            return Skip(f"not named in include={list(self.include)}")
        if _matches(path, self.exclude):
            return Skip(f"named in exclude={list(self.exclude)}")
        return Take() if record is None else record.wants(path)

    def at(self, paths: Sequence[str]) -> Self:
        """The pass with the settings that ``sites`` gives for any of ``paths`` (one weight may have several).

        Raises:
            OptionError: ``sites`` names a field that does not exist or is out of range.
        """
        changes: dict[str, Any] = {}
        for pattern, given in self.sites.items():
            if any(_matches(path, (pattern,)) for path in paths):
                changes |= self._overrides(pattern, given)
        return replace(self, sites={}, **changes) if changes else self

    def check_sites(self) -> None:
        """Raise :class:`OptionError` for a setting in ``sites`` that no site could have; call it in ``__post_init__``."""
        for pattern, given in self.sites.items():
            replace(self, sites={}, **self._overrides(pattern, given))

    def _overrides(self, pattern: str, given: Any) -> dict[str, Any]:
        shared = {*self.for_all_sites, *(f.name for f in fields(SitePatterns))}
        own = [f.name for f in fields(self) if f.name not in shared]
        if not isinstance(given, dict):
            raise OptionError(f"{self.name}: sites[{pattern!r}] is {given!r}; it takes a dict of {', '.join(own)}")
        for key in given:
            if key not in own:
                known = ", ".join(own) or "none"
                raise OptionError(f"{self.name}: sites[{pattern!r}] sets {key!r}{nearest(key, own)}; known: {known}")
        hints = get_type_hints(type(self))
        return {k: typed(v, hints[k], f"{self.name}: option {k!r}") for k, v in given.items()}


Watch = Callable[[Tensor], None]


class Run(Protocol):
    """Runs all calibration data once; ``what`` is said beside the progress bar."""

    def __call__(self, watched: Mapping[str, Watch], what: str) -> None:
        """Calls functions, given by parameter path, with the input of the linear that the parameter is of.

        Raises:
            PassError: no linear has such a parameter.
        """

    def gather(self, taps: Sequence[Tap], what: str) -> dict[str, Tensor]:
        """What taps gather over all data, by the name of the point, and ``.name`` of a tap that has one."""

    def blocks(self, what: str, rest: bool = False) -> Iterator[BlockRun]:
        """The blocks in order: what one gives is held for all data, and is what the next one reads. A model without blocks is one.

        ``rest``: what comes after the last block is one more.
        """

    def kept(self, number: int) -> dict[str, Tensor] | None:
        """What :meth:`keep` was given for a block in a run before this one, which was interrupted; None if there is nothing."""

    def keep(self, number: int, learnt: Mapping[str, Tensor]) -> None:
        """Keep what was learnt of a block, where the caller wants that."""


class BlockRun(Protocol):
    """One block of a model, with what all calibration data give it."""

    number: int

    @property
    def weights(self) -> frozenset[str]:
        """Paths of the weights of its linears."""

    def inputs(
        self, watched: Mapping[str, Watch], begin: Callable[[Mapping[str, Any]], None] = lambda call: None
    ) -> None:
        """Run the block on all data; functions by path of a weight are called with the input ``(..., in)`` of its linear.

        ``begin`` is told the model's arguments of each call before it is run.
        """

    def put(self, weights: Mapping[str, Tensor]) -> None:
        """Let later blocks read what this one gives with these weights, by path, in the form in which the model stores them."""


class Calibrated(ABC):
    """Mix-in of passes that learn something from data.

    Class attributes:
        fits_cache: the graph that it looks at fills an ``accelpass.KVCache``.
    """

    fits_cache: ClassVar[bool] = True

    @abstractmethod
    def calibrate(self, program: Program, run: Run) -> dict[str, Tensor]:
        """Fit, and return tensors by name for a plan; ``apply`` finds them as ``program.artefacts``.

        Args:
            program: the model's graph for a prompt.
            run: runs all data once, and lets the pass see what is computed.

        Raises:
            PassError: the graph has nothing to fit; says why.
        """


Attend = Callable[[AttentionSpec, Tensor, Tensor, Tensor], Tensor | None]
"""Computes an attention from its spec and ``(batch, heads, tokens, d)`` operands; None: as the model does."""

Seen = Callable[[Tensor], None]
Changes = Mapping[str, Callable[[Tensor], Tensor]]
"""What makes another weight of a weight, by its path; differentiable."""


class Study(Protocol):
    """The model's loss on calibration data, with each attention computed as a pass says.

    Attributes:
        batch: the one whose attentions are being computed: ``input_ids``, and ``labels`` and ``needle`` if they were given.
        batches: those that are learnt from.
        learnt: what the pass has learnt without the loss, as its plan has it.
    """

    batch: Mapping[str, Any]
    batches: Sequence[Mapping[str, Any]]
    learnt: Mapping[str, Tensor]

    def gradients(self, attend: Attend, what: str) -> None:
        """Run losses and gradients; what ``attend`` returns must be differentiable. Where the model attends itself, none are run."""

    def observed(self, attend: Attend, what: str) -> None:
        """Run the batches of :meth:`gradients` once, without gradients: for what ``attend`` sees."""

    def trained(self, attend: Attend, changes: Changes, step: Callable[[], None], what: str) -> None:
        """As :meth:`gradients`, with ``step()`` after each batch, and weights that ``changes`` puts in the place of the model's."""

    def projections(self, site: str) -> Mapping[str, Tensor]:
        """Weights ``(out, in)`` of the linears of queries, keys, values and output of a site that was run, by path."""

    def perplexity(self, attend: Attend, what: str, changes: Changes | None = None) -> float:
        """On the batches that :meth:`gradients` does not see, unless there are no others."""

    def losses(
        self,
        taps: Callable[[Program], Sequence[Tap]],
        vectors: Callable[[], Mapping[str, Tensor]],
        what: str,
        epochs: int = 1,
    ) -> Iterator[Tensor]:
        """The mean loss of each batch of :meth:`gradients`, with taps in the model's graph; differentiable in their vectors alone.

        Args:
            taps: those of a graph; with ``written`` vectors.
            vectors: these, anew for each batch, by the name of the point, and ``.0``, ``.1`` where a tap has several.
            epochs: how often all batches are run.
        """

    def last_queries(self, site: str) -> Tensor:
        """In a call of ``attend`` by :meth:`decoded`: queries of the tokens before those of the call, the last 64 at most."""

    def projected(self, site: str, out: Tensor) -> Tensor:
        """What a layer makes of an attention's result ``(batch, heads, tokens, d)``: ``(batch, tokens, channels)``.

        Raises:
            PassError: no linear reads the attention; names it.
        """

    def decoded(self, attend: Attend, what: str, seen: Seen | None = None) -> float:
        """Perplexity on all batches, with the tokens from the first label on computed as if they came one by one.

        What comes before them is computed once, as the model does it, and its keys and values are kept from call to call.
        ``attend`` gets the queries of those tokens, and keys and values of all. ``seen`` is called after each batch with the logits
        that its labels are compared with, from the first label that counts on, ``(batch, tokens, vocabulary)``.

        Raises:
            OptionError: a batch has more than ids and labels, or the model takes no ``position_ids``.
            PassError: an attention is not a plain causal one of a prompt over itself; names it.
        """


class CalibratedOnLoss(ABC):
    """Mix-in of passes that learn from what changes the model's loss."""

    @property
    def wants_loss(self) -> bool:
        """Whether it does with these options."""
        return True

    @abstractmethod
    def calibrate_on_loss(self, study: Study) -> dict[str, Tensor]:
        """Fit, and return tensors by name for a plan; ``apply`` finds them as ``program.artefacts``.

        Raises:
            PassError: the model has nothing to fit; says why.
        """


Judge = Callable[[Mapping[str, Tensor]], float]
"""Tries a candidate, given by what is written to the state of the pass that tries it, and returns its score; larger is better."""


class Judged(ABC):
    """Mix-in of passes whose plan is the candidate that a user's score likes best (``accelpass.search_by_score``).

    Attributes:
        trials: candidates that the search scores.
    """

    name: ClassVar[str]
    trials: int

    @abstractmethod
    def judged(self, found: dict[str, Any]) -> Pass:
        """The pass that the model is compiled with meanwhile: it reads candidates from state, and notes in ``found`` what there is
        to choose, by site."""

    @abstractmethod
    def search(self, found: Mapping[str, Any], judge: Judge, again: Judge, seed: int) -> dict[str, Tensor]:
        """Try candidates, and return the tensors of the plan.

        Args:
            judge: on the data of the search; ``again`` on other data.

        Raises:
            PassError: there is nothing to choose.
        """


def _matches(path: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch.fnmatchcase(path, p) or p in path.split(".") for p in patterns)
