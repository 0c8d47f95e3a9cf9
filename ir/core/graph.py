"""Small operations on FX graphs that capture, analyses and passes share."""

from __future__ import annotations

import heapq
import operator
import re
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols, statically_known_true

from accelpass.ir.torch_private import (
    FakeTensor,
    FakeTensorMode,
    enable_python_dispatcher,
    mark_model_state,
    source_name,
    tree_leaves,
)

aten = torch.ops.aten


def placeholders(gm: fx.GraphModule) -> list[fx.Node]:
    """Placeholders in the order of the graph's inputs."""
    return list(gm.graph.find_nodes(op="placeholder"))


def value(node: object) -> Any:
    """The fake value of a node (a FakeTensor, a SymInt, a tuple, ...); other objects are returned as they are."""
    return node.meta.get("val", node.meta.get("example_value")) if isinstance(node, fx.Node) else node


def shape(node: fx.Node) -> torch.Size:
    """Shape of a node's tensor; sizes may be symbolic."""
    return value(node).shape


def fake_mode(gm: fx.GraphModule) -> FakeTensorMode | None:
    """The mode in which the graph's values were faked; None for a graph without tensors."""
    for node in gm.graph.nodes:
        found = value(node)
        if isinstance(found, FakeTensor):
            return found.fake_mode
    return None


def known(condition: Any) -> bool:
    """True only if the condition holds for all sizes; unlike ``bool`` this never adds a guard."""
    return condition if isinstance(condition, bool) else statically_known_true(condition)


def is_from_run_time(size: Any) -> bool:
    """Whether a size is computed from the values of tensors, so that it has no value while a graph is compiled."""
    return isinstance(size, torch.SymInt) and bool(free_unbacked_symbols(size))


def hint(size: Any) -> int:
    """What a size was when the graph was traced, to sort and report by; of one from run time the most. This never adds a guard."""
    if is_from_run_time(size):
        return int(size.node.shape_env.bound_sympy(size.node.expr).upper)
    return size if isinstance(size, int) else size.node.hint


def through(node: Any, *targets: Any) -> Any:
    """What ``node`` is, with calls of ``targets`` on it looked through to their first operand."""
    while is_call(node, *targets) and isinstance(node.args[0], fx.Node):
        node = node.args[0]
    return node


def append_placeholder(gm: fx.GraphModule, name: str, fake: Tensor) -> fx.Node:
    """A new input at the end of the inputs that AOTAutograd takes for model state, not for a user's tensor."""
    last = placeholders(gm)[-1]
    with gm.graph.inserting_after(last):
        node = gm.graph.placeholder(name)
    node.target = node.name  # the name that was free; arguments of one name would be one
    mark_model_state(node)
    node.meta["val"] = fake
    return node


