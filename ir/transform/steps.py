"""What a denoising step computes, block by block, and what it keeps for later steps.

A graph that is run once for each step is cut at its blocks (:func:`prepare`), so that each block can be computed in
another way at another step. What a block keeps is a further output of the graph (:func:`remember`), what it reads of an
earlier step a further input (:func:`recall`); who runs the graph hands one to the other.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx

from accelpass.ir.analyses.axes.flow import VIEWS, bare, between, reached_from
from accelpass.ir.analyses.structure.block import Block, Sublayer, blocks
from accelpass.ir.attention.recognition.detect import Attention
from accelpass.ir.core.graph import argument_name, aten, fake_mode, is_call, mutates, placeholders, root, value
from accelpass.ir.core.program import BLOCK as BLOCK
from accelpass.ir.core.program import NAME as NAME
from accelpass.ir.core.program import Program
from accelpass.ir.errors import AccelpassError
from accelpass.ir.transform.tokens import decoder_blocks

SURVIVORS, PATCHES = "survivors:", "patches:"


class StepError(AccelpassError, ValueError):
    """A call that does not fit the plan of a sampling run: another step, another size, no guidance halves."""


@dataclass(frozen=True, eq=False)
class Module:
    """A self- or joint attention of a block, with what is computed from it alone.

    Attributes:
        path: where it is in the model.
        attention: the record; ``attention.node`` is the semantic node.
        streams: what the branches read: the hidden states, and those of the text where both attend jointly.
        results: the module's outputs, one for each stream, before any gate: after the out-projection, or of the
            attention itself if its output is projected together with something else (Flux's single blocks).
        region: the nodes between streams and results, results included, in graph order.
    """

    path: str
    attention: Attention
    streams: tuple[fx.Node, ...]
    results: tuple[fx.Node, ...]
    region: tuple[fx.Node, ...]


@dataclass(frozen=True, eq=False)
class StepBlock:
    """One block of the stack that the latents pass through.

    Attributes:
        number: counted from the first such block.
        inputs, outputs: its streams, the latents' first.
        modules: its attentions over the latents, in order; cross-attention is not among them.
        region: the nodes between inputs and outputs, outputs included, in graph order.
    """

    number: int
    path: str
    inputs: tuple[fx.Node, ...]
    outputs: tuple[fx.Node, ...]
    modules: tuple[Module, ...]
    region: tuple[fx.Node, ...]


def user_input(program: Program, *names: str) -> fx.Node | None:
    """The tensor that the model's caller passes under one of these names, in the order of preference."""
    by_name = {argument_name(n): n for n in program.tensors.callers()}
    return next((by_name[name] for name in names if name in by_name), None)


LATENTS = ("hidden_states", "sample", "latents", "x")
TIMESTEP = ("timestep", "timesteps", "t", "sigma", "time")


def step_blocks(program: Program) -> list[StepBlock]:
    """The blocks that the latents pass through, in order. Changes nothing."""
    latents = user_input(program, *LATENTS)
    if latents is None:
        return []
    found: list[StepBlock] = []
    reached = reached_from(program, latents)
    for block in program.analysis(blocks):
        if block.inputs[0] in reached:
            inside = _region(program, block.inputs, block.outputs)
            modules = _modules(program, block)
            found.append(StepBlock(len(found), block.path, block.inputs, block.outputs, modules, inside))
    return _with_own_paths(found)


def decoder_stack(program: Program) -> list[StepBlock]:
    """The blocks that one stream of tokens passes through, in order. Changes nothing.

    Raises:
        CannotCut: there are none, or they are no chain.
    """
    found = decoder_blocks(program)
    cut = (
        StepBlock(n, b.path, b.inputs, b.outputs, (), _region(program, b.inputs, b.outputs))
        for n, b in enumerate(found)
    )
    return _with_own_paths(list(cut))


def _with_own_paths(found: list[StepBlock]) -> list[StepBlock]:
    """Blocks of one path (a module that is called twice, blocks that are written in one ``forward``) are told apart."""
    taken: Counter[tuple[str, str]] = Counter()

    def own(path: str, kind: str) -> str:
        path = path or kind
        taken[path, kind] += 1
        number = taken[path, kind]
        return path if number == 1 else f"{path}#{number}"

    return [
        replace(
            block,
            path=own(block.path, "block"),
            modules=tuple(replace(m, path=own(m.path, "attention")) for m in block.modules),
        )
        for block in found
    ]


def _modules(program: Program, block: Block) -> tuple[Module, ...]:
    made: list[Module] = []
    done: set[int] = set()
    for sublayer in block.sublayers:
        for attention in sublayer.attentions:
            if attention.kind == "cross" or attention.node is None or id(attention.node) in done:
                continue
            done.add(id(attention.node))
            mine = [s for s in block.sublayers if any(a.node is attention.node for a in s.attentions)]
            if all(len(s.attentions) == 1 for s in mine):
                results = tuple(_result(program, s, attention) for s in mine)
                streams = tuple(s.input for s in mine)
                made.append(Module(attention.path, attention, streams, results, _region(program, streams, results)))
    return tuple(made)


def _result(program: Program, sublayer: Sublayer, attention: Attention) -> fx.Node:
    """What the attention's module gives, in front of the gate, casts and views."""
    node = sublayer.branch
    for _ in range(8):
        bared = bare(node, *VIEWS)
        if sublayer.gate is not None and is_call(bared, aten.mul) and sublayer.gate in bared.args[:2]:
            gated = bared.args[1] if bared.args[0] is sublayer.gate else bared.args[0]
            assert isinstance(gated, fx.Node)
            node = gated
            break
        if bared is node:
            node = sublayer.branch
            break
        node = bared
    # An MLP beside the attention that shares its out-projection (Flux's single blocks) is no part of the module.
    own = {*between(program, sublayer.input, attention.out), *between(program, attention.out, node)}
    return node if own.issuperset(between(program, sublayer.input, node)) else attention.out


def _region(program: Program, streams: tuple[fx.Node, ...], results: tuple[fx.Node, ...]) -> tuple[fx.Node, ...]:
    inside = {n for start in streams for end in results for n in between(program, start, end)}
    # A value may be written piece by piece (Wan's rotary embedding); the writes have no users.
    for node in reversed(list(program.graph.nodes)):
        if node not in inside and any(root(n) in inside for n in mutates(node)):
            inside |= {node, *(n for start in streams for n in between(program, start, node))}
    return tuple(sorted(inside))


def drop_dead_writes(graph: fx.Graph) -> None:
    """Remove calls that write to tensors which nothing reads any more, and what was computed for them."""
    graph.eliminate_dead_code()
    for start in reversed(list(graph.nodes)):
        if start._erased or start.op != "call_function" or root(start) is not start:
            continue
        own, front = [start], [start]
        while front:
            for user in front.pop().users:
                if user not in own and root(user) is start:
                    own.append(user)
                    front.append(user)
        written = {root(target) for node in own for target in mutates(node)}
        if written and written.issubset(own) and all(user in own for n in own for user in n.users):
            for node in sorted(own, reverse=True):
                graph.erase_node(node)
            graph.eliminate_dead_code()


def prepare(program: Program, stack: Callable[[Program], Sequence[StepBlock]] = step_blocks) -> Sequence[StepBlock]:
    """Put what several blocks share in front of them, and mark where each block ends (``meta[BLOCK]``).

    Shared values (a rotary table, the embedding of the step) must not vanish with the block that first used them.

    Args:
        stack: finds the blocks that the graph is cut at.
    """
    found = stack(program)
    if not found:
        return []
    last = max(found[0].inputs)
    number = _numbers(program, last, [max(b.outputs) for b in found])
    streams = reached_from(program, *found[0].inputs)
    shared: set[fx.Node] = set()
    front = [n for n, at in number.items() if n not in streams and any(number[u] != at for u in n.users)]
    while front:
        node = front.pop()
        if node.op == "call_function" and number[node] >= 0 and node not in shared:
            shared.add(node)
            front += node.all_input_nodes
    inputs = [n for n in program.graph.nodes if n.op == "placeholder"]
    last = max(last, inputs[-1])
    for node in sorted(shared):
        last.append(node)
        last = node
    if shared:
        program.changed()
        found = stack(program)
    for node in program.graph.nodes:
        node.meta[BLOCK] = -1
        if node is last:
            break
    # A block's streams are there whatever the blocks after it read.
    alive = [node for block in found for node in block.outputs if node.users]
    (output,) = program.graph.find_nodes(op="output")
    output.args = ((*output.args[0], *alive),)
    program.kept_alive = len(alive)
    for block in found:
        max(block.outputs).meta[BLOCK] = block.number
    for node in program.graph.nodes:
        node.meta[NAME] = node.name
    return found


def _numbers(program: Program, first: fx.Node, ends: list[fx.Node]) -> dict[fx.Node, int]:
    """By node: how many blocks end before it; -1 up to ``first``."""
    number, now = {}, -1
    for node in program.graph.nodes:
        number[node] = now
        if node is first:
            now = 0
        elif 0 <= now < len(ends) and node is ends[now]:
            now += 1
    return number


def recall(program: Program, name: str, like: fx.Node) -> fx.Node:
    """An input that holds what an earlier step remembered under ``name``, of the shape of ``like``."""
    return program.tensors.recall(name, value(like))


def recall_new(program: Program, name: str, shape: Sequence[Any], dtype: torch.dtype) -> fx.Node:
    """An input that whoever runs the graph has a tensor for at each call."""
    mode = fake_mode(program.gm)
    assert mode is not None
    devices = (held.device for n in placeholders(program.gm) if isinstance(held := value(n), Tensor))
    with mode:
        return program.tensors.recall(name, torch.empty(tuple(shape), dtype=dtype, device=next(devices)))


def survived(program: Program, path: str, rows: fx.Node, tokens: Any) -> None:
    """Tell which of ``tokens`` tokens of a prompt went on from a module: ``rows``, ascending, ``(batch, kept)``.

    An exported graph has nobody to tell.
    """
    if program.frontend == "export":
        return
    if program.survivors is None:
        program.survivors = {}
    program.survivors[path] = tokens
    remember(program, f"{SURVIVORS}{path}", rows)


def patches_went(program: Program, path: str, place: fx.Node) -> None:
    """Tell into which row of its tower's stream each patch went behind a module: ``(images, patches)``, -1 where it has left.

    Patches of one row were merged. An exported graph, and one that is cut into stages, have nobody to tell.
    """
    if program.frontend == "export" or program.actions:
        return
    if program.survivors is None:
        program.survivors = {}
    remember(program, f"{PATCHES}{path}", place)


def remember(program: Program, name: str, node: fx.Node) -> None:
    """Hand ``node`` to later steps under ``name``: one more output of the graph."""
    (output,) = program.graph.find_nodes(op="output")
    results = output.args[0]
    assert isinstance(results, tuple | list) and isinstance(value(node), Tensor)
    if name in program.remembered:
        raise AccelpassError(f"two passes remember {name!r}")
    output.args = ((*results, node),)
    program.remembered.append(name)
