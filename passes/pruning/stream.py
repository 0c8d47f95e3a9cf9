"""The residual stream as something to prune: whole sublayers that add nothing to it, and its width."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, fx

from accelpass.ir.analyses.axes.axes import Axis, axes
from accelpass.ir.analyses.axes.flow import VIEWS, bare, constant
from accelpass.ir.analyses.structure.block import Sublayer, blocks
from accelpass.ir.analyses.structure.linear import Linear, linears
from accelpass.ir.core.derived import Recipe
from accelpass.ir.core.graph import shape, value
from accelpass.ir.core.program import Program
from accelpass.ir.core.tensors import digest, placed
from accelpass.ir.transform.kept import Static
from accelpass.ir.transform.shrink import Shrunk, shrink
from accelpass.ir.transform.tap import point_name
from accelpass.passes.core.site_pass import Edits

FORMAT = 1


@dataclass(frozen=True)
class Layer:
    """An attention or an MLP as a whole: what it adds to the stream.

    Attributes:
        of: the path of the attention or MLP.
        writer: the linear that gives what is added.
        at: which operand of the addition is the stream.
        why: what stands in the way of leaving it out, or of weighing it; empty if nothing does.
    """

    of: str
    sublayer: Sublayer
    writer: Linear | None
    at: int
    why: str
    aspect: ClassVar[str] = "layer"

    @property
    def path(self) -> str:
        return point_name(self.of, "out")

    @property
    def node(self) -> fx.Node:
        """What is added."""
        assert self.writer is not None
        return self.writer.node

    @property
    def linears(self) -> float:
        """How many weights as large as the writer's its linears have; keys and values may be smaller."""
        if self.sublayer.mlps:
            return 2 + (self.sublayer.mlps[0].gate is not None)
        return 2 + 2 / self.sublayer.attentions[0].spec.groups

    def leave_out(self) -> None:
        """Let the stream go on as it was; what computed the rest has no reader any more."""
        # If the sublayer before it was left out, the stream that it is added to is another by now than the analysis found.
        stream = self.sublayer.node.args[self.at]
        assert isinstance(stream, fx.Node)
        self.sublayer.node.replace_all_uses_with(stream)


@dataclass(frozen=True)
class Width:
    """The channels of the stream that all blocks read and write.

    Attributes:
        path: of the point in front of the first block.
        start: the stream there.
        layers: all that is added to it, in order.
        why: as of :class:`Layer`.
    """

    path: str
    start: fx.Node
    layers: tuple[Layer, ...]
    why: str
    aspect: ClassVar[str] = "stream.channels"

    @property
    def node(self) -> fx.Node:
        return self.start

    def dimension(self, program: Program) -> Sequence[Axis]:
        return program.analysis(axes).of(self.start)[-1].leaves

    def narrow(self, program: Program, rows: Sequence[int]) -> list[Shrunk]:
        """Keep these channels everywhere. What norms average over is then the channels that are left.

        Raises:
            CannotShrink: something that has them cannot do with fewer; the graph is as it was.
        """
        program.graph.eliminate_dead_code()  # sublayers that were left out
        program.changed()
        (axis,) = self.dimension(program)
        return shrink(program, axis, Static.rows(rows))


def layers(program: Program) -> list[Layer]:
    """The attentions and MLPs that stand alone in their branch."""
    return [
        made for b in program.analysis(blocks) for s in b.sublayers if (made := _layer(program, s, b.path)) is not None
    ]


def _layer(program: Program, one: Sublayer, block: str) -> Layer | None:
    of = {site.node: site for site in program.analysis(linears)}
    if one.kind == "attention" and len(one.attentions) == 1:
        path, last = one.attentions[0].path, one.attentions[0].o_proj
    elif one.kind == "mlp" and len(one.mlps) == 1:
        path, last = one.mlps[0].path, one.mlps[0].down.node
    else:
        return None
    writer = None if last is None else of.get(last)
    why = ""
    if writer is None:
        why = f"the last linear of {path} was not recognised"
    elif one.norm in ("branch", "sandwich") or bare(one.branch, *VIEWS) is not writer.node:
        why = f"what {path} gives is changed before it is added (a norm, a gate)"
    elif value(one.input).dtype != value(one.node).dtype:
        why = f"{path} changes the dtype of the stream"
    at = next((i for i, operand in enumerate(one.node.args) if operand is one.input), -1)
    if at < 0:
        why = f"the stream is changed before what {path} gives is added to it"
    return Layer(path, one, writer, at, why)