def call(graph: fx.Graph, like: fx.Node, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
    """A call with its fake value and the provenance (module path, stack trace) of ``like``."""
    node = graph.call_function(target, args, kwargs)
    for key in ("nn_module_stack", "stack_trace", "source_fn_stack"):
        if key in like.meta:
            node.meta[key] = like.meta[key]
    refresh(node)
    return node


def refresh(node: fx.Node) -> None:
    """Compute a call node's fake value from those of its arguments."""
    args = fx.map_arg(node.args, value)
    kwargs = fx.map_arg(node.kwargs, value)
    mode = next((a.fake_mode for a in _flat(args, kwargs) if isinstance(a, FakeTensor)), None)
    assert callable(node.target)
    if mode is None:
        node.meta["val"] = node.target(*args, **kwargs)
        return
    # torch 2.11's own composite operators (linear of three dimensions) cannot count symbolic sizes; their Python forms can.
    with mode, torch.no_grad(), enable_python_dispatcher():
        node.meta["val"] = node.target(*args, **kwargs)


def replace(old: fx.Node, new: fx.Node) -> None:
    """Let ``new``, which comes right before or after ``old``, be read in its place; ``old`` is erased.

    What looks at the result through views is told where it lies now: a part of a fused product has other strides than the
    product that it replaces, and lowerings read strides from the graph.
    """
    moved = _layout(old) != _layout(new)
    old.replace_all_uses_with(new)
    old.graph.erase_node(old)
    if moved:
        _lay_out_anew(new)


def _lay_out_anew(first: fx.Node) -> None:
    """Compute the fake values of what reads ``first``, and of what reads that, as far as they change."""
    readers = [*first.users]
    heapq.heapify(readers)
    while readers:
        node = heapq.heappop(readers)
        if node.op != "call_function" or (readers and readers[0] is node):
            continue
        before = _layout(node)
        if is_call(node, aten.view):
            node.target = aten.reshape.default  # a view of what lies in one piece copies what does not
        refresh(node)
        if _layout(node) != before:
            for user in node.users:
                heapq.heappush(readers, user)


def _layout(node: fx.Node) -> list[Any]:
    """Shape, strides and offset of each tensor that a node gives; symbolic ones by name, so that none is guarded on."""
    tensors = [t for t in _flat(node.meta.get("val")) if isinstance(t, Tensor) and t.layout is torch.strided]
    return [str((t.shape, t.stride(), t.storage_offset())) for t in tensors]


def stored(x: fx.Node) -> fx.Node:
    """``x`` in memory before it is read, for a reader that reads it many times over.

    Inductor would compute a norm or an activation anew for each row of a product that it vectorises. ``as_strided`` is
    the one view that it stores its operand for. The insertion point of ``x``'s graph must be set.
    """
    tensor = value(x)
    layout = [*tensor.shape, *tensor.stride(), tensor.storage_offset()]
    if layout[-1] != 0 or not all(isinstance(n, int) for n in layout):
        return x
    return call(x.graph, x, aten.as_strided.default, x, list(tensor.shape), list(tensor.stride()))


def _flat(*trees: Any) -> Iterator[Any]:
    return iter(tree_leaves(trees))


def is_call(node: object, *targets: Any) -> bool:
    """True if ``node`` is a call of one of ``targets`` (overloads or overload packets)."""
    if not isinstance(node, fx.Node) or node.op != "call_function":
        return False
    return node.target in targets or getattr(node.target, "overloadpacket", None) in targets


def mutates(node: fx.Node) -> list[fx.Node]:
    """The argument nodes that a call writes to."""
    schema = getattr(node.target, "_schema", None)
    if node.op != "call_function" or schema is None or not schema.is_mutable:
        return []
    written = []
    for index, argument in enumerate(schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            given = node.args[index] if index < len(node.args) else node.kwargs.get(argument.name)
            written += [n for n in _flat(given) if isinstance(n, fx.Node)]
    return written


def draws(node: fx.Node) -> bool:
    """Whether a call may give something else each time."""
    return torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())


def root(node: fx.Node) -> fx.Node:
    """The tensor whose memory ``node`` may be, by what the operators' schemas declare."""
    while node.op == "call_function":
        first = node.args[0] if node.args else None
        if not isinstance(first, fx.Node):
            break
        schema = getattr(node.target, "_schema", None)
        aliases = schema is not None and schema.arguments and schema.arguments[0].alias_info is not None
        if node.target is not operator.getitem and not aliases:
            break
        node = first
    return node


def written_inputs(graph: fx.Graph) -> frozenset[fx.Node]:
    """Inputs and attributes that the graph writes to: key/value caches, running statistics."""
    written = (root(target) for node in graph.nodes for target in mutates(node))
    return frozenset(n for n in written if n.op in ("placeholder", "get_attr"))


ARGUMENT = "argument_name"
"""Key of ``meta`` of an exported graph's inputs."""


def argument_name(node: fx.Node) -> str:
    """The name under which a model's caller passes an input."""
    if ARGUMENT in node.meta:
        return str(node.meta[ARGUMENT])
    words = re.findall(r"\w+", source_name(node))
    return words[-1] if words and not words[-1].isdigit() else node.name


def size_among(nodes: Sequence[fx.Node], size: torch.SymInt) -> tuple[int, int | None] | None:
    """Which input says how large a symbolic size is: its position, and the dimension or None if it is the number."""
    for at, node in enumerate(nodes):
        held = value(node)
        if isinstance(held, torch.SymInt) and known(held == size):
            return at, None
        if isinstance(held, Tensor):
            for dim, found in enumerate(held.shape):
                if known(found == size):
                    return at, dim
    return None


def module_path(node: fx.Node) -> str:
    """Path of the innermost module whose forward made the node, without Dynamo's root (``layers.3.self_attn``)."""
    stack = node.meta.get("nn_module_stack")
    if not stack:
        return ""
    path = next(reversed(stack.values()))[0]
    return clean_path(path)


def clean_path(path: str) -> str:
    """``L['self'].model.layers.slice(..)[3].mlp`` and ``L['self']._modules['a']`` as a user would write them."""
    path = re.sub(r"^L\['\w+'\]\.?", "", path)
    path = re.sub(r"\.slice\([^)]*\)", "", path)
    path = re.sub(r"\['?([^'\]]+)'?\]", r".\1", path)
    path = re.sub(r"\b(__dict__|_modules|_parameters|_buffers)\.", "", path)
    return path.strip(".")
