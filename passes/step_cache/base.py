"""The base of passes that compute a block in one way at one denoising step and in another way at the next.

Such a pass says what is done where (``places``), when (``action``, on the host, from the step's number alone) and how
(``acted``, once for each action that occurs); the stages that a step runs are those that its actions name.
"""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

from torch import Tensor, fx

from accelpass.ir.analyses.axes.axes import Axes, axes
from accelpass.ir.attention.spec.spec import AttentionSpec
from accelpass.ir.core.capture import cut_said
from accelpass.ir.core.graph import hint, value
from accelpass.ir.core.program import Program
from accelpass.ir.errors import SpecConflict
from accelpass.ir.transform.steps import (
    LATENTS,
    StepBlock,
    StepError,
    drop_dead_writes,
    recall,
    remember,
    step_blocks,
    user_input,
)
from accelpass.passes.core.base import Record
from accelpass.passes.core.staged import FULL, Site, StagedPass, laid_out

FIRST = "first call: "
NO_BLOCKS = (
    "no block of this graph reads the latents (an input named hidden_states, sample, latents or x), so there are no "
    "denoising steps to save"
)

NO_SITES = "the blocks that the latents pass through hold nothing for this pass: no attention over the latents"


@dataclass(frozen=True)
class StepPass(StagedPass):
    """Chooses, for each step and site, one of a few actions; :data:`FULL` is the model's own computation.

    Attributes:
        timesteps: the timesteps that the schedule was made for, one for each model call; empty if it fits any run.
        latents: shape of the latents that it was made for, without the batch; empty if it fits any.
        scheduler: what it was made with, for people to read; the timesteps are what is checked.
    """

    timesteps: tuple[float, ...] = field(default=(), kw_only=True)
    latents: tuple[int, ...] = field(default=(), kw_only=True)
    scheduler: str = field(default="", kw_only=True)

    claims: ClassVar[dict[str, str]] = {"calls": "denoising steps follow one another"}
    by_step: ClassVar[bool] = True

    def stack(self, program: Program) -> Sequence[StepBlock]:
        return program.analysis(step_blocks)

    @abstractmethod
    def action(self, step: int, site: str, branch: int = 0) -> str:
        """What is done at a step; ``branch`` counts the calls of one step where guidance is two calls."""

    @abstractmethod
    def horizon(self) -> int:
        """How many model calls must be looked at to have seen every action."""

    @property
    def run_length(self) -> int:
        """Model calls of the run that the schedule was made for; of one that fits any run, its :meth:`horizon`."""
        return len(self.timesteps) or self.horizon()

    @property
    def ends(self) -> int | None:
        """Model calls after which a run is over, if the schedule says so; None if it fits runs of any length."""
        return len(self.timesteps) or None

    @property
    def exact_age(self) -> bool:
        """What is recalled must be of the very step that the schedule means, and not of a later one."""
        return False

    def shown(self, action: str) -> str:
        """What a picture calls an action."""
        return action.split("+output")[0].split("+residual")[0]

    @property
    def decides(self) -> StepSearch | None:
        """Who decides at each call in place of :meth:`action`, while a search goes on."""
        return None

    def operand(self, name: str, step: int) -> Tensor | None:
        """A tensor that a rewritten site recalls and that no step keeps: one that the plan holds for each step."""
        return None

    @property
    def branches(self) -> int:
        """How many calls of one step differ in what is done."""
        return 1

    @property
    def calls(self) -> int | None:
        """How many calls of the model make a step, if the schedule says so: two where guidance is two calls."""
        return None

    def actions(self, site: str) -> Sequence[str]:
        """What a search may try at a site; asked for only if :attr:`searching`."""
        return (FULL,)

    def ways(self, paths: Sequence[str], can: Callable[[str], bool]) -> Iterable[tuple[str, ...]]:
        if self.searching and any(map(can, paths)):
            return itertools.product(*(self.actions(path) if can(path) else (FULL,) for path in paths))
        calls = itertools.product(range(self.horizon()), range(self.branches))
        return [tuple(self.action(step, path, n) if can(path) else FULL for path in paths) for step, n in calls]

    def check_call(self, latents: Tensor) -> None:
        """Raise :class:`StepError` if the first call of a run is not what the schedule assumes."""

    def find(self, program: Program) -> list[Site]:
        # From the last to the first: what a site reads is then still the node that the analyses know.
        return self.places(program.analysis(step_blocks))[::-1]

    def whole(self, program: Program, sites: Sequence[Site]) -> str | None:
        # Nothing is dropped either where there is no site: a decoder's graph writes to a cache that nothing here knows.
        if sites:
            return None
        return cut_said(program) or (NO_SITES if program.analysis(step_blocks) else NO_BLOCKS)

    def apply(self, program: Program, record: Record) -> None:
        if not self.find(program):
            super().apply(program, record)
            return
        seen = tuple(int(n) for n in value(latents).shape[1:]) if (latents := user_input(program, *LATENTS)) else ()
        if self.latents and seen and seen != self.latents:
            raise StepError(
                f"the plan of {self.name} is for latents of {list(self.latents)}, and these are {list(seen)}; "
                "make a plan for this size (accelpass.search_steps)"
            )
        super().apply(program, record)
        drop_dead_writes(program.graph)


