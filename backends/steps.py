"""A model that is run once for each denoising step, as a graph for each step put together from compiled blocks.

Passes say how a block is computed at a step. Each way is compiled once: the model is captured and rewritten as often as a
block has ways to be computed, each of these graphs is cut at its blocks, and equal parts share code. A step is then a
choice of one part for each block.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from accelpass.backends.regions import Regions, Slot, Step
from accelpass.ir.errors import PassError
from accelpass.ir.tensors import Binder
from accelpass.passes.base import Record
from accelpass.passes.step_cache.base import FIRST, FULL, StepPass

Ref = tuple[str, Any]
"""Where a value comes from: ``argument`` (position), ``derived`` (what, which), ``recalled`` (name), ``held`` (a tensor),
``value`` (the name of the node that computes it)."""
Actions = tuple[str, ...]
Row = tuple[Actions, ...]
"""For each block what each pass does at each of its sites, in the order of :attr:`Composition.sites`."""


@dataclass(frozen=True, eq=False)
class Piece:
    """One part of the model, compiled: the block computed in one of its ways, or what precedes or follows all blocks.

    Attributes:
        attention: FLOPs of attention's products alone, among ``flops``.
    """

    fn: Callable[..., Any]
    given: tuple[Ref, ...]
    made: tuple[str, ...]
    keeps: tuple[tuple[str, Ref], ...]
    layouts: dict[str, Hashable]
    flops: int
    attention: int


@dataclass(frozen=True, eq=False)
class Linked:
    """A step's graph: the calls, what they are given, and the slots of what is kept."""

    regions: Regions
    sources: tuple[Ref, ...]
    keeps: tuple[str, ...]
    flops: int
    attention: int


