"""Mixtures of experts as units: a router picks, experts compute, their results are weighed and added."""

from __future__ import annotations

import operator
from dataclasses import dataclass

from torch import Tensor, fx

from accelpass.ir.analyses.axes.flow import (
    CASTS,
    VIEWS,
    bare,
    between,
    common_path,
    constant,
    fixed,
    positions,
    tensors,
)
from accelpass.ir.analyses.structure.linear import Linear, is_grouped_product, linears
from accelpass.ir.analyses.structure.mlp import Mlp, mlps
from accelpass.ir.attention.spec.op import is_attention
from accelpass.ir.core.graph import aten, is_call, module_path, mutates, root, shape, value
from accelpass.ir.core.program import Program

_PICKS = (aten.topk, aten.argmax, aten.max)
_FAR = 40  # nodes between a router and its choice; group-limited routing has about 16
_GATHERS = (aten.index, aten.index_select, aten.gather, aten.repeat_interleave, aten.repeat, aten.expand)
_COMBINES = (
    *(aten.mul, aten.mul_, aten.div, aten.sum, aten.index, aten.index_select, aten.index_add, aten.index_add_),
    *(aten.scatter_add, aten.scatter_add_, aten.index_put, aten.index_put_, aten.slice, aten.select, aten.where),
    *(aten.matmul, aten.bmm, aten.einsum, aten.masked_fill, aten.masked_fill_),
)


@dataclass(frozen=True)
class MoE:
    """A mixture of experts.

    Attributes:
        path: the module that holds router and experts.
        x: the hidden states that the experts read.
        out: the weighted sum, the shared expert in it.
        router: the linear whose result picks.
        experts: how many there are.
        top_k: how many a token goes to; None if it is not a number.
        form: ``stacked`` (batched or grouped products with one tensor for all experts) or ``loop``.
        weights: the constants of the experts, in the order in which they are used.
        nodes: the products with them.
        shared: the MLP that every token goes through, if there is one.
    """

    path: str
    x: fx.Node
    out: fx.Node
    router: Linear
    experts: int
    top_k: int | None
    form: str
    weights: tuple[fx.Node, ...]
    nodes: tuple[fx.Node, ...]
    shared: Mlp | None = None


def moes(program: Program) -> list[MoE]:
    """All mixtures of experts in graph order."""
    sites = {site.node: site for site in program.analysis(linears)}
    picks: dict[fx.Node, list[fx.Node]] = {}
    routers: dict[fx.Node, Linear] = {}
    for node in program.graph.nodes:
        if is_call(node, *_PICKS) and isinstance(node.args[0], fx.Node):
            router = _router(program, node, sites)
            if router is not None:
                routers[router.node] = router
                picks.setdefault(router.node, []).append(node)
    found = []
    place = program.analysis(positions)
    order = sorted(routers, key=place.__getitem__)
    nodes = list(program.graph.nodes) if order else []
    for number, router_node in enumerate(order):
        end = place[order[number + 1]] if number + 1 < len(order) else len(nodes)
        chosen = picks[router_node]
        moe = _moe(program, routers[router_node], chosen, nodes[place[chosen[0]] : end], sites)
        if moe is not None:
            found.append(moe)
    return found


def _router(program: Program, pick: fx.Node, sites: dict[fx.Node, Linear]) -> Linear | None:
    """The only linear that the choice is made from."""
    seen, front, found = {pick}, [pick], {}
    while front:
        node = front.pop()
        site = sites.get(node) or _cast_linear(program, node)
        if site is not None:
            found[site.node] = site
            continue
        if is_attention(node) or len(seen) > _FAR or (node.op == "placeholder" and not fixed(program, node)):
            return None
        for parent in tensors(node):
            if parent not in seen and not fixed(program, parent):
                seen.add(parent)
                front.append(parent)
    return next(iter(found.values())) if len(found) == 1 else None


def _cast_linear(program: Program, node: fx.Node) -> Linear | None:
    """Routers compute in float32 with a weight that is cast to it, which is no site for weight passes."""
    if not is_call(node, aten.linear):
        return None
    x, w = node.args[:2]
    weight = constant(program, w)
    if weight is None or not isinstance(x, fx.Node) or len(shape(weight)) != 2:
        return None
    out_features, in_features = (int(s) for s in shape(weight))
    bias = node.args[2] if len(node.args) > 2 and isinstance(node.args[2], fx.Node) else None
    return Linear(node, x, weight, bias, module_path(node), "linear", in_features, out_features)


