"""Checks of a compiled model in use: nothing leaks between runs and models, few graphs are compiled, gradients are answered."""

from __future__ import annotations

from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor

from accelpass.backends import compiled_graphs
from accelpass.testing.findings import Finding, failed, passed, skipped
from accelpass.testing.numbers import attempt, weights_of
from accelpass.testing.subjects import Shape, Subject
from accelpass.testing.trial import Trial, cause, compiled_since, difference, fresh, is_refusal, run, told


def check_leakage(trial: Trial, subject: Subject) -> Finding:
    """A run answers the same after another run, and beside another model of its class whose calls come in between; the
    model's own tensors are left alone."""

    def body() -> Finding:
        import accelpass

        shape, other = subject.shapes[0], Shape(subject.shapes[0].batch, subject.shapes[0].length, seed=5)
        alone = []
        for seed in (0, 1):
            fresh()
            model = subject.build(seed)
            alone.append(run(subject, trial.compile(model, [trial.made()]), model, shape))
        fresh()
        models = [subject.build(seed) for seed in (0, 1)]
        held = weights_of(models[0])
        fast = [trial.compile(m, [trial.made()]) for m in models]
        run(subject, fast[0], models[0], other)
        for name, tensor in models[0].state_dict().items():
            if not torch.equal(tensor, held[name]):
                return failed(
                    "leakage",
                    subject.name,
                    f"the model's own {name} was changed",
                    "in-place writes to what program.tensors.value() returns",
                )
        again = run(subject, fast[0], models[0], shape)
        error, note = difference(again, alone[0]), "without a reset"
        if not error <= trial.tolerance and not subject.delimited and accelpass.state(fast[0]):
            # A plain model has no beginning of a sequence; who compiles a pass with state into it says where one is.
            note = "with accelpass.reset() between, as the pass declares state"
            accelpass.reset(fast[0])
            error = difference(run(subject, fast[0], models[0], shape), alone[0])
        if not error <= trial.tolerance:
            return failed(
                "leakage",
                subject.name,
                f"a second run of one model against the same run alone ({note})",
                "what outlives a call: tensors kept on the pass, in a module, or in state without a lifetime",
                error,
            )
        if note != "without a reset":
            accelpass.reset(fast[0])
        mixed = _in_turns(subject, fast, models, shape)
        error = max(difference(got, want) for got, want in zip(mixed, alone, strict=True))
        if not error <= trial.tolerance:
            return failed(
                "leakage",
                subject.name,
                "two models of one class whose calls take turns, against each alone",
                "tensors made from weights at compile time (use program.tensors.derive: Dynamo shares a graph among models) "
                "and state that is not the model's own (program.tensors.state)",
                error,
            )
        return passed("leakage", subject.name, f"runs one after the other ({note}), and two models in turns", error)

    return attempt("leakage", trial, subject, body)


def _in_turns(subject: Subject, fast: list[Any], models: list[Any], shape: Shape) -> list[list[Tensor]]:
    made: list[list[Tensor]] = [[] for _ in fast]
    with torch.no_grad():
        for outputs in zip_longest(*(subject.drive(f, m, shape) for f, m in zip(fast, models, strict=True))):
            for into, output in zip(made, outputs, strict=True):
                into.append(output.clone())
    return made


def check_recompiles(trial: Trial, subject: Subject, allowed: int = 0) -> Finding:
    """Runs of other lengths compile no more graphs than the model does without the pass, and ``allowed`` more."""

    def body() -> Finding:
        counts = []
        for passes in ([], [trial.made()]):
            fresh()
            model, known = subject.build(0), compiled_graphs()
            fast, each = trial.compile(model, passes), list[int]()
            for shape in subject.shapes:
                run(subject, fast, model, shape)
                each.append(compiled_since(known) - sum(each))
            counts.append(each)
        without, with_pass = counts
        lengths = ", ".join(f"batch {s.batch} length {s.length}" for s in subject.shapes)
        what = f"graphs compiled at {lengths}: {with_pass}, without the pass {without}"
        if sum(with_pass) <= sum(without) + allowed:
            return passed("recompiles", subject.name, what)
        return failed(
            "recompiles",
            subject.name,
            f"{what}; {allowed} more are declared",
            "int(), bool() or == on a symbolic size (use ir.graph.known and hint), or declare recompiles=",
        )

    return attempt("recompiles", trial, subject, body)


def check_gradients(trial: Trial, subject: Subject) -> Finding:
    """Asked for gradients, the compiled model refuses and names the pass, or gives the dense model's gradients and the outputs
    that it gives without."""

    def body() -> Finding:
        if subject.delimited:
            return skipped("gradients", subject.name, "a model in a loop of calls is for inference")
        model = subject.build(0)
        fast, shape = trial.compile(model, [trial.made()]), subject.shapes[0]
        quiet = run(subject, fast, model, shape)
        try:
            loud = list(subject.drive(fast, model, shape))
        except Exception as raised:
            found = cause(raised)
            if is_refusal(found) and trial.name in str(found):
                return passed("gradients", subject.name, f"refused: {told(found)[:160]}")
            raise
        got = _gradients(model, loud)
        want = _gradients(model, list(subject.drive(model, model, shape)))
        error = difference([o.detach() for o in loud], quiet)
        if not error <= trial.tolerance:
            return failed(
                "gradients",
                subject.name,
                "outputs with gradients against those under no_grad: a training step would see another model",
                "exact: a pass that changes results is not exact, and is then refused where gradients are wanted",
                error,
            )
        error = difference(got, want)
        if not error <= trial.tolerance * 10:  # sums of many products
            return failed(
                "gradients", subject.name, "gradients against the dense model's", "the rewrite's backward", error
            )
        return passed("gradients", subject.name, "outputs and gradients against the dense model's", error)

    return attempt("gradients", trial, subject, body)


def _gradients(model: Any, outputs: list[Tensor]) -> list[Tensor]:
    model.zero_grad()
    sum(o.float().square().mean() for o in outputs).backward()  # type: ignore[union-attr]
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]
