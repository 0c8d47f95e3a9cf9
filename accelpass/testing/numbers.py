"""Checks of results: at the identity setting, against an eager oracle over random shapes, and that nothing sees the future."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from accelpass.passes.core.base import Pass
from accelpass.testing.findings import Finding, failed, passed, skipped
from accelpass.testing.subjects import Shape, Subject
from accelpass.testing.trial import Trial, cause, difference, fresh, is_refusal, raised_in, run, told, took

Oracle = Callable[[Any, Pass], Any]
"""The method once more, eagerly: gets a copy of the model, which it may change, and the pass; returns what is called in the
model's place."""


def attempt(check: str, trial: Trial, subject: Subject, body: Callable[[], Finding]) -> Finding:
    """Run a check; an error becomes a finding, and a refusal that names the pass a skipped check."""
    if subject.missing:
        return skipped(check, subject.name, subject.missing)
    fresh()
    try:
        return body()
    except Exception as error:  # whatever a pass may raise: the kit's business is to say so
        found = cause(error)
        if is_refusal(found) and trial.name in str(found):
            return skipped(check, subject.name, f"the pass refuses: {told(found)}")
        return failed(check, subject.name, f"raised {told(found)}", f"{trial.name}: {raised_in(found)}")


def check_identity(trial: Trial, subject: Subject, seed: int = 0) -> Finding:
    """At the setting that changes nothing, the compiled model equals the dense one up to the order of float additions."""

    def body() -> Finding:
        if trial.identity is None:
            return skipped(
                "identity",
                subject.name,
                "no setting at which it equals the dense model: give identity={...} if it has one",
            )
        model = subject.build(seed)
        want = run(subject, model, model)
        got = run(subject, trial.compile(model, [trial.made(identity=True)]), model)
        error, shown = difference(got, want), dict(trial.identity) or "as it is"
        what = f"at {shown}, outputs against the dense model's, {len(took(model, trial.name))} sites taken"
        if error <= trial.tolerance:
            return passed("identity", subject.name, what, error)
        return failed(
            "identity",
            subject.name,
            what,
            f"the rewrite at sites {_some(took(model, trial.name))}: at these options it must leave the values alone",
            error,
        )

    return attempt("identity", trial, subject, body)


def check_oracle(trial: Trial, subject: Subject, oracle: Oracle, examples: int = 10) -> Finding:
    """The compiled model against an eager one of the author's, over shapes, inputs and weights that hypothesis draws.

    Args:
        oracle: ``oracle(model, p)`` with a copy of the model in eval mode.
    """
    try:
        from hypothesis import HealthCheck, Phase, given, settings
        from hypothesis import strategies as st
    except ImportError:
        return skipped("oracle", subject.name, "needs hypothesis to draw shapes; type: pip install hypothesis")
    worst = [0.0, 0]

    def compare(shape: Shape, weights: int) -> None:
        fresh()
        model, p = subject.build(weights), trial.made()
        with torch.no_grad():
            twin = oracle(copy.deepcopy(model), p)
        want = run(subject, twin, model, shape)
        got = run(subject, trial.compile(model, [p], dynamic=False), model, shape)
        error = difference(got, want)
        worst[:] = [max(worst[0], error), max(worst[1], len(took(model, p.name)))]
        if not error <= trial.tolerance:
            raise _Differs(shape, error, took(model, p.name))

    shapes = st.builds(Shape, batch=st.integers(1, 3), length=st.integers(2, 40), seed=st.integers(0, 99))
    drawn = settings(
        max_examples=examples,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
        phases=(Phase.generate, Phase.shrink),
        report_multiple_bugs=False,
    )(given(shape=shapes, weights=st.integers(0, 9))(compare))

    def body() -> Finding:
        try:
            drawn()
        except _Differs as found:
            s = found.shape
            return failed(
                "oracle",
                subject.name,
                f"outputs against the oracle's at batch {s.batch}, length {s.length}, seed {s.seed}, the simplest that differs",
                f"what the pass and the oracle each do at {_some(found.sites)}",
                found.error,
            )
        if not worst[1]:
            return failed(
                "oracle",
                subject.name,
                f"in {examples} examples the pass took no site, so nothing was compared",
                "options= and models=: they must be such that the pass does something",
            )
        return passed("oracle", subject.name, f"outputs against the oracle's, {examples} examples", worst[0])

    return attempt("oracle", trial, subject, body)


class _Differs(Exception):
    def __init__(self, shape: Shape, error: float, sites: dict[str, str]) -> None:
        super().__init__(f"{shape} differs by {error}")
        self.shape, self.error, self.sites = shape, error, sites


def check_causality(trial: Trial, subject: Subject, looks_ahead: str | None = None) -> Finding:
    """Other tokens at the end of the input change no output before them.

    Args:
        looks_ahead: why the method lets earlier outputs depend on later tokens (it chooses tokens by the last one). The
            check is then made at the identity setting.
    """

    def body() -> Finding:
        if not subject.causal:
            return skipped("causality", subject.name, "the model itself is not causal")
        if looks_ahead is not None and trial.identity is None:
            return skipped("causality", subject.name, f"by the method: {looks_ahead}")
        model = subject.build(0)
        fast = trial.compile(model, [trial.made(identity=looks_ahead is not None)])
        for shape in subject.shapes[:1]:
            at = shape.length * 2 // 3
            one, two = (
                torch.cat(run(subject, fast, model, replace(shape, every_token=True, changed_from=start)), 1)
                for start in (None, at)
            )
            error = difference([two[:, :at]], [one[:, :at]])
            what = f"outputs of tokens 0 to {at - 1}, with other tokens from {at} on"
            if looks_ahead is not None:
                what += f" (at the identity setting; by the method {looks_ahead})"
            if not error <= trial.tolerance:
                return failed(
                    "causality",
                    subject.name,
                    what,
                    "reductions over the token axis and masks at "
                    f"{_some(took(model, trial.name))}; if the method means it, say looks_ahead='why'",
                    error,
                )
            if difference([two[:, at:]], [one[:, at:]]) == 0:
                return failed("causality", subject.name, "other tokens changed no output at all", "what the pass reads")
        return passed("causality", subject.name, what, error)

    return attempt("causality", trial, subject, body)


def weights_of(model: nn.Module) -> dict[str, torch.Tensor]:
    """Copies of everything that a model holds."""
    return {name: t.detach().clone() for name, t in model.state_dict(keep_vars=True).items()}


def _some(sites: dict[str, str] | list[str]) -> str:
    names = list(sites)
    return f"{', '.join(names[:3])}{' ...' if len(names) > 3 else ''}" if names else "(no site was taken)"
