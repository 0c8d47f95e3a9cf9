"""Equal blocks of a model are compiled once and called as often as they occur.

Inductor lowers, schedules and writes code for each of a model's thirty equal layers. Here the graph is cut into stages where
it repeats itself; a stage that equals an earlier one takes that one's code, with its own weights as arguments.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from accelpass.backends.staged.linker import Key, LinkedGraph, link
from accelpass.backends.staged.stage import Code, Compile, Fn, Held, Ref, Stage, attribute, layout, part_of
from accelpass.ir.attention.recognition.score_steps import argument
from accelpass.ir.core.graph import (
    aten,
    draws,
    fake_mode,
    is_call,
    is_from_run_time,
    placeholders,
    value,
    written_inputs,
)

LEAST_NODES, LEAST_TIMES = 10, 3
"""A repetition of fewer nodes, or that occurs fewer times, stays where it is: each call of a part costs microseconds."""
_PERIODS = 8  # candidates that are looked at


@dataclass(frozen=True)
class Repetition:
    """``times`` equal stretches of ``period`` nodes, the first of which begins at ``start``."""

    start: int
    period: int
    times: int

    @property
    def end(self) -> int:
        return self.start + self.period * self.times


def compile_repeating(
    gm: fx.GraphModule, inputs: Sequence[Any], compile_part: Compile, code: dict[Hashable, Fn] | None = None
) -> LinkedGraph | None:
    """Compile ``gm`` stage by stage; None if it does not repeat itself or cannot be cut safely.

    Args:
        inputs: real inputs, or fake ones.
        compile_part: compiles one stage for fake inputs; called once for each different one.
        code: stages that were compiled before, which gets what is new.
    """
    mode = fake_mode(gm)
    if mode is None or not _can_cut(gm, inputs):
        return None
    calls = [n for n in gm.graph.nodes if n.op == "call_function"]
    found = repetitions(calls)
    if not found:
        return None
    cuts = {0, len(calls), *(r.start + i * r.period for r in found for i in range(r.times + 1))}
    cuts -= _where_sizes_pass(calls)
    if len(cuts) == 2:
        return None
    parts = [part_of(calls[low:high]) for low, high in itertools.pairwise(sorted(cuts))]
    refs: dict[Any, Ref] = {n: ("argument", i) for i, n in enumerate(placeholders(gm))}
    given = list(refs.values())
    refs |= {n: ("held", Held(attribute(gm, n))) for n in gm.graph.nodes if n.op == "get_attr"}
    refs |= {n: ("value", n.name) for n in calls}
    compiled = Code(compile_part, {} if code is None else code)
    before = len(compiled.known)
    stages: dict[Key, Stage] = {}
    for number, part in enumerate(parts):
        fn, taken, made = compiled.of(part, mode), tuple(refs[n] for n in part.given), tuple(n.name for n in part.made)
        stages[number, ()] = Stage(fn, taken, made)
    (output,) = gm.graph.find_nodes(op="output")
    results = [refs[r] if isinstance(r, fx.Node) else ("literal", r) for r in output.args[0]]
    return link(stages, results, given, len(compiled.known) - before)


def _where_sizes_pass(calls: Sequence[fx.Node]) -> set[int]:
    """Places that no cut may be at: a number would cross it, or a tensor of a size that the graph computes from values."""
    place, found = {node: i for i, node in enumerate(calls)}, set[int]()
    for i, node in enumerate(calls):
        made = value(node)
        if not isinstance(made, Tensor) or any(map(is_from_run_time, made.shape)):
            found.update(range(i + 1, 1 + max((place.get(u, len(calls) - 1) for u in node.users), default=i)))
    return found


def repetitions(calls: Sequence[fx.Node]) -> list[Repetition]:
    """Where a sequence of nodes repeats itself, in order, none inside another."""
    numbers: dict[Hashable, int] = {}
    place = {node: i for i, node in enumerate(calls)}
    signs = [numbers.setdefault(_signature(n, place), len(numbers)) for n in calls]
    lives = _lives(calls, place)

    def inside(low: int, high: int) -> list[Repetition]:
        best = _longest(signs, low, high)
        if best is None:
            return []
        # Any rotation of the period would do; the one that hands on the fewest values is the model's own block.
        run = range(best.start, min(best.start + best.period, best.end - best.period * LEAST_TIMES + 1))
        start = min(run, key=lambda i: (lives[i + best.period], i))
        times = (best.end + _rest(signs, best, high) - start) // best.period
        chosen = Repetition(start, best.period, times)
        return [*inside(low, chosen.start), chosen, *inside(chosen.end, high)]

    return inside(0, len(calls))


def _longest(signs: list[int], low: int, high: int) -> Repetition | None:
    """The repetition that covers most of ``signs[low:high]``; of equals the one with the shortest period."""
    gaps: Counter[int] = Counter()
    last: dict[int, int] = {}
    for i in range(low, high):
        if signs[i] in last:
            gaps[i - last[signs[i]]] += 1
        last[signs[i]] = i
    periods = [p for p, _ in gaps.most_common() if p >= LEAST_NODES][:_PERIODS]
    best: Repetition | None = None
    for period in sorted(periods):
        start = low
        while start + period < high:
            length = 0
            while start + length + period < high and signs[start + length] == signs[start + length + period]:
                length += 1
            times = length // period + 1
            if times >= LEAST_TIMES and (best is None or times * period > best.times * best.period):
                best = Repetition(start, period, times)
            start += length + 1
    return best


def _rest(signs: list[int], found: Repetition, high: int) -> int:
    """How many nodes after ``found`` still follow its period."""
    length = 0
    while found.end + length < high and signs[found.end + length] == signs[found.end + length - found.period]:
        length += 1
    return length


def _lives(calls: Sequence[fx.Node], place: dict[fx.Node, int]) -> list[int]:
    """By position: how many values cross from the nodes before it to those at or after it."""
    change = [0] * (len(calls) + 2)
    for i, node in enumerate(calls):
        last = max((place.get(u, len(calls)) for u in node.users), default=i)
        change[i + 1] += 1
        change[last + 1] -= 1
    lives, now = [], 0
    for step in change:
        now += step
        lives.append(now)
    return lives


def _signature(node: fx.Node, place: dict[fx.Node, int]) -> Hashable:
    """What two nodes at the same place of equal blocks have in common."""
    literal = fx.map_arg((node.args, node.kwargs), lambda n: "input" if n not in place else "node")
    return str(node.op), str(node.target), str(literal), str(layout(value(node)))


def _can_cut(gm: fx.GraphModule, inputs: Sequence[Any]) -> bool:
    """Every size is a number, nothing is random, no graph inside the graph, and written inputs overlap no other."""
    for node in gm.graph.nodes:
        held = value(node)
        if node.op == "get_attr" and not isinstance(attribute(gm, node), Tensor):
            return False
        if node.op in ("call_module", "call_method"):
            return False
        if _is_random(node):
            return False
        sizes = (*held.shape, *held.stride(), held.storage_offset()) if isinstance(held, Tensor) else (held,)
        if any(isinstance(s, torch.SymInt | torch.SymFloat | torch.SymBool) for s in sizes):
            return False
    storages = Counter(t.untyped_storage()._cdata for t in inputs if isinstance(t, Tensor))
    written = written_inputs(gm.graph)
    return all(
        storages[t.untyped_storage()._cdata] == 1
        for node, t in zip(placeholders(gm), inputs, strict=True)
        if node in written and isinstance(t, Tensor)
    )


def _is_random(node: fx.Node) -> bool:
    if not draws(node):
        return False
    if is_call(node, aten.scaled_dot_product_attention):
        return argument(node, "dropout_p") != 0.0
    return not (is_call(node, aten.dropout, aten.feature_dropout) and node.args[2] is False)
