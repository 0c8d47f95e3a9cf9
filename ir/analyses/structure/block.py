"""Residual blocks: where a stream is read, what is computed from it, and where that is added back."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor, fx

from accelpass.ir.analyses.axes.flow import (
    CASTS,
    VIEWS,
    bare,
    between,
    common_path,
    fixed,
    positions,
    scaled,
)
from accelpass.ir.analyses.structure.linear import linears
from accelpass.ir.analyses.structure.mlp import Mlp, mlps
from accelpass.ir.analyses.structure.moe import MoE, moes
from accelpass.ir.analyses.structure.norm import Norm, norms
from accelpass.ir.attention.recognition.detect import Attention, detect
from accelpass.ir.attention.recognition.region import same_sizes
from accelpass.ir.attention.spec.op import is_attention
from accelpass.ir.core.graph import aten, is_call, module_path, value
from accelpass.ir.core.program import Program

_CONVOLUTIONS = (aten.conv1d, aten.conv2d, aten.conv3d, aten.convolution, aten.conv_transpose2d)
_PRODUCTS = (aten.matmul, aten.bmm, aten.mm, aten.baddbmm, aten.einsum)
_POOLS = (aten.avg_pool2d, aten.max_pool2d, aten.fft_fft2, aten.fft_fftn, aten.cumsum)
_PARALLEL = 3  # branches that read one point of the stream and are added one after the other


@dataclass(frozen=True, eq=False)
class Sublayer:
    """``node = input + f(input)``.

    Attributes:
        kind: ``attention``, ``mlp``, ``moe``, ``parallel`` (attention beside an MLP or experts in one branch), ``mixer``
            (tokens are mixed by something else: a convolution, a state-space layer) or ``other`` (each token by itself).
        input: the stream that f reads.
        node: the addition.
        output: the stream afterwards: ``node``, or the norm of it in a post-norm model.
        branch: what is added.
        norm: ``pre`` (f starts with a norm), ``post`` (the sum is normalised), ``branch`` (f ends with a norm),
            ``sandwich`` (f starts and ends with one) or ``none``.
        gate: what f's result is multiplied by before it is added, if that is computed from a condition (DiT).
        attentions, mlps, moes: what the branch holds.
    """

    kind: str
    input: fx.Node
    node: fx.Node
    output: fx.Node
    branch: fx.Node
    norm: str
    gate: fx.Node | None
    attentions: tuple[Attention, ...]
    mlps: tuple[Mlp, ...]
    moes: tuple[MoE, ...]
    inside: frozenset[fx.Node]
    """The nodes between ``input`` and ``branch``."""


@dataclass(frozen=True, eq=False)
class Block:
    """One layer of a stack: sublayers that follow one another in a stream.

    Attributes:
        path: the module that holds them all.
        sublayers: in execution order.
        inputs, outputs: the streams before and after; two of each where two streams attend jointly (MMDiT).
    """

    path: str
    sublayers: tuple[Sublayer, ...]
    inputs: tuple[fx.Node, ...]
    outputs: tuple[fx.Node, ...]

    @property
    def input(self) -> fx.Node:
        return self.inputs[0]

    @property
    def output(self) -> fx.Node:
        return self.outputs[0]


def sublayers(program: Program) -> list[Sublayer]:
    """All residual branches in graph order; not those that skip over other branches, nor those inside a branch."""
    found: dict[fx.Node, Sublayer] = {}
    for node in program.graph.nodes:
        if is_call(node, aten.add, aten.add_) and len(node.args) > 1:
            made = _sublayer(program, node, found)
            if made is not None:
                found[node] = made
    all_ = list(found.values())
    inner = {s: [i for i in all_ if i is not s and i.node in s.inside] for s in all_}
    skips = {s for s in all_ if any(i.input is s.input for i in inner[s])}
    nested = {i for s in all_ if s not in skips for i in inner[s]}
    kept = [s for s in all_ if s not in skips and s not in nested]
    return _with_post_norms(program, kept)


def blocks(program: Program) -> list[Block]:
    """The layers of all stacks, in graph order."""
    grouped: list[list[Sublayer]] = []
    owner: dict[fx.Node, list[Sublayer]] = {}
    for one in program.analysis(sublayers):
        group = owner.get(one.input)
        if group is None or not _joins(group, one):
            group = []
            grouped.append(group)
        group.append(one)
        for stream in (one.node, one.output):
            owner[stream] = group
        if one is group[0]:
            owner.setdefault(one.input, group)
    merged: list[list[list[Sublayer]]] = []
    by_attention: dict[int, list[list[Sublayer]]] = {}
    for group in grouped:
        if all(s.kind == "other" for s in group):
            continue
        shared = [id(a) for s in group for a in s.attentions]
        streams = next((by_attention[a] for a in shared if a in by_attention), None)
        if streams is None:
            streams = []
            merged.append(streams)
        streams.append(group)
        by_attention.update(dict.fromkeys(shared, streams))
    return [_block(streams) for streams in merged]


def _sublayer(program: Program, node: fx.Node, known: dict[fx.Node, Sublayer]) -> Sublayer | None:
    a, b = node.args[:2]
    if not _alike(a, b, node):
        return None
    place = program.analysis(positions)
    orders = ((a, b), (b, a))
    starts = [(start, branch) for x, branch in orders for start in dict.fromkeys((bare(x), _stream(program, x)))]
    for start, branch in starts:
        for _ in range(_PARALLEL):
            if place[start] >= place[branch] or fixed(program, start):
                break
            inside = frozenset(between(program, start, branch))
            if inside:
                return _described(program, node, start, branch, inside)
            # f may read the stream as it was before the branch that was added last.
            if start not in known:
                break
            start = known[start].input
    return None


def _alike(a: object, b: object, node: fx.Node) -> bool:
    tensors = [value(n) for n in (a, b) if isinstance(n, fx.Node)]
    if len(tensors) != 2 or not all(isinstance(t, Tensor) and t.is_floating_point() and t.dim() > 1 for t in tensors):
        return False
    return same_sizes(tensors[0].shape, tensors[1].shape)


def _stream(program: Program, node: fx.Node) -> fx.Node:
    """The stream behind casts and constant factors (``alpha * x + f(x)``)."""
    while True:
        node = bare(node)
        above = scaled(program, node)
        if above is None:
            return node
        node = above


def _described(
    program: Program, node: fx.Node, start: fx.Node, branch: fx.Node, inside: frozenset[fx.Node]
) -> Sublayer | None:
    attentions = tuple(a for a in program.analysis(detect) if (a.node or a.out) in inside)
    experts = tuple(m for m in program.analysis(moes) if m.nodes[-1] in inside)
    shared = {m.shared.node for m in experts if m.shared is not None}
    dense = tuple(m for m in program.analysis(mlps) if m.node in inside and m.node not in shared)
    sites = {site.node for site in program.analysis(linears)}
    mixes = any(_mixes_tokens(n, sites) for n in inside)
    if attentions:
        kind = "parallel" if _beside(program, attentions, dense, experts) else "attention"
    elif experts:
        kind = "moe"
    elif not mixes and not sites & inside:
        return None  # element-wise: x + 0.04 x^3, a rotary embedding
    else:
        kind = "mixer" if mixes else "mlp" if dense else "other"
    inner = program.analysis(norms)
    reads = (start, *(u for u in start.users if is_call(u, *CASTS, *VIEWS)))
    pre = any(n.node in inside and (bare(n.x, *VIEWS) is start or n.x in reads) for n in inner)
    post, gate = _end(program, branch, inside)
    where = {(True, True): "sandwich", (True, False): "pre", (False, True): "branch", (False, False): "none"}[pre, post]
    return Sublayer(kind, start, node, node, branch, where, gate, attentions, dense, experts, inside)


def _beside(
    program: Program, attentions: tuple[Attention, ...], dense: tuple[Mlp, ...], experts: tuple[MoE, ...]
) -> bool:
    """Some MLP, or mixture of experts, neither feeds an attention nor reads one (as a gate inside it would)."""
    attended = [a.node or a.out for a in attentions]
    for node in (*(m.node for m in dense), *(m.nodes[-1] for m in experts)):
        if not any(between(program, node, a) or between(program, a, node) for a in attended):
            return True
    return False


def _mixes_tokens(node: fx.Node, sites: set[fx.Node]) -> bool:
    if node in sites:
        return False
    return is_call(node, *_CONVOLUTIONS, *_PRODUCTS, *_POOLS) or is_attention(node)


def _end(program: Program, node: fx.Node, inside: frozenset[fx.Node]) -> tuple[bool, fx.Node | None]:
    """(whether f ends with a norm, the gate) of a branch, behind casts, views and constant factors."""
    normed = {bare(norm.node) for norm in program.analysis(norms)}
    gate = None
    while True:
        node = bare(node, *VIEWS)
        if node in normed:
            return True, gate
        above = scaled(program, node)
        if above is None and gate is None and is_call(node, aten.mul):
            a, b = node.args[:2]
            outside = [g for g in (a, b) if isinstance(g, fx.Node) and g not in inside]
            if len(outside) == 1:
                gate = outside[0]
                above = b if gate is a else a
        if not isinstance(above, fx.Node):
            return False, gate
        node = above


def _with_post_norms(program: Program, found: list[Sublayer]) -> list[Sublayer]:
    """The sublayers, those of a post-norm model with the norm of their sum as output."""
    read = {s.input for s in found}
    after: dict[fx.Node, list[Norm]] = {}
    for norm in program.analysis(norms):
        after.setdefault(bare(norm.x), []).append(norm)
    made = []
    for s in found:
        norm = after.get(s.node, [])
        if s.norm == "none" and len(norm) == 1 and s.node not in read:
            s = replace(s, norm="post", output=norm[0].node)
        made.append(s)
    return made


def _joins(group: list[Sublayer], one: Sublayer) -> bool:
    """Whether ``one`` belongs to the layer that ``group`` began."""
    if any(s.input is one.input for s in group):
        return True
    kinds = [s.kind for s in group]
    mixed = any(kind in ("mlp", "moe", "parallel") for kind in kinds)
    if one.kind in ("mlp", "moe"):
        return not mixed
    if one.kind == "attention":
        crosses = all(a.kind == "cross" for a in one.attentions)
        return crosses and not mixed and "attention" in kinds
    return one.kind == "other"


def _block(streams: list[list[Sublayer]]) -> Block:
    every = [s for group in streams for s in group]
    paths = [module_path(s.node) for s in every]
    return Block(
        path=common_path(paths),
        sublayers=tuple(every),
        inputs=tuple(group[0].input for group in streams),
        outputs=tuple(group[-1].output for group in streams),
    )
