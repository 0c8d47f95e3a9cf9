"""A decoder as stretches of blocks, each of which can run on any rows of its stream: tokens leave between two of them."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from accelpass.ir.analyses.axes.axes import Axes, axes
from accelpass.ir.analyses.axes.flow import reached_from
from accelpass.ir.analyses.structure.block import Block, blocks
from accelpass.ir.attention.spec.op import is_attention
from accelpass.ir.core.graph import aten, call, draws, known, mutates, value
from accelpass.ir.core.program import BLOCK, NAME, Program
from accelpass.ir.errors import AccelpassError
from accelpass.ir.kv.ops import KV_READ
from accelpass.ir.transform.resize import CannotResize
from accelpass.ir.transform.sequence.again import on_rows, replaced


class CannotCut(AccelpassError):
    """Says why no token can leave the stream of this graph."""


@dataclass(eq=False)
class Stretch:
    """Blocks that run on the same tokens.

    Attributes:
        number: counted from 0; all tokens of the call run through stretch 0 and what precedes it.
        blocks: their module paths.
        start, end: the stream in front of it and after it, ``(batch, tokens, channels)``.
        region: its calls, in order; attentions: the semantic ones.
        rows: values from outside that have a row for each token, and in which dimensions: rotary tables, masks.
    """

    number: int
    blocks: tuple[str, ...]
    start: fx.Node
    end: fx.Node
    region: list[fx.Node]
    attentions: list[fx.Node]
    rows: dict[fx.Node, tuple[int, ...]]

    def tables(self) -> dict[fx.Node, int]:
        """Those of :attr:`rows` that are computed for each token by itself, so that their rows may be kept, and where tokens are."""
        return {n: d[0] for n, d in self.rows.items() if len(d) == 1 and not any(map(is_attention, n.users))}


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


def stretches(program: Program, ends: Sequence[int]) -> list[Stretch]:
    """The stretches that end after the blocks ``ends`` (ascending, without the last) and after the last. Changes nothing.

    Raises:
        CannotCut: a stretch reads something that cannot be had for fewer tokens; says what.
    """
    found = decoder_blocks(program)
    streams = [found[0].input, *(found[e].output for e in ends), found[-1].output]
    limits = [0, *(e + 1 for e in ends), len(found)]
    return stretches_between(program, streams, [found[a:b] for a, b in itertools.pairwise(limits)])


def stretches_between(program: Program, streams: Sequence[fx.Node], blocks: Sequence[Sequence[Block]]) -> list[Stretch]:
    """The stretches between points of one stream of ``(batch, tokens, channels)``, the first and last included. Changes nothing.

    Args:
        blocks: of each stretch, for those who read its name.

    Raises:
        CannotCut: a stretch reads something that cannot be had for fewer tokens; says what.
    """
    known_axes: Axes = program.analysis(axes)
    if not known_axes.of(streams[0])[1].leaves:
        raise CannotCut("the axis analysis cannot follow the dimension of tokens")
    reached = reached_from(program, streams[0])
    order = {node: at for at, node in enumerate(program.graph.nodes)}
    made = []
    for number, ((start, end), inside) in enumerate(zip(itertools.pairwise(streams), blocks, strict=True)):
        region = [n for n in sorted(reached, key=order.__getitem__) if order[start] < order[n] <= order[end]]
        rows = _Rows(program, known_axes, streams[0], reached).of(region) if number else {}
        attentions = [n for n in region if is_attention(n)]
        made.append(Stretch(number, tuple(b.path for b in inside), start, end, region, attentions, rows))
    token = known_axes.of(streams[0])[1].leaves
    by_token = {n for n in reached if not _is_of_no_token(n, known_axes, token)}
    _check_reads(program, made, [n for n in reached if order[n] > order[streams[-1]]], by_token)
    return made


def ready(program: Program, ends: Sequence[int]) -> list[Stretch]:
    """As :func:`stretches`, with what does not depend on the stream in front of it.

    Where the graph reads a filled cache, each query of a later stretch sees what the last one does.
    """
    found = stretches(program, ends)
    _hoist(program, found[0].start)
    if any(True for _ in program.graph.find_nodes(op="call_function", target=KV_READ)):
        for stretch in found[1:]:
            for node in stretch.attentions:
                _see_as_the_last(program, node)
        program.changed()
    return stretches(program, ends)


def on_fewer(stretch: Stretch, rows: Mapping[fx.Node, fx.Node], count: Any, known_axes: Axes) -> dict[fx.Node, Any]:
    """Copies of a stretch for ``count`` tokens, by original, at the graph's insertion point.

    Args:
        rows: what is read in the place of its stream and of its :attr:`Stretch.rows`; count: a number, or a node that holds it.
        known_axes: of the graph as it was captured.

    Raises:
        CannotCut: an operation means something else for other rows; nothing reads the copies yet.
    """
    try:
        return on_rows(known_axes, stretch.region, rows, known_axes.of(stretch.start)[1], count)
    except CannotResize as cause:
        raise CannotCut(str(cause)) from cause


def take_over(program: Program, stretch: Stretch, made: Mapping[fx.Node, Any], label: str = "") -> None:
    """Let a stretch be its copies; ``label`` tells their values from those of the same stretch on other rows."""
    for old in stretch.region:
        new = made.get(old)
        if isinstance(new, fx.Node):
            new.meta |= {BLOCK: old.meta.pop(BLOCK)} if BLOCK in old.meta else {}
            new.meta |= {NAME: f"{old.meta[NAME]} on {label}"} if NAME in old.meta else {}
    stretch.attentions = [made[n] for n in stretch.attentions]
    stretch.end, region = made[stretch.end], stretch.region
    stretch.region = [new for n in region if isinstance(new := made.get(n), fx.Node)]
    replaced(program, region, made)


def ends_with(program: Program, tail: fx.Node, whole: fx.Node) -> None:
    """Let what follows the last stretch, the model's end, read ``whole`` in the place of the stream ``tail``."""
    own = program.results()[0]
    for user in list(tail.users):
        if user.op != "output" and user > whole:
            user.replace_input_with(tail, whole)
    (output,) = program.graph.find_nodes(op="output")
    rest = output.args[0][len(own) :]
    output.args = ((*(whole if n is tail else n for n in own), *rest),)
    program.changed()


