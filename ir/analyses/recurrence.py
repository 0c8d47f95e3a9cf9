"""Loops that a capture has unrolled: stretches of a graph that follow each other, are alike, and read the same parameters."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx

from accelpass.ir.analyses.axes.flow import common_path
from accelpass.ir.core.graph import draws, module_path, mutates, root, value
from accelpass.ir.core.program import Program
from accelpass.ir.torch_private import tree_map

_PERIODS = 4  # candidates that are looked at
LEAST_NODES = 4
"""A body of fewer nodes is no loop worth the name: ``x * w * w``."""


@dataclass(frozen=True, eq=False)
class Loop:
    """A body that runs ``trips`` times, each time on what the time before gave (vertical recurrence: a Universal Transformer, ALBERT).

    Attributes:
        path: the module that holds the body.
        iterations: the nodes of each trip, in graph order; as many in each.
        carried: the value that crosses trips: what the first one reads, and what each one gives.
        injected: what all trips read, parameters apart: embeddings that are read again, masks, rotary tables.
        parameters: paths of what the body is made of, read by each trip; the same tensors, not equal ones.
        inside: trips whose value something else reads too (collected hidden states): they cannot be left out.
    """

    path: str
    iterations: tuple[tuple[fx.Node, ...], ...]
    carried: tuple[fx.Node, ...]
    injected: tuple[fx.Node, ...]
    parameters: tuple[str, ...]
    inside: tuple[int, ...]

    @property
    def trips(self) -> int:
        return len(self.iterations)

    @property
    def writes(self) -> bool:
        """Whether a trip writes to a tensor that outlives it (a key/value cache)."""
        return any(mutates(node) for node in self.iterations[0])

    def __str__(self) -> str:
        again = f", reads again {', '.join(n.name for n in self.injected)}" if self.injected else ""
        return (
            f"{self.trips} trips of {len(self.iterations[0])} nodes with {len(self.parameters)} parameters, carries "
            f"{self.carried[0].name} {list(value(self.carried[0]).shape)}{again}"
        )


def loops(program: Program) -> list[Loop]:
    """All loops that carry one tensor, those first that cover more of the graph; none overlaps another.

    Found by the parameters that they share. Blocks of equal weights that are other tensors are no loop, and neither is one whose trips
    are not node by node alike.
    """
    return _loops(program, frozenset())


def scheduled_loops(program: Program) -> list[Loop]:
    """As :func:`loops`, of bodies that may read other constants in each trip: a sampler's step sizes and times.

    What follows from constants and parameters alone (:func:`constants`) is no part of a trip.
    """
    return _loops(program, constants(program))


def constants(program: Program) -> frozenset[fx.Node]:
    """Calls whose result is the same each time while the parameters are: they read nothing else, draw nothing and write nothing."""
    found: set[fx.Node] = set()
    for node in program.graph.nodes:
        if node.op != "call_function" or not isinstance(value(node), Tensor) or mutates(node) or draws(node):
            continue
        if all(a in found or _is_fixed(program, a) for a in node.all_input_nodes):
            found.add(node)
    written = {root(a) for n in program.graph.nodes for a in mutates(n)}
    return frozenset(n for n in found if root(n) not in written)


def _is_fixed(program: Program, node: fx.Node) -> bool:
    return program.tensors.is_constant(node) and not program.tensors.is_state(node)


def _loops(program: Program, fixed: frozenset[fx.Node]) -> list[Loop]:
    calls = [n for n in program.graph.nodes if n.op == "call_function" and n not in fixed]
    place = {node: number for number, node in enumerate(calls)}
    found: list[Loop] = []
    for start, period, trips in _candidates(program, calls, place):
        taken = {n for loop in found for nodes in loop.iterations for n in nodes}
        for first in range(max(0, start - period + 1), start + 1):
            if taken.isdisjoint(calls[first : first + period * trips]):
                made = _loop(program, calls, place, first, period, trips, fixed)
                if made is not None:
                    found.append(made)
                    break
    return sorted(found, key=lambda loop: -loop.trips * len(loop.iterations[0]))


def _candidates(program: Program, calls: list[fx.Node], place: dict[fx.Node, int]) -> Iterator[tuple[int, int, int]]:
    """First use, distance and number of uses of parameters that are used again and again at one distance."""
    seen: Counter[tuple[int, int, int]] = Counter()
    for node in program.graph.nodes:
        if _is_parameter(program, node):
            at = sorted(place[u] for u in node.users if u in place)
            for number in range(len(at) - 1):
                period = at[number + 1] - at[number]
                if period >= LEAST_NODES and (not number or at[number] - at[number - 1] != period):
                    trips = 2
                    while number + trips < len(at) and at[number + trips] - at[number + trips - 1] == period:
                        trips += 1
                    seen[at[number], period, trips] += 1
    # Of one body, the parameter that is read first; the more nodes are covered, the earlier.
    by_body: dict[tuple[int, int], int] = {}
    for start, period, trips in sorted(seen):
        by_body.setdefault((period, trips), start)
    ranked = sorted(by_body, key=lambda body: -body[0] * body[1])
    yield from ((by_body[body], *body) for body in ranked[:_PERIODS])


def _loop(
    program: Program,
    calls: list[fx.Node],
    place: dict[fx.Node, int],
    first: int,
    period: int,
    trips: int,
    fixed: frozenset[fx.Node],
) -> Loop | None:
    """The loop that begins at a node, or None: other values than one cross a trip's end, or trips differ."""
    trips = min(trips, (len(calls) - first) // period)
    groups = [tuple(calls[first + t * period : first + (t + 1) * period]) for t in range(trips)]
    end = first + period
    crossing = [n for n in groups[0] if any(place.get(u, len(calls)) >= end for u in n.users)]
    if len(crossing) != 1 or not isinstance(value(crossing[0]), Tensor):
        return None
    offset = place[crossing[0]] - first
    entries: set[fx.Node] = set()
    count = 1
    while count < trips and _alike(groups, count, place, first, crossing[0], entries, fixed):
        count += 1
    groups = groups[:count]
    if count < 2 or len(entries) != 1:
        return None
    entry, given = entries.pop(), [group[offset] for group in groups]
    if not isinstance(value(entry), Tensor) or value(entry).shape != value(given[0]).shape:
        return None
    outside = {a for n in groups[-1] for a in n.all_input_nodes if a not in groups[-1] and a is not given[-2]} - fixed
    own = {a for a in outside if _is_parameter(program, a)}
    if not own:
        return None
    inside = []
    for number, (group, node) in enumerate(zip(groups[:-1], given[:-1], strict=True)):
        leaks = {n for n in group for u in n.users if u not in group and u not in groups[number + 1]}
        if leaks - {node}:
            return None  # more than what is carried is read afterwards
        if leaks:
            inside.append(number)
    paths = sorted({str(program.tensors.path(a)) for a in own})
    return Loop(
        module_path(groups[0][-1]) or common_path([p.rpartition(".")[0] for p in paths]) or "loop", tuple(groups), (entry, *given),
        tuple(sorted(outside - own)), tuple(paths), tuple(inside),
    )  # fmt: skip


def _alike(
    groups: list[tuple[fx.Node, ...]],
    number: int,
    place: dict[fx.Node, int],
    first: int,
    carried: fx.Node,
    entries: set[fx.Node],
    fixed: frozenset[fx.Node],
) -> bool:
    """Whether a trip does what the one before it did, on what that one gave; notes what the first trip reads in its place.

    Where constants are ``fixed``, trips may differ in them and in numbers.
    """
    period, fresh = len(groups[0]), set(entries)
    for before, after in zip(groups[number - 1], groups[number], strict=True):
        if before.target is not after.target or len(before.all_input_nodes) != len(after.all_input_nodes):
            return False
        plain = [fx.map_arg((n.args, n.kwargs), lambda _: "node") for n in (before, after)]
        if fixed:
            plain = [_without_numbers(p) for p in plain]
        if str(plain[0]) != str(plain[1]) or not _same_layout(before, after):
            return False
        for old, new in zip(_read(before), _read(after), strict=True):
            if old in fixed and new in fixed and _same_layout(old, new):
                continue
            if old is new and place.get(old, -1) < first:
                continue
            if old in place and place[old] >= first and place.get(new) == place[old] + period:
                continue
            if number == 1 and new is carried and place.get(old, -1) < first:
                fresh.add(old)
                continue
            return False
    entries |= fresh
    return True


def _without_numbers(args: Any) -> Any:
    return tree_map(lambda a: "number" if isinstance(a, float) else a, args)


def _is_parameter(program: Program, node: fx.Node) -> bool:
    return node.op in ("placeholder", "get_attr") and program.tensors.path(node) is not None


def _read(node: fx.Node) -> list[fx.Node]:
    found: list[fx.Node] = []
    fx.map_arg((node.args, node.kwargs), found.append)
    return found


def _same_layout(one: fx.Node, other: fx.Node) -> bool:
    a, b = value(one), value(other)
    if not isinstance(a, Tensor) or not isinstance(b, Tensor):
        return type(a) is type(b)
    return a.shape == b.shape and a.dtype == b.dtype and a.stride() == b.stride()
