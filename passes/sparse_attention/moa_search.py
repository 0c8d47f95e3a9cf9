"""MoA's search: one rule for each head, so that masking costs little at every length (arXiv 2406.14909, section 4.2)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np

from accelpass.ir.errors import AccelpassError, PassError
from accelpass.passes.sparse_attention.spans import Rule

PER_LAYER = 2
LEVELS = 5
_MOST = 64
"""Programmes at most with levels: of more than three lengths, each has fewer levels (inferred: the paper has three)."""
SECONDS = 60.0
"""Given to each of the programmes; the best solution by then is taken."""

Array = np.ndarray[Any, Any]


class MissingSolver(AccelpassError):
    """The search needs scipy, which is not installed."""


@dataclass(frozen=True)
class Problem:
    """What is chosen from.

    Attributes:
        losses: ``(lengths, heads, rules)``: the cost of masking.
        densities: ``(lengths, rules)``.
        layers: the layer of each head, numbered from 0.
        bound: of the mean density over heads, at each length.
        per_layer: rules that the heads of one layer may have.
    """

    losses: Array
    densities: Array
    layers: Array
    bound: float
    per_layer: int = PER_LAYER

    def cost(self, chosen: Array) -> Array:
        """What a choice (a rule for each head) costs at each length."""
        total: Array = self.losses[:, np.arange(len(chosen)), chosen].sum(1)
        return total

    def allows(self, chosen: Array) -> bool:
        """Whether a choice is within the bound and has few enough rules a layer."""
        rules = (len(set(chosen[self.layers == layer])) for layer in np.unique(self.layers))
        return bool((self.densities[:, chosen].mean(1) <= self.bound + 1e-9).all()) and max(rules) <= self.per_layer


def search_space(lengths: Sequence[int], step: int, shares: int) -> list[Rule]:
    """Spans ``alpha + beta * N`` that are positive at the shortest length and no longer than any: alpha in steps from the
    shortest length below zero to the longest, beta in equal shares from 0 to 1. The narrowest at the longest comes first.
    The last is everything, ``(0, 1)``.
    """
    alphas = range(-(lengths[0] // step) * step, lengths[-1] + 1, step)
    rules = [
        (float(alpha), part / shares)
        for alpha in alphas
        for part in range(shares + 1)
        if alpha + part / shares * lengths[0] > 0 and all(alpha + part / shares * n <= n for n in lengths)
    ]
    return sorted(rules, key=lambda rule: (rule[0] + rule[1] * lengths[-1], rule))


def pareto(problem: Problem, advance: Callable[[], None] = lambda: None) -> list[Array]:
    """Choices of which none is better than another at all lengths, by the epsilon-constraint method.

    Each length's cost is minimised in turn, while the others are held below levels between the best and the worst that
    they have where only one of them is minimised.

    Args:
        advance: called after each programme; there are :func:`programmes` of them.

    Raises:
        PassError: no choice is within the bound.
        MissingSolver: scipy is not installed.
    """
    count = len(problem.losses)
    steps = levels(count) - 1
    alone = [_solved(problem, length, {}) for length in range(count)]
    for _ in alone:
        advance()
    if any(chosen is None for chosen in alone):
        least = problem.densities.min(1).max()
        raise PassError(
            f"moa: no spans have a mean density of {problem.bound:g} or less; the narrowest have {least:.3g}. Use a larger "
            "density, longer calibration data, or a smaller step"
        )
    found = [chosen for chosen in alone if chosen is not None]
    costs = np.stack([problem.cost(chosen) for chosen in found])
    ends = np.linspace(costs.min(0), costs.max(0), steps + 1)[1:]
    for length in range(count if count > 1 else 0):
        others = [i for i in range(count) if i != length]
        for at in product(range(steps), repeat=len(others)):
            chosen = _solved(
                problem, length, {other: ends[level, other] for other, level in zip(others, at, strict=True)}
            )
            advance()
            if chosen is not None:
                found.append(chosen)
    return _best(problem, found)


def levels(lengths: int) -> int:
    """Levels that the costs at other lengths are held below, the best and the worst included."""
    return next(n for n in range(LEVELS, 1, -1) if n == 2 or lengths * (n - 1) ** (lengths - 1) <= _MOST)


def programmes(lengths: int) -> int:
    """How many programmes :func:`pareto` solves."""
    return lengths + (lengths * (levels(lengths) - 1) ** (lengths - 1) if lengths > 1 else 0)


def _best(problem: Problem, found: Sequence[Array]) -> list[Array]:
    each = list({tuple(chosen): chosen for chosen in found}.values())
    costs = [problem.cost(chosen) for chosen in each]
    # The solver is exact up to a tolerance only: the smaller of two costs may differ in the last digits.
    return [
        c for c, mine in zip(each, costs, strict=True) if not any((o <= mine).all() and (o < mine).any() for o in costs)
    ]


def _solved(problem: Problem, length: int, limits: dict[int, float]) -> Array | None:
    """The choice with the least cost at one length, with those at others limited; None if there is none."""
    try:
        from scipy.optimize import Bounds, LinearConstraint, milp
        from scipy.sparse import csr_array
    except ImportError as cause:
        raise MissingSolver(f"moa's search needs scipy ({cause}); pip install 'accelpass[search]'") from None
    _, heads, rules = problem.losses.shape
    layers = int(problem.layers.max()) + 1
    choices, used = heads * rules, layers * rules  # x[head, rule] chosen; y[layer, rule] at least any of its heads' x
    nothing = np.zeros(used)
    row = np.repeat(np.arange(heads), rules)
    one_each = csr_array((np.ones(choices), (row, np.arange(choices))), shape=(heads, choices + used))
    at = np.arange(choices)
    y_of = choices + np.repeat(problem.layers, rules) * rules + np.tile(np.arange(rules), heads)
    uses = csr_array(
        (np.concatenate([np.ones(choices), -np.ones(choices)]), (np.tile(at, 2), np.concatenate([at, y_of]))),
        shape=(choices, choices + used),
    )
    few = csr_array((np.ones(used), (np.repeat(np.arange(layers), rules), choices + np.arange(used))),
                    shape=(layers, choices + used))  # fmt: skip
    dense = [np.concatenate([np.tile(d, heads) / heads, nothing]) for d in problem.densities]
    # Costs are of very different size, and the solver's tolerances are absolute.
    scale = [max(float(losses.max()), np.finfo(float).tiny) for losses in problem.losses]
    costs = [np.concatenate([losses.ravel() / s, nothing]) for losses, s in zip(problem.losses, scale, strict=True)]
    constraints = [
        LinearConstraint(one_each, 1, 1),
        LinearConstraint(uses, -np.inf, 0),
        LinearConstraint(few, -np.inf, problem.per_layer),
        LinearConstraint(np.stack(dense), -np.inf, problem.bound),
    ]
    for other, limit in limits.items():
        constraints.append(LinearConstraint(costs[other][None], -np.inf, limit / scale[other] * (1 + 1e-9)))
    solved = milp(
        costs[length],
        integrality=np.concatenate([np.ones(choices), nothing]),
        bounds=Bounds(0, 1),
        constraints=constraints,
        options={"time_limit": SECONDS, "mip_rel_gap": 1e-4},
    )
    if solved.x is None:
        return None
    chosen: Array = solved.x[:choices].reshape(heads, rules).argmax(1)
    return chosen
