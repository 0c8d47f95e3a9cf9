"""The base of passes that choose, in a vision tower, which of its tokens a language model reads."""

from __future__ import annotations

import os
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from accelpass.ir.analyses.axes.axes import axes
from accelpass.ir.analyses.axes.flow import CASTS, bare
from accelpass.ir.analyses.structure.vision import PACKED, Entry, Tower, vision
from accelpass.ir.attention.spec import steps
from accelpass.ir.attention.spec.op import spec_of
from accelpass.ir.attention.spec.spec import AttentionSpec
from accelpass.ir.core.graph import aten, is_call, value
from accelpass.ir.core.program import Program
from accelpass.ir.kv.shortened import note
from accelpass.ir.torch_private import assert_async
from accelpass.ir.transform.resize import CannotResize
from accelpass.ir.transform.sequence.again import again, on_rows
from accelpass.ir.transform.sequence.prompt import NoPrompt, prompt
from accelpass.ir.transform.splice import inserted
from accelpass.ir.transform.steps import drop_dead_writes, patches_went, survived
from accelpass.passes.core.base import Done, Record, Skip
from accelpass.passes.token_pruning.look import operands_of, visible
from accelpass.passes.token_pruning.shortened_prompt import ShortenedPrompt
from accelpass.passes.visual_tokens.arrangement import Arrangement, arrangement

_APART = "the tower is in another graph than the language model, so no token can be left out of both"


@dataclass(frozen=True, eq=False)
class Left:
    """What is left of the patches of all images of a call.

    Attributes:
        places: which patches' places in the text stay, of all images one after the other, ascending int64 ``(kept,)``; of the units of an
            :class:`.Arrangement`, if one was given.
        stream: what the projector reads, ``(images, kept of each, channels)``; None for the patches themselves. Of units: what the
            language model reads, behind the projector.
        went: by path of a block of the tower behind which patches left, into which row each went, ``(images, patches)``, or -1.
    """

    places: fx.Node
    stream: fx.Node | None = None
    went: Mapping[str, fx.Node] = field(default_factory=dict)


