"""One graph that was cut where tokens leave, compiled stretch by stretch, and one run of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import sympy
import torch
from torch import Tensor

from accelpass.backends.staged.stage import Held, Ref
from accelpass.ir.core.tensors import Binder
from accelpass.ir.transform.rows import rows_of
from accelpass.ir.transform.tokens import Taken


@dataclass(frozen=True, eq=False)
class Stage:
    """One stretch, compiled.

    Attributes:
        path: its first block.
        given: where each argument comes from: ``bound`` (position among the graph's bound inputs), ``recalled``,
            ``held``, ``value``, or ``size`` (an expression in the number of tokens).
        made: names of what it returns; ``end`` the stream, ``importance`` what tokens are worth after it.
        taken: its inputs that hold rows of values of the model.
        count: position among the model's arguments of the counter of its last layer.
    """

    path: str
    fn: Callable[..., Any]
    given: tuple[Ref, ...]
    made: tuple[str, ...]
    end: str
    importance: str
    taken: Mapping[str, Taken]
    count: int


@dataclass(eq=False)
class PrunedGraph:
    """The stretches, and what follows them.

    Attributes:
        stages: the stretches, then the model's end.
        pins: by number, the value that a :class:`~accelpass.ir.transform.tokens.Taken` has as source.
        symbol: what stands for the number of tokens; None for a graph of static sizes.
        asked: where a call says it: position of a bound input, and its dimension, None if it is the number itself.
        tokens: rows of the later stretches, if they are static.
    """

    stages: Sequence[Stage]
    outputs: tuple[Ref, ...]
    pins: tuple[Ref, ...]
    binder: Binder
    symbol: sympy.Symbol | None
    asked: tuple[int, int | None] | None
    tokens: int
    width: int
    dtype: torch.dtype

    def begin(self, args: Sequence[Any], values: dict[str, Any] | None = None) -> Run:
        """A call; ``values`` are those that another graph of the same model has computed for it."""
        return Run(self, self.binder(args), {} if values is None else values)


@dataclass(eq=False)
class Run:
    """The values of one call."""

    graph: PrunedGraph
    bound: list[Any]
    values: dict[str, Any] = field(default_factory=dict)
    _recalled: dict[str, Tensor] = field(default_factory=dict)
    _tokens: int | None = None

    def __post_init__(self) -> None:
        if self.graph.asked is not None:
            at, dim = self.graph.asked
            self._tokens = int(self.bound[at] if dim is None else self.bound[at].shape[dim])

    def stage(self, number: int, given: Mapping[str, Tensor], tokens: int | None = None) -> Tensor:
        """Run one stretch on ``tokens`` rows; returns the stream after it."""
        stage = self.graph.stages[number]
        self._recalled |= given
        made = stage.fn(*(self._at(ref, self._tokens if tokens is None else tokens) for ref in stage.given))
        self.values |= zip(stage.made, made, strict=True)
        end: Tensor = self.values[stage.end]
        return end

    def importance(self, number: int) -> Tensor:
        found: Tensor = self.values[self.graph.stages[number].importance]
        return found

    def pinned(self, source: int) -> Tensor:
        """The value that rows are taken of."""
        found: Tensor = self._at(self.graph.pins[source], None)
        return found

    def rows_of(self, stage: Stage, rows: Tensor) -> dict[str, Tensor]:
        """The stretch's inputs: rows ``(batch, n)`` of each value, in all of its dimensions of tokens."""
        found = {}
        for name, what in stage.taken.items():
            x = self.pinned(what.source)
            for dim in what.dims:
                x = rows_of(x, rows, dim)
            found[name] = x
        return found

    def results(self, given: Mapping[str, Tensor]) -> tuple[Any, ...]:
        """What the model returns, for the stream of all its tokens."""
        last = self.graph.stages[-1]
        self._recalled |= given
        made = last.fn(*(self._at(ref, self._tokens) for ref in last.given))
        self.values |= zip(last.made, made, strict=True)
        return tuple(self._at(ref, self._tokens) for ref in self.graph.outputs)

    def _at(self, ref: Ref, tokens: int | None) -> Any:
        kind, what = ref
        if kind == "bound":
            return self.bound[what]
        if kind == "recalled":
            return self._recalled[what]
        if kind == "value":
            return self.values[what]
        if kind == "size":
            return int(what.subs({self.graph.symbol: tokens}))
        if kind == "held":
            assert isinstance(what, Held)
            return what.tensor
        return what
