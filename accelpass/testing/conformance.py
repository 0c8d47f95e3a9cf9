"""One call that holds a pass to everything that accelpass asks of one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

from accelpass.passes.core.base import Pass
from accelpass.passes.core.registry import registered
from accelpass.testing.exports import check_export
from accelpass.testing.findings import Finding, NotConforming, failed
from accelpass.testing.graphs import check_graph, check_report
from accelpass.testing.masks import check_masks
from accelpass.testing.numbers import Oracle, check_causality, check_identity, check_oracle
from accelpass.testing.pairs import check_composition
from accelpass.testing.runtime import check_gradients, check_leakage, check_recompiles
from accelpass.testing.subjects import SUBJECTS, Subject, subject
from accelpass.testing.trial import TOLERANCE, Trial

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult

CHECKS = (
    "identity",
    "oracle",
    "graph",
    "report",
    "causality",
    "masks",
    "leakage",
    "recompiles",
    "gradients",
    "export",
    "composition",
)


@dataclass(frozen=True)
class Conformance:
    """All findings on one pass; prints as a table."""

    name: str
    findings: tuple[Finding, ...]

    @property
    def ok(self) -> bool:
        return not self.failures

    @property
    def failures(self) -> list[Finding]:
        return [f for f in self.findings if f.status == "failed"]

    def of(self, check: str) -> list[Finding]:
        """The findings of one check."""
        return [f for f in self.findings if f.check == check]

    def require(self) -> Conformance:
        """Raise :class:`NotConforming` with each failure in words, if there is one."""
        if not self.ok:
            told = "\n".join(f"  {f}" for f in self.failures)
            raise NotConforming(f"the pass {self.name!r} does not conform: {len(self.failures)} checks failed\n{told}")
        return self

    def __str__(self) -> str:
        from io import StringIO

        from rich.console import Console

        text = StringIO()
        Console(file=text, width=140, no_color=True).print(self)
        return text.getvalue()

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        from rich.table import Table
        from rich.text import Text

        table = Table(title=f"conformance of {self.name}", title_justify="left", expand=False)
        for column in ("check", "on", "", "difference", "what"):
            table.add_column(column, overflow="fold")
        style = {"passed": "green", "failed": "bold red", "skipped": "dim"}
        for f in self.findings:
            what = Text(f.what)
            if f.status == "failed" and f.look_at:
                what.append(f"\nlook at: {f.look_at}", style="bold")
            error = "" if f.error is None else f"{f.error:.1e}"
            table.add_row(f.check, f.subject, Text(f.status, style=style[f.status]), error, what)
        yield table
        counts = {s: sum(f.status == s for f in self.findings) for s in style}
        yield Text(", ".join(f"{n} {s}" for s, n in counts.items()))


def check_pass(
    given: str | type[Pass] | Pass,
    *,
    options: Mapping[str, Any] | None = None,
    identity: Mapping[str, Any] | None = None,
    composed_at: Mapping[str, Any] | None = None,
    oracle: Oracle | None = None,
    models: Sequence[str | Subject] | None = None,
    others: Iterable[str | type[Pass] | Pass] | None = None,
    checks: Sequence[str] = CHECKS,
    skip: Mapping[str, str] | None = None,
    tensors: Mapping[str, Tensor] | None = None,
    looks_ahead: str | None = None,
    recompiles: int = 0,
    examples: int = 10,
    tolerance: float = TOLERANCE,
    lowering: str = "eager",
    raising: bool = True,
) -> Conformance:
    """Hold a pass to everything that accelpass asks of one; for a test of the pass's author.

    On ``models=["mlp"]`` this takes some fifteen seconds, on all models some minutes, most of them for the composition.

    Args:
        given: the pass: a class, which need not be registered, a registered name, or an object.
        options: at which it does its work on the small models.
        identity: options, laid over those, at which it must equal the dense model; the class's ``identity`` if not given.
        composed_at: options, laid over ``options``, at which it is composed with other passes; the identity setting by default.
            For a pass that finds nothing to do there: pairs may then be as far from the dense model as both passes together.
        oracle: ``oracle(model, p)`` gets a copy of the model, and returns the method once more, written eagerly: what is
            called in the model's place. Shapes, inputs and weights are drawn by hypothesis.
        models: names of :data:`accelpass.testing.SUBJECTS`, or models of your own; all by default.
        others: passes to compose it with; all that are registered by default.
        checks: which of :data:`CHECKS` to make.
        skip: checks that are left out and why; the reason is shown.
        tensors: what a plan holds for the pass.
        looks_ahead: why earlier outputs may depend on later tokens; causality is then checked at the identity setting.
        recompiles: graphs that other lengths may compile beyond those of the model without the pass.
        examples: that the oracle is compared on.
        tolerance: relative difference that counts as equal.
        lowering: ``eager`` for the rewritten graph itself, ``inductor`` for what it compiles to.
        raising: raise on a failure; otherwise look at :attr:`Conformance.ok`.

    Raises:
        NotConforming: a check failed; says what was compared, by how much it differs and what to look at.
        OptionError: no such pass, option, model or check.
    """
    from accelpass.ir.errors import OptionError
    from accelpass.passes.core.fields import nearest

    skip = dict(skip or {})
    for name in (*checks, *skip):
        if name not in CHECKS:
            raise OptionError(f"no check {name!r}{nearest(name, CHECKS)}; known: {', '.join(CHECKS)}")
    trial = Trial.of(
        given,
        options,
        identity,
        tensors=dict(tensors or {}),
        lowering=lowering,
        tolerance=tolerance,
        composed=None if composed_at is None else dict(composed_at),
    )
    trial.beside()  # options that it does not have are told now
    subjects = [subject(s) for s in (models if models is not None else SUBJECTS)]
    if not subjects:
        raise OptionError(f"models=[] leaves nothing to run; known: {', '.join(SUBJECTS)}")
    found: list[Finding] = []
    for name in checks:
        if name in skip:
            found.append(Finding(name, "all models", "skipped", skip[name]))
        elif name == "report":
            found += check_report(trial, subjects)
        elif name == "masks":
            found += check_masks(trial)
        elif name == "composition":
            beside = [Trial.of(o) for o in (others if others is not None else sorted(registered()))]
            found += check_composition(trial, [o for o in beside if o.name != trial.name], subjects)
        elif name == "oracle" and oracle is None:
            found.append(Finding(name, "all models", "skipped", "no oracle given: oracle=, the method written eagerly"))
        else:
            found += [_one(name, trial, s, oracle, looks_ahead, recompiles, examples) for s in subjects]
    if all(f.status == "skipped" for f in found):
        found.append(failed("all", "all models", "every check was skipped", "models=, and the reasons above"))
    made = Conformance(trial.name, tuple(found))
    return made.require() if raising else made


def _one(
    name: str,
    trial: Trial,
    on: Subject,
    oracle: Oracle | None,
    looks_ahead: str | None,
    recompiles: int,
    examples: int,
) -> Finding:
    match name:
        case "identity":
            return check_identity(trial, on)
        case "oracle":
            assert oracle is not None
            return check_oracle(trial, on, oracle, examples)
        case "graph":
            return check_graph(trial, on)
        case "causality":
            return check_causality(trial, on, looks_ahead)
        case "leakage":
            return check_leakage(trial, on)
        case "recompiles":
            return check_recompiles(trial, on, recompiles)
        case "gradients":
            return check_gradients(trial, on)
    return check_export(trial, on)