@dataclass(eq=False)
class Composition:
    """All parts of a model at one set of sizes.

    Attributes:
        sites: by block, the (pass, path) that an action is chosen for.
        pieces: by number of the block (-1 and the number of blocks for what surrounds them) and actions.
        derived: binds the tensors that passes derived from weights.
        disabled: (pass, path) of sites that some action could not be done at; they stay dense, and the report says why.
        compiled: how many different parts were compiled; ``seconds`` in all.
        recalls: how what an earlier step kept lies in memory, by name.
    """

    sites: list[list[tuple[StepPass, str]]]
    pieces: dict[tuple[int, Actions], Piece]
    results: tuple[Any, ...]
    derived: Binder
    order: dict[Any, int]
    records: list[Record]
    disabled: frozenset[tuple[str, str]]
    compiled: int
    seconds: float
    recalls: dict[str, Hashable] = field(default_factory=dict)
    _linked: dict[Row, Linked] = field(default_factory=dict)

    def row(self, step: int, branch: int) -> Row:
        """What the passes want at a step."""
        return tuple(
            tuple(FULL if (p.name, path) in self.disabled else p.action(step, path, branch) for p, path in block)
            for block in self.sites
        )

    def possible(self, step: int, branch: int, held: Callable[[str, int], bool]) -> Row:
        """What the passes want at a step, as far as what it reads was kept.

        A block that reads what is missing does what the latest step before did that reads nothing missing, which is as a
        rule the step that keeps it.

        Args:
            held: whether something is remembered under a name, by the given step or a later one.
        """
        rows: dict[int, Row] = {}

        def actions(at: int, block: int) -> Actions:
            if at not in rows:
                rows[at] = self.row(at, branch)
            return rows[at][block]

        def reads(piece: Piece, block: int) -> bool:
            refs = dict.fromkeys((*piece.given, *(ref for _, ref in piece.keeps)))
            names = [what for kind, what in refs if kind == "recalled" and self.planned(what, step) is None]
            return all(held(name, kept_at(name, block)) for name in names)

        def kept_at(name: str, block: int) -> int:
            if name.startswith(FIRST):
                return step  # by the step's first call
            keeps = (t for t in range(step - 1, -1, -1) if name in dict(self.pieces[block, actions(t, block)].keeps))
            return next(keeps, step)  # never: nothing is as new as this step

        chosen = []
        for block, wanted in enumerate(self.row(step, branch)):
            tried = (wanted, *(actions(t, block) for t in range(step - 1, -1, -1)))
            ways = (way for way in tried if reads(self.pieces[block, way], block))
            chosen.append(next(ways, all_full(self.sites[block])))
        return tuple(chosen)

    def planned(self, name: str, step: int) -> Tensor | None:
        """A tensor that a step reads and that the plan holds, not an earlier step."""
        return next((t for p in self.passes if (t := p.operand(name, step)) is not None), None)

    @property
    def passes(self) -> list[StepPass]:
        return list({id(p): p for p, _ in itertools.chain.from_iterable(self.sites)}.values())

    @property
    def full(self) -> Row:
        return tuple(all_full(block) for block in self.sites)

    def linked(self, row: Row) -> Linked:
        """The graph of a step; made once for each different row."""
        if row not in self._linked:
            self._linked[row] = self._link(row)
        return self._linked[row]

    def evaluate(
        self, row: Row, args: Sequence[Any], recalled: Callable[[str], Tensor]
    ) -> tuple[tuple[Any, ...], dict[str, Tensor]]:
        """The model's results at one step, and what the step keeps."""
        graph = self.linked(row)
        bound = self.derived(args)
        given = [
            args[what] if kind == "argument" else bound[self.order[what]] if kind == "derived" else recalled(what)
            for kind, what in graph.sources
        ]
        made = graph.regions(*given)
        count = len(made) - len(graph.keeps)
        return made[:count], dict(zip(graph.keeps, made[count:], strict=True))

    def _link(self, row: Row) -> Linked:
        keys = [(-1, ()), *enumerate(row), (len(row), ())]
        outer = ((-1, ()), (len(row), ()))
        chain = [self.pieces[key] for key in keys if key in self.pieces or key not in outer]
        given = list(
            dict.fromkeys(ref for p in chain for ref in (*p.given, *(r for _, r in p.keeps)) if ref[0] != "value")
        )
        given += [
            r for r in self.results if isinstance(r, tuple) and r[0] not in ("value", "literal") and r not in given
        ]
        sources = [ref for ref in given if ref[0] != "held"]
        held = [ref for ref in given if ref[0] == "held"]
        slot: dict[Ref, int] = {ref: i for i, ref in enumerate([*sources, *held])}
        layouts: dict[str, Hashable] = {}
        for piece in chain:
            for name in piece.made:
                slot.setdefault(("value", name), len(slot))
                layouts[name] = piece.layouts[name]
            for kind, name in piece.given:
                if kind == "value" and (("value", name) not in slot or not _fits(layouts[name], piece.layouts[name])):
                    seen = layouts.get(name, "nothing")
                    raise PassError(
                        f"parts of the model do not fit together at {name}: {piece.layouts[name]} is read, {seen} is made"
                    )
        keeps = [(name, slot[ref]) for p in chain for name, ref in p.keeps]
        results = [r[1] if r[0] == "literal" else slot[r] for r in self.results]
        needed = {i for i, r in zip(results, self.results, strict=True) if r[0] != "literal"} | {i for _, i in keeps}
        steps: list[Step] = []
        dying = {slot["value", name]: at for at, p in enumerate(chain) for name in p.made}
        dying |= {slot[ref]: at for at, p in enumerate(chain) for ref in p.given}
        for at, piece in enumerate(chain):
            inputs = tuple(slot[ref] for ref in piece.given)
            outputs = tuple(slot["value", name] for name in piece.made)
            ends = tuple(i for i in dict.fromkeys((*inputs, *outputs)) if dying[i] == at and i not in needed)
            steps.append(Step(piece.fn, inputs, outputs, ends))
        wanted = [i if r[0] == "literal" else Slot(i) for r, i in zip(self.results, results, strict=True)]
        wanted += [Slot(i) for _, i in keeps]
        regions = Regions(steps, [ref[1].tensor for ref in held], len(slot), tuple(wanted), len(chain))
        flops, attention = sum(p.flops for p in chain), sum(p.attention for p in chain)
        return Linked(regions, tuple(sources), tuple(n for n, _ in keeps), flops, attention)


@dataclass(frozen=True, eq=False)
class Held:
    """A tensor that a graph itself holds."""

    tensor: Tensor


def all_full(block: Sequence[Any]) -> Actions:
    """The model's own computation at each of a block's sites."""
    return (FULL,) * len(block)


def _fits(made: Any, wanted: Any) -> bool:
    """Layouts are equal, except for the strides of dimensions that have one row."""
    if made == wanted:
        return True
    (shape, strides, *rest), (other, others, *rest_of_other) = made, wanted
    same = all(a == b for size, a, b in zip(shape, strides, others, strict=True) if size != 1)
    return shape == other and same and rest == rest_of_other
