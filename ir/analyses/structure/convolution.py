"""Every convolution with a constant kernel: one or several dimensions, in groups or not, patches of pixels among them."""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from accelpass.ir.analyses.structure.linear import CASTS, owner_of
from accelpass.ir.core.graph import aten, is_call, shape, through
from accelpass.ir.core.program import Program

_CONVOLUTIONS = (aten.conv1d, aten.conv2d, aten.conv3d)


@dataclass(frozen=True)
class Convolution:
    """A product of each window of the input with a constant kernel ``(out, in / groups, *size)``.

    As a matrix ``(out, in_features)`` the kernel is what a linear over unfolded windows multiplies.

    Attributes:
        node: the convolution; weight: the node of the kernel itself.
        path: of the module: ``down_blocks.0.resnets.0.conv1``.
        in_features: entries of a window: ``in / groups`` times the kernel's size.
    """

    node: fx.Node
    weight: fx.Node
    path: str
    in_features: int
    transposed: bool = False

    def operand(self) -> fx.Node:
        """The input as it is now."""
        operand = self.node.args[0]
        assert isinstance(operand, fx.Node)
        return operand

    def weight_operand(self) -> fx.Node:
        """What is multiplied: the kernel, or what casts made of it."""
        operand = self.node.args[1]
        assert isinstance(operand, fx.Node)
        return operand


def convolutions(program: Program) -> list[Convolution]:
    """All convolutions in graph order; transposed ones are none, whose kernels have the inputs first."""
    found = []
    for node in program.graph.nodes:
        if not is_call(node, *_CONVOLUTIONS) or not isinstance(node.args[1], fx.Node):
            continue
        weight = through(node.args[1], *CASTS)
        if program.tensors.is_constant(weight):
            found.append(Convolution(node, weight, owner_of(program, weight, node), int(shape(weight)[1:].numel())))
    return found
