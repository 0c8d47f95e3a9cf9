"""Captures, rewrites and cuts a model as often as its blocks have variants, and compiles each different stage."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import sympy
from torch import fx

from accelpass.backends.runtime.caches import Kept
from accelpass.backends.staged.linker import Key
from accelpass.backends.staged.model import Actions, StagedModel, all_full
from accelpass.backends.staged.stage import Code, Held, Ref, Stage, attribute, layout, part_of
from accelpass.ir.analyses.structure.cost import at_compiled_sizes, costs
from accelpass.ir.attention.spec.op import is_attention
from accelpass.ir.core.graph import fake_mode, value
from accelpass.ir.core.program import Program
from accelpass.ir.core.tensors import Binder, FromInputs
from accelpass.ir.errors import PassError, SpecConflict
from accelpass.ir.kv.lower import CacheUse
from accelpass.ir.transform.steps import BLOCK, NAME, StepBlock, prepare
from accelpass.passes.core.base import Record
from accelpass.passes.core.staged import FULL, PolicyPass

Sites = list[list[tuple[PolicyPass, str]]]
Nodes = Mapping[int, list[fx.Node]]
"""The calls of the graph by block; -1 in front of the first, their number after the last."""
Flops = Mapping[int, tuple[int, int]]
"""Of each stage, and of the products of its attentions alone."""


@dataclass
class Variants:
    """Makes a :class:`StagedModel`.

    Attributes:
        capture: the model's graph, new at each call.
        passes: those that choose; they see the same blocks.
        rewrite: applies all passes to a graph; its ``actions`` say what these do.
        lower: makes it what the compiler is given; returns what it does to key/value caches.
        code: compiles stages.
        release: give back weights that no stage needs as floats.
    """

    capture: Callable[[], Program]
    passes: Sequence[PolicyPass]
    rewrite: Callable[[Program], list[Record]]
    lower: Callable[[Program], list[CacheUse]]
    code: Code
    release: bool
    _stages: dict[Key, Stage] = field(default_factory=dict)
    _derived: dict[Any, int] = field(default_factory=dict)
    _disabled: set[tuple[str, str]] = field(default_factory=set)
    _records: list[Record] = field(default_factory=list)
    _binders: list[Binder] = field(default_factory=list)
    _recalls: dict[str, Any] = field(default_factory=dict)
    _caches: dict[int, tuple[tuple[str, ...], Kept]] = field(default_factory=dict)

    def compiled(self) -> StagedModel:
        """Compile every stage in every variant that the passes may choose."""
        started = time.perf_counter()
        dense, blocks = self._captured()
        assert isinstance(dense.tensors, FromInputs)
        several = len(self.passes) > 1  # each has the blocks that its options name; of one alone all are shown
        places = [(p, site) for p in self.passes for site in (p.chosen_places if several else p.places)(blocks)]
        sites: Sites = [[(p, place.path) for p, place in places if place.block.number == b.number] for b in blocks]
        owner = {place.path: place.block.number for _, place in places}
        streams = tuple(("value", block.outputs[0].meta[NAME]) for block in blocks)
        entry = _ref(dense.tensors, blocks[0].inputs[0], {})
        nodes, flops, results = self._variant(dense, sites, [all_full(b) for b in sites], owner)
        for chosen in self._ways(sites):
            self._variant(self._captured()[0], sites, chosen, owner)
        # What surrounds the blocks is the same at every call. A variant of a block may read more of what precedes the blocks
        # than the model's own does.
        read = {what for s in self._stages.values() for kind, what in s.given if kind == "value"}
        where = {node: at for at, inside in nodes.items() for node in inside}
        wanted = frozenset(n.name for n in where if _called(n, where) in read)
        for at in (-1, len(sites)):
            if nodes[at]:
                self._compile(dense, (at, ()), nodes, flops, wanted)
        return StagedModel(
            sites,
            [b.path for b in blocks],
            self._stages,
            len(dense.tensors.inputs_nodes),
            results,
            streams,
            entry,
            _union(self._binders, list(self._derived)),
            {what: i for i, what in enumerate(self._derived)},
            self._records,
            frozenset(self._disabled),
            len(self.code.known),
            time.perf_counter() - started,
            self._recalls,
            tuple((layer, *kept) for layer, kept in self._caches.items()),
        )

    def _captured(self) -> tuple[Program, Sequence[StepBlock]]:
        program = self.capture()
        return program, prepare(program, self.passes[0].stack)

    def _ways(self, sites: Sites) -> Iterator[list[Actions]]:
        """What to compile next, block by block, until nothing is left; a block that is done is computed in full."""
        tried = {(i, all_full(block)) for i, block in enumerate(sites)}
        while True:
            chosen = []
            for i, block in enumerate(sites):
                left = (w for w in _ways_of(block, self._disabled) if (i, w) not in tried)
                chosen.append(next(left, all_full(block)))
            fresh = set(enumerate(chosen)) - tried
            if not fresh:
                return
            tried |= fresh
            yield chosen

    def _variant(
        self, program: Program, sites: Sites, chosen: list[Actions], owner: Mapping[str, int]
    ) -> tuple[Nodes, Flops, tuple[Ref, ...]]:
        """Compile the blocks of one graph that are new; returns all of its nodes, and the model's results."""
        everything = [site for block in sites for site in block]
        program.actions = _by_pass(sites, chosen)
        made = self.rewrite(program)
        self._records += made
        refused = {(r.name, path) for r in made for path in r.skipped}
        flops = _flops(program, _cut(program, len(sites)))
        uses, tensors = self.lower(program), program.tensors
        assert isinstance(tensors, FromInputs)
        self._note_caches(
            [(tensors.position(u.count), u.form, replace(Kept.of(u, tensors), stepper=None)) for u in uses],
            sorted({name for (aspect, _), name in program.edited.items() if aspect.startswith("attention.")}),
        )
        self._binders.append(tensors.binder(self.release))
        nodes, keeps = _cut(program, len(sites)), _keeps(program, owner)
        for at, block in enumerate(sites):
            pairs = zip(block, chosen[at], strict=True)
            actions = tuple(FULL if (p.name, path) in refused else action for (p, path), action in pairs)
            if (at, actions) not in self._stages:
                size = " ".join(filter(None, (p.size(action) for (p, _), action in zip(block, actions, strict=True))))
                self._compile(program, (at, actions), nodes, flops, keeps=keeps.get(at, ()), size=size)
        # A site that cannot do all that is planned does nothing: half a plan would read what nobody kept.
        self._disabled |= {(p.name, path) for p, path in everything if (p.name, path) in refused and not p.searching}
        where = {node: at for at, inside in nodes.items() for node in inside}
        results = (_ref(tensors, r, where) if isinstance(r, fx.Node) else ("literal", r) for r in program.results()[0])
        return nodes, flops, tuple(results)

    def _compile(
        self,
        program: Program,
        key: Key,
        nodes: Nodes,
        flops: Flops,
        wanted: frozenset[str] = frozenset(),
        keeps: Sequence[tuple[str, fx.Node]] = (),
        size: str = "",
    ) -> None:
        mode, tensors, part = fake_mode(program.gm), program.tensors, part_of(nodes[key[0]], wanted)
        assert mode is not None and isinstance(tensors, FromInputs)
        where = {node: at for at, inside in nodes.items() for node in inside}
        fn = self.code.of(part, mode)
        given = tuple(_ref(tensors, n, where) for n in part.given)
        kept = tuple((name, _ref(tensors, node, where)) for name, node in keeps)
        read = (*part.given, *(node for _, node in keeps))
        for (kind, what), node in zip((*given, *(ref for _, ref in kept)), read, strict=True):
            if kind == "derived":
                self._derived.setdefault(what, len(self._derived))
            elif kind == "recalled":
                self._recalls[what] = layout(value(node))
        layouts = {_called(n, where): layout(value(n)) for n in (*part.given, *part.made) if n.op == "call_function"}
        pairs = zip(given, part.given, strict=True)
        layouts |= {what: layout(value(n)) for (kind, what), n in pairs if kind == "recalled"}
        made = tuple(_called(n, where) for n in part.made)
        self._stages[key] = Stage(fn, given, made, kept, layouts, *flops[key[0]], size)

    def _note_caches(self, uses: Sequence[tuple[int, tuple[str, ...], Kept]], editors: Sequence[str]) -> None:
        """A cache layer is one thing to all variants.

        Args:
            editors: passes that edited attentions.

        Raises:
            SpecConflict: variants store its tokens in different ways.
        """
        for layer, form, kept in uses:
            known, _ = self._caches.setdefault(layer, (form, kept))
            if known != form:
                raise SpecConflict(
                    f"{' and '.join(map(repr, (*(p.name for p in self.passes), *editors)))} cannot both have these layers: variants of "
                    f"a block store its tokens as {' '.join(known)} and as {' '.join(form)}. Use one of the two there (include=, "
                    "exclude= choose sites)."
                )


