"""A vision tower over frames of videos, in which some frames compute their most changed tokens alone and take the rest from an earlier one."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from accelpass.ir.analyses.axes.axes import Axes, axes
from accelpass.ir.analyses.axes.flow import between
from accelpass.ir.analyses.structure.block import Block, Sublayer
from accelpass.ir.analyses.structure.vision import PACKED, Tower
from accelpass.ir.attention.spec.op import ATTENTION, spec_of
from accelpass.ir.core.graph import call, value
from accelpass.ir.core.program import Program
from accelpass.ir.transform.resize import CannotResize
from accelpass.ir.transform.sequence.again import on_rows
from accelpass.ir.transform.sequence.rows import rows_of
from accelpass.ir.transform.splice import all_or_nothing, inserted


def why_not_reused(tower: Tower) -> str | None:
    """Why frames of a tower cannot take activations from others, or None."""
    if tower.is_packed:
        return PACKED
    for block in tower.blocks:
        kinds = [(s.kind, s.norm, len(s.attentions)) for s in block.sublayers]
        if kinds != [("attention", "pre", 1), ("mlp", "pre", 0)]:
            return f"{block.path} is not attention and MLP, each behind a norm"
        node = block.sublayers[0].attentions[0].node
        if node is None or spec_of(node).before or spec_of(node).causal or spec_of(node).is_edited:
            return f"{block.path}: its attention has a mask, or another pass has it"
        if spec_of(node).groups != 1:
            return f"{block.path}: its heads share keys"
    return None


def reuse(program: Program, tower: Tower, references: Sequence[int], others: dict[int, int], count: int) -> None:
    """Let the frames ``others`` compute ``count`` tokens in each block, and take the rest from frames among ``references``.

    These are the tokens whose keys, all heads as one vector, are least like those of the reference frame. For the others values,
    what attention adds and what the MLP adds are the reference frame's; the stream that these are added to is the frame's own.

    Args:
        references: frames that compute all; others: by frame, which of them it takes from.

    Raises:
        CannotResize: an operation means something else for fewer frames or tokens; the graph is as it was.
    """
    known: Axes = program.analysis(axes)
    before, anchor = set(program.graph.nodes), tower.end.next
    region = between(program, tower.start, tower.end)
    inside = set(region)
    if outside := [n.name for n in region[:-1] if any(u not in inside for u in n.users) and n is not tower.end]:
        raise CannotResize(f"{outside[0]} of the tower is read by what follows it")
    at = [references.index(others[frame]) for frame in others]
    try:
        with all_or_nothing(program):
            whole, part = (
                _copied(program, known, region, tower, list(frames), anchor) for frames in (references, list(others))
            )
            program.changed()
            end = _Frames(program, anchor, whole, part, at, count).run(tower)
    except CannotResize:
        program.changed()
        raise
    order = torch.tensor([*references, *others]).argsort().tolist()
    run = lambda a, b: [torch.cat([a, b]).index_select(0, torch.tensor(order, device=a.device))]  # noqa: E731
    (joined,) = inserted(program, anchor, run, whole[tower.end], end)
    tower.end.replace_all_uses_with(joined, delete_user_cb=lambda user: user in before)
    program.graph.eliminate_dead_code()
    program.changed()


def _copied(
    program: Program, known: Axes, region: Sequence[fx.Node], tower: Tower, frames: Sequence[int], anchor: fx.Node
) -> dict[fx.Node, Any]:
    """The tower for some of the frames."""
    run = lambda x: [x.index_select(0, torch.tensor(list(frames), device=x.device))]  # noqa: E731
    (some,) = inserted(program, anchor, run, tower.start)
    with program.graph.inserting_before(anchor):
        made = on_rows(known, region, {tower.start: some}, known.of(tower.start)[0], len(frames))
    return {**made, tower.start: some}


class _Frames:
    """The frames that take from others, block by block; ``whole`` and ``part`` are copies of the tower for both kinds, by original."""

    def __init__(
        self,
        program: Program,
        anchor: fx.Node,
        whole: dict[fx.Node, Any],
        part: dict[fx.Node, Any],
        at: list[int],
        count: int,
    ) -> None:
        self.program, self.anchor, self.whole, self.part, self.at, self.count = program, anchor, whole, part, at, count
        self.axes: Axes = program.analysis(axes)

    def run(self, tower: Tower) -> fx.Node:
        stream: fx.Node = self.part[tower.start]
        for block in tower.blocks:
            stream = self._block(block, stream)
        return stream

    def _block(self, block: Block, x: fx.Node) -> fx.Node:
        first, second = block.sublayers
        node = first.attentions[0].node
        assert node is not None
        q, k, v = node.args[:3]
        own, make = self.part[first.input], partial(inserted, self.program, self.anchor)
        keys = self._on(own, x, [k], 1, None)[0]
        (rows,) = make(partial(_changed, self.count, self.at), keys, self.whole[k])
        (some,) = make(lambda x, rows: [rows_of(x, rows)], x, rows)
        queries, values = self._on(own, some, [q, v], 1, self.count)
        (values,) = make(partial(_renewed, self.at, 2), self.whole[v], rows, values)
        with self.program.graph.inserting_before(self.anchor):
            made = call(self.program.graph, self.part[node], ATTENTION, queries, keys, values, [], node.args[-1])
        (added,) = self._on(self.part[node], made, [first.branch], 2, self.count)
        x = self._added(x, first, rows, added)
        (some,) = make(lambda x, rows: [rows_of(x, rows)], x, rows)
        (added,) = self._on(self.part[second.input], some, [second.branch], 1, self.count)
        return self._added(x, second, rows, added)

    def _added(self, x: fx.Node, sublayer: Sublayer, rows: fx.Node, added: fx.Node) -> fx.Node:
        """The stream after a sublayer, of which some rows are new."""

        def run(x: Tensor, held: Tensor, rows: Tensor, added: Tensor) -> list[Tensor]:
            return [x + _renewed(self.at, 1, held, rows, added)[0]]

        return inserted(self.program, self.anchor, run, x, self.whole[sublayer.branch], rows, added)[0]

    def _on(self, start: fx.Node, given: fx.Node, ends: Sequence[Any], dim: int, count: int | None) -> list[Any]:
        """What copies give at the ``ends`` (originals) if they read ``given`` in the place of ``start``: ``count`` tokens, or all."""
        wanted = [self.part[end] for end in ends]
        region = list(dict.fromkeys(n for end in wanted for n in between(self.program, start, end)))
        region.sort()
        count = value(start).shape[dim] if count is None else count
        with self.program.graph.inserting_before(self.anchor):
            made = on_rows(self.axes, region, {start: given}, self.axes.of(start)[dim], count)
        return [made[n] for n in wanted]


def _changed(count: int, at: Sequence[int], keys: Tensor, held: Tensor) -> list[Tensor]:
    """The tokens of each frame whose keys are least like those that are held: ascending int64 ``(frames, count)``."""
    held = held.index_select(0, torch.tensor(at, device=keys.device))
    a, b = (x.float().transpose(1, 2).flatten(2) for x in (keys, held))
    alike = F.cosine_similarity(a, b, dim=-1)
    return [(-alike).sort(dim=-1, descending=True, stable=True).indices[:, :count].sort(-1).values]


def _renewed(at: Sequence[int], dim: int, held: Tensor, rows: Tensor, new: Tensor) -> list[Tensor]:
    """What is held of the reference frames, with new rows along ``dim``."""
    held = held.index_select(0, torch.tensor(at, device=held.device))
    index = rows.view(rows.shape[0], *(1 for _ in range(dim - 1)), -1, 1)
    return [held.scatter(dim, index.expand_as(new), new)]
