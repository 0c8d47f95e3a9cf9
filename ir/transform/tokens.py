"""A decoder cut where tokens leave it: the stretches of blocks between, each of which can run on any rows of its stream.

Every value of the graph that a stretch reads and that has rows of tokens (the stream, rotary tables, masks) becomes an
input of its own, so that whoever runs the graph can hand in the rows that are left (:func:`cut`).
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from accelpass.ir.analyses.axes.axes import Axes, axes
from accelpass.ir.analyses.axes.flow import reached_from
from accelpass.ir.analyses.structure.block import Block, blocks
from accelpass.ir.attention.spec.op import is_attention
from accelpass.ir.core.graph import aten, call, fake_mode, is_call, known, mutates, value
from accelpass.ir.core.program import Program
from accelpass.ir.core.tensors import FromInputs
from accelpass.ir.errors import AccelpassError
from accelpass.ir.kv.ops import KV_APPEND, KV_READ
from accelpass.ir.transform.resize import CannotResize, Resizer


class CannotCut(AccelpassError):
    """Says why no token can leave the stream of this graph."""


@dataclass(frozen=True)
class Taken:
    """An input that holds some rows of a value.

    Attributes:
        source: the value's number among the graph's pinned values.
        dims: its dimensions of tokens.
        is_table: it is computed for each token by itself (a rotary table), so its rows may be kept for later calls.
    """

    source: int
    dims: tuple[int, ...]
    is_table: bool


@dataclass(eq=False)
class Stretch:
    """Blocks that run on the same tokens.

    Attributes:
        number: counted from 0; all tokens of the call run through stretch 0 and what precedes it.
        blocks: their module paths.
        attentions: the semantic attentions, in order; after :func:`cut` those that were made for other rows.
        end: the stream after it.
        taken: inputs by name that :func:`cut` made.
    """

    number: int
    blocks: tuple[str, ...]
    attentions: list[fx.Node]
    end: fx.Node
    taken: dict[str, Taken] = field(default_factory=dict)


@dataclass(eq=False)
class Cut:
    """A graph cut for pruning.

    Attributes:
        batch: sequences.
        tokens: rows of the stream in the graph as it was captured; may be symbolic.
        width: channels of the stream; ``dtype`` its dtype.
        pins: how many of the graph's pinned values are ends of stretches; values that others take rows of follow.
    """

    stretches: list[Stretch]
    batch: Any
    tokens: Any
    width: int
    dtype: torch.dtype
    pins: int


def stream_name(number: int) -> str:
    """The input that stands for the stream in front of a stretch; of the number after the last, for the model's end."""
    return f"stream:{number}"


def decoder_blocks(program: Program) -> list[Block]:
    """The blocks that one stream of ``(batch, tokens, channels)`` passes through, in order.

    Raises:
        CannotCut: there are none, or they are no chain.
    """
    found: list[Block] = program.analysis(blocks)
    if not found:
        raise CannotCut("no blocks were recognised")
    for block in found:
        if len(block.inputs) != 1 or value(block.input).dim() != 3:
            raise CannotCut(f"{block.path}: its stream is not one of (batch, tokens, channels)")
    for before, after in itertools.pairwise(found):
        if before.output is not after.input:
            raise CannotCut(f"{after.path} does not read what {before.path} gives")
    return found


