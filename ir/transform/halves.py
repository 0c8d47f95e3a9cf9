"""A graph in two: places where one tensor is all that goes on, and the graphs before and after such a place."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from accelpass.ir.analyses.axes.flow import CASTS, VIEWS, positions
from accelpass.ir.core.graph import aten, call, clean_path, is_call, known, mutates, placeholders, root, value
from accelpass.ir.core.program import Program
from accelpass.ir.errors import AccelpassError

_SIZES = (aten.sym_size, aten.sym_numel, aten._assert_tensor_metadata)
_FILLS = {aten.new_zeros.default: 0, aten.new_ones.default: 1, aten.zeros_like.default: 0, aten.ones_like.default: 1}
_ASSERTIONS = (aten._assert_tensor_metadata, aten._assert_scalar, aten._assert_async)


class CannotSplit(AccelpassError):
    """Says what more than one tensor goes over a place, or that there is no such place."""


@dataclass(frozen=True, eq=False)
class Cut:
    """A place where a single tensor holds all that the rest of the graph needs of the caller's inputs.

    Attributes:
        node: the tensor.
        path: the module whose result it is; where it is no module's, the name of the operation.
    """

    node: fx.Node
    path: str


def prepare(program: Program) -> None:
    """Take out what would tie the end of a graph to its beginning without a value going from one to the other.

    Assertions go, and a tensor that is filled in the shape or on the device of another is made without it.
    """
    graph = program.graph
    for node in [*graph.nodes]:
        if is_call(node, *_ASSERTIONS):
            graph.erase_node(node)
        elif node.target in _FILLS:
            made = value(node)
            size = node.args[1] if len(node.args) > 1 else list(made.shape)
            if all(isinstance(s, int | fx.Node) for s in size):
                with graph.inserting_before(node):
                    new = call(
                        graph, node, aten.full.default, size, _FILLS[node.target], dtype=made.dtype, device=made.device
                    )
                node.replace_all_uses_with(new)
                graph.erase_node(node)
    graph.eliminate_dead_code()
    program.changed()


def of_caller(program: Program) -> set[fx.Node]:
    """What is computed from values of the caller's inputs; not what only needs their sizes."""
    found: set[fx.Node] = set(placeholders(program.gm))
    while True:
        before = len(found)
        for node in program.graph.nodes:
            if (
                node.op in ("call_function", "output")
                and not is_call(node, *_SIZES)
                and not found.isdisjoint(node.all_input_nodes)
            ):
                found.add(node)
                found.update(root(written) for written in mutates(node))
        if len(found) == before:
            return found


def cuts(program: Program) -> list[Cut]:
    """All places where one tensor goes on, in graph order, without those that only look at the one before. See :func:`prepare`."""
    found: list[Cut] = []
    ends = _ends(program)
    for node, live in _live(program):
        if live == [node] and node.op != "placeholder" and isinstance(value(node), Tensor):
            path = ends.get(node)
            if path is None and found and is_call(node, *VIEWS, *CASTS):
                continue
            if any(user.op != "output" for user in node.users) and not _unknown_sizes(program, node):
                found.append(Cut(node, path or node.name))
    return found


def find_cut(program: Program, path: str) -> Cut:
    """The place behind a module.

    Raises:
        CannotSplit: there is no such module, or several tensors go on from it; says which.
    """
    found = cuts(program)
    for cut in found:
        if cut.path == path or cut.node.name == path:
            return cut
    ends = {inner: node for node, inners in _all_ends(program).items() for inner in inners}
    places = ", ".join(c.path for c in found[:8]) + (", ..." if len(found) > 8 else "") if found else "there is none"
    if path not in ends:
        raise CannotSplit(f"at={path!r}: no module of that name ends in this graph; it can be split behind: {places}")
    same = next((c for c in found if c.node is ends[path]), None)
    if same is not None:
        return same
    live = next((live for node, live in _live(program) if node is ends[path]), [])
    names = ", ".join(f"{n.name} {tuple(value(n).shape)}" for n in live if isinstance(value(n), Tensor))
    if not live:
        raise CannotSplit(
            f"at={path!r}: what it computes does not depend on the model's inputs; split behind: {places}"
        )
    what = (
        f"{len(live)} values go on from there ({names})"
        if len(live) > 1 or live[0] is not ends[path]
        else "it ends the model"
    )
    raise CannotSplit(f"at={path!r}: {what}, and a split sends one tensor; split behind: {places}")


