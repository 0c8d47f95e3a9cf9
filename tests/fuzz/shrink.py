"""Makes a failing program small: statements, calls and passes are dropped one by one while it still fails."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch

from tests.fuzz.judge import Verdict, judge
from tests.fuzz.program import Class, Line, Program, Region, Statement, lines
from tests.fuzz.settings import Options

Case = tuple[Program, Options]


def kind_of(why: str) -> str:
    """A failure without its numbers and names: what tells two failures apart."""
    text = re.sub(r"%?\b[a-z_]*\d[\w.+-]*|'[^']*'", "#", why.replace("eager raises", "eager_raises"))
    if "raises" in why:
        return re.sub(r"\W+", " ", re.sub(r"after \w+:", "", text[text.index("raises") :]))[:70]
    return re.sub(r"[^a-zA-Z ]+", " ", text)[:50]


def fails(case: Case, kind: str | None = None, confirm: bool = True) -> Verdict | None:
    """The verdict, if it is the wanted failure: of ``kind``, or of any.

    Args:
        confirm: see :func:`tests.fuzz.judge.judge`.
    """
    program, options = case
    try:
        if not confirm:  # most of what a shrinker tries is no program at all: eager says so at once
            model = program.build()
            with torch.no_grad():
                model(*program.given(0))
        (verdict,) = judge(program, [options], confirm)
    except Exception:  # a program that cannot even be built
        return None
    wanted = verdict.status == "wrong" and (kind is None or kind_of(verdict.why) == kind)
    return verdict if wanted else None


def shrunk(case: Case, kind: str, budget: int = 120) -> Case:
    """The smallest failing case that ``budget`` runs find."""
    size = -1
    while size != (size := len(repr(case))) and budget > 0:
        for step in (_calls, _options, _returns, _statements, _inputs):
            at, tries = 0, list(step(case))
            while at < len(tries) and budget > 0:
                budget -= 1
                if fails(tries[at], kind, confirm=False):
                    case = tries[at]
                    tries = list(step(case))
                else:
                    at += 1
    return case


def _calls(case: Case) -> Iterator[Case]:
    program, options = case
    for call in program.calls if len(program.calls) > 1 else ():
        yield replace(program, calls=(call,)), options
    if program.around:
        yield replace(program, around=""), options
    if program.dynamic is not None:
        yield replace(program, dynamic=None), options


def _options(case: Case) -> Iterator[Case]:
    yield from ((case[0], o) for o in _fewer_passes(case[1]))


def _returns(case: Case) -> Iterator[Case]:
    """Only the last of several outputs, or an earlier value."""
    made = case[0].model
    found = [t for line in lines(made.body) for t in line.targets]
    several = re.findall(r"\b(?:v\d+|[xy])\b", made.returns) if made.returns.startswith(("(", "{")) else []
    for name in dict.fromkeys((*several, *found[: found.index(made.returns) if made.returns in found else 0])):
        yield _changed(case, len(case[0].classes) - 1, replace(made, returns=name))


def _statements(case: Case) -> Iterator[Case]:
    for number, made in reversed(list(enumerate(case[0].classes))):
        for body, renamed in _dropped(made.body):
            old, new = renamed or ("", "")
            smaller = (
                replace(made, body=_substituted(body, old, new), returns=_word(old, new, made.returns))
                if renamed
                else replace(made, body=body)
            )
            yield _changed(case, number, smaller)


def _inputs(case: Case) -> Iterator[Case]:
    """Without inputs that nothing reads."""
    program, model = case[0], case[0].model
    read = "\n".join((*(s.source() for s in model.body), model.returns))
    for given in program.inputs:
        if not re.search(rf"\b{given[0]}\b", read):
            fewer = replace(model, inputs=tuple(n for n in model.inputs if n != given[0]))
            inputs = tuple(i for i in program.inputs if i != given)
            yield replace(program, inputs=inputs, classes=(*program.classes[:-1], fewer)), case[1]


def _changed(case: Case, number: int, made: Class) -> Case:
    classes = [*case[0].classes]
    classes[number] = made
    return _without_unused(replace(case[0], classes=tuple(classes))), case[1]


def _fewer_passes(options: Options) -> Iterator[Options]:
    for key in ("debug", "regions", "preset"):
        if key in options:
            yield {k: v for k, v in options.items() if k != key}
    passes: list[Any] = options.get("passes", [])
    for number in range(len(passes)):
        yield {**options, "passes": passes[:number] + passes[number + 1 :]}
    if "passes" in options:
        yield {k: v for k, v in options.items() if k != "passes"}
    if options.get("lowering") != "eager":
        yield {**options, "lowering": "eager"}


def _dropped(body: tuple[Statement, ...]) -> Iterator[tuple[tuple[Statement, ...], tuple[str, str] | None]]:
    """Without one statement; and what its name is to be replaced by in what follows."""
    for number in reversed(range(len(body))):
        before, statement, after = body[:number], body[number], body[number + 1 :]
        if isinstance(statement, Region):
            yield (*before, *statement.body, *after), None
            if statement.otherwise:
                yield (*before, *statement.otherwise, *after), None
            for inner, renamed in _dropped(statement.body):
                if inner:
                    yield (*before, replace(statement, body=inner), *after), renamed
            yield (*before, *after), None
        else:
            yield (*before, *after), None
            if len(statement.targets) == 1:
                for name in statement.reads:
                    if name not in ("self", "torch", "nn"):
                        yield (*before, *after), (statement.targets[0], name)


def _word(old: str, new: str, text: str) -> str:
    return re.sub(rf"(?<![\w.]){old}\b", new, text)


def _substituted(body: tuple[Statement, ...], old: str, new: str) -> tuple[Statement, ...]:
    made: list[Statement] = []
    for s in body:
        if isinstance(s, Line):
            made.append(Line(_word(old, new, s.text)))
        else:
            inner, otherwise = _substituted(s.body, old, new), _substituted(s.otherwise, old, new)
            made.append(Region(_word(old, new, s.head), inner, otherwise))
    return tuple(made)


def _without_unused(program: Program) -> Program:
    """Without attributes that nothing reads, and classes that nothing makes."""
    classes = []
    for made in program.classes:
        text = "\n".join((*(s.source() for s in made.body), made.returns))
        setup = list(made.setup)
        for line in reversed(made.setup):
            name = re.search(r'^self\.(\w+)|"(\w+)"', line.text)
            used = text + "\n".join(other.text for other in setup if other is not line)
            if name and not re.search(rf"\b{name[1] or name[2]}\b", used):
                setup.remove(line)
        classes.append(replace(made, setup=tuple(setup)))
    model = classes[-1]
    used = "\n".join(line.text for line in model.setup)
    return replace(program, classes=(*(c for c in classes[:-1] if f"{c.name}(" in used), model))