def cut(program: Program, ends: Sequence[int], sizes: Sequence[int] | None = None) -> Cut:
    """Cut the graph after the blocks ``ends``; to be done before any pass runs.

    Args:
        ends: numbers of blocks after which tokens leave; ascending, not the last block.
        sizes: rows of each stretch after the first, for a graph of static sizes; None to leave them as they are.

    Raises:
        CannotCut: a stretch reads something that cannot be had for fewer tokens; says what.
    """
    found = decoder_blocks(program)
    streams = [found[0].input, *(found[e].output for e in ends), found[-1].output]
    _hoist(program, streams[0])
    continues = any(True for _ in program.graph.find_nodes(op="call_function", target=KV_READ))
    if continues:
        for node in [n for n in program.graph.nodes if is_attention(n) and n > streams[1]]:
            _see_as_the_last(program, node)
        program.changed()
    known_axes: Axes = program.analysis(axes)
    tokens = known_axes.of(streams[0])[1]
    if not tokens.leaves:
        raise CannotCut("the axis analysis cannot follow the dimension of tokens")
    reached = reached_from(program, streams[0])
    limits = [0, *(e + 1 for e in ends), len(found)]
    stretches, regions = [], []
    order = {node: at for at, node in enumerate(program.graph.nodes)}
    for number, (start, end) in enumerate(itertools.pairwise(streams)):
        inside = found[limits[number] : limits[number + 1]]
        region = [n for n in sorted(reached, key=order.__getitem__) if order[start] < order[n] <= order[end]]
        attentions = [n for n in region if is_attention(n)]
        stretches.append(Stretch(number, tuple(b.path for b in inside), attentions, end))
        regions.append(region)
    tail = [n for n in reached if order[n] > order[streams[-1]] and n.op == "call_function"]
    _check_reads(reached, streams, regions, tail)
    like = value(streams[0])
    made = Cut(stretches, like.shape[0], tokens.size, int(like.shape[2]), like.dtype, len(stretches))
    cutter = _Cutter(program, known_axes, tokens.leaves, reached, made)
    cutter.end(streams[-1], tail)
    for stretch in reversed(stretches[1:]):  # a later one no longer reads what an earlier one is about to lose
        at = stretch.number
        cutter.isolate(stretch, streams[at], regions[at], None if sizes is None else sizes[at - 1])
    if continues:
        for stretch in stretches:
            for name, what in stretch.taken.items():
                if not what.is_table:
                    raise CannotCut(f"{name} mixes tokens, so its rows cannot be kept for later calls")
    cutter.pin()
    program.changed()
    program.graph.eliminate_dead_code()
    return made


def _hoist(program: Program, stream: fx.Node) -> None:
    """Put what does not depend on the stream in front of it, equal values once."""
    reached = reached_from(program, stream)
    inputs = [n for n in program.graph.nodes if n.op == "placeholder"]
    last = max(inputs[-1], *(n for n in program.graph.nodes if n.op == "get_attr"), stream)
    same: dict[Any, fx.Node] = {}
    for node in list(program.graph.nodes):
        if node.op != "call_function" or node in reached:
            continue
        pure = not mutates(node) and torch.Tag.nondeterministic_seeded not in getattr(node.target, "tags", ())
        key = (node.target, str(node.args), str(node.kwargs))
        if pure and key in same:
            node.replace_all_uses_with(same[key])
            program.graph.erase_node(node)
            continue
        same[key] = node
        if node > stream:
            last.append(node)
            last = node
    program.changed()


def _see_as_the_last(program: Program, node: fx.Node) -> None:
    """Let each query see what the last one does; the layer's storage cuts that to what precedes it.

    A token that is taken up again has no row in the masks of this call.
    """
    extras, tokens = list(node.args[3]), value(node.args[0]).shape[2]
    if isinstance(tokens, int) and tokens == 1:
        return
    for at, extra in enumerate(extras):
        held = value(extra)
        if held.dim() > 1 and known(held.shape[-2] == tokens):
            with program.graph.inserting_after(extra):
                extras[at] = call(program.graph, extra, aten.slice.Tensor, extra, held.dim() - 2, -1, sys.maxsize)
    node.args = (*node.args[:3], extras, *node.args[4:])


def _check_reads(
    reached: set[fx.Node], streams: Sequence[fx.Node], regions: Sequence[Sequence[fx.Node]], tail: Sequence[fx.Node]
) -> None:
    """Nothing but the stream goes from one stretch to a later one, or to the model's end."""
    for at, region in enumerate([*regions[1:], tail], 1):
        inside = {*region, streams[at]}
        for node in region:
            for read in node.all_input_nodes:
                if read in reached and read not in inside:
                    raise CannotCut(f"{node.name} reads {read.name}, which is computed before tokens leave")