@dataclass(frozen=True)
class VisualFilter(ShortenedPrompt):
    """The language model reads fewer visual tokens: their places are left out of the text, which closes up.

    The caller goes on passing ids, masks and positions of the whole text, as the processor made them. The tokens that are left
    get the positions 0, 1, 2 ..., and the cache holds these alone; graphs of later tokens count as the cache does.
    """

    source: ClassVar[str] = "image"
    claims: ClassVar[dict[str, str]] = {
        "calls": "a prompt is read once",
        "tokens": "the vision tower chooses the tokens that all layers of the language model read",
    }

    @abstractmethod
    def leave(self, program: Program, tower: Tower, before: fx.Node) -> Left:
        """Choose, in front of ``before``.

        Raises:
            NoPrompt: this tower does not tell its tokens apart, or has no more than are kept; says why.
        """

    def leave_units(self, program: Program, tower: Tower, entry: Entry, given: Arrangement) -> Left:
        """As :meth:`leave`, where a visual token is made of several patches, or other tokens stand between.

        Raises:
            NoPrompt: as there; or this choice is of single patches.
        """
        raise NoPrompt(
            f"{entry.features.name}: the text has not one place for each of {given.images} x {tower.patches} patches "
            f"{tuple(value(entry.features).shape)}: the projector pools them, or packs tiles with tokens between"
        )

    def shorten(self, program: Program, record: Record) -> None:
        entry, tower = _entry(program)
        if isinstance(record.wants(tower.path), Skip):
            raise NoPrompt(f"{tower.path} is named in skip_sites")
        found = prompt(program)
        region = [n for n in program.graph.nodes if n.op == "call_function"]
        made_of = _above(entry.features)
        (stream, front), texts = patch_stream(tower, entry), found.batch
        images, patches = value(stream).shape[0], tower.patches
        if not isinstance(images, int) or not isinstance(patches, int):
            raise NoPrompt(f"{tower.path}: how many images and patches there are, only run time knows")
        given = arrangement(program, entry, stream, front)
        if given.is_plain:
            left = self.leave(program, tower, entry.node)
            places, count, kept = left.places, images * patches, value(left.places).shape[0]
        else:
            left = self.leave_units(program, tower, entry, given)
            count, kept = len(given.places), value(left.places).shape[0] + given.places.count(-1)
            (places,) = inserted(program, entry.node, partial(_placed, given.places, given.units, kept), left.places)
        if not isinstance(texts, int) or (count - kept) % texts:
            raise NoPrompt(f"{images} images of {texts} texts cannot leave the same number of tokens out of each text")
        features = self._projected(program, entry, stream, left, places, given)
        attention = found.attentions[0].node
        assert attention is not None and entry.mask is not None
        (q, k, *extras), masks = operands_of(attention)
        run = partial(_rows, texts, count, masks)
        anchor = max(attention, entry.node, features, places, key=_order(program).__getitem__)
        rows, positions, seen, moved, seen_all = inserted(program, anchor.next, run, entry.mask, places, q, k, *extras)
        again(program, found, [n for n in region if n not in made_of], rows, positions, {entry.features: features})
        note(program, rows, seen, moved, seen_all)
        survived(program, tower.path, rows, found.tokens)
        for path, place in left.went.items():
            patches_went(program, path, place)
        drop_dead_writes(program.graph)
        record.take(tower.path, Done(f"{kept} of {count} visual tokens are read"))

    def _projected(
        self, program: Program, entry: Entry, stream: fx.Node, left: Left, places: fx.Node, given: Arrangement
    ) -> fx.Node:
        """The features of what is left, made of fewer patches where the choice gives as many of each image."""
        width = value(entry.node).shape[-1]
        if left.stream is None or not given.is_plain:
            own = () if left.stream is None else (left.places, left.stream)
            run = partial(_kept_features, width, given.place_of() if own else [])
            return inserted(program, entry.node, run, entry.features, places, *own)[0]
        known_axes = program.analysis(axes)
        order = _order(program)
        way = [n for n in entry.projector if order[n] > order[stream]]
        try:
            with program.graph.inserting_before(entry.node):
                count = value(left.stream).shape[1]
                copies = on_rows(known_axes, way, {stream: left.stream}, known_axes.of(stream)[1], count, anew=True)
        except CannotResize as cause:
            raise NoPrompt(f"the projector cannot be had for fewer tokens: {cause}") from cause
        made = copies[entry.features] if way else left.stream
        assert isinstance(made, fx.Node)
        return inserted(program, entry.node, lambda features: [features.reshape(-1, width)], made)[0]


def patch_stream(tower: Tower, entry: Entry) -> tuple[fx.Node, int]:
    """The patches, ``(images, patches, channels)``: the tower's slice behind the first tokens, or its whole stream and how many stand in front."""
    for node in entry.projector if tower.first else ():
        if is_call(node, aten.slice) and bare(node.args[0], *CASTS) is tower.end and node.args[1:3] == (1, tower.first):
            return node, 0
    return tower.end, tower.first


def first_row(q: Tensor, k: Tensor, extras: Sequence[Tensor], spec: AttentionSpec) -> Tensor:
    """The probabilities of the first query, float32 ``(images, heads, tokens)``: one row beside the fused attention."""
    k = k.repeat_interleave(spec.groups, 1) if spec.groups > 1 else k
    scores = torch.matmul(q[:, :, :1].float(), k.float().mT) * spec.scale
    first = [e[..., :1, :] if e.dim() > 1 and e.shape[-2] == q.shape[2] else e for e in extras]
    return steps.apply(scores, spec.before, first).softmax(-1).squeeze(2)


def attention_of(tower: Tower, block: int) -> fx.Node:
    """The attention of a block of a tower."""
    (node, *_) = [a.node for s in tower.blocks[block].sublayers for a in s.attentions]
    assert node is not None
    return node


def class_attention(program: Program, tower: Tower, block: int, before: fx.Node) -> fx.Node:
    """What the class token pays each patch in a block, summed over heads: float32 ``(images, patches)``."""
    node = attention_of(tower, block)
    spec, first = spec_of(node), tower.first
    operands = [*node.args[:2], *node.args[3]]

    def run(q: Tensor, k: Tensor, *extras: Tensor) -> list[Tensor]:
        return [first_row(q, k, extras, spec)[..., first:].sum(1)]

    return inserted(program, before, run, *operands)[0]


