"""The family's base: channels taken out of MLPs and heads out of attentions, the lowest by a method's score."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import fx

from accelpass.ir.analyses.axes.axes import Axis, axes
from accelpass.ir.analyses.structure.linear import Linear, linears
from accelpass.ir.analyses.structure.mlp import Mlp, mlps
from accelpass.ir.attention.recognition.detect import Attention, detect
from accelpass.ir.core.derived import Recipe
from accelpass.ir.core.program import Program
from accelpass.ir.transform.changed_axes import CannotShrink, Carrier, carriers, followers
from accelpass.ir.transform.kept import Static
from accelpass.ir.transform.shrink import shrink
from accelpass.passes.core.base import Done, Skip, Take, Verdict
from accelpass.passes.core.site_pass import Edits, SitePass


@dataclass(frozen=True)
class Channels:
    """The hidden channels of an MLP."""

    mlp: Mlp
    aspect: ClassVar[str] = "mlp.channels"

    @property
    def path(self) -> str:
        return self.mlp.path

    @property
    def reader(self) -> Linear | None:
        """The linear that sums over what may be taken out."""
        return self.mlp.down

    def dimension(self, program: Program) -> Sequence[Axis]:
        """The axes of the dimension that the channels, or the heads, are in."""
        return program.analysis(axes).of(self.mlp.down.operand())[-1].leaves

    def region(self, program: Program) -> Collection[fx.Node] | None:
        """The nodes that are to shrink; None for all that have the axis."""
        return None

    def said(self, before: int, after: int) -> str:
        return f"{after} of {before} channels"


@dataclass(frozen=True)
class Heads:
    """The heads of an attention; those that share keys and values stay or go together."""

    attention: Attention
    reader: Linear | None
    aspect: ClassVar[str] = "attention.heads"

    @property
    def path(self) -> str:
        return self.attention.path

    def dimension(self, program: Program) -> Sequence[Axis]:
        assert self.attention.node is not None
        keys = program.analysis(axes).of(self.attention.node.args[1])
        return keys[-3].leaves if len(keys) > 2 else ()

    def region(self, program: Program) -> Collection[fx.Node] | None:
        """What this attention's heads are computed from and read by: a bias may give the heads of all layers one axis."""
        (axis,) = self.dimension(program)
        of = self.attention
        return followers(program, axis, [*of.q_proj, *of.k_proj, *of.v_proj])

    def said(self, before: int, after: int) -> str:
        groups = self.attention.spec.groups
        shared = "" if groups == 1 else f" ({after} of {before} groups that share keys and values)"
        return f"{after * groups} of {before * groups} heads{shared}"


Site = Channels | Heads


@dataclass(frozen=True)
class RowPruning(SitePass):
    """Base of passes that make MLPs and attentions narrower; a method says how many rows stay, and how they are scored.

    Weights, biases, caches and products are smaller; masks are not kept. What is kept follows the weights when these are swapped or
    loaded anew.
    """

    phase: ClassVar[str] = "structure"
    edits: ClassVar[frozenset[str]] = frozenset({Channels.aspect, Heads.aspect})
    reads: ClassVar[frozenset[str]] = frozenset({"block.steps"})  # a layer that is left out is not pruned first
    nothing: ClassVar[str] = "no MLP and no attention was recognised in this graph"

    @abstractmethod
    def score(self, site: Site, found: Sequence[Carrier], program: Program) -> tuple[Recipe, Sequence[fx.Node]] | Skip:
        """How rows are scored: a recipe that makes ``(rows,)`` of tensors, and these.

        Args:
            found: the weights that have the rows; at least one.
        """

    @abstractmethod
    def count(self, site: Site, size: int, program: Program) -> int | Skip:
        """How many of ``size`` rows stay; Skip says why none goes."""

    def find(self, program: Program) -> list[Site]:
        of = {linear.node: linear for linear in program.analysis(linears)}
        return [
            *(Channels(mlp) for mlp in program.analysis(mlps)),
            *(
                Heads(a, None if a.o_proj is None else of.get(a.o_proj))
                for a in program.analysis(detect)
                if a.node is not None
            ),
        ]

    def aspects(self, site: Site) -> frozenset[str]:
        return frozenset({site.aspect})

    def check(self, site: Site, program: Program) -> Verdict:
        if isinstance(site, Heads) and site.reader is None:
            return Skip("what reads the heads was not recognised")
        found = site.dimension(program)
        if len(found) != 1:
            return Skip("there is one head" if not found else "several axes are in one dimension here")
        size = found[0].size
        if not isinstance(size, int):
            return Skip(f"how many there are, only run time knows ({size})")
        count = self.count(site, size, program)
        return count if isinstance(count, Skip) else Take()

    def rewrite(self, site: Site, edit: Edits) -> Done | Skip:
        program = edit.program
        (axis,) = site.dimension(program)
        try:
            region = site.region(program)
            found = carriers(program, axis, region)
            if not found:
                return Skip("no weight has what would be taken out")
            score = self.score(site, found, program)
            if isinstance(score, Skip):
                return score
            recipe, of = score
            count = self.count(site, int(axis.size), program)
            assert isinstance(count, int)
            shrunk = shrink(program, axis, Static.best(count, recipe, of), region)
        except CannotShrink as cause:
            return Skip(str(cause))
        before, after = (sum(getattr(s, name) for s in shrunk) for name in ("bytes_before", "bytes_after"))
        return Done(site.said(int(axis.size), count), before, after, shrunk=tuple(shrunk))


@dataclass(frozen=True)
class StructuredPruning(RowPruning):
    """Base of passes that take a given share out of every layer.

    Every layer keeps as many rows, so that equal layers still share code.

    Attributes:
        channels: share of each MLP's hidden channels that is taken out, from 0 to below 1.
        heads: share of each attention's heads that is taken out, rounded to whole groups that share keys and values; at
            least one group stays.
        multiple: kept channels are a multiple of this, as formats that pack weights in groups want it.
    """

    channels: float = 0.25
    heads: float = 0.25
    multiple: int = 16

    identity: ClassVar[dict[str, Any] | None] = {"channels": 0.0, "heads": 0.0}

    def __post_init__(self) -> None:
        for name in ("channels", "heads"):
            if not 0 <= getattr(self, name) < 1:
                raise self.fail(name, "a share from 0 to below 1")
        if self.multiple < 1:
            raise self.fail("multiple", "a number of channels, at least 1")
        super().__post_init__()

    def kept(self, site: Site, size: int) -> int:
        """How many of ``size`` rows stay."""
        if isinstance(site, Heads):
            return max(1, size - round(size * self.heads))
        if not self.channels:
            return size
        return min(size, max(1, round(size * (1 - self.channels) / self.multiple)) * self.multiple)

    def check(self, site: Site, program: Program) -> Verdict:
        if not (self.heads if isinstance(site, Heads) else self.channels):
            return Skip("nothing is to be taken out here")
        return super().check(site, program)

    def count(self, site: Site, size: int, program: Program) -> int | Skip:
        kept = self.kept(site, size)
        return kept if kept < size else Skip(f"of {size} none is taken out: {self._share(site)}")

    def _share(self, site: Site) -> str:
        if isinstance(site, Heads):
            return f"heads={self.heads} is not more than half of one"
        return f"channels={self.channels} leaves as many multiples of {self.multiple}"
