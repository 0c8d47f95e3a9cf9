"""``search_by_score``: a pass tries candidates, a function of the user's scores them, and the best is the plan."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from accelpass.api.calibration.searching import counting_bar, only_one
from accelpass.api.stateful import write
from accelpass.ir.errors import OptionError
from accelpass.ir.torch_private import forget_compilations
from accelpass.passes.core.base import Judge, Judged
from accelpass.passes.core.plan import Plan
from accelpass.passes.core.registry import make

Score = Callable[[Any], float]


def search_by_score(
    model: nn.Module,
    score: Score,
    passes: Sequence[Any],
    *,
    validation: Score | None = None,
    seed: int = 0,
    progress: bool = True,
    options: dict[str, Any] | None = None,
) -> Plan:
    """Let a pass that learns from a score alone try candidates; no gradient is needed, and the model is compiled once.

    Args:
        model: the model as it is, not compiled; it is not changed.
        score: runs the model that it is given on some data and returns a number, larger is better: an accuracy in percent, or
            a loss with its sign turned.
        passes: as in ``torch.compile``'s options; one of them searches, the others are in force meanwhile.
        validation: the same on other data, by which the last few are compared; without it, ``score`` is.
        seed: equal seeds try equal candidates.
        progress: show a bar, with the best score so far.
        options: further options of the backend.

    Returns:
        The plan; ``torch.compile(model, backend="accelpass", options={"plan": plan})`` follows it.

    Raises:
        OptionError: none of the passes, or more than one, is fitted in this way, or a score is no number.
        PassError: the model has nothing to choose; says why.
    """
    made = [make(p) for p in passes]
    one = only_one([p for p in made if isinstance(p, Judged)], "search_by_score", "is judged by a score")
    others, found, name = [p for p in made if p is not one], dict[str, Any](), one.name
    forget_compilations()
    asked: dict[str, Any] = {**(options or {}), "passes": [one.judged(found), *others]}
    fast = torch.compile(model, backend="accelpass", options=asked)
    with counting_bar(progress) as bar, torch.no_grad():
        task, best = bar.add_task(name, total=one.trials), float("-inf")

        def by(what: str, score: Score, advance: int) -> Judge:
            def judge(candidate: Mapping[str, Tensor]) -> float:
                nonlocal best
                write(fast, candidate)
                made = _number(score(fast), what)
                best = max(best, made) if advance else best
                bar.update(task, advance=advance, description=f"{name}: {what}, best {best:g}")
                return made

            return judge

        _number(score(fast), "score")  # compiles, and tells what there is to choose
        tensors = one.search(found, by("score", score, 1), by("validation", validation or score, 0), seed)
    forget_compilations()
    return Plan.of(model, [*made], tensors)


def _number(made: Any, what: str) -> float:
    try:
        return float(made)
    except (TypeError, ValueError, RuntimeError) as cause:
        raise OptionError(f"search_by_score: {what} returned {type(made).__name__}; it returns one number") from cause