def widths(program: Program) -> list[Width]:
    """The stream of each stack of blocks."""
    found = program.analysis(blocks)
    stacks: list[list[Sublayer]] = []
    paths: list[list[str]] = []
    for block in found:
        if not stacks or stacks[-1][-1].output is not block.input:
            stacks.append([])
            paths.append([])
        stacks[-1] += block.sublayers
        paths[-1].append(block.path)
    made = []
    for stack, names in zip(stacks, paths, strict=True):
        parts = [_layer(program, s, names[0]) for s in stack]
        known = tuple(p for p in parts if p is not None)
        whys = [p.why for p in known if p.why]
        if len(stacks) > 1:
            whys = [f"the model has {len(stacks)} streams"]
        elif len(known) < len(parts):
            whys = [f"{names[0]} adds something else than an attention or an MLP to the stream"]
        elif any(s.norm == "post" for s in stack):
            whys = ["blocks normalise the stream itself, which gives it another scale"]
        elif any(a.output is not b.input for a, b in itertools.pairwise(stack)):
            whys = ["something is done to the stream between its blocks"]
        made.append(Width(point_name(names[0].rpartition(".")[0], "stream"), stack[0].input, known, (*whys, "")[0]))
    return made


def read_elsewhere(program: Program, linear: Linear, rows: bool) -> str:
    """Why the factors of one linear would be those of another, too; empty if they would not."""
    shared = any(len(node.users) > 1 for node in _weighed(program, linear, rows))
    return f"the weight of {linear.path} is read elsewhere, too" if shared else ""


def _weighed(program: Program, linear: Linear, rows: bool) -> list[fx.Node]:
    found = (constant(program, arg) for arg in linear.node.args)
    return [n for n in found if n is not None and (rows or len(shape(n)) == 2)]


def weigh(linear: Linear, factors: Tensor, edit: Edits, rows: bool) -> None:
    """Let a linear's weight be multiplied with factors of what it reads; of what it gives (``rows``), and its bias with it."""
    for node in _weighed(edit.program, linear, rows):
        at = int(rows == linear.transposed) if len(shape(node)) == 2 else 0

        def weighed(weight: Tensor, at: int = at) -> tuple[Tensor]:
            (own,) = placed(weight, [factors])
            each = own.to(weight.dtype).repeat_interleave(weight.shape[at] // len(factors))
            return ((weight * each.view([-1 if d == at else 1 for d in range(weight.dim())])).contiguous(),)

        recipe = Recipe((f"{edit.by}.means", FORMAT, digest(factors), at), weighed, first=True)
        (made,) = edit.derive([node], recipe, [f"{node.name}_weighed"])
        for user in [u for u in node.users if u is not made]:
            user.replace_input_with(node, made)


def weigh_value(node: fx.Node, factors: Tensor, edit: Edits) -> None:
    """Multiply a value's channels with factors, which live beside the model's first weight."""
    anchor = next(n for n in edit.program.graph.nodes if edit.program.tensors.is_constant(n))
    recipe = Recipe(
        (f"{edit.by}.factors", FORMAT, digest(factors)), lambda weight: placed(weight, [factors]), first=True
    )
    (held,) = edit.derive([anchor], recipe, [f"{node.name}_factors"])
    (made,) = edit.run("weighed", lambda x, f: [x * f.to(x.dtype)], [node, held], node.next)
    inside = {made, *made.all_input_nodes, *(n for n in held.users)}
    node.replace_all_uses_with(made, delete_user_cb=lambda user: user not in inside)
