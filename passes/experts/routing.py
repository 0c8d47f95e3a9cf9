"""How a mixture's router comes to its choice, and whether experts can be taken away from it."""

from __future__ import annotations

import operator
from collections.abc import Sequence

from torch import fx

from accelpass.ir.analyses.axes.flow import between
from accelpass.ir.analyses.structure.moe import MoE, moes
from accelpass.ir.core.graph import aten, is_call, shape
from accelpass.ir.core.program import Program

_SOFTMAX = (aten.softmax, aten._softmax)
_PROBABILITIES = (*_SOFTMAX, aten.sigmoid)
_PICKS = (aten.topk, aten.argmax, aten.max)


def unfit(program: Program, site: MoE) -> str | None:
    """Why a mixture cannot lose experts, or None."""
    if site.form == "loop":
        return "its experts run one after the other; type: model.set_experts_implementation('batched_mm')"
    if any(int(shape(w)[0]) != site.experts for w in site.weights) or site.router.out_features != site.experts:
        return "its router chooses among more experts than it has of its own"
    others = {m.path for m in program.analysis(moes) if m is not site and not set(m.weights).isdisjoint(site.weights)}
    return f"its experts are those of {sorted(others)[0]}, too" if others else None


def _choice(program: Program, site: MoE) -> tuple[fx.Node, Sequence[fx.Node]] | None:
    """A router's choice, and what is computed of its scores up to there."""
    inside = between(program, site.router.node, site.out)
    pick = next((n for n in inside if is_call(n, *_PICKS)), None)
    return None if pick is None else (pick, between(program, site.router.node, pick))


def probabilities(program: Program, site: MoE) -> fx.Node | None:
    """The router's probabilities, which its choice is made of."""
    found = _choice(program, site)
    return None if found is None else next((n for n in found[1] if is_call(n, *_PROBABILITIES)), None)


def sliceable(program: Program, site: MoE) -> bool:
    """Whether experts that are taken out change no gate: none is compared with others, or gates are divided by their sum."""
    found = _choice(program, site)
    if found is None or not any(is_call(n, *_SOFTMAX) for n in found[1]):
        return found is not None
    values = [u for u in found[0].users if is_call(u, operator.getitem) and u.args[1] == 0]
    for gates in values:
        sums = [u for u in gates.users if is_call(u, aten.sum)]
        if any(is_call(u, aten.div, aten.div_) and u.args[:2] == (gates, s) for s in sums for u in s.users):
            return True
    return False
