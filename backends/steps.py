"""A model that is run once for each denoising step, as a graph for each step put together from compiled blocks.

Passes say how a block is computed at a step. Each way is compiled once: the model is captured and rewritten as often as a
block has ways to be computed, each of these graphs is cut at its blocks, and equal parts share code. A step is then a
choice of one part for each block.
"""

from __future__ import annotations

import itertools
import operator
import time
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

import sympy
from torch import Tensor, fx
from torch._guards import TracingContext, tracing

from accelpass.backends.regions import Part, Regions, Slot, Step, key_of, layout, part_of
from accelpass.ir.analyses.cost import at_compiled_sizes, costs
from accelpass.ir.errors import PassError
from accelpass.ir.graph import fake_mode, value
from accelpass.ir.program import Program
from accelpass.ir.steps import BLOCK, prepare
from accelpass.ir.tensors import Binder, FromInputs
from accelpass.passes.base import Record
from accelpass.passes.step_cache.base import FULL, StepPass

Ref = tuple[str, Any]
"""Where a value comes from: ``argument`` (position), ``derived`` (what, which), ``recalled`` (name), ``held`` (a tensor),
``value`` (the name of the node that computes it)."""
Actions = tuple[str, ...]
Row = tuple[Actions, ...]
"""For each block what each pass does at each of its sites, in the order of :attr:`Composition.sites`."""


@dataclass(frozen=True, eq=False)
class Piece:
    """One part of the model, compiled: the block computed in one of its ways, or what precedes or follows all blocks."""

    fn: Callable[..., Any]
    given: tuple[Ref, ...]
    made: tuple[str, ...]
    keeps: tuple[tuple[str, Ref], ...]
    layouts: dict[str, Hashable]
    flops: int


@dataclass(frozen=True, eq=False)
class Linked:
    """A step's graph: the calls, what they are given, and the slots of what is kept."""

    regions: Regions
    sources: tuple[Ref, ...]
    keeps: tuple[str, ...]
    flops: int


@dataclass(eq=False)
class Composition:
    """All parts of a model at one set of sizes.

    Attributes:
        sites: by block, the (pass, path) that an action is chosen for.
        pieces: by number of the block (-1 and the number of blocks for what surrounds them) and actions.
        derived: binds the tensors that passes derived from weights.
        disabled: (pass, path) of sites that some action could not be done at; they stay dense, and the report says why.
        compiled: how many different parts were compiled; ``seconds`` in all.
    """

    sites: list[list[tuple[StepPass, str]]]
    pieces: dict[tuple[int, Actions], Piece]
    results: tuple[Any, ...]
    derived: Binder
    order: dict[Any, int]
    records: list[Record]
    disabled: frozenset[tuple[str, str]]
    compiled: int
    seconds: float
    _linked: dict[Row, Linked] = field(default_factory=dict)

    def row(self, step: int, branch: int) -> Row:
        """What the passes want at a step."""
        return tuple(
            tuple(FULL if (p.name, path) in self.disabled else p.action(step, path, branch) for p, path in block)
            for block in self.sites
        )

    @property
    def full(self) -> Row:
        return tuple((FULL,) * len(block) for block in self.sites)

    def linked(self, row: Row) -> Linked:
        """The graph of a step; made once for each different row."""
        if row not in self._linked:
            self._linked[row] = self._link(row)
        return self._linked[row]

    def evaluate(
        self, row: Row, args: Sequence[Any], recalled: Callable[[str], Tensor]
    ) -> tuple[tuple[Any, ...], dict[str, Tensor]]:
        """The model's results at one step, and what the step keeps."""
        graph = self.linked(row)
        bound = self.derived(args)
        given = [
            args[what] if kind == "argument" else bound[self.order[what]] if kind == "derived" else recalled(what)
            for kind, what in graph.sources
        ]
        made = graph.regions(*given)
        count = len(made) - len(graph.keeps)
        return made[:count], dict(zip(graph.keeps, made[count:], strict=True))

    def _link(self, row: Row) -> Linked:
        first, last = self.pieces[-1, ()], self.pieces[len(self.sites), ()]
        chain = [first, *(self.pieces[i, actions] for i, actions in enumerate(row)), last]
        outer = list(
            dict.fromkeys(ref for p in chain for ref in (*p.given, *(r for _, r in p.keeps)) if ref[0] != "value")
        )
        outer += [
            r for r in self.results if isinstance(r, tuple) and r[0] not in ("value", "literal") and r not in outer
        ]
        sources = [ref for ref in outer if ref[0] != "held"]
        held = [ref for ref in outer if ref[0] == "held"]
        slot: dict[Ref, int] = {ref: i for i, ref in enumerate([*sources, *held])}
        layouts: dict[str, Hashable] = {}
        for piece in chain:
            for name in piece.made:
                slot.setdefault(("value", name), len(slot))
                layouts[name] = piece.layouts[name]
            for kind, name in piece.given:
                if kind == "value" and (("value", name) not in slot or layouts[name] != piece.layouts[name]):
                    raise PassError(f"parts of the model do not fit together at {name}; please report this graph")
        keeps = [(name, slot[ref]) for p in chain for name, ref in p.keeps]
        results = [r[1] if r[0] == "literal" else slot[r] for r in self.results]
        needed = {i for i, r in zip(results, self.results, strict=True) if r[0] != "literal"} | {i for _, i in keeps}
        steps: list[Step] = []
        dying: dict[int, int] = {slot[ref]: at for at, p in enumerate(chain) for ref in p.given}
        for at, piece in enumerate(chain):
            inputs = tuple(slot[ref] for ref in piece.given)
            outputs = tuple(slot["value", name] for name in piece.made)
            ends = tuple(i for i in dict.fromkeys(inputs) if dying[i] == at and i not in needed)
            steps.append(Step(piece.fn, inputs, outputs, ends))
        wanted = [i if r[0] == "literal" else Slot(i) for r, i in zip(self.results, results, strict=True)]
        wanted += [Slot(i) for _, i in keeps]
        regions = Regions(steps, [ref[1].tensor for ref in held], len(slot), tuple(wanted), len(chain))
        return Linked(regions, tuple(sources), tuple(n for n, _ in keeps), sum(p.flops for p in chain))


