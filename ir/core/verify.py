"""The rules of the IR, checked after each pass: what breaks one is named together with the pass and the rule."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from accelpass.ir.core.graph import known, value, written_inputs
from accelpass.ir.core.program import Program
from accelpass.ir.errors import GraphError
from accelpass.ir.torch_private import tree_leaves


@dataclass(frozen=True)
class Signature:
    """What a pass must not change: shapes and dtypes of the outputs and of the inputs that are written to."""

    outputs: tuple[Any, ...]
    mutated: tuple[str, ...]


def signature(program: Program) -> Signature:
    """The signature of the graph as it is now."""
    (output,) = program.graph.find_nodes(op="output")
    results: Any = output.args[0]
    if further := program.kept_alive + len(program.remembered):  # no results of the model
        results = results[: len(results) - further]
    outputs = tuple(_described(value(n)) for n in tree_leaves(results))
    inputs = (n for n in written_inputs(program.graph) if not program.tensors.is_state(n))
    return Signature(outputs, tuple(sorted(n.name for n in inputs)))


def verify(program: Program, before: Signature, after: str, origin: str = "") -> None:
    """Raise :class:`GraphError` naming ``after`` (a pass) if the graph broke a rule.

    Args:
        origin: a sentence on where the pass comes from, for the error.
    """

    def broken(rule: str, detail: str) -> GraphError:
        return GraphError(
            f"after {after}: broken rule: {rule}: {detail}. This is a bug in the pass {after!r}. {origin}".rstrip()
        )

    try:
        program.graph.lint()
    except Exception as cause:  # lint raises RuntimeError, AssertionError, ...
        raise broken("the graph is well formed", str(cause)) from cause
    for node in program.graph.nodes:
        if node.op in ("call_function", "placeholder") and value(node) is None and node.users:
            raise broken("every used node has a fake value", node.format_node() or node.name)
    now = signature(program)
    if len(now.outputs) != len(before.outputs):
        raise broken("the outputs stay", f"{len(before.outputs)} before, {len(now.outputs)} now")
    for index, (old, new) in enumerate(zip(before.outputs, now.outputs, strict=True)):
        if not _same(old, new):
            raise broken("shapes and dtypes of the outputs stay", f"output {index} was {old}, is {new}")
    if {*before.mutated} - program.unwritten != {*now.mutated} - program.unwritten:
        raise broken("mutated inputs stay", f"{list(before.mutated)} before, {list(now.mutated)} now")


def _described(found: Any) -> Any:
    return (tuple(found.shape), found.dtype, found.device) if isinstance(found, Tensor) else type(found)


def _same(old: Any, new: Any) -> bool:
    if not (isinstance(old, tuple) and isinstance(new, tuple)):
        return old == new
    sizes = len(old[0]) == len(new[0]) and all(known(a == b) for a, b in zip(old[0], new[0], strict=True))
    return sizes and old[1:] == new[1:]