def halves(program: Program, cut: Cut) -> tuple[fx.GraphModule, fx.GraphModule]:
    """The graph up to a cut, which returns its tensor, and the graph behind, which takes that alone.

    What does not depend on the caller (positions, masks of a fixed length) is computed where it is needed. Weights are the same
    objects, under the same paths.
    """
    nodes, dependent = [*program.graph.nodes], program.analysis(of_caller)
    at = nodes.index(cut.node)
    head = fx.Graph()
    env: dict[fx.Node, fx.Node] = {}
    for node in nodes[: at + 1]:
        env[node] = head.node_copy(node, env.__getitem__)
    head.output(env[cut.node])
    tail = fx.Graph()
    stream = tail.placeholder("stream")
    stream.meta["val"] = value(cut.node)
    env = {cut.node: stream}
    for index, node in enumerate(nodes):
        if node is cut.node or (index < at and node in dependent):
            continue
        if is_call(node, *_SIZES) and _is_before(node.args[0], nodes, at, dependent):
            dim = _dim_of(value(cut.node), value(node))
            if dim is not None:  # one that nothing behind the cut needs has no size there
                env[node] = call(tail, node, aten.sym_size.int, stream, dim)
            continue
        if node.op != "output" and any(n not in env for n in node.all_input_nodes):
            continue  # it needs such a size, and so nothing behind the cut needs it
        env[node] = tail.node_copy(node, env.__getitem__)
    if any(root(written) is stream for node in tail.nodes for written in mutates(node)):
        with tail.inserting_after(stream):  # what was sent is the caller's
            own = tail.call_function(aten.clone.default, (stream,))
        own.meta["val"] = value(stream)
        stream.replace_all_uses_with(own, delete_user_cb=lambda user: user is not own)
    made = []
    for graph in (head, tail):
        graph.eliminate_dead_code()
        graph.lint()
        made.append(fx.GraphModule(program.gm, graph).eval())
    return made[0], made[1]


def _is_before(node: Any, nodes: Sequence[fx.Node], at: int, dependent: set[fx.Node]) -> bool:
    return isinstance(node, fx.Node) and node in dependent and node in nodes[:at]


def _unknown_sizes(program: Program, cut: fx.Node) -> bool:
    """Whether the graph behind a cut needs a size that its tensor does not have."""
    nodes, dependent = [*program.graph.nodes], program.analysis(of_caller)
    at = nodes.index(cut)
    missing: set[fx.Node] = set()
    for index, node in enumerate(nodes):
        if index <= at and node in dependent:
            continue
        lost = is_call(node, aten.sym_size) and _is_before(node.args[0], nodes, at, dependent)
        if (lost and _dim_of(value(cut), value(node)) is None) or not missing.isdisjoint(node.all_input_nodes):
            missing.add(node)
            if node in dependent:
                return True
    return False


def _dim_of(tensor: Tensor, size: Any) -> int | None:
    return next((dim for dim, found in enumerate(tensor.shape) if known(found == size)), None)


def _live(program: Program) -> list[tuple[fx.Node, list[fx.Node]]]:
    """Behind each node that depends on the caller: the nodes among these that later ones read."""
    dependent = program.analysis(of_caller)
    place = program.analysis(positions)
    last = {
        node: max((place[u] for u in node.users if u in dependent), default=-1)
        for node in program.graph.nodes
        if node in dependent
    }
    found: list[tuple[fx.Node, list[fx.Node]]] = []
    live: list[fx.Node] = []
    for node in program.graph.nodes:
        if node in dependent and node.op != "output":
            live = [n for n in (*live, node) if last[n] > place[node]]
            found.append((node, live))
    return found


def _ends(program: Program) -> dict[fx.Node, str]:
    """The outermost module that ends with a node."""
    return {node: paths[0] for node, paths in _all_ends(program).items()}


def _all_ends(program: Program) -> dict[fx.Node, list[str]]:
    """The modules that end with a node, outermost first."""
    last: dict[str, fx.Node] = {}
    for node in program.graph.nodes:
        if node.op == "call_function":
            for path, _ in (node.meta.get("nn_module_stack") or {}).values():
                last[clean_path(str(path))] = node
    ends: dict[fx.Node, list[str]] = {}
    for path, node in last.items():
        if path:
            ends.setdefault(node, []).append(path)
    return {node: sorted(paths, key=len) for node, paths in ends.items()}


def encoded(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A tensor as codes of 8 bits, with their scale and zero point (BottleFit, arXiv 2201.02693, section III).

    One range for the whole tensor, which always holds 0 (inferred: values of one sign far from 0 do not fit otherwise), so that a
    value comes back within 1.5 steps of ``(largest - smallest) / 255``. What is not finite comes back as NaN.
    """
    real = x.float()
    least, most = real.flatten().amin(0).clamp(max=0.0), real.flatten().amax(0).clamp(min=0.0)
    scale = (most - least) / 255
    scale = torch.where(scale == 0, torch.ones_like(scale), scale)
    zero = (-least / scale).floor().clamp(0, 255)
    codes = (zero + real / scale).clamp(0, 255).round()
    return codes.to(torch.uint8), scale, zero.to(torch.uint8)


def decoded(codes: Tensor, scale: Tensor, zero: Tensor, dtype: torch.dtype) -> Tensor:
    """The reverse of :func:`encoded`."""
    return ((codes.float() - zero.float()) * scale).to(dtype)
