"""Checks of the rewritten graph and of what the pass says that it did."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from accelpass.backends import backend
from accelpass.backends.compile.rewriting import captured
from accelpass.ir import attention
from accelpass.ir.core.graph import known, refresh, value
from accelpass.ir.core.program import Program
from accelpass.ir.core.verify import signature, verify
from accelpass.ir.errors import GraphError
from accelpass.ir.kv import lower as kv
from accelpass.ir.transform.steps import LATENTS, user_input
from accelpass.passes.core.base import Pass, Record
from accelpass.passes.core.manager import Observer, watched
from accelpass.passes.core.report import GraphReport
from accelpass.testing.findings import Finding, failed, passed, skipped
from accelpass.testing.numbers import attempt
from accelpass.testing.subjects import Subject
from accelpass.testing.trial import (
    Trial,
    cause,
    difference,
    fresh,
    is_refusal,
    raised_in,
    reasons,
    records,
    run,
    told,
    took,
)


@dataclass(frozen=True)
class Rewrite:
    """What ``apply`` alone did to one graph: its code before and after, its record, the rule that it broke, and the first new
    node whose fake value is not what the node computes."""

    before: str
    after: str
    again: str
    record: Record
    broken: str = ""
    lie: str = ""

    @property
    def changed(self) -> bool:
        return self.before != self.after


def rewrites(trial: Trial, subject: Subject) -> list[Rewrite]:
    """Each graph of a run, rewritten by the pass alone, twice, and verified whatever the record says."""
    model, p, found = subject.build(0), trial.made(), list[Rewrite]()

    def watch(gm: fx.GraphModule, inputs: Sequence[Any], options: dict[str, Any]) -> Any:
        base, one, two = (captured(gm, inputs, GraphReport.start()) for _ in range(3))
        record, broken, lie = Record(p.name), "", ""
        old, rules = {n.name for n in one.graph.nodes}, signature(one)
        _apply(trial, p, one, record)
        try:
            _clean(one)
            verify(one, rules, after=p.name)
            lie = _lie([n for n in one.graph.nodes if n.name not in old])
            after = _code(one)
        except (GraphError, RuntimeError) as error:
            after, broken = str(one.graph), str(error)
        _apply(trial, p, two, Record(p.name))
        found.append(Rewrite(_code(base), after, after if broken else _code(two), record, broken, lie))
        return backend(gm, inputs, options={**options, "passes": []})

    run(subject, trial.compile(model, [p], backend=watch), model)
    return found


def applications(trial: Trial, subject: Subject) -> list[tuple[bool, Record]]:
    """Each time the product applies the pass in a run: whether the program was changed, and the record.

    A pass across denoising steps rewrites a program for each variant of a step, one that filters prompts a program that is
    captured for it; only what compiles them knows these.
    """
    found: list[tuple[bool, Record]] = []
    code: dict[int, str] = {}

    def before(program: Program, p: Pass) -> None:
        if p.name == trial.name:
            code[id(program)] = str(program.graph)

    def after(program: Program, record: Record) -> None:
        if record.name == trial.name:
            found.append((code.pop(id(program)) != str(program.graph), record))

    fresh()
    model = subject.build(0)
    with watched(Observer(after, before)):
        run(subject, trial.compile(model, [trial.made()]), model)
    return found


def _lie(nodes: Sequence[fx.Node]) -> str:
    """The first node whose fake value has another shape or dtype than its arguments give."""
    for node in nodes:
        if node.op != "call_function" or not isinstance(value(node), Tensor):
            continue
        said = value(node)
        refresh(node)
        made, node.meta["val"] = value(node), said
        sizes = len(made.shape) == len(said.shape) and all(
            known(a == b) for a, b in zip(made.shape, said.shape, strict=True)
        )
        if not sizes or made.dtype != said.dtype:
            return f"{node.format_node()} gives {list(made.shape)} {made.dtype}, and its fake value is {list(said.shape)} {said.dtype}"
    return ""


def _apply(trial: Trial, p: Pass, program: Program, record: Record) -> None:
    program.artefacts = trial.tensors
    latents = user_input(program, *LATENTS)
    p = p.bound(trial.tensors, torch.device("cpu") if latents is None else value(latents).device)
    with torch.no_grad():
        p.apply(program, record)


def _clean(program: Program) -> None:
    program.graph.eliminate_dead_code()
    program.gm.recompile()
    program.changed()


def _code(program: Program) -> str:
    """The lowered graph: what a pass changes inside an attention shows in its code alone."""
    _clean(program)
    kv.lower(program)
    attention.lower(program)
    program.gm.recompile()
    return program.gm.code


def check_graph(trial: Trial, subject: Subject) -> Finding:
    """After the pass the graph obeys the rules of the IR, also where it says that it took nothing; and rewriting the same graph
    twice gives the same code."""

    def body() -> Finding:
        found = rewrites(trial, subject)
        for one in found:
            if one.broken:
                return failed(
                    "graph", subject.name, one.broken, "the nodes that apply() inserts, and the uses it replaces"
                )
            if one.lie:
                return failed(
                    "graph",
                    subject.name,
                    one.lie,
                    "nodes made by hand: ir.graph.call() computes meta['val'] for the arguments",
                )
            if one.again != one.after:
                return failed(
                    "graph",
                    subject.name,
                    "rewriting one graph twice gave two different codes",
                    "sets and dicts whose order is chance, and state that apply() keeps on the pass; caches of compiled code "
                    "rely on equal code",
                )
            if one.changed and not one.record.took:
                return failed(
                    "graph",
                    subject.name,
                    "the graph was changed and the record has no site that was taken, so nobody verifies it",
                    "record.take(site, Done(...)) at each place that is rewritten",
                )
        through = applications(trial, subject)
        changed = sum(one.changed for one in found) + sum(is_new for is_new, _ in through)
        took = [one.record for one in found if one.record.took] + [record for _, record in through if record.took]
        if took and not changed:
            return failed(
                "graph",
                subject.name,
                f"sites are recorded as taken ({next(iter(took[0].took))}) and no graph changed",
                "apply(): take() a site only when it was rewritten",
            )
        if not changed:
            why = dict.fromkeys(w for one in found for w in one.record.skipped.values())
            return skipped(
                "graph", subject.name, f"the pass rewrites nothing of it: {'; '.join(why) or 'it has no site'}"
            )
        return passed(
            "graph",
            subject.name,
            f"{len(found)} graphs, {len(through)} programs in the product; valid and the same twice",
        )

    return attempt("graph", trial, subject, body)


def check_report(trial: Trial, subjects: Sequence[Subject]) -> list[Finding]:
    """Each site is taken with words, or skipped with a reason; on some model something is taken; and a pass that is declared
    exact is exact."""
    made, anywhere, why = [], False, dict[str, str]()
    for subject in subjects:
        if subject.missing:
            made.append(skipped("report", subject.name, subject.missing))
            continue
        fresh()
        try:
            found, sites, skips = _report(trial, subject)
        except Exception as error:  # as in attempt()
            known = cause(error)
            refused = is_refusal(known) and trial.name in str(known)
            made.append(
                skipped("report", subject.name, f"the pass refuses: {told(known)}")
                if refused
                else failed("report", subject.name, f"raised {told(known)}", f"{trial.name}: {raised_in(known)}")
            )
            why[subject.name] = told(known)
            continue
        made.append(found)
        anywhere |= sites > 0
        why |= skips
    if not anywhere and not any(f.status == "failed" for f in made):
        seen = "; ".join(f"{k}: {v}" for k, v in list(why.items())[:3]) or "it recorded no site"
        made.append(
            failed(
                "report",
                "all models",
                f"the pass took no site on any model ({seen})",
                "options= at which it works on small models, or models= with one that it is for (a Subject of your own)",
            )
        )
    return made


def _report(trial: Trial, subject: Subject) -> tuple[Finding, int, dict[str, str]]:
    model = subject.build(0)
    got = run(subject, trial.compile(model, [trial.made()]), model)
    sites, skips = took(model, trial.name), reasons(model, trial.name)
    for _, record in records(model, trial.name):
        for site, done in record.took.items():
            if not (site.strip() and done.what.strip()) or done.bytes_before < 0 or done.bytes_after < 0:
                shown = f"site {site!r} is recorded as taken with {done}"
                return (
                    failed("report", subject.name, shown, "Done(what): say what was done, in words"),
                    len(sites),
                    skips,
                )
        for site, why in record.skipped.items():
            if not (isinstance(why, str) and site.strip() and why.strip()):
                shown = f"site {site!r} is skipped with {why!r} for a reason"
                return (
                    failed("report", subject.name, shown, "record.skip(site, why): say what was seen and needed"),
                    1,
                    skips,
                )
    what = f"{len(sites)} sites taken, {len(skips)} skipped with a reason"
    if trial.kind.exact:
        error = difference(got, run(subject, model, model))
        if not error <= trial.tolerance:
            return (
                failed(
                    "report",
                    subject.name,
                    "declared exact, and the outputs are not the dense model's",
                    "exact: ClassVar[bool] = False, or the rewrite",
                    error,
                ),
                len(sites),
                skips,
            )
        return passed("report", subject.name, f"{what}; exact as declared", error), len(sites), skips
    return passed("report", subject.name, what), len(sites), skips