@dataclass(frozen=True, eq=False)
class Held:
    """A tensor that a graph itself holds."""

    tensor: Tensor


def compose(
    capture: Callable[[], Program],
    passes: Sequence[StepPass],
    rewrite: Callable[[Program], list[Record]],
    lower: Callable[[Program], Any],
    compile_part: Callable[[fx.GraphModule, list[Any]], Callable[..., Any]],
    release: bool,
) -> Composition:
    """Compile every part in every way in which the passes want it.

    Args:
        capture: the model's graph, new at each call.
        rewrite: applies all passes to a graph; its ``actions`` say what the step passes do.
        lower: makes it what the compiler is given.
        compile_part: compiles one part for fake inputs.
        release: give back weights that no part needs as floats.
    """
    started = time.perf_counter()
    program = capture()
    found = prepare(program)
    owner = {site.path: site.block.number for p in passes for site in p.places(found)}
    sites: list[list[tuple[StepPass, str]]] = [[] for _ in found]
    for p in passes:
        for site in p.places(found):
            sites[owner[site.path]].append((p, site.path))
    last = len(found)
    ways: list[list[Actions]] = [[(FULL,) * len(block)] for block in sites]
    code: dict[Hashable, Callable[..., Any]] = {}
    pieces: dict[tuple[int, Actions], Piece] = {}
    derived: dict[Any, int] = {}
    records: list[Record] = []
    binders: list[Binder] = []
    disabled: set[tuple[str, str]] = set()
    results: tuple[Any, ...] = ()
    number = 0
    while number == 0 or number < max(map(len, ways), default=0):
        if number:
            program = capture()
            prepare(program)
        chosen = [w[min(number, len(w) - 1)] for w in ways]
        program.actions = _by_pass(sites, chosen)
        made = rewrite(program)
        records += made
        refused = {(r.name, path) for r in made for path in r.skipped}
        flops = _flops(program, last)
        lower(program)
        assert isinstance(program.tensors, FromInputs)
        binders.append(program.tensors.binder(release))
        mode = fake_mode(program.gm)
        assert mode is not None
        keeps = _keeps(program, owner)
        for at, nodes in _segments(program, last).items():
            if at in (-1, last):
                if number:
                    continue  # what surrounds the blocks is the same at every step
                actions: Actions = ()
            else:
                pairs = zip(sites[at], chosen[at], strict=True)
                actions = tuple(FULL if (p.name, path) in refused else action for (p, path), action in pairs)
            if (at, actions) in pieces:
                continue
            part = part_of(nodes)
            key = key_of(part)
            if key not in code:
                with tracing(TracingContext(mode)):
                    code[key] = compile_part(part.gm, [value(n) for n in part.given])
            pieces[at, actions] = _piece(program.tensors, code[key], part, keeps.get(at, ()), flops.get(at, 0), derived)
        if number == 0:
            results = _results(program)
            disabled |= refused
            ways = [_ways([(p, path) for p, path in block], disabled) for block in sites]
        else:
            disabled |= {
                (p.name, path) for b in sites for p, path in b if (p.name, path) in refused and not p.searching
            }
        number += 1
    order = {what: i for i, what in enumerate(derived)}
    seconds = time.perf_counter() - started
    binder = _union(binders, list(derived))
    return Composition(sites, pieces, results, binder, order, records, frozenset(disabled), len(code), seconds)