@dataclass
class _Cutter:
    program: Program
    axes: Axes
    leaves: tuple[Any, ...]
    reached: set[fx.Node]
    made: Cut
    sources: list[fx.Node] = field(default_factory=list)

    def isolate(self, stretch: Stretch, start: fx.Node, region: list[fx.Node], size: int | None) -> None:
        """Let the stretch read inputs of its own, of ``size`` rows."""
        resize = size is not None and not known(size == self.made.tokens)
        rows = self._rows(region)
        taken: dict[fx.Node, fx.Node] = {}

        def input_for(outer: fx.Node, size: Any) -> fx.Node:
            if outer not in taken:
                dims = (1,) if outer is start else rows[outer]
                taken[outer] = self._input(stretch, outer, start, dims, size)
            return taken[outer]

        if not resize:
            for node in region:
                for outer in node.all_input_nodes:
                    if outer is start or outer in rows:
                        node.replace_input_with(outer, input_for(outer, None))
            return
        graph = self.program.graph
        resizer = Resizer(graph, self.axes, self.axes.of(start)[1], int(size or 0), lambda n, _: n)
        for outer in (start, *rows):
            resizer.put(outer, input_for(outer, size))
        try:
            with graph.inserting_before(region[0]):
                (end,) = resizer.copy(region, [stretch.end])
        except CannotResize as cause:
            raise CannotCut(str(cause)) from cause
        stretch.attentions = [resizer.copied(n) for n in stretch.attentions]
        stretch.end = end
        for node in reversed(region):
            if not node.users or is_call(node, KV_APPEND):
                graph.erase_node(node)

    def end(self, stream: fx.Node, tail: Sequence[fx.Node]) -> None:
        """What follows the last stretch reads the stream of all tokens."""
        users = [u for u in stream.users if u.op == "output" or u in set(tail)]
        if users:
            whole = self._recall(stream_name(len(self.made.stretches)), value(stream))
            for user in users:
                user.replace_input_with(stream, whole)

    def pin(self) -> None:
        """Keep ends and sources alive and known, whatever passes do."""
        pins = [*(s.end for s in self.made.stretches), *self.sources]
        (output,) = self.program.graph.find_nodes(op="output")
        output.args = ((*output.args[0], *pins),)
        self.program.pins = len(pins)

    def _rows(self, region: Sequence[fx.Node]) -> dict[fx.Node, tuple[int, ...]]:
        """Values from outside that have rows of tokens, and in which dimensions."""
        rows: dict[fx.Node, tuple[int, ...]] = {}
        for node in region:
            for outer in node.all_input_nodes:
                if outer in self.reached or not isinstance(value(outer), Tensor):
                    continue
                dims = self._row_dims(outer, node)
                if dims:
                    rows[outer] = tuple(sorted({*rows.get(outer, ()), *dims}))
        return rows

    def _row_dims(self, outer: fx.Node, user: fx.Node) -> tuple[int, ...]:
        mine = tuple(i for i, d in enumerate(self.axes.of(outer)) if d.leaves == self.leaves)
        if mine or is_attention(user) or self.program.tensors.is_constant(outer) or self._is_constant(outer):
            return mine
        # One token: its dimension has size 1 and may have no axis; it stands below that of what it is combined with.
        shape, dims = value(outer).shape, self.axes.of(user)
        at = next((i for i, d in enumerate(dims) if d.leaves == self.leaves), None)
        if at is None or not isinstance(self.made.tokens, int) or self.made.tokens != 1:
            return ()
        place = at - (len(dims) - len(shape))
        return (place,) if place >= 0 and shape[place] == 1 else ()

    def _is_constant(self, node: fx.Node) -> bool:
        """It is computed from the model's own tensors alone."""
        front, seen = [node], set()
        while front:
            one = front.pop()
            if one in seen:
                continue
            seen.add(one)
            if one.op == "placeholder" and not self.program.tensors.is_constant(one):
                return False
            front += one.all_input_nodes
        return True

    def _input(self, stretch: Stretch, outer: fx.Node, start: fx.Node, dims: tuple[int, ...], size: Any) -> fx.Node:
        if outer is start:
            name = stream_name(stretch.number)
        else:
            if outer not in self.sources:
                self.sources.append(outer)
            if 0 in dims or value(outer).dim() < 2:
                raise CannotCut(f"{outer.name} has tokens in the place of the batch")
            source = self.made.pins + self.sources.index(outer)
            name = f"rows:{stretch.number}:{source}"
            table = len(dims) == 1 and not any(is_attention(u) for u in outer.users)
            stretch.taken[name] = Taken(source, dims, table)
        return self._recall(name, value(outer), dims, size)

    def _recall(self, name: str, like: Tensor, dims: tuple[int, ...] = (), size: Any = None) -> fx.Node:
        mode, tensors = fake_mode(self.program.gm), self.program.tensors
        assert mode is not None and isinstance(tensors, FromInputs)
        shape = [size if i in dims and size is not None else s for i, s in enumerate(like.shape)]
        if dims:  # each sequence has rows of its own
            shape[0] = self.made.batch
        with mode:
            return tensors.recall(name, torch.empty(shape, dtype=like.dtype, device=like.device))
