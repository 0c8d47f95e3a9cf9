"""Which patches each visual token of a text is made of, where a projector pools them or packs tiles with tokens between."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from accelpass.ir.analyses.axes.flow import CASTS, SPLITS, VIEWS, between
from accelpass.ir.analyses.structure.vision import Entry
from accelpass.ir.core.graph import aten, is_call, known, shape, value
from accelpass.ir.core.program import Program
from accelpass.ir.linear.op import LINEAR
from accelpass.ir.transform.sequence.prompt import NoPrompt

_MOVES = (*VIEWS, *SPLITS, aten.slice, aten.select, aten.cat, aten.stack, aten.repeat)
_OF_ROWS = (
    *(aten.linear, aten.layer_norm, aten.rms_norm, aten.gelu, aten.silu, aten.relu, aten.sigmoid, aten.tanh),
    *(aten.add, aten.sub, aten.mul, aten.div, aten.pow, aten.mean, aten.rsqrt, aten.square),
)
"""What computes each row of channels by itself (a mean: that of the last dimension)."""


@dataclass(frozen=True, eq=False)
class Arrangement:
    """How the patches of all images of a call stand in the text.

    Attributes:
        members: the patches of its image that a unit, the least that a choice takes or leaves, is made of: int64 ``(units, each)``.
        places: the unit of each place, those of all images numbered one after the other; -1 where no patch stands (a new line).
        images: how many there are.
    """

    members: Tensor
    places: tuple[int, ...]
    images: int

    @classmethod
    def plain(cls, images: int, patches: int) -> Arrangement:
        """A place for each patch, in order."""
        return cls(torch.arange(patches).unsqueeze(-1), tuple(range(images * patches)), images)

    @property
    def units(self) -> int:
        """Of all images."""
        return len(self.members) * self.images

    @property
    def is_plain(self) -> bool:
        """Whether there is one place for each patch, in order."""
        return self.members.shape[1] == 1 and self.places == tuple(range(self.units))

    @property
    def present(self) -> Tensor:
        """Which units have a place: bool ``(images, units of each)``; padding of an image has none."""
        there = torch.zeros(self.units, dtype=torch.bool)
        there[[unit for unit in self.places if unit >= 0]] = True
        return there.view(self.images, -1)

    def place_of(self) -> list[int]:
        """The place of each unit; 0 for one that has none."""
        found = [0] * self.units
        for place, unit in enumerate(self.places):
            if unit >= 0:
                found[unit] = place
        return found


def arrangement(program: Program, entry: Entry, stream: fx.Node, front: int = 0) -> Arrangement:
    """Follows the patches of ``stream`` ``(images, front + patches, channels)`` to the features that enter the text.

    The calls between are run on numbers of patches in the place of channels. Tokens in ``front`` of the patches are none.

    Raises:
        NoPrompt: one of them mixes patches otherwise than by putting them side by side; or sizes are known at run time alone.
    """
    images, tokens, width = shape(stream)
    patches = tokens - front
    numbers = torch.full((images, tokens, 1), -1, dtype=torch.int32)
    numbers[:, front:, 0] = torch.arange(images * patches).view(images, patches)
    held: dict[fx.Node, Any] = {stream: numbers.expand(images, tokens, width).contiguous()}
    try:
        for node in between(program, stream, entry.features) if entry.features is not stream else ():
            held[node] = _carried(node, held)
    except NoPrompt:
        if front or not known(value(entry.features).numel() == images * patches * shape(entry.node)[-1]):
            raise
        # There is a place for each patch all the same.
        return Arrangement.plain(images, patches)
    found = _members(entry.features, held[entry.features].reshape(-1, shape(entry.node)[-1]))
    filled = [i for i, row in enumerate(found.tolist()) if row[0] >= 0]
    whole = found[filled].long()
    if (whole < 0).any() or (whole // patches != whole[:, :1] // patches).any():
        raise NoPrompt(f"{entry.features.name}: a visual token is made of patches of several images")
    image, inside = whole[:, 0] // patches, whole % patches
    first = {tuple(row): None for row in inside.tolist()}
    if len({patch for row in first for patch in row}) != sum(map(len, first)):
        raise NoPrompt(f"{entry.features.name}: a patch is in several visual tokens")
    members = torch.tensor(sorted(first) if whole.shape[1] == 1 else list(first))
    number = {tuple(row): i for i, row in enumerate(members.tolist())}
    places = [-1] * len(found)
    for at, which, row in zip(filled, image.tolist(), inside.tolist(), strict=True):
        places[at] = which * len(members) + number[tuple(row)]
    if len(set(filtered := [p for p in places if p >= 0])) != len(filtered):
        raise NoPrompt(f"{entry.features.name}: a patch has several places in the text")
    return Arrangement(members, tuple(places), images)


def _carried(node: fx.Node, held: dict[fx.Node, Any]) -> Any:
    """The numbers of patches behind a call, in the shape of its result."""
    if node.target is operator.getitem:
        return held[node.args[0]][node.args[1]]
    if is_call(node, *CASTS):
        return held[node.args[0]]
    if is_call(node, *_MOVES):
        args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: held[n] if n in held else _none(n))
        if is_call(node, aten.view, aten._unsafe_view):
            return args[0].reshape(args[1])
        assert callable(node.target)
        return node.target(*args, **kwargs)
    own = [held[n] for n in node.all_input_nodes if n in held]
    of_rows = is_call(node, *_OF_ROWS) or node.target is LINEAR
    if not of_rows or value(node).shape[:-1] != own[0].shape[:-1] or (is_call(node, aten.mean) and not _of_last(node)):
        raise NoPrompt(f"{node.name}: the projector computes a visual token of several patches")
    rows = max((_members(node, x.reshape(-1, x.shape[-1])) for x in own), key=lambda found: found.shape[1])
    width = value(node).shape[-1]
    return rows[:, torch.arange(width) % rows.shape[1]].view(value(node).shape)


def _of_last(node: fx.Node) -> bool:
    dims = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")
    return isinstance(dims, list | tuple) and [d % value(node.args[0]).dim() for d in dims] == [
        value(node.args[0]).dim() - 1
    ]


def _none(node: fx.Node) -> Any:
    """What stands for a value that is made of no patch."""
    tensor = value(node)
    if not isinstance(tensor, Tensor):
        raise NoPrompt(f"{node.name}: a size of the projector, only run time knows")
    return torch.full(tuple(tensor.shape), -1, dtype=torch.int32)


def _members(node: fx.Node, rows: Tensor) -> Tensor:
    """The different numbers in each row, ascending: ``(rows, numbers)``; rows of fewer (of no patch) repeat theirs."""
    if bool((rows == rows[:, :1]).all()):  # as a rule, and sorting takes long
        return rows[:, :1]
    ascending = rows.sort(-1).values
    starts = torch.ones_like(ascending, dtype=torch.bool)
    starts[:, 1:] = ascending[:, 1:] != ascending[:, :-1]
    counts = starts.sum(-1)
    most = int(counts.max())
    if not bool(((counts == most) | ((counts == 1) & (ascending[:, 0] < 0))).all()):
        raise NoPrompt(f"{node.name}: visual tokens are made of different numbers of patches")
    found = ascending[:, :1].repeat(1, most)
    full = counts == most
    found[full] = ascending[full][starts[full]].view(-1, most)
    return found
