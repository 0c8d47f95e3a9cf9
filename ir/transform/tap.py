"""Taps: what is computed at named points of a graph is read into state, or replaced, inside the compiled graph.

A point is a value that models of all libraries have: the stream before and after a block, the hidden channels of an MLP, queries,
keys and values, attention probabilities and what keys get of them, what an output projection reads, a router's scores, logits. No
module hook is needed and no graph is broken.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, fx

from accelpass.ir.analyses.structure.block import Block, blocks
from accelpass.ir.analyses.structure.mlp import mlps
from accelpass.ir.analyses.structure.moe import moes
from accelpass.ir.analyses.structure.output_head import output_heads
from accelpass.ir.attention.recognition.detect import detect
from accelpass.ir.attention.spec.spec import AttentionMass, ScoreTap
from accelpass.ir.core.graph import aten, call, placeholders, value
from accelpass.ir.core.program import Program
from accelpass.ir.core.state import StateSpec
from accelpass.ir.errors import AccelpassError
from accelpass.ir.kv.sites import kv_sites
from accelpass.ir.transform.attention_points import mass_of, probabilities_of
from accelpass.ir.transform.real_tokens import real_tokens
from accelpass.ir.transform.splice import splice, trace

KINDS = ("residual", "stream", "act", "q", "k", "v", "heads", "probs", "mass", "out", "router", "logits")
_OF_SCORES = ("probs", "mass")
STARTS = {"sum": 0.0, "max": float("-inf"), "min": float("inf"), "last": 0.0}


class CannotTap(AccelpassError):
    """Says which point cannot be tapped, and why."""


@dataclass(frozen=True, eq=False)
class Point:
    """A named value of a graph.

    Attributes:
        path: the module, ``model.layers.3.mlp``.
        kind: one of KINDS: ``residual`` (the streams before and after a block), ``stream`` (what the first block of a stack
            reads), ``act`` (the hidden channels of an MLP, which its
            last linear reads), ``q``, ``k``, ``v`` (as attention reads them), ``heads`` (what the output projection of an
            attention reads), ``probs`` (attention probabilities ``(batch, heads, queries, keys)``), ``mass`` (what each key gets of the
            scores, float32 ``(batch, kv_heads, keys)``), ``out`` (what the last linear of an attention or MLP gives), ``router`` (the scores of experts), ``logits``.
        nodes: the values; a tap that replaces replaces the last. Of ``probs`` and ``mass`` the attention, which gives them when tapped.
    """

    path: str
    kind: str
    nodes: tuple[fx.Node, ...]

    @property
    def name(self) -> str:
        return point_name(self.path, self.kind)


def point_name(path: str, kind: str) -> str:
    """What the point of a kind is called in a module; one that is the model itself has no path."""
    return ".".join(filter(None, (path, kind)))


@dataclass(frozen=True)
class Tap:
    """A function of what is computed at some points.

    Attributes:
        at: a shell pattern for names of points, ``*.mlp.act``, or a kind.
        fn: gets the point's values. Its result, of a shape that does not depend on the call, is gathered; or, if the tap replaces,
            it takes the place of the last value.
        how: what is gathered over calls: their ``sum``, ``max``, ``min`` or ``last`` result; ``replace`` for a tap that replaces.
        name: tells several taps at one point apart.
        written: ``fn`` gets so many vectors more, of the last value's channels: zeros, until ``accelpass.write`` sets them (steering,
            masking). Of several each is called by its number, from 0. In place of how many, their shapes, if these are others.
        score: at a point ``mass``, what a key gets of the scores: all queries' probabilities, unless something else is wanted
            (``LastQueries(AttentionMass(), 1)``: those of the last query alone, for which the attention stays as it is).
        also: finds further values of a graph that ``fn`` gets after the point's: ``real_tokens``, which tells padding from text.
    """

    at: str
    fn: Callable[..., Tensor]
    how: str = "sum"
    name: str = ""
    written: int | Sequence[Sequence[int]] = 0
    also: Callable[[Program], Sequence[fx.Node]] | None = None
    score: ScoreTap = field(default_factory=AttentionMass)

    @property
    def counts_padding(self) -> bool:
        """Whether ``fn`` cannot tell padding from text."""
        return self.also is not real_tokens

    def __post_init__(self) -> None:
        if self.how not in (*STARTS, "replace"):
            raise ValueError(f"how={self.how!r} is not known; use {', '.join((*STARTS, 'replace'))}")

    def fits(self, point: Point) -> bool:
        return self.at == point.kind or fnmatch.fnmatchcase(point.name, self.at)


def points(program: Program) -> list[Point]:
    """The points of a graph, those of one kind in graph order; several of one name are numbered."""
    found: list[Point] = []
    taken: dict[str, int] = {}
    for point in _points(program):
        number = taken[point.name] = taken.get(point.name, 0) + 1
        path = point.path if number == 1 else f"{point.path}#{number}"
        found.append(Point(path, point.kind, point.nodes))
    return found


def _points(program: Program) -> Iterator[Point]:
    before: Block | None = None
    for block in program.analysis(blocks):
        if before is None or block.input is not before.output:
            yield Point(block.path.rpartition(".")[0], "stream", (block.input,))
        yield Point(block.path, "residual", (block.input, block.output))
        before = block
    for mlp in program.analysis(mlps):
        yield Point(mlp.path, "act", (mlp.down.operand(),))
        yield Point(mlp.path, "out", (mlp.down.node,))
    for attention in program.analysis(detect):
        if attention.node is None:
            continue
        for kind, node in zip("qkv", attention.node.args, strict=False):
            assert isinstance(node, fx.Node)
            yield Point(attention.path, kind, (node,))
        for kind in _OF_SCORES:
            yield Point(attention.path, kind, (attention.node,))
        if attention.o_proj is not None:
            read = attention.o_proj.all_input_nodes
            yield Point(attention.path, "heads", (next(n for n in read if not program.tensors.is_constant(n)),))
            yield Point(attention.path, "out", (attention.o_proj,))
    for moe in program.analysis(moes):
        yield Point(moe.path, "router", (moe.router.node,))
    for head in program.analysis(output_heads):
        yield Point(head.path, "logits", (head.node,))


def tap(program: Program, taps: Sequence[Tap], by: str) -> dict[str, fx.Node]:
    """Put taps into a graph; returns the state that each fills or reads, by ``by.point`` or ``by.point.name``.

    What is gathered lives with the model and is shared by all its graphs: ``accelpass.read(fast, "by.*")`` gives it, and
    ``accelpass.reset`` sets it back. Analyses are to be run anew afterwards (``program.changed()``).

    Raises:
        CannotTap: what a function gives has a size that only run time knows, or is no replacement.
    """
    found, anchor = points(program), _anchor(program)
    slots: dict[str, fx.Node] = {}
    now: dict[fx.Node, fx.Node] = {}  # attentions that were asked for something, which makes other nodes of them
    cached = {site.attention for site in program.analysis(kv_sites)}
    for one in taps:
        for point in found:
            if one.fits(point):
                name = ".".join(filter(None, (by, point.name, one.name)))
                given = [
                    *_values(program, one, point, by, now, cached),
                    *(one.also(program) if one.also is not None else ()),
                ]
                written = name if one.how == "replace" else f"{name}.written"
                shapes = _written(one, point)
                for number, shape in enumerate(shapes):
                    vector = f"{written}.{number}" if len(shapes) > 1 else written
                    spec = StateSpec(vector, shape, value(point.nodes[-1]).dtype, "model")
                    slots[vector] = program.tensors.state(anchor, spec)
                    given.append(slots[vector])
                if one.how == "replace":
                    _replace(program, one, point, given)
                else:
                    slots[name] = _read(program, one, point, given, anchor, name)
                    if one.counts_padding:
                        program.counts_padding.append(name)
    program.gm.recompile()
    return slots


def _values(
    program: Program, one: Tap, point: Point, by: str, now: dict[fx.Node, fx.Node], cached: Collection[fx.Node | None]
) -> Sequence[fx.Node]:
    """What a tap's function gets of its point."""
    if point.kind not in _OF_SCORES:
        return point.nodes
    (node,) = point.nodes
    if one.how == "replace":
        raise CannotTap(
            f"{point.name}: it is read beside the attention, and cannot be replaced; replace heads, q, k or v"
        )
    if node in cached:
        raise CannotTap(f"{point.name}: its keys stand in a KVCache; tap a call without one (use_cache=False)")
    last = now.get(node, node)
    if point.kind == "probs":
        return [probabilities_of(program, last)]
    found, now[node] = mass_of(program, last, one.score, by)
    return [found]


