"""Finds the region that one attention occupies, from its softmax (or its sdpa call) outwards."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, fx

from accelpass.ir.attention.recognition.contraction import Product, permutation, product, same_sizes
from accelpass.ir.attention.recognition.effects import Effects, writes
from accelpass.ir.attention.recognition.region import (
    Match,
    NoAttention,
    NoMatch,
    Operand,
    grow,
    is_size,
    peel_groups,
    unmerge,
)
from accelpass.ir.attention.recognition.score_steps import Raw, argument, aten, number, readings
from accelpass.ir.attention.spec.spec import Step
from accelpass.ir.core.graph import is_call, value

SOFTMAX = (aten.softmax, aten._softmax, aten._safe_softmax, aten.special_softmax)
_FAR = 24  # operations between a softmax and its product; the longest known is 9
_POINTWISE = ("scale", "offset", "cast", "tanh", "relu", "clamp", "nan_to_num", "same")


def match_sdpa(node: fx.Node, effects: Effects) -> Match:
    """The attention around a ``scaled_dot_product_attention`` call."""
    q, k, v = (node.args[i] for i in range(3))
    assert isinstance(q, fx.Node) and isinstance(k, fx.Node) and isinstance(v, fx.Node)
    if number(argument(node, "dropout_p")) != 0:
        raise NoMatch("dropout is on: the model is in training mode")
    scale = argument(node, "scale")
    width = value(q).shape[-1]
    if scale is None:
        if not isinstance(width, int):
            raise NoMatch("the head dimension is symbolic and no scale is given")
        scale = width**-0.5
    if number(scale) is None:
        raise NoMatch("the scale is not a constant")
    found = Match(Operand(q), Operand(k), Operand(v), node, {node}, scale=float(scale))
    found.causal = bool(argument(node, "is_causal"))
    mask = argument(node, "attn_mask")
    if isinstance(mask, fx.Node):
        kind = "keep" if not value(mask).dtype.is_floating_point else "add"
        found.steps.append(Step(kind, extra=found.extra(mask), value=float("-inf") if kind == "keep" else None))
    found.steps.append(Step("safe_softmax"))
    peel_groups(found)
    return _checked(found, effects)


_NO_SCORES = ("the input ", "aten.linear.", "aten.addmm.")
"""Where the way back from a softmax ends that is a router's or a classifier's, and not of the scores of an attention."""


def match_softmax(node: fx.Node, effects: Effects) -> Match:
    """The attention around a softmax, if it is one."""
    logits = node.args[0]
    if not isinstance(logits, fx.Node) or value(node).dim() < 2:
        raise NoAttention("softmax over a vector")
    blocked: list[str] = []
    ends = _products_after(node)
    if not ends:
        raise NoAttention("no matrix product uses the probabilities")
    before = _walk(logits, node, effects, lambda n: product(n) is not None, blocked)
    if before is None:
        kind = NoAttention if all(end.startswith(_NO_SCORES) for end in blocked) else NoMatch
        raise kind(f"no matrix product is behind the softmax ({'; '.join(dict.fromkeys(blocked[:3]))})")
    reasons = []
    for end, side in ends:
        probabilities = end.lhs if side == "lhs" else end.rhs
        after = _walk(probabilities, end.node, effects, lambda n: n is node, blocked)
        if after is None:
            reasons.append(f"what is between the softmax and {end.node.name} is not understood")
            continue
        try:
            return _checked(_assembled(node, before, after, end, side), effects)
        except NoMatch as no:
            reasons.append(str(no))
    raise NoMatch("; ".join(dict.fromkeys(reasons)))


Chain = list[tuple[fx.Node, Raw | None]]


def _walk(
    node: fx.Node,
    reader: fx.Node,
    effects: Effects,
    stop: Callable[[fx.Node], bool],
    blocked: list[str],
    far: int = _FAR,
) -> Chain | None:
    """From what ``reader`` sees as ``node`` back to a node that ``stop`` accepts; the chain is in execution order."""
    write = effects.last_write(node, reader)
    if write is not None:
        writer, written = write
        if written is not node and not writes(written):
            blocked.append(f"{writer.name} writes to a part of {node.name}")
            return None
        node = writer
    if stop(node):
        return [(node, None)]
    if far == 0:
        return None
    found = readings(node)
    if not found:
        blocked.append(str(node.target) if node.op == "call_function" else f"the input {node.name}")
    for raw in found:
        chain = _walk(raw.source, node, effects, stop, blocked, far - 1)
        if chain is not None:
            return [*chain, (node, raw)]
    return None


def _products_after(softmax: fx.Node) -> list[tuple[Product, str]]:
    """Products that use the probabilities, perhaps after a few operations."""
    found: list[tuple[Product, str]] = []
    seen, front = {softmax}, [softmax]
    for _ in range(_FAR):
        following = []
        for node in front:
            for user in node.users:
                made = product(user)
                if made is not None:
                    side = made.side(node)
                    if side is not None and (made, side) not in found:
                        found.append((made, side))
                elif user not in seen and (writes(user) or any(r.source is node for r in readings(user))):
                    seen.add(user)
                    following.append(user)
        front = following
    return found


def _assembled(softmax: fx.Node, before: Chain, after: Chain, end: Product, side: str) -> Match:
    """Name every dimension, from the score product through the softmax to the output product."""
    start = product(before[0][0])
    assert start is not None
    order = start.out_labels
    viewed = False
    trail: list[tuple[Raw, tuple[str, ...]]] = []
    dim = argument(softmax, "dim")
    key = ""
    for node, raw in (*before[1:], *after):
        if raw is None:  # the softmax itself
            key = order[dim % len(order)]
            trail.append((Raw(softmax, "softmax"), order))
            continue
        if raw.kind == "permute":
            order = tuple(order[i] for i in raw.value)
        elif raw.kind == "view":
            order = (*(f"v{node.name}{i}" for i in range(len(raw.value))), *order[-2:])
            viewed = True
        trail.append((raw, order))
    if viewed and any(raw.kind == "permute" for raw, _ in trail):
        raise NoMatch("the scores are both viewed and transposed")
    mine, other = (end.lhs_labels, end.rhs_labels) if side == "lhs" else (end.rhs_labels, end.lhs_labels)
    other_node = end.rhs if side == "lhs" else end.lhs
    named = dict(zip(mine, order, strict=True))
    if {named[label] for label in end.summed} != {key}:
        raise NoMatch("the product after the softmax does not sum over the softmax's dimension")
    free = [label for label in mine if label not in other]
    if len(free) != 1:
        raise NoMatch(f"the probabilities have {len(free)} dimensions that the values lack; one was expected")
    query = named[free[0]]
    channels = [label for label in other if label not in mine]
    if len(channels) != 1:
        raise NoMatch(f"the values have {len(channels)} dimensions that the probabilities lack; one was expected")
    channel = f"out {channels[0]}"  # both products use the same letters, for different dimensions
    q_side, k_side = (start.lhs_labels, start.rhs_labels), (start.rhs_labels, start.lhs_labels)
    if query in q_side[0] and query not in q_side[1]:
        (q_labels, k_labels), (q, k) = q_side, (start.lhs, start.rhs)
    elif query in k_side[0] and query not in k_side[1]:
        (q_labels, k_labels), (q, k) = k_side, (start.rhs, start.lhs)
    else:
        raise NoMatch("no operand of the score product has the query dimension alone")
    if key not in k_labels or key in q_labels or len(start.summed) != 1:
        raise NoMatch("the softmax is not over the keys of the score product")
    at_softmax = next(o for raw, o in trail if raw.kind == "softmax")
    if viewed:
        batch = tuple(label for label in start.out_labels if label not in (query, key))
        canonical_after = order
        if start.out_labels[-2:] != (query, key):
            raise NoMatch("the scores are viewed while keys are not their last dimension")
        end_batch = canonical_after[:-2]
    else:
        batch = end_batch = tuple(label for label in at_softmax if label not in (query, key))
    (depth,) = start.summed
    found = Match(
        _operand(q, q_labels, (*batch, query, depth), "query"),
        _operand(k, k_labels, (*batch, key, depth), "key"),
        _operand(other_node, tuple(named.get(x, f"out {x}") for x in other), (*end_batch, key, channel), "value"),
        end.node,
        {end.node, start.node, softmax, *(n for n, _ in (*before, *after))},
        scale=start.alpha,
    )
    out_labels = tuple(named.get(x, f"out {x}") for x in end.out_labels)
    found.order = permutation(out_labels, (*end_batch, query, channel))
    if found.order is None:
        raise NoMatch("the output lacks a dimension of the attention")
    if found.order == tuple(range(len(found.order))):
        found.order = None
    if end.bias is not None or end.alpha != 1:
        raise NoMatch("the output product adds a bias")
    if start.bias is not None:
        found.steps.append(Step("add", extra=found.extra(start.bias), value=None if start.beta == 1 else start.beta))
    for raw, seen in trail:
        _add_step(found, raw, seen, (query, key), softmax)
    _fold(found)
    if viewed:
        unmerge(found)
        _fold(found)
    grow(found, (q, k, other_node))
    peel_groups(found)
    return found


def _operand(node: fx.Node, labels: tuple[str, ...], wanted: tuple[str, ...], what: str) -> Operand:
    order = permutation(labels, wanted)
    if order is None:
        raise NoMatch(f"the {what} tensor has {len(labels)} dimensions, the scores want {len(wanted)}")
    return Operand(node, None if order == tuple(range(len(order))) else order)


def _add_step(found: Match, raw: Raw, order: tuple[str, ...], last: tuple[str, str], softmax: fx.Node) -> None:
    if raw.kind == "softmax":
        dtype = argument(softmax, "dtype")
        name = str(dtype).removeprefix("torch.") if dtype is not None else None
        kind = "safe_softmax" if is_call(softmax, aten._safe_softmax) else "softmax"
        found.steps.append(Step(kind, value=name))
        return
    if raw.kind in ("same", "permute"):
        found.region.update(raw.nodes)
        return
    if raw.kind not in _POINTWISE and order[-2:] != last:
        raise NoMatch(f"{raw.kind} on scores whose last dimensions are not (queries, keys)")
    extra = None if raw.extra is None else found.extra(raw.extra)
    other = None if raw.other is None else found.extra(raw.other)
    given = tuple(raw.value) if isinstance(raw.value, list) else raw.value
    found.steps.append(Step(raw.kind, extra, other, given))
    found.region.update(raw.nodes)


def _fold(found: Match) -> None:
    """Write soft-capping as one step, and the first constant factors as the spec's scale."""
    steps = found.steps
    for i in range(len(steps) - 1):
        if steps[i].kind == "tanh" and steps[i + 1].kind == "scale":
            cap = steps[i + 1].value
            steps[i : i + 2] = [Step("scale", value=cap), Step("softcap", value=cap)]
    while len(steps) > 1 and steps[0].kind == steps[1].kind == "scale":
        steps[:2] = [Step("scale", value=steps[0].value * steps[1].value)]
    if steps[0].kind == "scale":
        found.scale *= steps.pop(0).value
        # A soft cap undoes its own division: 1/50 * 50 is 1 only up to rounding.
        found.scale = round(found.scale, 12) if abs(found.scale - round(found.scale, 12)) < 1e-15 else found.scale


