"""From semantic nodes back to operators: what the model had where no pass edited, a lowering of the spec elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx

from accelpass.ir.attention.recognition.insert import base, inverse, shared
from accelpass.ir.attention.spec.block_select import BlockSelect
from accelpass.ir.attention.spec.faults import named, shapes_said
from accelpass.ir.attention.spec.op import ATTENTION, attend, is_attention, spec_of
from accelpass.ir.attention.spec.spec import All, AttentionSpec, Band, BlockList, Dense, SinksAndWindow
from accelpass.ir.attention.spec.steps import STEPS
from accelpass.ir.core.graph import hint, module_path, value
from accelpass.ir.core.program import Program
from accelpass.ir.errors import AccelpassError
from accelpass.ir.transform.splice import KEPT, splice, trace

Run = Callable[[Tensor, Tensor, Tensor, Sequence[Tensor], AttentionSpec], tuple[Tensor, dict[str, Tensor]]]


class NoLowering(AccelpassError):
    """A spec that nothing can compute; names the passes that made it."""


@dataclass(frozen=True)
class Lowering:
    """One way to compute edited attentions.

    Attributes:
        name: shown to users.
        why_not: the reason it cannot take a node with this spec, or None if it can. The node is there for shapes,
            dtypes and devices.
        run: traced on fake tensors; like ``op.attend``. May call custom ops.
        rank: of two that can, the one with the higher rank is used.
        in_python: it emits an operator that runs in Python, which no library compiled ahead of time can call.
    """

    name: str
    why_not: Callable[[AttentionSpec, fx.Node], str | None]
    run: Run
    rank: int = 0
    in_python: bool = False


def _composed_why_not(spec: AttentionSpec, node: fx.Node) -> str | None:
    if not isinstance(spec.store, Dense):
        return f"store {spec.store.part} is not known to it"
    if isinstance(spec.select, BlockSelect) and any(value(n).dim() != 4 for n in node.args[:2]):
        return f"selection {spec.select.part} is of (batch, heads, tokens, d) operands"
    if not isinstance(spec.select, All | Band | SinksAndWindow | BlockList | BlockSelect):
        return f"selection {spec.select.part} is not known to it"
    unknown = [s.kind for s in spec.steps if s.kind not in STEPS]
    return f"step {unknown[0]} is not known to it" if unknown else None


COMPOSED = Lowering("composed", _composed_why_not, attend, rank=-1000)


class Lowerings:
    """A set of lowerings; the default one holds what is registered with :func:`register_lowering`."""

    def __init__(self, *lowerings: Lowering) -> None:
        self.all = [COMPOSED, *lowerings]

    def pick(self, spec: AttentionSpec, node: fx.Node) -> Lowering:
        """The best lowering for a node.

        Raises:
            NoLowering: none can; says why for each.
        """
        reasons = []
        for lowering in sorted(self.all, key=lambda one: -one.rank):
            why = lowering.why_not(spec, node)
            if why is None:
                return lowering
            reasons.append(f"{lowering.name}: {why}")
        makers = ", ".join(dict.fromkeys(f"{who!r} ({part})" for who, part in spec.edits)) or "no pass"
        site = spec.site or module_path(node) or node.name
        raise NoLowering(
            f"nothing can compute the attention at {site} as {makers} want it: {'; '.join(reasons)}. "
            "Leave one of these passes out there, or register a lowering."
        )


DEFAULT = Lowerings()


def without_python() -> Lowerings:
    """The registered lowerings but for those that run in Python."""
    return Lowerings(*(one for one in DEFAULT.all if one is not COMPOSED and not one.in_python))


def register_lowering(lowering: Lowering) -> None:
    """Offer a lowering to every later :func:`lower` that is given no set of its own."""
    if any(one.name == lowering.name for one in DEFAULT.all):
        raise ValueError(f"a lowering named {lowering.name!r} is registered already")
    DEFAULT.all.append(lowering)


def lower(program: Program, lowerings: Lowerings | None = None) -> dict[str, str]:
    """Replace every semantic attention by operators.

    Returns:
        For each former node: ``origin`` (the model's own operators) or the name of the lowering.

    Raises:
        NoLowering: before anything is changed, if some spec cannot be computed.
    """
    lowerings = lowerings or DEFAULT
    plan: list[tuple[fx.Node, Lowering | None]] = []
    for node in program.graph.nodes:
        if is_attention(node):
            plan.append((node, None if is_as_inserted(node) else lowerings.pick(spec_of(node), node)))
    alive = {n.name: n for n in program.graph.nodes}
    used = {}
    for node, lowering in plan:
        used[node.name] = lowering.name if lowering else "origin"
        if lowering is None:
            _inline_origin(program.graph, node, alive)
        else:
            _inline_traced(program, node, lowering)
    if plan:
        program.gm.recompile()
        program.changed()
    return used


def is_as_inserted(node: fx.Node) -> bool:
    """No pass changed the spec, nor gave different tensors to operands that were one."""
    return (
        node.target is ATTENTION
        and "attention_origin" in node.meta
        and node.args[-1] == node.meta["attention_spec"]
        and shared(node) == node.meta["attention_shared"]
    )


def renew_origin(program: Program, node: fx.Node) -> None:
    """Let an attention whose operands became smaller count as the model's own: what its spec lowers to is its new origin.

    Raises:
        NoLowering: nothing can compute it.
    """
    if node.target is ATTENTION and "attention_origin" in node.meta:
        give_origin(program, node)


def give_origin(program: Program, node: fx.Node) -> None:
    """Let an attention that was put together count as the model's own, which passes may then edit or write anew.

    Raises:
        NoLowering: nothing can compute it.
    """
    spec, order = spec_of(node), memory_order(value(node))
    operands = [*node.args[:3], *node.args[3]]
    lowering = DEFAULT.pick(spec, node)

    def run(*given: Tensor) -> list[Tensor]:
        return [_in_order(lowering.run(given[0], given[1], given[2], given[3:], spec)[0], order)]

    origin = trace(program, run, operands)
    (output,) = origin.graph.find_nodes(op="output")
    output.args = (output.args[0][0],)
    origin.recompile()
    node.meta |= {"attention_origin": origin, "attention_spec": node.args[-1], "attention_shared": shared(node)}


def _inline_origin(graph: fx.Graph, node: fx.Node, alive: dict[str, fx.Node]) -> None:
    origin: fx.GraphModule = node.meta["attention_origin"]
    operands = [*node.args[:3], *node.args[3]]
    env: dict[fx.Node, Any] = dict(zip(origin.graph.find_nodes(op="placeholder"), operands, strict=True))
    (output,) = origin.graph.find_nodes(op="output")
    result = output.args[0]
    with graph.inserting_before(node):
        for old in origin.graph.nodes:
            if old in env or old is output or (old is result and _is_adapter(old)):
                continue
            if _is_adapter(old) and (cancelled := _cancelled(env[old.args[0]], old)) is not None:
                env[old] = cancelled
                continue
            env[old] = _alive(old, env, alive) or _copied(graph, old, env)
    for old in reversed(env):  # a size on the way to one that the graph still has
        new, is_size = env[old], not isinstance(value(old), Tensor | tuple | list)
        if old.op == "call_function" and is_size and alive.get(new.name) is not new and not new.users:
            graph.erase_node(new)
    if _is_adapter(result):
        for user in list(node.users):
            if _is_adapter(user) and tuple(user.args[1]) == inverse(tuple(result.args[1])):
                user.replace_all_uses_with(env[result.args[0]])
                graph.erase_node(user)
        if node.users:
            with graph.inserting_before(node):
                env[result] = _copied(graph, result, env)
    if node.users:
        node.replace_all_uses_with(env[result])
    graph.erase_node(node)
    _erase_adapters(graph, operands)


def _is_adapter(node: Any) -> bool:
    return isinstance(node, fx.Node) and bool(node.meta.get("attention_adapter"))


def _cancelled(given: fx.Node, adapter: fx.Node) -> fx.Node | None:
    """What is under an adapter of the graph that ``adapter`` undoes."""
    if _is_adapter(given) and tuple(given.args[1]) == inverse(tuple(adapter.args[1])):
        return base(given)
    return None


def _alive(old: fx.Node, env: dict[fx.Node, Any], alive: dict[str, fx.Node]) -> fx.Node | None:
    """The model's own node, if something else kept it: probabilities that are returned, a shared repetition."""
    node = alive.get(old.meta.get("attention_was", ""))
    if node is None or node._erased:
        return None
    if not isinstance(value(old), Tensor | tuple | list):  # a size: whatever computes it
        return node if not isinstance(value(node), Tensor) and value(node) == value(old) else None
    if node.target is not old.target:
        return None
    same = fx.map_arg((old.args, old.kwargs), env.__getitem__) == (node.args, node.kwargs)
    return node if same else None


def _copied(graph: fx.Graph, old: fx.Node, env: dict[fx.Node, Any]) -> fx.Node:
    new = graph.node_copy(old, env.__getitem__)
    new.meta = {k: old.meta[k] for k in ("val", *KEPT) if k in old.meta}
    return new


def _erase_adapters(graph: fx.Graph, operands: Sequence[Any]) -> None:
    for operand in operands:
        if _is_adapter(operand) and not operand.users and not operand._erased:
            graph.erase_node(operand)


def _inline_traced(program: Program, node: fx.Node, lowering: Lowering) -> None:
    """Trace a lowering on the node's fake operands and put its operators in the node's place."""
    graph, spec = program.graph, spec_of(node)
    operands = [*node.args[:3], *node.args[3]]
    many = node.target is not ATTENTION
    order = memory_order(value(node)[0] if many else value(node))  # not in the trace: its strides may be symbolic

    def run(*given: Tensor) -> list[Tensor]:
        out, found = lowering.run(given[0], given[1], given[2], given[3:], spec)
        return [_in_order(out, order), *(found[name] for name in sorted(spec.statistics))]

    given = shapes_said({name: value(n) for name, n in zip("qkv", operands, strict=False)})
    with named(spec, spec.site or module_path(node), f"blocks of keys for {given}"):
        results = splice(program, trace(program, run, operands), operands, node)
    if many:
        for user in list(node.users):
            user.replace_all_uses_with(results[user.args[1]])
            graph.erase_node(user)
    else:
        node.replace_all_uses_with(results[0])
    graph.erase_node(node)
    _erase_adapters(graph, operands)


def like_in_memory(out: Tensor, wanted: Tensor) -> Tensor:
    """``out`` with its dimensions in memory as ``wanted`` has them: the model may view the result."""
    return _in_order(out, memory_order(wanted))


def memory_order(wanted: Tensor) -> tuple[int, ...] | None:
    """Its dimensions from the slowest to the fastest; None if it is contiguous."""
    if wanted.is_contiguous():
        return None
    return tuple(sorted(range(wanted.dim()), key=lambda d: hint(wanted.stride(d)), reverse=True))


def _in_order(out: Tensor, order: tuple[int, ...] | None) -> Tensor:
    if order is None:
        return out if out.is_contiguous() else out.contiguous()
    return out.permute(order).contiguous().permute(inverse(order))