def _moe(
    program: Program, router: Linear, picks: list[fx.Node], window: list[fx.Node], sites: dict[fx.Node, Linear]
) -> MoE | None:
    """The mixture of ``router``; ``window`` is what follows its first choice, up to the next router."""
    after = set(picks)
    products: list[tuple[fx.Node, fx.Node, fx.Node]] = []  # product, weight, activation
    loop: list[Linear] = []
    for node in window:
        if not after.intersection(node.all_input_nodes) and node not in after:
            continue
        after.add(node)
        stacked = _stacked(program, node)
        if stacked is not None:
            products.append((node, *stacked))
        elif node in sites and (sites[node].kind == "expert" or _is_routed(sites[node].operand(), after)):
            loop.append(sites[node])
    if products:
        form, experts = "stacked", int(shape(products[0][1])[0])
    elif loop:
        form, experts = "loop", router.out_features
        products = [(site.node, site.weight, site.operand()) for site in loop]
        products += [(n, sites[n].weight, sites[n].operand()) for n in _rest_of_loop(window, loop, sites)]
    else:
        return None
    nodes = sorted({node for node, *_ in products}, key=program.analysis(positions).__getitem__)
    x = _read(products[0][2], after)
    out, shared = _combined(program, nodes[-1], x)
    last = picks[-1]
    count = last.args[1] if is_call(last, aten.topk) else 1
    return MoE(
        path=common_path([module_path(router.node), module_path(nodes[0]), module_path(out)]),
        x=x,
        out=out,
        router=router,
        experts=experts,
        top_k=count if isinstance(count, int) else None,
        form=form,
        weights=tuple(dict.fromkeys(weight for _, weight, _ in products)),
        nodes=tuple(nodes),
        shared=shared,
    )


def _stacked(program: Program, node: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """(stack of weights, activation) of a product with the weights of several experts."""
    if not (is_grouped_product(node) or is_call(node, aten.bmm, aten.matmul, aten.baddbmm, aten.einsum)):
        return None
    operands = [n for n in tensors(node) if value(n) is not None]
    for weight in operands:
        stack: object = weight
        while is_call(stack, *CASTS, *VIEWS, aten.index, aten.index_select):
            stack = stack.args[0]  # type: ignore[attr-defined]
        held = constant(program, stack)
        if held is not None and len(shape(held)) == 3:
            others = [n for n in operands if n is not weight]
            return (held, others[0]) if others else None
    return None


def _is_routed(x: fx.Node, after: set[fx.Node]) -> bool:
    """Some tokens only, those that a choice of experts lists."""
    x = bare(x, *VIEWS)
    if not is_call(x, aten.index, aten.index_select):
        return False
    return any(n in after for n in x.all_input_nodes[1:])


def _rest_of_loop(window: list[fx.Node], loop: list[Linear], sites: dict[fx.Node, Linear]) -> list[fx.Node]:
    """The further linears of experts whose first are known: those up to the last expert's way back."""
    inside = {site.node for site in loop}
    for node in window:
        if any(p in inside for p in node.all_input_nodes) and not is_call(node, *_COMBINES[4:]):
            inside.add(node)
    return [n for n in window if n in inside and n in sites and n not in {s.node for s in loop}]


def _read(node: fx.Node, after: set[fx.Node]) -> fx.Node:
    """The hidden states before they are gathered, repeated or scaled by the router."""
    while True:
        node = bare(node, *VIEWS)
        if is_call(node, *_GATHERS) and isinstance(node.args[0], fx.Node):
            node = node.args[0]
        elif is_call(node, aten.mul) and any(a in after for a in node.args[:2]):
            fresh = [a for a in node.args[:2] if isinstance(a, fx.Node)]
            plain = [a for a in fresh if a not in after] or fresh[:1]
            if node in plain:
                return node
            node = plain[0]
        else:
            return node


def _combined(program: Program, node: fx.Node, x: fx.Node) -> tuple[fx.Node, Mlp | None]:
    """(the sum of what the experts gave, the shared expert in it), from the last product with expert weights."""
    place = program.analysis(positions)
    while True:
        users = [u for u in _readers(node, place) if isinstance(value(u), Tensor)]
        if len(users) != 1:
            return node, None
        (user,) = users
        if is_call(user, *CASTS, *VIEWS, *_COMBINES, operator.getitem):
            node = user
        elif is_call(user, aten.add, aten.add_):
            other = next((a for a in user.args[:2] if a is not node), None)
            if not isinstance(other, fx.Node) or _is_gathered_constant(program, other):
                node = user
                continue
            inside = set(between(program, x, other)) if place[bare(other)] > place[x] else set()
            shared = [m for m in program.analysis(mlps) if m.node in inside]
            return (user, shared[0]) if len(shared) == 1 else (node, None)
        else:
            return node, None


def _readers(node: fx.Node, place: dict[fx.Node, int]) -> list[fx.Node]:
    """Who reads the value that ``node`` makes, be it in another node's memory."""
    if not mutates(node):
        return list(node.users)
    base = root(node)
    written = [u for u in (*base.users, node) if base in (root(m) for m in mutates(u))]
    last = max(written, key=place.__getitem__)
    return [u for u in dict.fromkeys((*base.users, *last.users)) if place[u] > place[last]]


def _is_gathered_constant(program: Program, node: fx.Node) -> bool:
    """A bias: the model's own, or the rows of it that the picked experts need."""
    if fixed(program, node):
        return True
    node = bare(node, *VIEWS)
    return is_call(node, aten.index, aten.index_select) and constant(program, node.args[0]) is not None