def _checked(found: Match, effects: Effects) -> Match:
    """The same match, if replacing its region by one node is legal."""
    for node in sorted(found.region):
        if is_call(node, aten.type_as, aten.expand_as, aten.view_as, aten.reshape_as):
            (like,) = node.args[1:2]
            if like not in found.region and like not in found.inputs():
                found.extra(like)  # no step reads it, only the origin does
    q, k, v = found.q.shape(), found.k.shape(), found.v.shape()
    if not len(q) == len(k) == len(v) >= 3:
        raise NoMatch(
            f"query, key and value have {len(q)}, {len(k)} and {len(v)} dimensions; all need the same, 3 or more"
        )
    sizes = value(found.out).shape
    out = tuple(sizes) if found.order is None else tuple(sizes[i] for i in found.order)
    if not same_sizes(out, (*q[:-1], v[-1])):
        raise NoMatch(f"the output has shape {out}, the query {q} and the value {v}")
    inputs = found.inputs()
    if any(n in found.region for n in inputs):
        raise NoMatch("an operand is computed inside the attention")
    first = min(effects.position[n] for n in found.region)
    seen, front = set(inputs), list(inputs)
    while front:
        for parent in front.pop().all_input_nodes:
            if parent in found.region:
                raise NoMatch("a mask or bias is computed from the attention's own scores")
            if parent not in seen and effects.position[parent] > first:
                seen.add(parent)
                front.append(parent)
    for node in found.region:
        for parent in node.all_input_nodes:
            if parent in found.region or parent in inputs:
                continue
            if isinstance(value(parent), Tensor):
                raise NoMatch(f"{node.name} reads {parent.name}, which is not an operand")
            if not is_size(parent, inputs):
                raise NoMatch(f"{node.name} reads the size {parent.name}, which is no dimension of an operand")
    if hazard := effects.hazard(found.region, inputs, found.out):
        raise NoMatch(hazard)
    return found