def _anchor(program: Program) -> fx.Node:
    """The weight that gathered state lives with: the same one in every graph of a model."""
    found = {program.tensors.path(n): n for n in program.graph.nodes if _is_own(program, n)}
    if not found:
        raise CannotTap("the graph has no weight that what is gathered could live with")
    return found[min(found, key=str)]


def _is_own(program: Program, node: fx.Node) -> bool:
    return node.op in ("placeholder", "get_attr") and program.tensors.sources(node) == [node]


def _written(one: Tap, point: Point) -> list[tuple[int, ...]]:
    """The shapes of what ``accelpass.write`` sets: by default a number for each channel of the point's last value."""
    if not isinstance(one.written, int):
        return [tuple(shape) for shape in one.written]
    last = value(point.nodes[-1])
    if one.written and not isinstance(last.shape[-1], int):
        raise CannotTap(f"{point.name}: how many channels there are, only run time knows")
    return [(last.shape[-1],)] * one.written


def _made(program: Program, one: Tap, given: Sequence[fx.Node]) -> fx.Node:
    """What the function gives, behind the last of what it is given."""
    traced = trace(program, lambda *values: [one.fn(*values)], given)
    (made,) = splice(program, traced, given, max((*given, placeholders(program.gm)[-1])).next)
    return made


