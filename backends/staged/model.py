"""A model as stages: every block in each of the variants that passes choose from, and what surrounds the blocks.

Passes say how a block is computed; the host chooses, call by call, one variant for each block, and runs these.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from torch import Tensor

from accelpass.backends.runtime.caches import Kept
from accelpass.backends.staged.linker import Execution, Key, LinkedGraph, link
from accelpass.backends.staged.stage import Ref, Stage
from accelpass.ir.core.tensors import Binder
from accelpass.passes.core.base import Record
from accelpass.passes.core.staged import FULL, PolicyPass

Actions = tuple[str, ...]
Row = tuple[Actions, ...]
"""For each block what each pass does at each of its sites, in the order of :attr:`StagedModel.sites`: its variant."""


@dataclass(eq=False)
class StagedModel:
    """All stages of a model at one set of sizes.

    Attributes:
        sites: by block, the (pass, path) that an action is chosen for.
        paths: of the blocks.
        stages: by number of the block (-1 and the number of blocks for what surrounds them) and actions.
        arguments: how many a call has.
        streams: the value after each block; entry: the one that the first block reads.
        derived: binds the tensors that passes derived from weights, in the order of ``order``.
        disabled: (pass, path) of sites that some action could not be done at; they stay dense, and the report says why.
        compiled: how many different stages were compiled; ``seconds`` in all.
        recalls: how what an earlier call kept lies in memory, by name.
        caches: cache layers that it appends to: position of each one's counter, how tokens are stored, and who keeps them.
    """

    sites: list[list[tuple[PolicyPass, str]]]
    paths: list[str]
    stages: dict[Key, Stage]
    arguments: int
    results: tuple[Ref, ...]
    streams: tuple[Ref, ...]
    entry: Ref
    derived: Binder
    order: dict[Any, int]
    records: list[Record]
    disabled: frozenset[tuple[str, str]]
    compiled: int
    seconds: float
    recalls: dict[str, Hashable] = field(default_factory=dict)
    caches: tuple[tuple[int, tuple[str, ...], Kept], ...] = ()

    @cached_property
    def linked(self) -> LinkedGraph:
        given: list[Ref] = [("argument", at) for at in range(self.arguments)]
        return link(self.stages, self.results, [*given, *(("derived", what) for what in self.order)])

    @property
    def passes(self) -> list[PolicyPass]:
        """Those that choose."""
        return list({id(p): p for p, _ in itertools.chain.from_iterable(self.sites)}.values())

    @property
    def full(self) -> Row:
        return tuple(all_full(block) for block in self.sites)

    def chosen(self, number: int, action: Callable[[PolicyPass, str], str]) -> Actions:
        """The variant of a block in which each site does as it is told; those that cannot compute all."""
        return tuple(FULL if (p.name, path) in self.disabled else action(p, path) for p, path in self.sites[number])

    def keys(self, row: Row) -> Iterable[Key]:
        """The stages of a call, in order."""
        keys = ((-1, ()), *enumerate(row), (len(row), ()))
        return (key for key in keys if key in self.stages or 0 <= key[0] < len(row))

    def begin(self, args: Sequence[Any], recalled: Callable[[str], Tensor] | None = None) -> Execution:
        inputs = [*args, *self.derived(args)]
        return Execution(self.linked, inputs) if recalled is None else Execution(self.linked, inputs, recalled)

    def evaluate(
        self, row: Row, args: Sequence[Any], recalled: Callable[[str], Tensor]
    ) -> tuple[tuple[Any, ...], dict[str, Tensor]]:
        """The model's results at one call, and what the call keeps."""
        execution = self.begin(args, recalled)
        for key in self.keys(row):
            execution.run(self.linked.stages[key])
        return execution.results(), execution.kept

    def flops(self, row: Row) -> tuple[int, int]:
        """Of a call, and those of attention's products alone."""
        ran = [self.stages[key] for key in self.keys(row)]
        return sum(s.flops for s in ran), sum(s.attention for s in ran)


def all_full(block: Sequence[Any]) -> Actions:
    """The model's own computation at each of a block's sites."""
    return (FULL,) * len(block)
