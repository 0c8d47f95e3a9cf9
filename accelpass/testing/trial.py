"""A pass with its options on a model: compiled, driven, compared."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from accelpass.backends import CompiledGraph, compiled_graphs
from accelpass.ir.errors import AccelpassError, GraphError, OptionError, PassError
from accelpass.ir.torch_private import forget_compilations
from accelpass.passes.core.base import Pass, Record
from accelpass.passes.core.registry import make, registered
from accelpass.testing.subjects import Shape, Subject

TOLERANCE = 1e-4
"""Relative difference that the order of float additions may cause in the small models."""


@dataclass(frozen=True)
class Trial:
    """What is checked: a pass, its options, and what they need.

    Attributes:
        kind: the pass's class.
        options: at which it does its work on the small models.
        identity: options, laid over ``options``, at which it must equal the dense model; None if there are none.
        tensors: what a plan holds for it.
        lowering: ``eager``, ``aten`` or ``inductor``.
        tolerance: relative difference that counts as equal.
        composed: options, laid over ``options``, for a run beside another pass; the identity if None.
    """

    kind: type[Pass]
    options: Mapping[str, Any] = field(default_factory=dict)
    identity: Mapping[str, Any] | None = None
    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    lowering: str = "eager"
    tolerance: float = TOLERANCE
    composed: Mapping[str, Any] | None = None

    @classmethod
    def of(
        cls,
        given: str | type[Pass] | Pass,
        options: Mapping[str, Any] | None = None,
        identity: Mapping[str, Any] | None = None,
        **rest: Any,
    ) -> Trial:
        """From a registered name, a class, or a pass object, whose options are then taken.

        Raises:
            OptionError: no such pass, or an option that it does not have.
        """
        if isinstance(given, Pass):
            if options:
                raise OptionError(f"{given.name}: give the options in the pass object or as options=, not in both")
            options, given = {f: getattr(given, f) for f in given.__dataclass_fields__}, type(given)
        elif isinstance(given, str):
            make_able = registered()
            if given not in make_able:
                make(given)  # raises, with the nearest name
            given = make_able[given]
        if identity is None:
            identity = {} if given.exact else given.identity
        trial = cls(given, dict(options or {}), identity, **rest)
        trial.made()
        return trial

    @property
    def name(self) -> str:
        return self.kind.name

    def made(self, identity: bool = False) -> Pass:
        """The pass object."""
        laid = {**self.options, **(self.identity or {})} if identity else self.options
        return self.kind.from_options(dict(laid))

    @property
    def is_dense_in_pairs(self) -> bool:
        """Whether it equals the dense model as it is set beside another pass."""
        return self.composed is None and self.identity is not None

    def beside(self) -> Pass:
        """The pass object as it is set beside another one."""
        if self.composed is not None:
            return self.kind.from_options({**self.options, **self.composed})
        return self.made(identity=self.identity is not None)

    def compile(
        self, model: nn.Module, passes: Sequence[Pass], backend: Any = "accelpass", **more: Any
    ) -> Callable[..., Any]:
        """The model compiled with ``passes`` and, as a user has them, those that are on by default."""
        options: dict[str, Any] = {"passes": list(passes), "lowering": self.lowering}
        if self.tensors and passes:
            from accelpass.passes.core.plan import Plan

            options["plan"] = Plan.of(model, [], dict(self.tensors))
        if backend != "accelpass":
            return torch.compile(model, backend=lambda gm, given: backend(gm, given, options), **more)
        return torch.compile(model, backend=backend, options=options, **more)

    def at_identity(self) -> Trial:
        return replace(self, options={**self.options, **(self.identity or {})})


def run(subject: Subject, fast: Any, model: nn.Module, shape: Shape | None = None) -> list[Tensor]:
    """All outputs of one run, each a copy; the subject's first shape if none is given."""
    shape = shape or subject.shapes[0]
    with torch.no_grad():
        return [made.clone() for made in subject.drive(fast, model, shape)]


def fresh() -> None:
    """Forget what Dynamo has compiled: the next model of a known class is compiled anew."""
    forget_compilations()


def difference(got: Sequence[Tensor], want: Sequence[Tensor]) -> float:
    """The largest difference over the largest wanted value; infinite where shapes differ or something is not finite.

    An infinity that both have (the logit of a token that can never come) is no difference.
    """
    if len(got) != len(want) or any(a.shape != b.shape for a, b in zip(got, want, strict=True)):
        return float("inf")
    worst = 0.0
    for a, b in zip(got, want, strict=True):
        if not a.numel():
            continue
        if bool((alike := a.isinf() & (a == b)).any()):
            a, b = a[~alike], b[~alike]
            if not a.numel():
                continue
        error = (a.double() - b.double()).abs().max() / b.double().abs().max().clamp_min(1e-12)
        worst = max(worst, float(error) if torch.isfinite(error) else float("inf"))
    return worst


def records(model: nn.Module, name: str) -> list[tuple[CompiledGraph, Record]]:
    """What a pass says that it did, for each graph compiled for ``model``."""
    from accelpass.backends import graphs_of

    return [(g, r) for g in graphs_of(model) for r in g.report.records if r.name == name]


def took(model: nn.Module, name: str) -> dict[str, str]:
    """Sites that a pass took in any graph of ``model``."""
    return {site: done.what for _, record in records(model, name) for site, done in record.took.items()}


def reasons(model: nn.Module, name: str) -> dict[str, str]:
    """Sites that it left alone, and why."""
    return {site: why for _, record in records(model, name) for site, why in record.skipped.items()}


def compiled_since(before: Sequence[CompiledGraph]) -> int:
    """How many graphs were compiled that are not in ``before``; one that is compiled anew for each size counts each time."""
    known = {g.report.number for g in before}
    new = [g for g in compiled_graphs() if g.report.number not in known]
    return sum(max(1, len(g.steps.models)) if g.steps is not None else 1 for g in new)


def cause(error: Exception) -> Exception:
    """What a backend raised, without Dynamo's wrapping."""
    inner = getattr(error, "inner_exception", None)
    return inner if isinstance(inner, Exception) else error


def is_refusal(error: Exception) -> bool:
    """An error that a pass raises on purpose because of what it is asked for, as opposed to one that it suffers."""
    if isinstance(error, GraphError):
        return False
    return isinstance(error, AccelpassError) and not (isinstance(error, PassError) and error.__cause__ is not None)


def told(error: Exception) -> str:
    """An error in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:400]}"


def raised_in(error: BaseException) -> str:
    """File, line and function in which an error began."""
    while error.__cause__ is not None:
        error = error.__cause__
    frames = traceback.extract_tb(error.__traceback__)
    return f"{Path(frames[-1].filename).name}:{frames[-1].lineno} in {frames[-1].name}()" if frames else "nowhere known"
