"""Captures, rewrites and cuts a model as often as its blocks have ways to be computed, and compiles each different part."""

from __future__ import annotations

import itertools
import operator
import time
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import sympy
from torch import fx
from torch._guards import TracingContext, tracing

from accelpass.backends.regions import Part, key_of, layout, part_of
from accelpass.backends.steps import Actions, Composition, Held, Piece, Ref, all_full
from accelpass.ir.analyses.cost import at_compiled_sizes, costs
from accelpass.ir.attention.op import is_attention
from accelpass.ir.errors import PassError
from accelpass.ir.graph import fake_mode, value
from accelpass.ir.program import Program
from accelpass.ir.steps import BLOCK, NAME, prepare
from accelpass.ir.tensors import Binder, FromInputs
from accelpass.passes.base import Record
from accelpass.passes.step_cache.base import FULL, StepPass

Sites = list[list[tuple[StepPass, str]]]
Flops = tuple[int, int]
"""Of a part, and of the products of its attentions alone."""


@dataclass
class Composer:
    """Makes a :class:`Composition`.

    Attributes:
        capture: the model's graph, new at each call.
        rewrite: applies all passes to a graph; its ``actions`` say what the step passes do.
        lower: makes it what the compiler is given.
        compile_part: compiles one part for fake inputs.
        release: give back weights that no part needs as floats.
    """

    capture: Callable[[], Program]
    passes: Sequence[StepPass]
    rewrite: Callable[[Program], list[Record]]
    lower: Callable[[Program], Any]
    compile_part: Callable[[fx.GraphModule, list[Any]], Callable[..., Any]]
    release: bool
    _code: dict[Hashable, Callable[..., Any]] = field(default_factory=dict)
    _pieces: dict[tuple[int, Actions], Piece] = field(default_factory=dict)
    _derived: dict[Any, int] = field(default_factory=dict)
    _disabled: set[tuple[str, str]] = field(default_factory=set)
    _records: list[Record] = field(default_factory=list)
    _binders: list[Binder] = field(default_factory=list)
    _recalls: dict[str, Hashable] = field(default_factory=dict)

    def compose(self) -> Composition:
        """Compile every part in every way in which the passes want it."""
        started = time.perf_counter()
        dense = self.capture()
        sites, owner = self._sites(dense)
        around, results = self._variant(dense, sites, [all_full(b) for b in sites], owner)
        for chosen in self._ways(sites):
            program = self.capture()
            prepare(program)
            self._variant(program, sites, chosen, owner)
        # What surrounds the blocks is the same at every step. A way to compute a block may read more of what precedes
        # the blocks than the model's own does.
        read = {what for p in self._pieces.values() for kind, what in p.given if kind == "value"}
        where = {node: at for at, segment in _segments(dense, len(sites)).items() for node in segment}
        for at, (nodes, flops) in around.items():
            if nodes:
                wanted = frozenset(n.name for n in nodes if _called(n, where) in read)
                self._compile(dense, at, (), part_of(nodes, wanted), (), flops, where)
        order = {what: i for i, what in enumerate(self._derived)}
        binder = _union(self._binders, list(self._derived))
        disabled, seconds = frozenset(self._disabled), time.perf_counter() - started
        return Composition(
            sites,
            self._pieces,
            results,
            binder,
            order,
            self._records,
            disabled,
            len(self._code),
            seconds,
            self._recalls,
        )

    def _sites(self, program: Program) -> tuple[Sites, dict[str, int]]:
        found = prepare(program)
        places = [(p, place) for p in self.passes for place in p.places(found)]
        sites: Sites = [[] for _ in found]
        for p, place in places:
            sites[place.block.number].append((p, place.path))
        return sites, {place.path: place.block.number for _, place in places}

    def _ways(self, sites: Sites) -> Iterator[list[Actions]]:
        """What to compile next, block by block, until nothing is left; a block that is done is computed in full."""
        tried = {(i, all_full(block)) for i, block in enumerate(sites)}
        while True:
            chosen = []
            for i, block in enumerate(sites):
                left = (w for w in _ways(block, self._disabled) if (i, w) not in tried)
                chosen.append(next(left, all_full(block)))
            fresh = set(enumerate(chosen)) - tried
            if not fresh:
                return
            tried |= fresh
            yield chosen

    def _variant(
        self, program: Program, sites: Sites, chosen: list[Actions], owner: dict[str, int]
    ) -> tuple[dict[int, tuple[list[fx.Node], Flops]], tuple[Ref, ...]]:
        """Compile the blocks of one graph that are new; returns what surrounds them, and the model's results."""
        last, everything = len(sites), [site for block in sites for site in block]
        program.actions = _by_pass(sites, chosen)
        made = self.rewrite(program)
        self._records += made
        refused = {(r.name, path) for r in made for path in r.skipped}
        flops = _flops(program, last)
        self.lower(program)
        assert isinstance(program.tensors, FromInputs)
        self._binders.append(program.tensors.binder(self.release))
        keeps = _keeps(program, owner)
        segments = _segments(program, last)
        where = {node: at for at, nodes in segments.items() for node in nodes}
        for at, block in enumerate(sites):
            pairs = zip(block, chosen[at], strict=True)
            actions = tuple(FULL if (p.name, path) in refused else action for (p, path), action in pairs)
            if (at, actions) not in self._pieces:
                self._compile(program, at, actions, part_of(segments[at]), keeps.get(at, ()), flops[at], where)
        # A site that cannot do all that is planned does nothing: half a plan would read what nobody kept.
        self._disabled |= {(p.name, path) for p, path in everything if (p.name, path) in refused and not p.searching}
        return {at: (segments[at], flops[at]) for at in (-1, last)}, _results(program, where)

    def _compile(
        self,
        program: Program,
        at: int,
        actions: Actions,
        part: Part,
        keeps: Sequence[tuple[str, fx.Node]],
        flops: Flops,
        where: Mapping[fx.Node, int],
    ) -> None:
        key, mode, tensors = key_of(part), fake_mode(program.gm), program.tensors
        assert mode is not None and isinstance(tensors, FromInputs)
        if key not in self._code:
            with tracing(TracingContext(mode)):
                self._code[key] = self.compile_part(part.gm, [value(n) for n in part.given])
        given = tuple(_ref(tensors, n, where) for n in part.given)
        kept = tuple((name, _ref(tensors, node, where)) for name, node in keeps)
        nodes = (*part.given, *(node for _, node in keeps))
        for (kind, what), node in zip((*given, *(ref for _, ref in kept)), nodes, strict=True):
            if kind == "derived":
                self._derived.setdefault(what, len(self._derived))
            elif kind == "recalled":
                self._recalls[what] = layout(value(node))
        layouts = {_called(n, where): layout(value(n)) for n in (*part.given, *part.made) if n.op == "call_function"}
        made = tuple(_called(n, where) for n in part.made)
        self._pieces[at, actions] = Piece(self._code[key], given, made, kept, layouts, *flops)


