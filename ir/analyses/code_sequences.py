"""Where images that were written as a sequence of codes are read: decoders of 1-D tokenizers (TiTok, One-D-Piece)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx

from accelpass.ir.analyses.axes.axes import Dim, axes
from accelpass.ir.analyses.axes.flow import output_nodes, reached_from, tensors
from accelpass.ir.core.graph import aten, is_call, module_path, value
from accelpass.ir.core.program import Program

_LOOKUPS = (aten.embedding, aten.index, aten.index_select)


@dataclass(frozen=True, eq=False)
class CodeSequence:
    """Vectors of a codebook that are joined with learnt tokens, of which alone the image is made.

    Attributes:
        path: the module that joins them.
        count: codes of an image; vocabulary: vectors of the codebook.
        dim: the sequence's dimension of codes.
        roots: where the sequence begins: what the encoder gives, the caller's codes, the codes themselves where they are returned.
        region: what is computed of them one by one, and of the joined sequence, in graph order.
        results: what the graph returns of it.
    """

    path: str
    count: int
    vocabulary: int
    dim: Dim
    roots: tuple[fx.Node, ...]
    region: tuple[fx.Node, ...]
    results: tuple[fx.Node, ...]


def code_sequences(program: Program) -> list[CodeSequence]:
    """Those of a graph, in order. Use it as ``program.analysis(code_sequences)``."""
    return [found for node in program.graph.nodes if is_call(node, aten.cat) for found in _joined(program, node)]


def _joined(program: Program, node: fx.Node) -> Iterator[CodeSequence]:
    known = program.analysis(axes)
    at = (node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)) % value(node).dim()
    parts: Any = node.args[0]
    given = [p for p in parts if not _of_weights(program, p)]
    if len(given) != 1 or len(parts) < 2 or not known.of(given[0]):
        return
    dim, returned = known.of(given[0])[at], output_nodes(program)
    has = lambda n: any(set(dim.leaves) <= set(d.leaves) for d in known.of(n))  # noqa: E731
    if not dim.leaves or not isinstance(dim.size, int):
        return
    above, roots, front = set[fx.Node](), set[fx.Node](), [given[0]]
    while front:
        one = front.pop()
        if one in above or one in roots:
            continue
        before = [n for n in one.all_input_nodes if has(n)]
        if one in returned or one.op != "call_function" or not before:
            roots.add(one)
        else:
            above.add(one)
            front += before
    tables = [n.args[0] for n in {*above, *roots} if is_call(n, *_LOOKUPS) and _of_weights(program, n.args[0])]
    own = [n for n in roots if not _of_weights(program, n)]
    if not tables or not own:
        return
    behind = reached_from(program, node)
    results = [n for n in dict.fromkeys(returned) if n in behind]
    needed, front = set[fx.Node](), list(results)
    while front:
        one = front.pop()
        if one in behind and one not in needed:
            needed.add(one)
            front += one.all_input_nodes
    if results:
        size = value(tables[0]).shape[0]
        path = module_path(node) or "decoder"
        yield CodeSequence(
            path, dim.size, int(size), dim, tuple(sorted(own)), tuple(sorted(above | needed)), tuple(results)
        )


def _of_weights(program: Program, node: Any) -> bool:
    """Whether a tensor is computed from the model's weights alone, and from sizes."""
    seen, front = set[fx.Node](), [node]
    while front:
        one = front.pop()
        if not isinstance(one, fx.Node) or one in seen or not isinstance(value(one), Tensor | tuple | list):
            continue
        seen.add(one)
        if one.op == "placeholder" and not program.tensors.is_constant(one):
            return False
        if one.op == "call_function":
            front += tensors(one)
    return True