def _by_pass(sites: list[list[tuple[StepPass, str]]], chosen: list[Actions]) -> dict[str, dict[str, str]]:
    actions: dict[str, dict[str, str]] = {}
    for block, row in zip(sites, chosen, strict=True):
        for (p, path), action in zip(block, row, strict=True):
            actions.setdefault(p.name, {})[path] = action
    return actions


def _ways(block: list[tuple[StepPass, str]], disabled: set[tuple[str, str]]) -> list[Actions]:
    """Every combination of actions that occurs at a block, the model's own first."""
    ways: dict[Actions, None] = {(FULL,) * len(block): None}
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
    segments: dict[int, list[fx.Node]] = {}
    now: list[fx.Node] = []
    expected = -1
    for node in program.graph.nodes:
        if node.op == "call_function":
            now.append(node)
        if node.meta.get(BLOCK) is not None:
            if node.meta[BLOCK] != expected:
                break
            segments[expected] = now
            now, expected = [], expected + 1
    if expected != last:
        raise PassError(
            f"a pass has replaced the end of block {expected}, so the model cannot be cut there for step caching; "
            "leave one of the two passes out"
        )
    segments[last] = now
    return segments


def _flops(program: Program, last: int) -> dict[int, int]:
    cost = program.analysis(costs)
    return {
        at: at_compiled_sizes(program, sum((cost[n].flops for n in nodes), sympy.S.Zero))
        for at, nodes in _segments(program, last).items()
    }


def _ref(tensors: FromInputs, node: fx.Node) -> Ref:
    if node.op == "placeholder":
        return tensors.origin(node)
    if node.op == "get_attr":
        return "held", Held(operator.attrgetter(str(node.target))(tensors.gm))
    return "value", node.name


def _outputs(program: Program) -> tuple[list[Any], list[fx.Node]]:
    """What the model returns, and what is remembered."""
    (output,) = program.graph.find_nodes(op="output")
    everything: Any = output.args[0]
    count = len(everything) - len(program.remembered)
    return list(everything[:count]), list(everything[count:])


def _results(program: Program) -> tuple[Ref, ...]:
    assert isinstance(program.tensors, FromInputs)
    own, _ = _outputs(program)
    return tuple(_ref(program.tensors, r) if isinstance(r, fx.Node) else ("literal", r) for r in own)


def _keeps(program: Program, owner: dict[str, int]) -> dict[int, list[tuple[str, fx.Node]]]:
    """What each block remembers."""
    keeps: dict[int, list[tuple[str, fx.Node]]] = {}
    for name, node in zip(program.remembered, _outputs(program)[1], strict=True):
        keeps.setdefault(owner[name.rpartition(":")[0]], []).append((name, node))
    return keeps


def _piece(
    tensors: FromInputs,
    fn: Callable[..., Any],
    part: Part,
    keeps: Sequence[tuple[str, fx.Node]],
    flops: int,
    derived: dict[Any, int],
) -> Piece:
    given = tuple(_ref(tensors, n) for n in part.given)
    for kind, what in given:
        if kind == "derived":
            derived.setdefault(what, len(derived))
    kept = tuple((name, _ref(tensors, node)) for name, node in keeps)
    layouts = {n.name: layout(value(n)) for n in (*part.given, *part.made)}
    return Piece(fn, given, tuple(n.name for n in part.made), kept, layouts, flops)


def _union(binders: Sequence[Binder], derived: Sequence[Any]) -> Binder:
    """One binder for the derived tensors of all graphs; it releases what none of them reads as floats."""
    paths = {position: path for b in binders for position, path in b.paths.items()}
    kept = {p for b in binders for p in b.kept}
    released = frozenset().union(*(b.released for b in binders)) - kept
    return Binder((), tuple(derived), paths, released, tuple({p for b in binders for p in b.staying}))
