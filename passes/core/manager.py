"""Runs passes over a program: order, verification, analyses, and the record of what was done."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from types import MappingProxyType

import networkx as nx
import torch

from accelpass.ir.core.program import Program
from accelpass.ir.core.verify import signature, verify
from accelpass.ir.errors import AccelpassError, DefaultPassFailed, GraphError, OptionError, PassError
from accelpass.passes.core.base import PHASES, Pass, Record
from accelpass.passes.core.registry import origin


def ordered(passes: Sequence[Pass]) -> list[Pass]:
    """Passes in running order: by phase, then who reads an aspect after who edits it, then by name.

    Raises:
        OptionError: two passes exclude each other, or their constraints form a circle; names them.
    """
    _refuse_claims(passes)
    by_name = {p.name: p for p in passes}
    graph = nx.DiGraph()
    graph.add_nodes_from(by_name)
    for p in passes:
        for other, why in p.excludes.items():
            if other in by_name:
                raise OptionError(f"{p.name} cannot be used with {other}: {why}")
        graph.add_edges_from((other, p.name) for other in p.after if other in by_name)
        graph.add_edges_from((p.name, other) for other in p.before if other in by_name)
    for a, b in itertools.permutations(passes, 2):
        # Two that edit and read the same aspect are in no order.
        if a.phase == b.phase and a.edits & b.reads and not b.edits & a.reads:
            graph.add_edge(a.name, b.name)
    for a in passes:
        graph.add_edges_from((a.name, b.name) for b in passes if PHASES.index(a.phase) < PHASES.index(b.phase))
    try:
        return [by_name[n] for n in nx.lexicographical_topological_sort(graph)]
    except nx.NetworkXUnfeasible:
        circle = " -> ".join(a for a, _ in nx.find_cycle(graph))
        raise OptionError(f"these passes each ask to run before the other: {circle}") from None


def _refuse_claims(passes: Sequence[Pass]) -> None:
    """Refuse two passes that assume different things of the model; the one that assumes more is named first."""
    for one, second in itertools.combinations(sorted(passes, key=lambda p: (-len(p.claims), p.name)), 2):
        for aspect in sorted(one.claims.keys() & second.claims.keys()):
            if one.claims[aspect] != second.claims[aspect]:
                raise OptionError(
                    f"{one.name} cannot be used with {second.name}: of the first, {one.claims[aspect]}; of the second, "
                    f"{second.claims[aspect]}"
                )


@dataclass(frozen=True)
class Observer:
    """Looks at the program after each pass, and before it; used by debug mode and by the conformance kit."""

    after: Callable[[Program, Record], None]
    before: Callable[[Program, Pass], None] = lambda program, p: None


_WATCHING: ContextVar[tuple[Observer, ...]] = ContextVar("watching", default=())


@contextmanager
def watched(observer: Observer) -> Iterator[None]:
    """Let an observer see every program that passes are applied to in this block, whatever compiles it."""
    token = _WATCHING.set((*_WATCHING.get(), observer))
    try:
        yield
    finally:
        _WATCHING.reset(token)


def run(
    program: Program,
    passes: Sequence[Pass],
    observers: Sequence[Observer] = (),
    skip_sites: Mapping[str, Collection[str]] = MappingProxyType({}),
    asked: Collection[str] | None = None,
) -> list[Record]:
    """Apply ``passes`` in order. The graph is valid after each, or an error names the pass and the rule.

    Args:
        skip_sites: by name of a pass, sites that it leaves alone.
        asked: the passes that a user typed; None for all.

    Raises:
        DefaultPassFailed: a pass that is not among ``asked`` failed, or broke the graph.
        PassError: a pass failed, or rewrote a site of ``skip_sites``.
    """
    records = []
    observers = (*observers, *_WATCHING.get())
    before = signature(program)
    for p in ordered(passes):
        is_asked = asked is None or p.name in asked
        record = Record(p.name, leave=frozenset(skip_sites.get(p.name, ())))
        for observer in observers:
            observer.before(program, p)
        try:
            # Fake values are computed for new nodes: never under autograd, which would trace gradients of them.
            with torch.no_grad():
                p.apply(program, record)
        except AccelpassError:
            raise
        except Exception as cause:
            # Dynamo re-raises some types as they are and turns others into a silent graph break.
            told = f"the pass {p.name!r} failed: {type(cause).__name__}: {cause}"
            if not is_asked:
                raise DefaultPassFailed(told, p.name) from cause
            raise PassError(". ".join(filter(None, (told, origin(type(p)))))) from cause
        if taken := record.leave.intersection(record.took):
            raise PassError(
                f"the pass {p.name!r} cannot leave single sites alone: it took {sorted(taken)[0]}, which skip_sites names. "
                "Leave the pass out, or let it ask Record.wants(site) before it rewrites one"
            )
        if record.took:
            program.graph.eliminate_dead_code()
            program.gm.recompile()
            program.changed()
        try:
            verify(program, before, after=p.name, origin=origin(type(p)))
        except GraphError as cause:
            if not is_asked:
                raise DefaultPassFailed(str(cause), p.name) from cause
            raise
        for observer in observers:
            observer.after(program, record)
        records.append(record)
    return records
