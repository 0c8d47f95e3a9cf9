"""Vision towers, and where what they see enters a text: the tower, the projector, the visual span."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx

from accelpass.ir.analyses.axes.axes import axes
from accelpass.ir.analyses.axes.flow import CASTS, VIEWS, bare, between, common_path, fixed, reached_from
from accelpass.ir.analyses.structure.block import Block, blocks
from accelpass.ir.analyses.structure.norm import norms
from accelpass.ir.core.graph import aten, is_call, known, module_path, value
from accelpass.ir.core.program import Program

_PATCHES = (aten.conv2d, aten.conv3d, aten.convolution)
_EMPTY = (aten.zeros_like, aten.zeros, aten.full_like, aten.full)
PACKED = "patches of all images are packed in one sequence, where an image has no rows of its own"
"""Why a tower is not taken by what needs ``(images, tokens, channels)``."""
_ON_THE_WAY = 24  # operations between the patches and the first block


@dataclass(frozen=True, eq=False)
class Tower:
    """A stack of blocks over patches of images, each of which sees all others.

    Attributes:
        path: the module that holds the blocks.
        blocks: in order.
        start, end: the stream in front of them and after them, ``(images, tokens, channels)``; where all images are packed in one
            sequence (Qwen's towers), ``(tokens, channels)``.
        first: tokens in front of the patches: a class token, registers. They are computed from the model's weights alone.
        grid: rows and columns of patches; None where it cannot be told.
        is_packed: whether patches of all images, of whatever sizes, follow each other in one sequence.
    """

    path: str
    blocks: tuple[Block, ...]
    start: fx.Node
    end: fx.Node
    first: int
    grid: tuple[Any, Any] | None
    is_packed: bool = False

    @property
    def tokens(self) -> Any:
        return value(self.start).shape[-2]

    @property
    def patches(self) -> Any:
        """How many patches an image has; all images where they are packed."""
        return self.tokens - self.first


@dataclass(frozen=True, eq=False)
class Entry:
    """Where image features take the places of tokens in a text.

    Attributes:
        how: ``scatter`` (into the places that a mask names) or ``join`` (before, behind or between the text's tokens).
        node: the text with the features in it, ``(batch, tokens, channels)``.
        text: the embedded text; features: what takes the places, in order.
        mask: True where a token is a place for a feature; None where they are joined.
        tower: whose features they are; None if the tower is in another graph.
        projector: the calls between the tower and the features, in order.
    """

    how: str
    node: fx.Node
    text: fx.Node
    features: fx.Node
    mask: fx.Node | None
    tower: Tower | None
    projector: tuple[fx.Node, ...]


@dataclass(frozen=True, eq=False)
class Vision:
    """What :func:`vision` finds; ``missed``: by path of a stack that looks at images, why it is no tower."""

    towers: tuple[Tower, ...]
    entries: tuple[Entry, ...]
    missed: dict[str, str]


def vision(program: Program) -> Vision:
    """The vision towers of a graph, and where their features enter a text. Use it as ``program.analysis(vision)``."""
    patched = reached_from(program, *_patches(program)) if _patches(program) else set()
    towers: list[Tower] = []
    missed: dict[str, str] = {}
    ends: list[fx.Node] = []
    for chain in chains(program):
        if chain[0].input not in patched or any(
            a.spec.causal for b in chain for s in b.sublayers for a in s.attentions
        ):
            continue
        path = common_path([b.path for b in chain]) or chain[0].path
        if any(chain[0].input in reached_from(program, end) for end in ends):
            continue  # a language model, whose text holds what a tower sees
        ends.append(chain[-1].output)
        why = _why_no_tower(program, chain)
        if why is not None:
            missed[path] = why
            continue
        start = chain[0].input
        shape = _first(program, start), _grid(program, start), _is_packed(program, start)
        towers.append(Tower(path, tuple(chain), start, chain[-1].output, *shape))
    return Vision(tuple(towers), tuple(_entries(program, towers)), missed)


def chains(program: Program) -> list[list[Block]]:
    """The blocks of a graph in stacks, in each of which a block reads what the one before gives, and maybe a sum with other values."""
    found: list[list[Block]] = []
    for block in program.analysis(blocks):
        if found and len(block.inputs) == 1 and _goes_on(program, found[-1][-1].output, block.input):
            found[-1].append(block)
        else:
            found.append([block])
    return found


def _goes_on(program: Program, output: fx.Node, stream: fx.Node) -> bool:
    if stream is output:
        return True
    if not is_call(stream, aten.add, aten.add_) or output not in stream.args[:2]:
        return False
    others = [n for n in stream.args[:2] if isinstance(n, fx.Node) and n is not output]
    return bool(others) and others[0] not in reached_from(program, output)


def _patches(program: Program) -> list[fx.Node]:
    """What makes patches of pixels: a convolution as wide as its stride over what the caller passes."""
    return [n for n in program.graph.nodes if is_call(n, *_PATCHES) and value(n).dim() > 3 and _is_patching(n)]


def _is_patching(node: fx.Node) -> bool:
    stride = node.args[3] if len(node.args) > 3 else node.kwargs.get("stride", 1)
    stride = [stride] if isinstance(stride, int) else list(stride)
    return any(known(s > 1) for s in stride)


def _why_no_tower(program: Program, chain: Sequence[Block]) -> str | None:
    if any(len(b.inputs) != 1 for b in chain):
        return "it has several streams"
    shape = tuple(value(chain[0].input).shape)
    has_attention = all(any(s.attentions for s in b.sublayers) for b in chain)
    if len(shape) != 3 and not (len(shape) == 2 and has_attention):
        return f"its stream {shape} is not (images, tokens, channels), nor (tokens, channels) of blocks with attention"
    if any(s.gate is not None for b in chain for s in b.sublayers):
        return "its blocks depend on a condition (a denoising step)"
    if not has_attention:
        return "a block has no attention that was recognised"
    attentions = [a for b in chain for s in b.sublayers for a in s.attentions]
    if any(a.kind != "self" or value(a.q).dim() != 4 for a in attentions):
        return "an attention is not one of (images, heads, tokens, d) to itself"
    if len(shape) == 2:  # an attention for each image, or for each window
        return None
    dims = program.analysis(axes)
    if any(dims.same(dims.of(chain[0].input)[0], dims.of(a.k)[2]) for a in attentions):
        return f"its stream {shape} is (tokens, images, channels): the sequence is the first dimension"
    tokens = shape[1]
    if not all(known(value(a.k).shape[2] == tokens) for a in attentions):
        return "an attention sees a window of the patches"
    return None


def _is_packed(program: Program, start: fx.Node) -> bool:
    """Whether a stream has no dimension of images: patches are made of more images than it has rows."""
    if value(start).dim() == 2:
        return True
    made = [n for n in _patches(program) if value(n).dim() == 4 and start in reached_from(program, n)]
    return bool(made) and not known(value(made[0]).shape[0] == value(start).shape[0])


def _first(program: Program, start: fx.Node) -> int:
    """How many tokens of weights alone stand in front of the patches."""
    joined = _behind(program, start, aten.cat)
    if joined is None or value(start).dim() == 2:
        return 0
    parts: Any = joined.args[0]
    at = (joined.args[1] if len(joined.args) > 1 else 0) % value(joined).dim()
    if at != 1:
        return 0
    own = itertools.takewhile(lambda part: fixed(program, bare(part, *VIEWS, aten.repeat)), parts)
    return sum(int(value(part).shape[1]) for part in own)


def _grid(program: Program, start: fx.Node) -> tuple[Any, Any] | None:
    made = _behind(program, start, *_PATCHES)
    if made is None or value(made).dim() != 4:
        return None
    return value(made).shape[-2], value(made).shape[-1]


def _behind(program: Program, start: fx.Node, *targets: Any) -> fx.Node | None:
    """The nearest call of ``targets`` that a stream is made of, behind additions, norms, casts and views."""
    normed = {bare(norm.node): norm.x for norm in program.analysis(norms)}
    front = [start]
    for _ in range(_ON_THE_WAY):
        if not front:
            return None
        node = front.pop(0)
        if is_call(node, *targets):
            return node
        if node in normed:
            front.append(normed[node])
        elif is_call(node, aten.add, aten.add_, aten.cat, aten.mul, aten.slice, *CASTS, *VIEWS):
            front += [n for n in node.all_input_nodes if isinstance(value(n), Tensor) and not fixed(program, n)]
    return None


def _entries(program: Program, towers: Sequence[Tower]) -> list[Entry]:
    made = []
    for node in program.graph.nodes:
        if is_call(node, aten.masked_scatter, aten.masked_scatter_):
            text, mask, features = node.args[:3]
            # Features that are spread out to be added to a stream (Qwen3-VL's of inner blocks) take no places.
            if value(node).dim() == 3 and not is_call(bare(text, *CASTS), *_EMPTY):
                made.append(_entry(program, towers, "scatter", node, text, features, mask))
        elif is_call(node, aten.cat) and value(node).dim() == 3 and towers:
            parts = node.args[0]
            mine = [p for p in parts for t in towers if p is not t.end and between(program, t.end, p)]
            others = [p for p in parts if p not in mine and _is_text(program, p)]
            if len(mine) == 1 and others:
                made.append(_entry(program, towers, "join", node, others[0], mine[0], None))
    return made


def _is_text(program: Program, node: fx.Node) -> bool:
    node = bare(node, *VIEWS)
    return is_call(node, aten.embedding)


def _entry(
    program: Program, towers: Sequence[Tower], how: str, node: fx.Node, text: Any, features: Any, mask: Any
) -> Entry:
    for tower in towers:
        way = between(program, tower.end, features)
        if way:
            return Entry(how, node, text, features, mask, tower, tuple(way))
    return Entry(how, node, text, features, mask, None, ())


def describe(found: Vision) -> list[str]:
    """What was found, a line each, and what was not, with the reason."""
    lines = []
    for tower in found.towers:
        grid = "packed" if tower.is_packed else "x".join(map(str, tower.grid)) if tower.grid else "?"
        lines.append(
            f"{tower.path}: tower of {len(tower.blocks)} blocks over {tower.patches} patches ({grid}), {tower.first} tokens before"
        )
    for entry in found.entries:
        source = entry.tower.path if entry.tower else "another graph"
        path = module_path(entry.node) or "the model"
        lines.append(f"{path}: features of {source} enter by {entry.how}")
    lines += [f"{path}: no tower: {why}" for path, why in found.missed.items()]
    return lines
