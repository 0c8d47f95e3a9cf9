"""Equal blocks of a model are compiled once and called as often as they occur.

Inductor lowers, schedules and writes code for each of a model's thirty equal layers. Here the graph is cut where it
repeats itself; a part that equals an earlier one takes that one's code, with its own weights as arguments.
"""

from __future__ import annotations

import itertools
import operator
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch._guards import TracingContext, tracing

from accelpass.ir.attention.score_steps import argument
from accelpass.ir.graph import aten, fake_mode, is_call, placeholders, value, written_inputs

Fn = Callable[..., Any]
Compile = Callable[[fx.GraphModule, list[Any]], Fn]

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


@dataclass
class Step:
    """One call of a compiled part; slots are positions in the list of all values."""

    fn: Fn
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    last_used: tuple[int, ...]


@dataclass
class Regions:
    """The whole graph as calls of its parts, in order.

    Attributes:
        constants: tensors that the graph itself holds; their slots follow those of the arguments.
        slots: how many values there are in all.
        compiled: how many different parts were compiled for the steps; others had been compiled before.
    """

    steps: list[Step]
    constants: list[Tensor]
    slots: int
    results: tuple[Any, ...]
    compiled: int

    def __call__(self, *args: Any) -> tuple[Any, ...]:
        values = [*args, *self.constants]
        values += [None] * (self.slots - len(values))
        for step in self.steps:
            made = step.fn(*[values[i] for i in step.inputs])
            for slot, one in zip(step.outputs, made, strict=True):
                values[slot] = one
            del made
            for slot in step.last_used:
                values[slot] = None
        return tuple(values[r.number] if isinstance(r, Slot) else r for r in self.results)


@dataclass(frozen=True)
class Slot:
    number: int


@dataclass
class Part:
    """A stretch of the graph as a module of its own, what it is given, and what it hands on."""

    gm: fx.GraphModule
    given: list[fx.Node]
    made: list[fx.Node]


def compile_regions(
    gm: fx.GraphModule, inputs: Sequence[Any], compile_part: Compile, code: dict[Hashable, Fn] | None = None
) -> Regions | None:
    """Compile ``gm`` part by part; None if it does not repeat itself or cannot be cut safely.

    Args:
        inputs: real inputs, or fake ones.
        compile_part: compiles one part for fake inputs; called once for each different part.
        code: parts that were compiled before, which gets what is new.
    """
    mode = fake_mode(gm)
    if mode is None or not _can_cut(gm, inputs):
        return None
    calls = [n for n in gm.graph.nodes if n.op == "call_function"]
    found = repetitions(calls)
    if not found:
        return None
    cuts = sorted({0, len(calls), *(r.start + i * r.period for r in found for i in range(r.times + 1))})
    parts = [part_of(calls[low:high]) for low, high in itertools.pairwise(cuts)]
    if not all(isinstance(value(n), Tensor) for part in parts for n in part.made):
        return None
    (output,) = gm.graph.find_nodes(op="output")
    held = [n for n in gm.graph.nodes if n.op == "get_attr"]
    kept = {*output.all_input_nodes, *placeholders(gm), *held}
    last = {n: i for i, part in enumerate(parts) for n in part.given if n not in kept}
    slot: dict[fx.Node, int] = {}
    for node in (*placeholders(gm), *held, *(n for part in parts for n in part.made)):
        slot[node] = len(slot)
    code = {} if code is None else code
    before = len(code)
    steps = []
    for i, part in enumerate(parts):
        key = key_of(part)
        if key not in code:
            with tracing(TracingContext(mode)):
                code[key] = compile_part(part.gm, [value(n) for n in part.given])
        groups = (part.given, part.made, [n for n in part.given if last.get(n) == i])
        steps.append(Step(code[key], *(tuple(slot[n] for n in group) for group in groups)))
    results = tuple(Slot(slot[r]) if isinstance(r, fx.Node) else r for r in output.args[0])
    return Regions(steps, [_attribute(gm, n) for n in held], len(slot), results, len(code) - before)


def part_of(nodes: Sequence[fx.Node], wanted: frozenset[str] = frozenset()) -> Part:
    """A stretch of the graph by itself; ``wanted`` names nodes that it hands on though nothing here reads them."""
    inside = set(nodes)
    given = list(dict.fromkeys(p for n in nodes for p in n.all_input_nodes if p not in inside))
    made = [n for n in nodes if n.name in wanted or any(u not in inside for u in n.users)]
    graph = fx.Graph()
    env: dict[fx.Node, fx.Node] = {}
    for node in given:
        env[node] = graph.placeholder(node.name)
        env[node].meta = {"val": value(node)}
    for node in nodes:
        env[node] = graph.node_copy(node, env.__getitem__)
    graph.output(tuple(env[n] for n in made))
    return Part(fx.GraphModule(torch.nn.Module(), graph), given, made)


def key_of(part: Part) -> Hashable:
    """Equal for parts that the same code can run: the same calls on tensors that are laid out and overlap alike."""
    nodes = list(part.gm.graph.nodes)
    number = {n: f"%{i}" for i, n in enumerate(nodes)}
    storages = [value(n).untyped_storage()._cdata if isinstance(value(n), Tensor) else n for n in part.given]
    overlap = tuple(storages.index(s) for s in storages)
    calls = tuple(
        (n.op, n.target if n.op == "call_function" else "", str(fx.map_arg((n.args, n.kwargs), number.__getitem__)))
        for n in nodes
    )
    return calls, overlap, tuple(layout(value(n)) for n in nodes if n.op != "output")


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


def layout(held: Any) -> Hashable:
    if isinstance(held, Tensor):
        return tuple(held.shape), held.stride(), held.dtype, held.device, held.storage_offset()
    if isinstance(held, tuple | list):
        return tuple(map(layout, held))
    return type(held).__name__, held if isinstance(held, int | float | bool | str) else None


def _can_cut(gm: fx.GraphModule, inputs: Sequence[Any]) -> bool:
    """Every size is a number, nothing is random, no graph inside the graph, and written inputs overlap no other."""
    for node in gm.graph.nodes:
        held = value(node)
        if node.op == "get_attr" and not isinstance(_attribute(gm, node), Tensor):
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


def _attribute(gm: fx.GraphModule, node: fx.Node) -> Any:
    return operator.attrgetter(str(node.target))(gm)


def _is_random(node: fx.Node) -> bool:
    if torch.Tag.nondeterministic_seeded not in getattr(node.target, "tags", ()):
        return False
    if is_call(node, aten.scaled_dot_product_attention):
        return argument(node, "dropout_p") != 0.0
    return not (is_call(node, aten.dropout, aten.feature_dropout) and node.args[2] is False)
