"""What axes are called: seeds from operators that give a dimension a meaning, spread to what it is a part of."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor, fx

from accelpass.ir.analyses.axes.axis_factors import Factor, Factors, leaves, same_size
from accelpass.ir.analyses.axes.axis_flow import Flow
from accelpass.ir.analyses.structure.linear import Linear, embeddings, expert_stacks, linears
from accelpass.ir.attention.spec.op import is_attention, spec_of
from accelpass.ir.core.graph import aten, is_call, shape, value
from accelpass.ir.core.program import Program

GRID = ("frame", "height", "width")
"""Axes of a grid; where attention runs over them they are tokens too."""

_WEAK = ("batch", "token", "head", "channel")  # the first of several weak names holds
_READS_ONLY = (aten.to, aten._to_copy, aten.view, aten.reshape, aten.slice, aten.clone, aten.contiguous, aten.unsqueeze)
_AFTER_HEAD = (*_READS_ONLY, aten.mul, aten.div, aten.tanh, aten.add, aten.log_softmax, aten.squeeze)


@dataclass(frozen=True)
class Seed:
    """An operator's word on what a dimension is. A weak one holds only where no other operator says more."""

    dim: Factors
    name: str
    site: fx.Node
    strong: bool = True


@dataclass(frozen=True)
class Naming:
    """What is known of one axis: its names (a grid axis may be ``token`` too), and which sites gave them."""

    names: frozenset[str]
    sites: tuple[tuple[str, fx.Node], ...] = ()

    @property
    def conflict(self) -> bool:
        return len(self.names - {"token"} if self.names & set(GRID) else self.names) > 1

    @property
    def name(self) -> str | None:
        if self.conflict or not self.names:
            return None
        return next((n for n in GRID if n in self.names), next(iter(self.names)))


def named(program: Program, flow: Flow) -> dict[Factor, Naming]:
    """The names of all axes that have any."""
    strong: dict[Factor, dict[str, fx.Node]] = {}
    weak: dict[Factor, dict[str, fx.Node]] = {}
    for seed in _seeds(program, flow):
        for leaf in leaves(seed.dim):
            (strong if seed.strong else weak).setdefault(leaf, {}).setdefault(seed.name, seed.site)
    found = {leaf: Naming(frozenset(names), tuple(names.items())) for leaf, names in strong.items()}
    _spread(flow, found)
    for leaf, names in weak.items():
        if leaf not in found:
            name = min(names, key=_WEAK.index)
            found[leaf] = Naming(frozenset({name}), ((name, names[name]),))
    _spread(flow, found)
    return found


def _spread(flow: Flow, found: dict[Factor, Naming]) -> None:
    """A part of a named axis has its name, and an axis has the name that its named parts share."""
    down = [(leaves(p.whole), leaves(p.part)) for p in flow.pieces] + [
        (leaves(a), leaves(b)) for a, b in flow.resampled
    ]
    up: dict[Factor, list[Factors]] = {}
    for whole, part in [(p.whole, p.part) for p in flow.pieces if p.telling] + flow.resampled:
        if len(leaves(whole)) == 1:
            up.setdefault(leaves(whole)[0], []).append(leaves(part))
    before = None
    while before != len(found):
        before = len(found)
        while any(_give(leaf, _shared(whole, found), found) for whole, part in down for leaf in part):
            pass
        for factor, parts in up.items():
            names = [n for n in (_shared(part, found) for part in parts) if n]
            _give(factor, frozenset.intersection(*names) if names else frozenset(), found)


def _give(leaf: Factor, names: frozenset[str], found: dict[Factor, Naming]) -> bool:
    """Name an axis that has no name, or a grid axis a token axis; True if that is new."""
    mine = found.get(leaf)
    if names and mine is None:
        found[leaf] = Naming(names)
        return True
    if mine and "token" in names - mine.names and mine.names <= set(GRID):
        found[leaf] = Naming(mine.names | {"token"}, mine.sites)
        return True
    return False


def _shared(dim: Factors, found: dict[Factor, Naming]) -> frozenset[str]:
    """The names that all factors of a dimension share; none where one is in conflict."""
    namings = [found.get(leaf) for leaf in dim]
    if not namings or any(n is None or n.conflict for n in namings):
        return frozenset()
    return frozenset.intersection(*(n.names for n in namings if n))


def _seeds(program: Program, flow: Flow) -> Iterator[Seed]:
    for node in program.graph.nodes:
        if is_attention(node) or is_call(node, aten.scaled_dot_product_attention):
            yield from _of_attention(flow, node)
        elif is_call(node, aten.conv1d, aten.conv2d, aten.conv3d):
            yield from _of_convolution(flow, node)
        elif is_call(node, aten.layer_norm, aten.rms_norm):
            yield from (Seed(d, "channel", node, False) for d in flow.of(node)[-1:])
    sites = program.analysis(linears)
    yield from _of_linears(flow, sites)
    yield from _of_vocabulary(program, flow, sites)
    yield from _of_experts(program, flow, sites)


