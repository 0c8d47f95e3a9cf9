"""The linker: gives each value that stages read or make a place in one list, so that any of their variants can follow each other."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from accelpass.backends.staged.stage import Fn, Ref, Stage
from accelpass.ir.errors import PassError

Key = tuple[int, Hashable]
"""The number of a stage and its variant."""


@dataclass(frozen=True)
class Place:
    """Where a result stands."""

    number: int


@dataclass(frozen=True, eq=False)
class LinkedStage:
    """A stage whose values have places.

    Attributes:
        recalls: places of what earlier calls have kept, and its names; keeps: names and places of what later calls read.
        ends: places that no later stage reads, whatever its variant.
    """

    fn: Fn
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    recalls: tuple[tuple[int, str], ...]
    keeps: tuple[tuple[str, int], ...]
    ends: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class LinkedGraph:
    """All stages of a graph, linked. Called, it runs one variant of each in order, which is the trivial policy.

    Attributes:
        constants: tensors that the graph itself holds; their places follow those of the inputs.
        size: how many places there are.
        compiled: how many different stages were compiled for it; others had been compiled before.
    """

    stages: Mapping[Key, LinkedStage]
    place: Mapping[Ref, int]
    constants: list[Tensor]
    size: int
    results: tuple[Any, ...]
    compiled: int = 0

    def __call__(self, *inputs: Any) -> tuple[Any, ...]:
        execution = Execution(self, inputs)
        for stage in self.stages.values():
            execution.run(stage)
        return execution.results()


def _nothing(name: str) -> Tensor:
    raise PassError(f"{name!r} is read of an earlier call, and none has kept it")


@dataclass(eq=False)
class Execution:
    """One run of a linked program, stage by stage.

    Attributes:
        recalled: finds what an earlier call has kept under a name.
        kept: what the stages that ran keep for later calls.
    """

    program: LinkedGraph
    inputs: Sequence[Any]
    recalled: Callable[[str], Tensor] = _nothing
    kept: dict[str, Tensor] = field(default_factory=dict)
    values: list[Any] = field(init=False)

    def __post_init__(self) -> None:
        self.values = [*self.inputs, *self.program.constants]
        self.values += [None] * (self.program.size - len(self.values))

    def run(self, stage: LinkedStage, free: bool = True) -> None:
        """Run one stage; ``free`` lets go of what no later one reads."""
        values = self.values
        for place, name in stage.recalls:
            values[place] = self.recalled(name)
        made = stage.fn(*[values[i] for i in stage.inputs])
        for place, one in zip(stage.outputs, made, strict=True):
            values[place] = one
        del made
        for name, place in stage.keeps:
            self.kept[name] = values[place]
        if free:
            for place in stage.ends:
                values[place] = None

    def results(self) -> tuple[Any, ...]:
        return tuple(self.values[r.number] if isinstance(r, Place) else r for r in self.program.results)


def link(stages: Mapping[Key, Stage], results: Sequence[Ref], inputs: Sequence[Ref], compiled: int = 0) -> LinkedGraph:
    """Link stages; those of one number are variants of each other.

    Args:
        inputs: in the order in which a call gives them.

    Raises:
        PassError: a variant reads what another stage does not make in each of its variants, or lays out in another way.
    """
    _check(stages)
    reads: dict[Ref, None] = dict.fromkeys(ref for stage in stages.values() for ref in stage.reads)
    reads |= dict.fromkeys(ref for ref in results if ref[0] != "literal")
    held = [ref for ref in reads if ref[0] == "held"]
    place: dict[Ref, int] = {ref: at for at, ref in enumerate((*inputs, *held))}
    made = (("value", name) for stage in stages.values() for name in stage.made)
    for ref in (*reads, *made):
        place.setdefault(ref, len(place))
    needed = {place[ref] for ref in results if ref[0] != "literal"}
    last: dict[int, int] = {}
    for (number, _), stage in stages.items():
        for ref in (*stage.reads, *(("value", name) for name in stage.made)):
            if ref[0] in ("value", "recalled") and place[ref] not in needed:
                last[place[ref]] = max(number, last.get(place[ref], number))
    ends: dict[int, list[int]] = {}
    for at, number in last.items():
        ends.setdefault(number, []).append(at)
    linked = {key: _linked(stage, place, ends.get(key[0], ())) for key, stage in stages.items()}
    wanted = tuple(ref[1] if ref[0] == "literal" else Place(place[ref]) for ref in results)
    return LinkedGraph(linked, place, [ref[1].tensor for ref in held], len(place), wanted, compiled)


def _linked(stage: Stage, place: Mapping[Ref, int], ends: Iterable[int]) -> LinkedStage:
    return LinkedStage(
        stage.fn,
        tuple(place[ref] for ref in stage.given),
        tuple(place["value", name] for name in stage.made),
        tuple((place[ref], ref[1]) for ref in stage.reads if ref[0] == "recalled"),
        tuple((name, place[ref]) for name, ref in stage.keeps),
        tuple(ends),
    )


def _check(stages: Mapping[Key, Stage]) -> None:
    """Whatever variants run, each value that is read is there, and laid out as its reader was compiled for."""
    makers: dict[str, int] = {name: number for (number, _), stage in stages.items() for name in stage.made}
    variants: dict[int, list[Stage]] = {}
    for (number, _), stage in stages.items():
        variants.setdefault(number, []).append(stage)
    for stage in stages.values():
        for kind, name in stage.given:
            if kind != "value":
                continue
            likely = variants[makers[name]] if name in makers else []
            alike: list[Stage | None] = [s for s in likely if name in s.made or s.size == stage.size]
            for maker in alike or [None]:
                seen = None if maker is None or name not in maker.made else maker.layouts.get(name, ())
                if seen is None or not _fits(seen, stage.layouts.get(name, seen)):
                    raise PassError(
                        f"stages of the model do not fit together at {name}: {stage.layouts.get(name, 'it')} is read, "
                        f"{'nothing' if seen is None else seen} is made; leave one of the passes out"
                    )


def _fits(made: Any, wanted: Any) -> bool:
    """Layouts are equal, except for the strides of dimensions that have one row."""
    if made == wanted:
        return True
    (shape, strides, *rest), (other, others, *rest_of_other) = made, wanted
    same = all(a == b for size, a, b in zip(shape, strides, others, strict=True) if size != 1)
    return shape == other and same and rest == rest_of_other
