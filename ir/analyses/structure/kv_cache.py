"""Key-value caches: where new keys and values are written, and where attention reads them together with the old."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import fx

from accelpass.ir.analyses.axes.flow import CASTS, VIEWS, output_nodes, positions, writes
from accelpass.ir.attention.recognition.detect import Attention, detect
from accelpass.ir.core.graph import aten, is_call, known, mutates, root, through, value
from accelpass.ir.core.program import Program

_LAYOUT = (*CASTS, *VIEWS, aten.repeat_interleave, aten.repeat, aten.slice, aten.roll)
_INDEXED = (aten.index_copy, aten.index_copy_, aten.index_put, aten.index_put_, aten.slice_scatter, aten.index_add_)
_FAR = 16

Pair = tuple[fx.Node, fx.Node]


@dataclass(frozen=True)
class KVCache:
    """The cache of one attention; pairs are (keys, values).

    Attributes:
        kind: ``static`` (a graph input that is written in place) or ``dynamic`` (old and new are concatenated, and
            returned).
        path: the module that attends.
        attentions: those that read it; several where layers share one cache.
        buffers: the inputs that hold what earlier calls stored; None for a dynamic cache that is still empty.
        new: what this call adds.
        writes: the calls that store: the in-place writes, or the concatenations (for an empty dynamic cache, ``new``).
        reads: what attention reads.
        positions: where the new tokens go, if the write is indexed.
    """

    kind: str
    path: str
    attentions: tuple[Attention, ...]
    buffers: Pair | None
    new: Pair
    writes: Pair
    reads: Pair
    positions: fx.Node | None = None


@dataclass(frozen=True)
class _Side:
    """The same for keys, or for values, alone."""

    kind: str
    buffer: fx.Node | None
    new: fx.Node
    write: fx.Node
    read: fx.Node
    positions: fx.Node | None = None


def kv_caches(program: Program) -> list[KVCache]:
    """All caches that a detected attention reads, in execution order."""
    written = program.analysis(writes)
    returned = set(output_nodes(program))
    place = program.analysis(positions)
    found: dict[Pair, KVCache] = {}
    for attention in program.analysis(detect):
        at = place[attention.node or attention.out]
        sides = [_side(program, operand, at, written, returned) for operand in (attention.k, attention.v)]
        k, v = sides
        if k is None or v is None or k.kind != v.kind or k.write is v.write:
            continue
        key = (k.write, v.write)
        if key in found:
            found[key] = replace(found[key], attentions=(*found[key].attentions, attention))
            continue
        buffers = (k.buffer, v.buffer) if k.buffer is not None and v.buffer is not None else None
        reads = (k.read, v.read)
        found[key] = KVCache(
            k.kind, attention.path, (attention,), buffers, (k.new, v.new), key, reads, k.positions or v.positions
        )
    return list(found.values())


def _side(
    program: Program,
    operand: fx.Node,
    at: int,
    written: dict[fx.Node, list[fx.Node]],
    returned: set[fx.Node],
) -> _Side | None:
    """How one operand meets a cache, from what attention reads back to where old and new come together."""
    place = program.analysis(positions)
    node: fx.Node | None = operand
    for _ in range(_FAR):
        if node is None:
            return None
        base = root(node)
        stores = [w for w in written.get(base, ()) if place[w] < at]
        if stores:
            return _static(operand, base, stores)
        other = _stored_elsewhere(node, written)
        if other is not None:
            return replace(other, read=operand)
        if is_call(node, aten.cat) and (joined := _joined(node, operand, returned)) is not None:
            return joined
        if _is_returned(node, returned):
            return _Side("dynamic", None, node, node, operand)
        node = node.args[0] if is_call(node, *_LAYOUT) and isinstance(node.args[0], fx.Node) else None
    return None


def _static(operand: fx.Node, base: fx.Node, stores: list[fx.Node]) -> _Side:
    write = stores[-1]
    return _Side("static", base, _added(write, base), write, operand, _index(write))


def _index(write: fx.Node) -> fx.Node | None:
    if not is_call(write, *_INDEXED) or is_call(write, aten.slice_scatter):
        return None
    place = write.args[1] if is_call(write, aten.index_put, aten.index_put_) else write.args[2]
    if isinstance(place, list | tuple):
        place = next((p for p in reversed(place) if isinstance(p, fx.Node)), None)
    return place if isinstance(place, fx.Node) else None


def _added(write: fx.Node, base: fx.Node) -> fx.Node:
    """What a write brings that was not in the buffer: a rolled copy of it with new columns counts as those."""
    source = write.args[2] if is_call(write, aten.index_put, aten.index_put_) else write.args[-1]
    if is_call(write, aten.index_copy, aten.index_copy_, aten.index_add_):
        source = write.args[3]
    elif is_call(write, aten.copy_, aten.copy, aten.slice_scatter):
        source = write.args[1]
    node = source
    for _ in range(_FAR):
        if not isinstance(node, fx.Node):
            break
        if node is not write and mutates(node):
            return _added(node, base)
        if is_call(node, aten.cat):
            fresh = [p for p in node.args[0] if isinstance(p, fx.Node) and _origin(p) is not base]
            return fresh[-1] if fresh else node
        patches = [u for u in _touching(node) if any(root(m) is root(node) for m in mutates(u))]
        if patches:
            return _added(patches[-1], base)
        if not is_call(node, aten.slice, aten.clone, aten.roll) or not isinstance(node.args[0], fx.Node):
            break
        if is_call(node, aten.slice) and not is_call(node.args[0], aten.cat, aten.slice):
            break
        node = node.args[0]
    return source if isinstance(source, fx.Node) else write


def _touching(node: fx.Node) -> list[fx.Node]:
    """Users, and users of slices of it: what may write to a part of it."""
    found, front = [], [node]
    for _ in range(_FAR):
        if not front:
            break
        for user in front.pop().users:
            found.append(user)
            if is_call(user, aten.slice, aten.select):
                front.append(user)
    return found


def _origin(node: fx.Node) -> fx.Node:
    """The tensor that ``node`` is a layout, a part or a rotation of."""
    return through(node, *_LAYOUT)


def _stored_elsewhere(node: fx.Node, written: dict[fx.Node, list[fx.Node]]) -> _Side | None:
    """Attention reads new keys directly while a copy of them goes to a buffer (a prompt longer than the window)."""
    for user in (node, *(u for u in node.users if is_call(u, aten.slice, *CASTS))):
        for write in user.users:
            base = next((root(m) for m in mutates(write)), None)
            if base in written and user in write.args[1:] and write in written[base]:
                return _Side("static", base, node, write, node, _index(write))
    return None


def _joined(cat: fx.Node, operand: fx.Node, returned: set[fx.Node]) -> _Side | None:
    """Old and new along the tokens, the result (or a part of it) going back to the caller."""
    parts = [p for p in cat.args[0] if isinstance(p, fx.Node) and not known(value(p).numel() == 0)]
    dim = cat.args[1] if len(cat.args) > 1 else cat.kwargs.get("dim", 0)
    rank = value(cat).dim()
    if not isinstance(dim, int) or dim % rank == rank - 1 or not _is_returned(cat, returned):
        return None
    if len(parts) == 1:
        return _Side("dynamic", None, parts[0], cat, operand)
    if len(parts) != 2:
        return None
    old, new = parts
    buffer = _origin(old)
    if buffer.op not in ("placeholder", "get_attr"):
        return None
    return _Side("dynamic", buffer, new, cat, operand)


def _is_returned(node: fx.Node, returned: set[fx.Node]) -> bool:
    return node in returned or any(u in returned and is_call(u, aten.slice, *CASTS) for u in node.users)
