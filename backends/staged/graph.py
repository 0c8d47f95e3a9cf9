"""A compiled graph that runs in stages: its models by size, and the policy that chooses variants at each call."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor

from accelpass.backends.runtime.survivors import Survivors, keep_last
from accelpass.backends.staged.linker import Execution
from accelpass.backends.staged.model import StagedModel
from accelpass.ir.errors import PassError
from accelpass.ir.kv.holdings import holding_of
from accelpass.passes.core.staged import PolicyPass


@dataclass(eq=False)
class StagedGraph(ABC):
    """What Dynamo calls.

    Attributes:
        build: compiles the model for the sizes of a call's arguments.
        models: by these sizes.
    """

    build: Callable[[Sequence[Any]], StagedModel]
    models: dict[tuple[int, ...], StagedModel] = field(default_factory=dict, init=False)
    _building: threading.RLock = field(default_factory=threading.RLock, init=False)

    @abstractmethod
    def __call__(self, *args: Any) -> Any: ...

    def sizes(self, args: Sequence[Any]) -> tuple[int, ...]:
        """Those of a call that it is compiled for."""
        return tuple(a for a in args if isinstance(a, int) and not isinstance(a, bool))

    def model(self, args: Sequence[Any]) -> StagedModel:
        """The stages for a call's sizes, compiled if they are new."""
        sizes = self.sizes(args)
        if sizes not in self.models:
            with self._building, torch.no_grad():
                if sizes not in self.models:
                    self.models[sizes] = self.build(args)
        return self.models[sizes]


@dataclass(eq=False)
class PolicyGraph(StagedGraph):
    """Runs the policy of a pass that needs nothing but the call itself."""

    policy: PolicyPass
    owner: int | None = None
    """The position of one of the model's own tensors."""

    def sizes(self, args: Sequence[Any]) -> tuple[int, ...]:
        return ()  # symbolic ones stay so

    def __call__(self, *args: Any) -> Any:
        model = self.model(args)
        given: dict[str, Tensor] = {}
        call = Call(self.policy, model, model.begin(args, given.__getitem__), args, given)
        call.begin()
        made = self.policy.run(call)
        if call.survivors and self.owner is not None:
            keep_last(args[self.owner], call.survivors)
        return made


@dataclass(eq=False)
class Call:
    """See :class:`accelpass.passes.core.staged.StagedCall`."""

    policy: PolicyPass
    model: StagedModel
    execution: Execution
    args: Sequence[Any]
    given: dict[str, Tensor]
    survivors: list[Survivors] = field(default_factory=list)

    @property
    def blocks(self) -> range:
        return range(len(self.model.sites))

    @property
    def held(self) -> int:
        return holding_of(self.args[self.model.caches[0][0]]).tokens if self.model.caches else 0

    def path(self, number: int) -> str:
        return self.model.paths[number]

    def begin(self) -> None:
        """Run what precedes the blocks."""
        self._run(-1)

    def run(self, number: int, action: str) -> None:
        variant = self.model.chosen(number, lambda p, path: action)
        stage = self.model.linked.stages.get((number, variant))
        if stage is None:
            known = sorted(
                " and ".join(cast(tuple[str, ...], actions)) for at, actions in self.model.stages if at == number
            )
            raise PassError(
                f"{self.policy.name}: {self.path(number)} was not compiled as {action!r}; name it in ways(), which gave "
                f"{', '.join(known)}"
            )
        for name, tensor in self.given.items():
            shape = self.model.stages[number, variant].layouts.get(name, ((),))[0]  # type: ignore[index]
            if name in dict(stage.recalls).values() and any(
                isinstance(size, int) and size != now for size, now in zip(shape, tensor.shape, strict=True)
            ):
                raise PassError(
                    f"{self.policy.name}: {self.path(number)} as {action!r} takes {name} of {list(shape)}, and was given "
                    f"{list(tensor.shape)}; give it as many rows as one of the sizes that ways() declares"
                )
        self.execution.run(stage)

    def give(self, name: str, tensor: Tensor) -> None:
        self.given[name] = tensor

    def value(self, name: str) -> Tensor:
        found: Tensor = self.execution.values[self.model.linked.place["value", name]]
        return found

    def stream(self, number: int) -> Tensor:
        ref = self.model.entry if number < 0 else self.model.streams[number]
        found: Tensor = self.execution.values[self.model.linked.place[ref]]
        return found

    def counter(self, number: int) -> Tensor:
        within = f"{self.path(number)}."
        last = [at for at, _, kept in self.model.caches if kept.site.startswith(within)][-1]
        found: Tensor = self.args[last]
        return found

    def went_on(self, path: str, kept: Tensor, tokens: int) -> None:
        self.survivors.append(Survivors(path, kept, tokens))

    def early(self, number: int) -> tuple[Any, ...]:
        place, values = self.model.linked.place, self.execution.values
        values[place[self.model.streams[-1]]] = values[place[self.model.streams[number]]]
        self._run(len(self.model.sites), free=False)
        return self.execution.results()

    def results(self) -> tuple[Any, ...]:
        self._run(len(self.model.sites))
        return self.execution.results()

    def _run(self, number: int, free: bool = True) -> None:
        stage = self.model.linked.stages.get((number, ()))
        if stage is not None:
            self.execution.run(stage, free)