def keep(program: Program, site: Site, what: str, nodes: Sequence[fx.Node], like: Sequence[fx.Node]) -> None:
    """Remember ``nodes`` of a site for later steps, in memory as ``like`` are, which is how :func:`kept` reads them."""
    for index, (node, known) in enumerate(zip(nodes, like, strict=True)):
        remember(program, state_name(site.path, what, index), laid_out(node, known))


def kept(program: Program, site: Site, what: str, like: Sequence[fx.Node]) -> list[fx.Node]:
    """What an earlier step remembered of a site; ``like`` are the nodes that :func:`keep` was given."""
    return [recall(program, state_name(site.path, what, index), node) for index, node in enumerate(like)]


def of_first_branch(name: str) -> str:
    """The name under which a call finds what the first call of its step remembered as ``name``."""
    return FIRST + name


def state_name(path: str, what: str, index: int = 0) -> str:
    """How remembered tensors are called: ``transformer_blocks.3.attn1:output``."""
    return f"{path}:{what}" if index == 0 else f"{path}:{what}{index + 1}"


def refuse_edited(spec: AttentionSpec, by: str) -> None:
    """Raise :class:`SpecConflict` if another pass has edited the attention already."""
    for owner, part in spec.edits:
        if owner != by:
            raise SpecConflict(f"{by!r} and {owner!r} ({part}) cannot both have the attention at {spec.site}")


def why_no_window(program: Program, site: Site) -> str | None:
    """Why a window over the tokens has no meaning at the attention of a site, or None."""
    assert site.module is not None
    if len(site.streams) > 1:
        return "text and image attend jointly; a window along both has no meaning"
    found: Axes = program.analysis(axes)
    # A stream that is joined itself, or one that attends together with text whose own result nobody reads (SD3's last).
    operands = () if site.module.attention.node is None else site.module.attention.node.args[:2]
    tokens = [found.of(n)[-2].leaves for n in (site.streams[0], *operands) if isinstance(n, fx.Node)]
    if any(part.whole in tokens for part in found.parts):
        return "its tokens are joined from text and image; a window along both has no meaning"
    spec = site.module.attention.spec
    return "the model's own mask is not combined with a window" if spec.bias != "none" or spec.before else None


def joined_tokens(program: Program, attention: fx.Node) -> list[tuple[Any, Any]]:
    """First token and number of each part that the tokens of an attention were joined of, in order; empty if they were not."""
    found: Axes = program.analysis(axes)
    tokens = found.of(attention.args[0])[-2].leaves if isinstance(attention.args[0], fx.Node) else ()
    parts = {str(p.start): (p.start, p.size) for p in found.parts if tokens and p.whole == tokens and p.step == 1}
    return sorted(parts.values(), key=lambda part: hint(part[0]))


class Searched(ABC):
    """Mix-in of passes that fit themselves in a sampling run (``accelpass.search_steps``)."""

    @abstractmethod
    def search(self, tell: Callable[[str], None]) -> StepSearch:
        """A new search; it calls ``tell`` once for each model call, with a few words on what it decided."""


class StepSearch(ABC):
    """Takes the decisions of one search, call by call.

    Attributes:
        in_search: the pass that the model is compiled with meanwhile; its ``searcher`` is this object.
        options: options of the backend that the search needs.
    """

    in_search: StepPass
    options: ClassVar[dict[str, Any]] = {}

    @abstractmethod
    def choose(self, trial: Trial) -> tuple[tuple[str, ...], ...]:
        """What to do at this call: by block, the action of each of its sites."""

    @abstractmethod
    def found(self) -> StepPass:
        """The pass with what was found."""

    def tensors(self) -> dict[str, Tensor]:
        """What was found besides, for the plan; names begin with the pass's."""
        return {}


class Trial(Protocol):
    """One model call of a search, which may be computed in several ways before one is chosen.

    Attributes:
        sites: by block, the pass and the path of each site.
        step, branch: as in :meth:`StepPass.action`; ``time`` is the timestep, ``latents`` what the model is given.
    """

    @property
    def sites(self) -> Sequence[Sequence[tuple[StepPass, str]]]: ...

    @property
    def step(self) -> int: ...

    @property
    def branch(self) -> int: ...

    @property
    def time(self) -> float: ...

    @property
    def latents(self) -> Tensor: ...

    def can(self, block: int, actions: tuple[str, ...]) -> bool:
        """Whether a block can be computed so."""

    def run(self, row: Sequence[tuple[str, ...]]) -> tuple[tuple[Any, ...], dict[str, Tensor]]:
        """The model's results and what would be kept; nothing is kept."""