def _read(program: Program, one: Tap, point: Point, operands: Sequence[fx.Node], anchor: fx.Node, name: str) -> fx.Node:
    made = _made(program, one, operands)
    given = value(made)
    if not all(isinstance(size, int) for size in given.shape):
        raise CannotTap(f"{point.name}: the tap gives {list(given.shape)}; sum over what changes from call to call")
    spec = StateSpec(name, tuple(given.shape), given.dtype, "model", STARTS[one.how])
    slot = program.tensors.state(anchor, spec)
    graph = program.graph
    with graph.inserting_after(made):
        end = graph.call_function(aten.alias.default, (made,))
    with graph.inserting_before(end):
        if one.how == "sum":
            call(graph, made, aten.add_.Tensor, slot, made)
        else:
            joined = made
            if one.how != "last":
                joined = call(graph, made, {"max": aten.maximum, "min": aten.minimum}[one.how].default, slot, made)
            call(graph, made, aten.copy_.default, slot, joined)
    graph.erase_node(end)
    return slot


def _replace(program: Program, one: Tap, point: Point, operands: Sequence[fx.Node]) -> None:
    old = point.nodes[-1]
    made = _made(program, one, operands)
    new, was = value(made), value(old)
    if str(new.shape) != str(was.shape) or new.dtype != was.dtype:
        raise CannotTap(f"{point.name}: the tap gives {list(new.shape)} {new.dtype} for {list(was.shape)} {was.dtype}")
    inside: set[Any] = set()
    front = [made]
    while front:
        node = front.pop()
        if node not in inside and node > old:
            inside.add(node)
            front += node.all_input_nodes
    old.replace_all_uses_with(made, delete_user_cb=lambda user: user not in inside)
