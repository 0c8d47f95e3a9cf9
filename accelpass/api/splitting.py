"""A model in two halves that run in two places: where it can be split, and the halves as modules (split computing)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx, nn

from accelpass.ir.errors import OptionError

if TYPE_CHECKING:
    from accelpass.backends.export.capture import Captured

_HEADER = 5
"""Bytes that go with codes of 8 bits: the scale and the zero point."""


@dataclass(frozen=True)
class SplitPoint:
    """A place behind which one tensor holds all that the rest of a model needs.

    Attributes:
        at: the module that ends there, or an operation's name: what :func:`split` takes.
        shape: of the tensor, for the example.
        bytes: of the tensor as the model has it.
        bytes_int8: as codes of 8 bits with their range; None if it is no tensor of floats.
        flops: of the products before and after, for the example.
        weights: bytes of weights before and after; one that both read counts twice.
    """

    at: str
    shape: tuple[int, ...]
    bytes: int
    bytes_int8: int | None
    flops: tuple[int, int]
    weights: tuple[int, int]


@dataclass(frozen=True)
class SplitPoints:
    """All places where a model can be split, in the order in which it runs; prints as a table.

    Attributes:
        input_bytes: of the example's tensors, which a split at the very beginning would send.
    """

    points: tuple[SplitPoint, ...]
    input_bytes: int

    def __iter__(self) -> Iterator[SplitPoint]:
        return iter(self.points)

    def __len__(self) -> int:
        return len(self.points)

    def __getitem__(self, at: str | int) -> SplitPoint:
        if isinstance(at, int):
            return self.points[at]
        for point in self.points:
            if point.at == at:
                return point
        raise KeyError(at)

    def __str__(self) -> str:
        rows = [("split behind", "tensor", "kB", "kB at 8 bits", "FLOPs before", "weights before, MB")]
        for p in self.points:
            flops, weights = sum(p.flops) or 1, p.weights[0] / 1e6
            small = "" if p.bytes_int8 is None else f"{p.bytes_int8 / 1e3:.1f}"
            shape = "x".join(map(str, p.shape))
            rows.append((p.at, shape, f"{p.bytes / 1e3:.1f}", small, f"{p.flops[0] / flops:.0%}", f"{weights:.1f}"))
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        return "\n".join([*lines, f"inputs: {self.input_bytes / 1e3:.1f} kB"])


def split_points(model: nn.Module, example: Any, *, dynamic_shapes: Any = None) -> SplitPoints:
    """Where ``model`` can be split so that one tensor goes from the first half to the second.

    Nothing runs: sizes and products are counted in the exported graph.

    Args:
        model: in eval mode.
        example: an example call: keyword arguments, a tuple of positional ones, or one tensor.
        dynamic_shapes: as ``torch.export`` takes it, by argument name.

    Raises:
        ExportError: the model cannot be traced for these arguments.
    """
    from accelpass.ir.analyses.structure.cost import at_compiled_sizes, costs
    from accelpass.ir.core.graph import hint, value
    from accelpass.ir.transform.halves import cuts, of_caller

    captured = _captured(model, example, dynamic_shapes)
    program = captured.program
    dependent, cost = program.analysis(of_caller), program.analysis(costs)
    nodes = [*program.graph.nodes]
    flops = [at_compiled_sizes(program, cost[n].flops) if n in cost and n in dependent else 0 for n in nodes]
    found = []
    for cut in cuts(program):
        at = nodes.index(cut.node)
        shape = tuple(hint(size) for size in value(cut.node).shape)
        count, held = torch.Size(shape).numel(), value(cut.node)
        sides = _weights(program, nodes[: at + 1]), _weights(program, nodes[at + 1 :])
        small = count + _HEADER if held.is_floating_point() else None
        before = sum(flops[: at + 1])
        found.append(
            SplitPoint(cut.path, shape, count * held.element_size(), small, (before, sum(flops) - before), sides)
        )
    return SplitPoints(tuple(found), sum(t.numel() * t.element_size() for t in captured.inputs.values()))


def split(
    model: nn.Module, example: Any, at: str, *, wire_bits: int | None = None, dynamic_shapes: Any = None
) -> tuple[nn.Module, nn.Module]:
    """``model`` as two modules, the first of which gives one tensor that the second takes.

    After Matsubara et al., "BottleFit: Learning Compressed Representations in Deep Neural Networks for Effective and Efficient
    Split Computing" (arXiv 2201.02693): what a device computes, what it sends, and what a server computes. The bottleneck that
    the paper trains is not put in; a model that has one is split behind it.

    The halves are modules like any other, with the model's own weights: ``torch.compile`` them with passes of their own, write each to a file
    with ``accelpass.export_onnx`` or ``accelpass.package``, and run the files in two processes.

    Args:
        model: in eval mode; it is not changed.
        example: an example call: keyword arguments, a tuple of positional ones, or one tensor.
        at: the module behind which it is split, or an operation, as :func:`split_points` names it.
        wire_bits: 8 lets the first half give codes of 8 bits, their scale and their zero point (one range for the tensor), and the
            second take these three; None sends the tensor as it is, and the halves together are the model.
        dynamic_shapes: as ``torch.export`` takes it, by argument name; other dimensions are those of the example.

    Returns:
        ``(head, tail)``: ``tail(head(*inputs))``, with 8 bits ``tail(*head(*inputs))``. The tail gives the model's tensor; of several
        a tuple, in the model's order.

    Raises:
        ExportError: the model cannot be traced for these arguments.
        CannotSplit: more than one tensor goes on behind ``at``, or there is no such place; names some that there are.
        OptionError: ``wire_bits`` is not 8, or the tensor is not one of floats.
    """
    from accelpass.ir.core.graph import placeholders, value
    from accelpass.ir.transform.halves import find_cut, halves

    if wire_bits not in (None, 8):
        raise OptionError(
            f"split: wire_bits={wire_bits!r} is not supported; use 8, or None to send the tensor as it is"
        )
    captured = _captured(model, example, dynamic_shapes)
    cut = find_cut(captured.program, at)
    if wire_bits and not value(cut.node).is_floating_point():
        raise OptionError(
            f"split: wire_bits=8 rounds floats, and behind {at!r} goes a tensor of {value(cut.node).dtype}"
        )
    names = [name.replace(".", "_") for name in captured.inputs]
    for node, name in zip(placeholders(captured.program.gm), names, strict=True):
        node.target = name
    head, tail = halves(captured.program, cut)
    if wire_bits:
        _rounded(head, tail)
    return _module("Head", head), _module("Tail", tail)


def _captured(model: nn.Module, example: Any, dynamic_shapes: Any) -> Captured:
    from accelpass.backends.export.capture import bound, captured
    from accelpass.ir.core.capture import from_export
    from accelpass.ir.transform.halves import prepare

    args, kwargs = ((), dict(example)) if isinstance(example, Mapping) else (example, {})
    found = captured(model, bound(model, (args,) if isinstance(args, Tensor) else args, kwargs), dynamic_shapes)
    assert found.exported is not None
    found.program = from_export(
        found.exported
    )  # attention as the model writes it: the halves are modules of plain torch
    (output,) = found.program.graph.find_nodes(op="output")
    results, _, _ = found.program.results()
    output.args = (results[0] if len(results) == 1 else tuple(results),)
    found.program.graph.set_codegen(fx.graph.CodeGen())
    prepare(found.program)
    return found


def _module(name: str, graph: fx.GraphModule) -> nn.Module:
    """A graph as a plain module, which exporters take for what it is: a GraphModule keeps a forward apart from its class."""
    graph.recompile()
    made: nn.Module = type(name, (nn.Module,), {"forward": type(graph).forward})()
    for path, part in graph.named_children():
        made.add_module(path, part)
    for path, weight in graph.named_parameters(recurse=False):
        made.register_parameter(path, weight)
    for path, tensor in graph.named_buffers(recurse=False):
        made.register_buffer(path, tensor)
    return made.eval()


def _weights(program: Any, nodes: list[fx.Node]) -> int:
    """Bytes of the constants that some nodes read."""
    read = {n for node in nodes for n in node.all_input_nodes if program.tensors.is_constant(n)}
    return int(sum(n.meta["val"].numel() * n.meta["val"].element_size() for n in read))


def _rounded(head: fx.GraphModule, tail: fx.GraphModule) -> None:
    """Let the tensor go from one to the other as codes of 8 bits."""
    from accelpass.ir.core.graph import value
    from accelpass.ir.core.program import Program
    from accelpass.ir.core.tensors import FromModule
    from accelpass.ir.transform.halves import decoded, encoded
    from accelpass.ir.transform.splice import inserted

    (output,) = head.graph.find_nodes(op="output")
    made = inserted(Program(head, FromModule(head), "export"), output, encoded, output.args[0])
    output.args = (tuple(made),)
    (stream,) = tail.graph.find_nodes(op="placeholder")
    given, dtype = [], value(stream).dtype
    for name, node in zip(("codes", "scale", "zero"), made, strict=True):
        with tail.graph.inserting_before(stream):
            given.append(tail.graph.placeholder(name))
        given[-1].meta["val"] = value(node)
    program = Program(tail, FromModule(tail), "export")
    (back,) = inserted(program, stream.next, lambda c, s, z: [decoded(c, s, z, dtype)], *given)
    stream.replace_all_uses_with(back)
    tail.graph.erase_node(stream)