def _by_pass(sites: Sites, chosen: list[Actions]) -> dict[str, dict[str, str]]:
    actions: dict[str, dict[str, str]] = {}
    for block, row in zip(sites, chosen, strict=True):
        for (p, path), action in zip(block, row, strict=True):
            actions.setdefault(p.name, {})[path] = action
    return actions


def _ways_of(block: list[tuple[PolicyPass, str]], disabled: set[tuple[str, str]]) -> list[Actions]:
    """Every combination of actions that occurs at a block, the model's own first."""
    chosen = []
    for p, sites in itertools.groupby(block, lambda site: site[0]):
        paths = [path for _, path in sites]
        chosen.append(list(p.ways(paths, {path for path in paths if (p.name, path) not in disabled}.__contains__)))
    combined = (tuple(itertools.chain.from_iterable(ways)) for ways in itertools.product(*chosen))
    return list(dict.fromkeys((all_full(block), *combined)))


def _cut(program: Program, last: int) -> Nodes:
    """The calls of the graph by block.

    Raises:
        PassError: a pass has replaced the end of a block.
    """
    nodes = list(program.graph.nodes)
    start = max((i for i, n in enumerate(nodes) if n.meta.get(BLOCK) == -1), default=-1) + 1
    found = {-1: [n for n in nodes[:start] if n.op == "call_function"]}
    now: list[fx.Node] = []
    expected = 0
    for node in nodes[start:]:
        if node.op == "call_function":
            now.append(node)
        if node.meta.get(BLOCK) == expected:
            found[expected] = now
            now, expected = [], expected + 1
    if expected != last:
        raise PassError(
            f"a pass has replaced the end of block {expected}, so the model cannot be cut into stages there; "
            "leave one of the two passes out"
        )
    return {**found, last: now}


def _flops(program: Program, nodes: Nodes) -> Flops:
    cost = program.analysis(costs)

    def of(inside: list[fx.Node]) -> int:
        return at_compiled_sizes(program, sum((cost[n].flops for n in inside), sympy.S.Zero))

    return {at: (of(inside), of([n for n in inside if is_attention(n)])) for at, inside in nodes.items()}


def _ref(tensors: FromInputs, node: fx.Node, where: Mapping[fx.Node, int]) -> Ref:
    if node.op == "placeholder":
        return tensors.origin(node)
    if node.op == "get_attr":
        return "held", Held(attribute(tensors.gm, node))
    return "value", _called(node, where)


def _called(node: fx.Node, where: Mapping[fx.Node, int]) -> str:
    """The name of a value in all variants of the graph; what passes made is known by its block besides."""
    called: str | None = node.meta.get(NAME)
    return f"{where[node]}/{node.name}" if called is None else called


def _keeps(program: Program, owner: Mapping[str, int]) -> dict[int, list[tuple[str, fx.Node]]]:
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
