"""Runs calibration data through a model block by block: what one block gives is held for all data, and is what the next one reads.

Of the model's weights and of what is learnt from them, no more than one block's need be held, however deep the model; a block may be
run again with other weights, which later blocks then see the effect of.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from accelpass.ir import attention
from accelpass.ir.analyses.structure.block import blocks
from accelpass.ir.analyses.structure.convolution import convolutions
from accelpass.ir.analyses.structure.linear import linears
from accelpass.ir.core.graph import placeholders
from accelpass.ir.core.program import Program
from accelpass.ir.core.tensors import FromInputs
from accelpass.passes.core.base import Watch


class _Reached(Exception):
    """The first block is reached; the rest of the graph is run later."""


class _Cut:
    """A graph as stretches of nodes, each of which ends where a block does.

    Attributes:
        stretches: what comes before the first block is part of the first one; what comes after the last is run if ``rest`` asks for it.
        inputs: by stretch, the inputs of its linears and convolutions by the path of their weight.
        weights: the nodes of the model's tensors by path.
    """

    def __init__(self, program: Program, rest: bool = False) -> None:
        self.program = program
        ends = [b.outputs for b in program.analysis(blocks)]
        self.inputs: list[dict[str, fx.Node]] = []
        sites = [*program.analysis(convolutions), *program.analysis(linears)]
        attention.lower(program)
        order = {node: at for at, node in enumerate(program.graph.nodes)}
        nodes = list(order)
        bounds = sorted({max(order[n] for n in outputs) + 1 for outputs in ends if all(n in order for n in outputs)})
        bounds += [len(nodes)] if rest else []
        self.stretches = [
            [n for n in nodes[start:end] if n.op not in ("placeholder", "output")]
            for start, end in itertools.pairwise([0, *(bounds or [len(nodes)])])  # no blocks: all of it is one
        ]
        self.weights = {p: n for n in placeholders(program.gm) if (p := program.tensors.path(n)) is not None}
        for stretch in self.stretches:
            inside = set(stretch)
            here = ((program.tensors.path(s.weight), s) for s in sites if s.node in inside)
            self.inputs.append({path: site.operand() for path, site in here if path is not None})
        last = {read: at for at, stretch in enumerate(self.stretches) for n in stretch for read in n.all_input_nodes}
        self.dead = [[n for n, at in last.items() if at == number] for number in range(len(self.stretches))]
        assert isinstance(program.tensors, FromInputs)
        self.binder = program.tensors.binder()
        program.gm.recompile()


@dataclass(eq=False)
class _Held:
    """One batch: its graph, the values that later stretches read, and the model's arguments."""

    cut: _Cut
    values: dict[fx.Node, Any]
    call: Mapping[str, Any] = field(default_factory=dict)

    def run(self, number: int, weights: Mapping[str, Tensor], watched: Mapping[str, Watch]) -> dict[fx.Node, Any]:
        """The values after a stretch."""
        runner = fx.Interpreter(self.cut.program.gm, garbage_collect_values=False)
        runner.env = dict(self.values)
        for path, weight in weights.items():
            node = self.cut.weights[path]
            runner.env[node] = weight.to(runner.env[node].dtype)
        watches = [(node, watched[path]) for path, node in self.cut.inputs[number].items() if path in watched]
        for node, watch in watches:
            if node in runner.env:  # the stream that the block before gave
                watch(runner.env[node].detach())
        for node in self.cut.stretches[number]:
            runner.env[node] = runner.run_node(node)
            for seen, watch in watches:
                if seen is node:
                    watch(runner.env[node].detach())
        return runner.env

    def go_on(self, number: int, weights: Mapping[str, Tensor]) -> None:
        made = self.run(number, weights, {})
        for node in self.cut.dead[number]:
            made.pop(node, None)
        self.values = made


@dataclass(eq=False)
class BlockRun:
    """One block, with what all data give it."""

    number: int
    held: Sequence[_Held]
    track: Callable[[Sequence[_Held]], Iterable[_Held]]
    replaced: dict[str, Tensor] = field(default_factory=dict)

    @property
    def weights(self) -> frozenset[str]:
        """Paths of the weights of its linears."""
        return frozenset(self.held[0].cut.inputs[self.number])

    def inputs(
        self, watched: Mapping[str, Watch], begin: Callable[[Mapping[str, Any]], None] = lambda call: None
    ) -> None:
        """Run the block on all data; functions by path of a weight are called with the input of its linear.

        ``begin`` is told the model's arguments of each call before it is run.
        """
        with torch.no_grad():
            for one in self.track(self.held):
                begin(one.call)
                one.run(self.number, self.replaced, watched)

    def put(self, weights: Mapping[str, Tensor]) -> None:
        """Let later blocks read what this one gives with these weights, by path, in the form in which the model stores them."""
        self.replaced |= weights

    def go_on(self) -> None:
        with torch.no_grad():
            for one in self.held:
                one.go_on(self.number, self.replaced)


def walk(
    model: nn.Module,
    batches: Sequence[Mapping[str, Any]],
    track: Callable[[Sequence[_Held]], Iterable[_Held]] = iter,
    rest: bool = False,
) -> Iterator[BlockRun]:
    """The blocks of a model in order.

    Args:
        batches: arguments of the model.
        track: shows progress over batches.
        rest: what comes after the last block is one more.
    """
    held: list[_Held] = []

    def backend(gm: fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        program = attention.captured(gm, inputs)
        with torch.no_grad():
            cut = _Cut(program, rest)

        def begin(*given: Any) -> Any:
            held.append(_Held(cut, dict(zip(placeholders(cut.program.gm), cut.binder(given), strict=True))))
            raise _Reached

        return begin

    fast = torch.compile(model, backend=backend)
    with torch.no_grad():
        for batch in batches:
            try:
                fast(**batch)
            except _Reached:
                held[-1].call = batch
    for number in range(min(len(one.cut.stretches) for one in held)):
        block = BlockRun(number, held, track)
        yield block
        block.go_on()