def _of_attention(flow: Flow, node: fx.Node) -> Iterator[Seed]:
    """Operands are (batch ..., head, token, channel); three dimensions may have the heads in the batch, or none."""
    over_channels = is_attention(node) and spec_of(node).kind == "channel"
    for operand in node.args[:3]:
        dims = flow.of(operand)
        yield Seed(dims[-2], "channel" if over_channels else "token", node)
        if not over_channels:
            yield Seed(dims[-1], "channel", node)
        if len(dims) > 3:
            yield Seed(dims[-3], "head", node)
            # Windows and frames may be merged into the batch, so only a dimension of one factor is surely that.
            batch = leaves(dims[0])
            yield Seed(batch[:1], "batch", node, strong=len(batch) == 1 and len(dims) == 4)
        elif len(dims) == 3 and len(merged := leaves(dims[0])) > 1:
            yield Seed(merged[:1], "batch", node, False)
            yield Seed(merged[1:], "head", node, False)


def _of_convolution(flow: Flow, node: fx.Node) -> Iterator[Seed]:
    spatial = {aten.conv1d: ("token",), aten.conv2d: GRID[1:], aten.conv3d: GRID}[node.target.overloadpacket]
    for dims in (flow.of(node.args[0]), flow.of(node)):
        yield Seed(dims[-1 - len(spatial)], "channel", node, False)
        for dim, name in zip(dims[-len(spatial) :], spatial, strict=True):
            yield Seed(dim, name, node, strong=len(spatial) > 1)
        if len(dims) == len(spatial) + 2:
            batch = leaves(dims[0])
            yield Seed(batch[:1], "batch", node, strong=len(batch) == 1)


def _of_linears(flow: Flow, sites: list[Linear]) -> Iterator[Seed]:
    for site in sites:
        if site.kind in ("linear", "conv1d", "matmul", "expert"):
            for dim in flow.of(site.weight)[-2:]:
                yield Seed(dim, "channel", site.node, False)


def _of_vocabulary(program: Program, flow: Flow, sites: list[Linear]) -> Iterator[Seed]:
    """Rows of the table that the caller's token ids index, and of the linear that makes the output of as many.

    Ids are an integer input with more than one dimension, read without arithmetic: positions are computed, and a class
    label has no tokens.
    """
    tables = []
    for site in program.analysis(embeddings):
        indices, table = flow.of(site.indices), flow.of(site.weight)
        yield Seed(table[1], "channel", site.node, False)
        if len(indices) < 2:
            yield from (Seed(d, "token", site.node, False) for d in indices)
            continue
        yield Seed(indices[-1], "token", site.node)
        yield Seed(indices[0], "batch", site.node, False)
        source = site.indices
        while is_call(source, *_READS_ONLY):
            source = source.args[0]
        if source.op == "placeholder" and not program.tensors.is_constant(source):
            tables.append(site)
            yield Seed(table[0], "vocabulary", site.node)
    for head in sites:
        if any(same_size(head.out_features, shape(t.weight)[0]) for t in tables) and _is_output(head.node):
            rows = flow.of(head.weight)[-1 if head.transposed else 0]
            yield Seed(rows, "vocabulary", head.node)


def _is_output(node: fx.Node) -> bool:
    """The value is returned, perhaps scaled, capped or reshaped, and not used otherwise."""
    while True:
        users = list(node.users)
        if any(u.op == "output" for u in users):
            return True
        if len(users) != 1 or not is_call(users[0], *_AFTER_HEAD):
            return False
        node = users[0]


def _of_experts(program: Program, flow: Flow, sites: list[Linear]) -> Iterator[Seed]:
    """The first dimension of a stack of expert weights, and the scores that a router picks the best of."""
    stacks = [(s.weight, s.node) for s in program.analysis(expert_stacks)]
    stacks += [(s.weight, s.node) for s in sites if s.kind == "expert"]
    grouped = (
        n for n in program.graph.nodes if str(n.target).split(".")[1:2] in (["_grouped_mm"], ["grouped_mm_fallback"])
    )
    stacks += [(n.args[1], n) for n in grouped if len(shape(n.args[1])) == 3]
    for weight, node in stacks:
        rows, *columns = flow.of(weight)
        yield Seed(rows, "expert", node)
        for dim in columns:
            yield Seed(dim, "channel", node, False)
    counts = {shape(weight)[0] for weight, _ in stacks}
    routers = {leaf for s in sites if s.out_features in counts for leaf in leaves(flow.of(s.node)[-1])}
    for node in program.graph.find_nodes(op="call_function", target=aten.topk.default) if stacks else ():
        scores = node.args[0]
        dim = flow.of(scores)[node.args[2] if len(node.args) > 2 else -1]
        if isinstance(value(scores), Tensor) and routers.intersection(leaves(dim)):
            yield Seed(dim, "expert", node)