def _entry(program: Program) -> tuple[Entry, Tower]:
    found = program.analysis(vision)
    if not found.entries:
        if found.missed:
            raise NoPrompt("; ".join(f"{path} is no tower: {why}" for path, why in found.missed.items()))
        read = "no language model reads a vision tower in this graph" if found.towers else "text alone is read as it is"
        raise NoPrompt(read)
    if len(found.entries) > 1:
        raise NoPrompt(f"images enter the text in {len(found.entries)} places")
    (entry,) = found.entries
    if any(n is not entry.node and is_call(n, aten.masked_scatter, aten.masked_scatter_) for n in program.graph.nodes):
        raise NoPrompt("features of inner blocks of the tower are added to layers of the language model, too")
    if entry.tower is None:
        raise NoPrompt(f"{_APART}: {_remedy(program)}")
    if entry.tower.is_packed:
        raise NoPrompt(f"{entry.tower.path}: {PACKED}")
    if entry.mask is None:
        raise NoPrompt(f"{entry.node.name} joins image and text: no places in the text's ids say where the image is")
    return entry, entry.tower


def _remedy(program: Program) -> str:
    """What a user can do where tower and text are in two graphs, or what cut them apart."""
    if not os.environ.get("TRANSFORMERS_DISABLE_TORCH_CHECK"):
        return "call accelpass.one_graph(model) before the model is compiled"
    if program.cut:
        place = program.cut.rpartition("site-packages/")[2]
        return f"a graph break cut the model, where something is read on the host: {place}"
    return "give pixels and text in one call of the whole model"


def _rows(
    texts: int, patches: int, masks: Any, mask: Tensor, places: Tensor, q: Tensor, k: Tensor, *extras: Tensor
) -> list[Tensor]:
    """The tokens of each text that are read; results as those of :func:`.look.chosen`.

    Args:
        mask: True where a token is a place for a patch, ``(texts, tokens, ...)``; places: see :class:`Left`.
    """
    mask = mask.flatten(2)[:, :, 0] if mask.dim() > 2 else mask
    kept = torch.zeros(patches, dtype=torch.bool, device=mask.device).index_fill(0, places, True)
    number = (mask.flatten().long().cumsum(0) - 1).clamp(0, patches - 1).view(mask.shape)
    stays = mask.logical_not() | kept[number]
    left = mask.shape[1] - (patches - places.shape[0]) // texts
    assert_async(
        (stays.sum(1) == left).all(),
        "visual tokens are left out: each text must have the same number of images, and one place for each of their patches",
    )
    rows = stays.long().sort(dim=1, descending=True, stable=True).indices[:, :left].sort(-1).values
    seen = visible(masks, q, k, extras)
    there = seen.gather(1, rows)
    positions = (there.long().cumsum(1) - 1).clamp_min(0)
    return [rows, positions, there, seen.long().sum(1) - there.long().sum(1), seen]


def _placed(units: Sequence[int], count: int, kept: int, chosen: Tensor) -> list[Tensor]:
    """The places that stay, ascending: those of the units that are ``chosen``, and those where none of ``count`` stands."""
    there = torch.zeros(count, dtype=torch.bool, device=chosen.device).index_fill(0, chosen, True)
    of = torch.tensor(units, device=chosen.device)
    stays = there[of.clamp_min(0)] | (of < 0)
    return [stays.long().sort(descending=True, stable=True).indices[:kept].sort().values]


def _kept_features(width: int, place_of: Sequence[int], features: Tensor, places: Tensor, *new: Tensor) -> list[Tensor]:
    """The features at ``places``; ``new`` are units and, ``(units, width)``, what stands for them."""
    rows = features.reshape(-1, width)
    if new:
        rows = rows.index_copy(0, torch.tensor(place_of, device=rows.device)[new[0]], new[1].reshape(-1, width))
    return [rows.index_select(0, places)]


def _above(node: fx.Node) -> set[fx.Node]:
    """The node and all that it is computed from."""
    found, front = {node}, [node]
    while front:
        for one in front.pop().all_input_nodes:
            if one not in found:
                found.add(one)
                front.append(one)
    return found


def _order(program: Program) -> dict[fx.Node, int]:
    return {node: at for at, node in enumerate(program.graph.nodes)}