def _hoist(program: Program, stream: fx.Node) -> None:
    """Put what does not depend on the stream in front of it, equal values once."""
    reached = reached_from(program, stream)
    inputs = [n for n in program.graph.nodes if n.op == "placeholder"]
    last = max(inputs[-1], stream)
    same: dict[Any, fx.Node] = {}
    for node in list(program.graph.nodes):
        if node.op not in ("call_function", "get_attr") or node in reached:
            continue
        pure = not mutates(node) and not draws(node)
        key = (node.target, str(node.args), str(node.kwargs))
        if pure and key in same:
            node.replace_all_uses_with(same[key])
            program.graph.erase_node(node)
            continue
        same[key] = node
        if node > stream:
            last.append(node)
            last = node
            if BLOCK in stream.meta:
                node.meta[BLOCK] = -1
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
                last = call(program.graph, extra, aten.slice.Tensor, extra, held.dim() - 2, -1, sys.maxsize)
            with program.graph.inserting_after(last):
                # Its strides say how many tokens the call has, which a stage of other rows could not name.
                extras[at] = call(program.graph, extra, aten.clone.default, last, memory_format=torch.contiguous_format)
    node.args = (*node.args[:3], extras, *node.args[4:])


def _is_of_no_token(node: fx.Node, known_axes: Axes, token: Any) -> bool:
    """Whether a value is one for the whole call, of which each dimension is known not to be that of tokens: a score of heads."""
    held, dims = value(node), known_axes.of(node)
    return isinstance(held, Tensor) and len(dims) == held.dim() and all(d.leaves and d.leaves != token for d in dims)


def _check_reads(
    program: Program, found: Sequence[Stretch], tail: Sequence[fx.Node], by_token: Collection[fx.Node]
) -> None:
    """Of what is computed for each token, nothing but the stream goes from one stretch to a later one, or to the model's end."""
    made = {n: at for at, stretch in enumerate(found) for n in stretch.region}
    readers = [(node, stretch.number, stretch.start) for stretch in found for node in stretch.region]
    readers += [(node, len(found), found[-1].end) for node in tail if node.op == "call_function"]
    for node, number, start in readers:
        for read in node.all_input_nodes:
            if read is not start and read in by_token and made.get(read, number) < number:
                raise CannotCut(f"{node.name} reads {read.name}, which is computed before tokens leave")
    for node in program.results()[0]:
        if isinstance(node, fx.Node) and node in made and node is not found[-1].end:
            raise CannotCut(f"the graph returns {node.name}, which has a row for each token between two blocks")


@dataclass
class _Rows:
    """Finds the values from outside that have rows of tokens, and in which dimensions."""

    program: Program
    axes: Axes
    stream: fx.Node
    reached: set[fx.Node]

    def of(self, region: Sequence[fx.Node]) -> dict[fx.Node, tuple[int, ...]]:
        rows: dict[fx.Node, tuple[int, ...]] = {}
        for node in region:
            for outer in node.all_input_nodes:
                if outer in self.reached or not isinstance(value(outer), Tensor):
                    continue
                dims = self._dims(outer, node)
                if dims:
                    rows[outer] = tuple(sorted({*rows.get(outer, ()), *dims}))
        for outer, dims in rows.items():
            if 0 in dims or value(outer).dim() < 2:
                raise CannotCut(f"{outer.name} has tokens in the place of the batch")
        return rows

    def _dims(self, outer: fx.Node, user: fx.Node) -> tuple[int, ...]:
        token = self.axes.of(self.stream)[1]
        mine = tuple(i for i, d in enumerate(self.axes.of(outer)) if d.leaves == token.leaves)
        if mine or is_attention(user) or self.program.tensors.is_constant(outer) or self._is_constant(outer):
            return mine
        # One token: its dimension has size 1 and may have no axis; it stands below that of what it is combined with.
        shape, dims = value(outer).shape, self.axes.of(user)
        at = next((i for i, d in enumerate(dims) if d.leaves == token.leaves), None)
        if at is None or not known(token.size == 1):
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
