"""Which denoising step a call is: told from the timestep and the latents that the model is given."""

from __future__ import annotations

import itertools
import math
import weakref
from collections.abc import Iterable, Sequence
from contextvars import ContextVar, Token
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from accelpass.ir.transform.steps import StepError

_NEAR = 2**-8
"""Timesteps that differ by no more than this share of the schedule's span are one: half of bfloat16's spacing above 512 is
2, and a pipeline may round them to bfloat16."""


@dataclass(eq=False)
class Declared:
    """A sampling run that the caller declares, of the model with these tensors: all calls made inside ``with`` are of it.

    It may be entered as often as it takes, which is how requests whose steps take turns are told apart. What the run
    keeps lives as long as this object.

    Attributes:
        runs: what was run in it, by whatever compiled the model (several options, several runs).
    """

    tensors: dict[int, weakref.ref[Tensor]]
    runs: weakref.WeakKeyDictionary[Any, Any] = field(default_factory=weakref.WeakKeyDictionary)
    _entered: list[Token[tuple[Declared, ...]]] = field(default_factory=list)

    @classmethod
    def of(cls, tensors: Iterable[Tensor]) -> Declared:
        return cls({id(t): weakref.ref(t) for t in tensors})

    def covers(self, tensor: Tensor | None) -> bool:
        known = self.tensors.get(id(tensor))
        return known is not None and known() is tensor

    def __enter__(self) -> Declared:
        self._entered.append(_DECLARED.set((*_DECLARED.get(), self)))
        return self

    def __exit__(self, *_: object) -> None:
        _DECLARED.reset(self._entered.pop())


_DECLARED: ContextVar[tuple[Declared, ...]] = ContextVar("declared sampling runs", default=())
"""Of this thread or task, the innermost last."""


def declared(tensors: Iterable[Tensor]) -> Declared:
    """``with declared(...)``: the calls of the model with these tensors are one run, in which timesteps may go back."""
    return Declared.of(tensors)


def declaration_of(tensor: Tensor | None) -> Declared | None:
    """The innermost declared run that a call of the model with this tensor belongs to."""
    return next((d for d in reversed(_DECLARED.get()) if d.covers(tensor)), None)


def is_declared(tensor: Tensor | None) -> bool:
    return declaration_of(tensor) is not None


@dataclass(frozen=True)
class Tick:
    """One model call.

    Attributes:
        step: counted from 0; a scheduler that calls the model twice per step makes two of it.
        branch: 0, or the number of calls before it for the same latents: guidance as two calls.
        fresh: a sampling run begins with it.
    """

    step: int
    branch: int
    fresh: bool


@dataclass
class Clock:
    """Counts the model calls of one sampling run after another.

    A run begins when the timestep goes back to a noisier one, when the latents change their shape, when the plan's first
    timestep is due again, or when :meth:`reset` says so. Which way time goes, down to 0 or up, is learnt from the first
    two timesteps. Guidance as two calls repeats the latents; a second-order scheduler repeats the timestep with other latents.

    Attributes:
        timesteps: those that a plan was made for; None to count alone.
        most: calls that one step has, if it is known; None if guidance may be one call or two.
        declared: the caller says where runs begin, so that going back in time does not.
    """

    timesteps: Sequence[float] | None = None
    most: int | None = None
    declared: bool = False
    last: Tick | None = None
    before: float = 0.0
    """The timestep of the last call."""
    _direction: float = 0.0
    _latents: Tensor | None = None
    _shape: torch.Size | None = None

    def reset(self) -> None:
        self.last, self._latents, self._shape = None, None, None

    def tick(self, time: float, latents: Tensor, follows: bool = False) -> Tick:
        """What the coming call is; nothing changes until :meth:`done`.

        Args:
            follows: the latents are known to come of the last call, though their batch or the timestep may not show it.

        Raises:
            StepError: the timestep is not the plan's.
        """
        last = self.last
        if last is None or (self._shape != latents.shape and not follows):
            return self._first(time)
        more = self.most is None or last.branch + 1 < self.most
        if more and self.repeats(time, latents):
            return Tick(last.step, last.branch + 1, False)
        if self.timesteps is not None:
            following = last.step + 1
            if following < len(self.timesteps) and self._equals(time, self.timesteps[following]):
                return Tick(following, 0, False)
            if self._equals(time, self.timesteps[0]):
                return self._first(time)
            raise self._foreign(time, following)
        stands = self._equals(time, self.before)
        back = not stands and (time - self.before) * self._direction < 0
        if (back or (stands and last.step == 0 and not follows)) and not self.declared:
            return self._first(time)
        return Tick(last.step + 1, 0, False)

    def done(self, tick: Tick, time: float, latents: Tensor) -> None:
        """The call went well."""
        if not (tick.fresh or self._direction or self._equals(time, self.before)):
            self._direction = math.copysign(1.0, time - self.before)
        self.last, self.before, self._shape = tick, time, latents.shape
        # A pipeline that calls twice passes one tensor twice, or the same values in two.
        self._latents = latents

    def ahead(self, time: float) -> bool:
        """Whether the plan has this timestep at a step that the run has not come to."""
        done = 0 if self.last is None else self.last.step + 1
        return any(self._equals(time, later) for later in (self.timesteps or ())[done:])

    def _first(self, time: float) -> Tick:
        if self.timesteps is not None and not self._equals(time, self.timesteps[0]):
            raise self._foreign(time, 0)
        return Tick(0, 0, True)

    def _foreign(self, time: float, step: int) -> StepError:
        assert self.timesteps is not None
        due = f"its step {step} is at {self.timesteps[step]:g}" if step < len(self.timesteps) else "it ends there"
        return StepError(
            f"the model is called for timestep {time:g}, which the plan does not have: it was made for "
            f"{len(self.timesteps)} model calls from {self.timesteps[0]:g} to {self.timesteps[-1]:g}, and {due}. "
            "Use the scheduler and the number of steps that it was made for, or make a plan for these "
            "(accelpass.search_steps). If a run was cut off, accelpass.reset(model) begins a new one."
        )

    def _equals(self, a: float, b: float) -> bool:
        span = max(map(abs, self.timesteps)) if self.timesteps else max(abs(a), abs(b))
        near = min(_NEAR * span, self._gap() / 3) if self.timesteps else 0.0
        return abs(a - b) <= max(near, 1e-6 * span)

    def _gap(self) -> float:
        """The smallest distance between two different timesteps of the plan."""
        assert self.timesteps is not None
        distinct = sorted(set(self.timesteps))
        return min((b - a for a, b in itertools.pairwise(distinct)), default=math.inf)

    def _same(self, latents: Tensor) -> bool:
        return self._latents is latents or (self._latents is not None and torch.equal(self._latents, latents))

    def repeats(self, time: float, latents: Tensor) -> bool:
        """Whether a call is one more of the last step: the same timestep and latents."""
        if self.last is None or self._shape != latents.shape:
            return False
        return self._equals(time, self.before) and self._same(latents)
