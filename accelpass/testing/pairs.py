"""Two passes on one model: right, or refused by both names."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from accelpass.ir.errors import AccelpassError
from accelpass.testing.findings import Finding, failed, passed, skipped
from accelpass.testing.subjects import Subject
from accelpass.testing.trial import Trial, cause, difference, fresh, is_refusal, reasons, run, told, took

PairStatus = Literal["right", "yields", "apart", "refused", "wrong"]
TOLERANCE = 2e-3
"""A difference in the last bits may move a stored key to the next of 255 steps."""
MEANING: Mapping[str, str] = {
    "right": "both rewrite one model, and the result is right",
    "yields": "right; one of the two leaves its sites to the other, and its report says so",
    "apart": "no model is for both; each is right on its own models, where the other says why it does nothing",
    "refused": "refused with an error that names both",
    "wrong": "wrong, or refused without naming both: a bug",
}


@dataclass(frozen=True)
class Alone:
    """A pass by itself on one model: sites that it took, its outputs, and what it says if there are none."""

    sites: int
    outputs: list[Tensor]
    why: str = ""
    refused: bool = False


@dataclass(frozen=True)
class Pair:
    """Two passes in the order in which they were typed.

    Attributes:
        model: on which they were compiled; two if no model is for both.
        why: the reason of anything but ``right``.
        error: the largest relative difference from what is right.
    """

    first: str
    second: str
    model: str
    status: PairStatus
    why: str = ""
    error: float | None = None


class Bench:
    """Compiles pairs on a few models, and remembers what each pass does alone.

    Each pass is at its identity setting, where it has one: the pair must then equal the dense model. Beside a pass that
    has none (rounded weights) it must equal that pass alone, or be no further from the dense model; of two that have none,
    the difference from the dense model may be as large as both of theirs together, and half as much again.
    """

    def __init__(self, subjects: Sequence[Subject], lowering: str = "eager") -> None:
        self.subjects = [s for s in subjects if s.missing is None]
        self.lowering = lowering
        self._dense: dict[str, list[Tensor]] = {}
        self._alone: dict[tuple[str, str], Alone] = {}

    def dense(self, subject: Subject) -> list[Tensor]:
        if subject.name not in self._dense:
            model = subject.build(0)
            self._dense[subject.name] = run(subject, model, model)
        return self._dense[subject.name]

    def alone(self, trial: Trial, subject: Subject) -> Alone:
        """What a pass does on a model with none beside it but those that are on by default."""
        key = (trial.name, subject.name)
        if key not in self._alone:
            fresh()
            model = subject.build(0)
            try:
                outputs = run(subject, trial.compile(model, [trial.beside()]), model)
                why = "; ".join(dict.fromkeys(reasons(model, trial.name).values()))
                self._alone[key] = Alone(len(took(model, trial.name)), outputs, why)
            except Exception as error:
                if not is_refusal(cause(error)):
                    raise
                self._alone[key] = Alone(0, [], told(cause(error)), refused=True)
        return self._alone[key]

    def judge(self, a: Trial, b: Trial) -> Pair:
        """What comes of ``passes=[a, b]``."""
        common = next((s for s in self.subjects if all(self.alone(t, s).sites for t in (a, b))), None)
        if common is not None:
            return self._on(a, b, common, both=True)
        # Each on the first model that it takes part in; what it needs for that is refused nowhere else.
        own = [next((s for s in self.subjects if self.alone(t, s).sites), None) for t in (a, b)]
        where = [s for s in self.subjects if s in own] or self.subjects[:1]  # in one order for both of typing
        judged = [self._on(a, b, s, both=False) for s in where]
        worst = next((p for p in judged if p.status == "wrong"), judged[0])
        if worst.status in ("wrong", "refused"):
            return worst
        said = dict.fromkeys(p.why for p in judged if p.why)
        errors = [p.error for p in judged if p.error is not None]
        model = " and ".join(s.name for s in where)
        return Pair(a.name, b.name, model, "apart", "; ".join(said), max(errors, default=None))

    def _on(self, a: Trial, b: Trial, subject: Subject, both: bool) -> Pair:
        for t in (a, b):
            if (known := self.alone(t, subject)).refused:
                # By itself; nothing can be learnt of the other here.
                return Pair(
                    a.name, b.name, subject.name, "apart", f"{t.name} alone refuses the {subject.name}: {known.why}"
                )
        fresh()
        model, passes = subject.build(0), [a.beside(), b.beside()]
        merged = Trial(a.kind, tensors={**a.tensors, **b.tensors}, lowering=self.lowering)
        try:
            got = run(subject, merged.compile(model, passes), model)
        except Exception as error:
            found = cause(error)
            named = isinstance(found, AccelpassError) and all(t.name in str(found) for t in (a, b))
            status: PairStatus = "refused" if named and is_refusal(found) else "wrong"
            why = " ".join(str(found).split()) if status == "refused" else told(found)
            return Pair(a.name, b.name, subject.name, status, why)
        error_of, bound, against, note = self._expected(a, b, subject, got, model)
        if not error_of <= bound:
            return Pair(a.name, b.name, subject.name, "wrong", f"outputs differ from {against}", error_of)
        idle = [t for t in (a, b) if not took(model, t.name) and (not both or self.alone(t, subject).sites)]
        why = "; ".join(filter(None, (note, *(f"{t.name}: {self._reason(t, subject, model)}" for t in idle))))
        return Pair(a.name, b.name, subject.name, "yields" if idle else "right", why, error_of)

    def _reason(self, trial: Trial, subject: Subject, model: nn.Module) -> str:
        said = reasons(model, trial.name)
        return next(iter(said.values()), f"finds nothing to do in the {subject.name}")

    def _error_of_a_site(self, trial: Trial, subject: Subject) -> float:
        """What a rounding pass costs at each site on this model; where it takes nothing alone, twice that on a model where it does."""
        home = next((s for s in (subject, *self.subjects) if self.alone(trial, s).sites), subject)
        error = difference(self.alone(trial, home).outputs, self.dense(home)) / max(self.alone(trial, home).sites, 1)
        return error if home is subject else 2 * error  # other weights, other tokens

    def _expected(
        self, a: Trial, b: Trial, subject: Subject, got: list[Tensor], model: nn.Module
    ) -> tuple[float, float, str, str]:
        """How far the outputs are from what is right, how far they may be, what that is, and what is to be said of it."""
        dense = self.dense(subject)
        rounding = [t for t in (a, b) if not t.is_dense_in_pairs]
        if not rounding:
            return difference(got, dense), TOLERANCE, "the dense model's", ""
        if len(rounding) == 1:
            (t,) = rounding
            alone = self.alone(t, subject).outputs
            error, far, allowed = difference(got, alone), difference(got, dense), difference(alone, dense)
            if error > TOLERANCE and far <= allowed * (1 + TOLERANCE):
                # The other pass computes something of its own from the weights before they are rounded.
                return (
                    far,
                    allowed * (1 + TOLERANCE),
                    "",
                    f"other values than {t.name} alone, no further from the dense model",
                )
            sites, more = self.alone(t, subject).sites, len(took(model, t.name))
            if error > TOLERANCE and more > sites and far <= (most := more * self._error_of_a_site(t, subject)):
                # The other pass lets it reach what it could not take: each costs what those do that it takes alone.
                return far, most, "", f"{t.name} takes {more - sites} more sites than alone"
            return error, TOLERANCE, f"those of {t.name} alone", ""
        bound = 1.5 * sum(difference(self.alone(t, subject).outputs, dense) for t in rounding) + TOLERANCE
        return (
            difference(got, dense),
            bound,
            f"the dense model's by more than {bound:.1e}, which both together explain",
            "",
        )


def check_composition(trial: Trial, others: Sequence[Trial], subjects: Sequence[Subject]) -> Iterator[Finding]:
    """The pass beside each other one, typed before and after it."""
    bench = Bench(subjects, trial.lowering)
    if not bench.subjects:
        yield skipped("composition", "all models", "; ".join(s.missing or "" for s in subjects))
        return
    alone = [bench.alone(trial, s) for s in bench.subjects]
    if not any(a.sites or a.refused for a in alone):
        setting = "composed_at=" if trial.composed is not None else "its identity setting"
        yield skipped(
            "composition",
            "all models",
            f"{trial.name} takes nothing at {setting} on these models, so no pair would run: give composed_at=, options at which it does",
        )
        return
    for other in others:
        try:
            one, two = bench.judge(trial, other), bench.judge(other, trial)
        except Exception as error:  # as in attempt(): a finding, and the next pair
            yield failed(
                "composition", other.name, f"raised {told(cause(error))}", f"{trial.name} and {other.name}, each alone"
            )
            continue
        worst = next((p for p in (one, two) if p.status == "wrong"), one)
        typed = f"passes=[{worst.first!r}, {worst.second!r}] on the {worst.model}"
        if worst.status == "wrong":
            yield failed(
                "composition",
                other.name,
                f"{typed}: {worst.why}",
                "edits= and claims= of the pass: two that edit one aspect of one site are refused with both names",
                worst.error,
            )
        elif one.status != two.status:
            yield failed(
                "composition",
                other.name,
                f"{typed}: {one.status}; typed the other way round: {two.status} ({two.why})",
                "what depends on the order in which passes are typed: declare reads=, or after= and before=",
            )
        else:
            said = MEANING[one.status] + (f": {one.why[:200]}" if one.why else "")
            yield passed("composition", other.name, f"{typed}: {said}", one.error)