def _by_pass(sites: Sites, chosen: list[Actions]) -> dict[str, dict[str, str]]:
    actions: dict[str, dict[str, str]] = {}
    for block, row in zip(sites, chosen, strict=True):
        for (p, path), action in zip(block, row, strict=True):
            actions.setdefault(p.name, {})[path] = action
    return actions


def _ways(block: list[tuple[StepPass, str]], disabled: set[tuple[str, str]]) -> list[Actions]:
    """Every combination of actions that occurs at a block, the model's own first."""
    ways: dict[Actions, None] = {all_full(block): None}
    free = [p.searching and (p.name, path) not in disabled for p, path in block]
    if any(free):
        choices = [p.actions(path) if f else (FULL,) for (p, path), f in zip(block, free, strict=True)]
        ways |= dict.fromkeys(itertools.product(*choices))
    else:
        for step in range(max((p.horizon() for p, _ in block), default=0)):
            for branch in range(max(p.branches for p, _ in block)):
                one = (FULL if (p.name, path) in disabled else p.action(step, path, branch) for p, path in block)
                ways[tuple(one)] = None
    return list(ways)


def _segments(program: Program, last: int) -> dict[int, list[fx.Node]]:
    """The calls of the graph by block; -1 in front of the first, ``last`` after the last.

    Raises:
        PassError: a pass has replaced the end of a block.
    """
    nodes = list(program.graph.nodes)
    start = max((i for i, n in enumerate(nodes) if n.meta.get(BLOCK) == -1), default=-1) + 1
    segments = {-1: [n for n in nodes[:start] if n.op == "call_function"]}
    now: list[fx.Node] = []
    expected = 0
    for node in nodes[start:]:
        if node.op == "call_function":
            now.append(node)
        if node.meta.get(BLOCK) == expected:
            segments[expected] = now
            now, expected = [], expected + 1
    if expected != last:
        raise PassError(
            f"a pass has replaced the end of block {expected}, so the model cannot be cut there for step caching; "
            "leave one of the two passes out"
        )
    segments[last] = now
    return segments


def _flops(program: Program, last: int) -> dict[int, Flops]:
    cost = program.analysis(costs)

    def of(nodes: list[fx.Node]) -> int:
        return at_compiled_sizes(program, sum((cost[n].flops for n in nodes), sympy.S.Zero))

    segments = _segments(program, last).items()
    return {at: (of(nodes), of([n for n in nodes if is_attention(n)])) for at, nodes in segments}


def _ref(tensors: FromInputs, node: fx.Node, where: Mapping[fx.Node, int]) -> Ref:
    if node.op == "placeholder":
        return tensors.origin(node)
    if node.op == "get_attr":
        return "held", Held(operator.attrgetter(str(node.target))(tensors.gm))
    return "value", _called(node, where)


def _called(node: fx.Node, where: Mapping[fx.Node, int]) -> str:
    """The name of a value in all variants of the graph; what passes made is known by its block besides."""
    called: str | None = node.meta.get(NAME)
    return f"{where[node]}/{node.name}" if called is None else called


def _results(program: Program, where: Mapping[fx.Node, int]) -> tuple[Ref, ...]:
    assert isinstance(program.tensors, FromInputs)
    own, _, _ = program.results()
    return tuple(_ref(program.tensors, r, where) if isinstance(r, fx.Node) else ("literal", r) for r in own)


def _keeps(program: Program, owner: dict[str, int]) -> dict[int, list[tuple[str, fx.Node]]]:
    """What each block remembers."""
    keeps: dict[int, list[tuple[str, fx.Node]]] = {}
    for name, node in zip(program.remembered, program.results()[2], strict=True):
        keeps.setdefault(owner[name.rpartition(":")[0]], []).append((name, node))
    return keeps


def _union(binders: Sequence[Binder], derived: Sequence[Any]) -> Binder:
    """One binder for the derived tensors of all graphs; it releases what none of them reads as floats."""
    paths = {position: path for b in binders for position, path in b.paths.items()}
    kept = {p for b in binders for p in b.kept}
    released = frozenset().union(*(b.released for b in binders)) - kept
    return Binder((), tuple(derived), paths, released, tuple({p for b in binders for p in b.staying}))
