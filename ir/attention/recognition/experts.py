"""The analysis: attentions that are experts of one layer, all computed for every token, their results weighed and added."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, fx

from accelpass.ir.analyses.axes.flow import CASTS, VIEWS, bare, between, common_path
from accelpass.ir.analyses.structure.linear import Linear, linears
from accelpass.ir.attention.recognition.detect import Attention, detect
from accelpass.ir.attention.recognition.insert import base
from accelpass.ir.core.graph import (
    aten,
    draws,
    is_call,
    known,
    module_path,
    mutates,
    root,
    shape,
    value,
    written_inputs,
)
from accelpass.ir.core.program import Program
from accelpass.ir.kv.ops import KV_APPEND, KV_READ

_PRODUCTS = (aten.mul, aten.matmul, aten.bmm, aten.einsum)


@dataclass(frozen=True)
class Term:
    """What one expert adds to the sum.

    Attributes:
        attention: with its semantic node.
        projection: the linear that reads it.
        gate: what the router weighs it with, ``(..., 1)``; None if all are weighed in one product.
    """

    attention: Attention
    projection: Linear
    gate: fx.Node | None = None


@dataclass(frozen=True)
class AttentionExperts:
    """A mixture of attentions (BAM, arXiv 2408.08274, section 3.2): ``sum_j gate_j projection_j(attention_j)``.

    Attributes:
        path: the module that holds the experts.
        out: the sum, or the stack of all results that is weighed as one.
        terms: the experts in the order in which they are computed.
        others: what else is added to the sum (a residual stream).
        shared: all read one set of keys and values.
        why: what stands in the way of computing them as one attention; empty if nothing does.
    """

    path: str
    out: fx.Node
    terms: tuple[Term, ...]
    others: tuple[fx.Node, ...]
    shared: bool
    why: str

    @property
    def nodes(self) -> list[fx.Node]:
        """The semantic nodes."""
        return [_node(t.attention) for t in self.terms]


def attention_experts(program: Program) -> list[AttentionExperts]:
    """Every mixture of attentions, in graph order; those that cannot be one attention with the reason. Changes nothing."""
    sites = {site.node: site for site in program.analysis(linears)}
    read = [a for a in program.analysis(detect) if a.node is not None and a.o_proj in sites]
    if len(read) < 2:
        return []
    by = {a.o_proj: Term(a, sites[a.o_proj]) for a in read if a.o_proj is not None}
    found = []
    for node in program.graph.nodes:
        terms, others = _summed(node, by) if is_call(node, aten.add) else (_stacked(node, by), [])
        if len({t.projection.node for t in terms}) > 1:
            found.append(_described(program, node, sorted(terms, key=lambda t: _node(t.attention)), others))
    return found


def _summed(node: fx.Node, by: dict[fx.Node, Term]) -> tuple[list[Term], list[fx.Node]]:
    """The gated results of experts that a sum adds, and what else it adds; ``node`` is the last addition."""
    if _is_inner(node):
        return [], []
    terms: list[Term] = []
    others: list[fx.Node] = []
    for part in _parts(node):
        product = bare(part, *VIEWS)
        pair = product.args[:2] if is_call(product, aten.mul) else ()
        made = [(bare(o, *VIEWS), g) for o, g in (pair, pair[::-1]) if isinstance(o, fx.Node)] if pair else []
        term = next((replace(by[o], gate=g) for o, g in made if o in by and _is_gate(g, o)), None)
        if term is None or _node(term.attention) in [_node(t.attention) for t in terms]:
            others.append(part)
        else:
            terms.append(term)
    return terms, others


def _is_inner(node: fx.Node) -> bool:
    """The sum goes on: another addition alone reads it."""
    return any(is_call(u, aten.add) and _goes_on(node, u) for u in node.users)


def _goes_on(inner: Any, outer: fx.Node) -> bool:
    if not is_call(inner, aten.add) or inner.kwargs or outer.kwargs:
        return False
    return len(inner.users) == 1 and outer.args.count(inner) == 1


def _parts(node: fx.Node) -> Iterator[fx.Node]:
    """What an addition adds, with the additions that it alone reads looked into."""
    given: Any
    for given in node.args[:2]:
        if _goes_on(given, node):
            yield from _parts(given)
        elif isinstance(given, fx.Node):
            yield given


def _is_gate(gate: object, of: fx.Node) -> bool:
    """One number for each token."""
    held = value(gate) if isinstance(gate, fx.Node) else None
    return isinstance(held, Tensor) and held.dim() == value(of).dim() and held.shape[-1] == 1


def _stacked(node: fx.Node, by: dict[fx.Node, Term]) -> list[Term]:
    """The experts whose results are stacked and weighed in one product."""
    parts = node.args[0] if is_call(node, aten.stack) else ()
    made = [by.get(bare(p, *VIEWS)) for p in parts if isinstance(p, fx.Node)]
    terms = [t for t in made if t is not None]
    readers = [node]
    while readers and all(is_call(r, *CASTS, *VIEWS, aten.stack) for r in readers):
        readers = [u for r in readers for u in r.users]
    return terms if len(terms) == len(parts) and readers and all(is_call(r, *_PRODUCTS) for r in readers) else []


def _described(program: Program, out: fx.Node, terms: Sequence[Term], others: Sequence[fx.Node]) -> AttentionExperts:
    attentions = [t.attention for t in terms]
    path = common_path([a.path for a in attentions]).removesuffix(".experts") or module_path(out)
    written = written_inputs(program.graph)
    shared = all(_same(a.k, attentions[0].k, written) and _same(a.v, attentions[0].v, written) for a in attentions)
    why = _unlike(attentions) or ("" if shared else _remembered(attentions, written)) or _ordered(program, attentions)
    return AttentionExperts(path, out, tuple(terms), tuple(others), shared, why)


def _unlike(attentions: Sequence[Attention]) -> str:
    """How attentions differ in more than their weights."""
    first = attentions[0]
    for one in attentions:
        if one.spec.is_edited:
            return f"{', '.join(dict.fromkeys(who for who, _ in one.spec.edits))} has edited its attentions already"
        if replace(one.spec, site="") != replace(first.spec, site="") or not _alike(one, first):
            return f"{one.path} attends in another way than {first.path}"
        if any(s.kind == "view" for s in one.spec.steps):
            return "scores are rearranged by head"
        if any(value(e).dim() > 2 and not known(value(e).shape[-3] == 1) for e in one.extras):
            return "a bias or a sink differs between heads"
    return ""


def _alike(one: Attention, first: Attention) -> bool:
    heads = [
        [*shape(n)[:-3], *shape(n)[-2:]] for a in (one, first) for n in _node(a).args[:3] if isinstance(n, fx.Node)
    ]
    sizes = all(known(a == b) for x, y in zip(heads[:3], heads[3:], strict=True) for a, b in zip(x, y, strict=True))
    return sizes and _same(one.extras, first.extras, frozenset())


def _remembered(attentions: Sequence[Attention], written: frozenset[fx.Node]) -> str:
    """Of experts with keys of their own, that these are in caches of their own."""
    for one in attentions:
        for given in (one.k, one.v):
            node = base(given)
            kept = any(is_call(u, KV_APPEND) for u in node.users) or is_call(
                node.args[0] if node.args else None, KV_READ
            )
            if kept or root(node) in written or not known(shape(one.k)[-2] == shape(one.q)[-2]):
                return (
                    f"each of its {len(attentions)} experts has keys and values in a cache of its own, and one attention would copy "
                    "all of them together at each step; experts that share them (accelpass.upcycle(models, "
                    "attention='shared_kv')) have one cache"
                )
    return ""


def _ordered(program: Program, attentions: Sequence[Attention]) -> str:
    pairs = itertools.combinations([_node(a) for a in attentions], 2)
    if any(between(program, early, late) for early, late in pairs):
        return "an expert reads what another gives"
    return ""


def _same(a: Any, b: Any, written: frozenset[fx.Node]) -> bool:
    """Whether two values are one, or are computed from the same ones in the same way."""
    known_alike: set[tuple[fx.Node, fx.Node]] = set()

    def alike(a: Any, b: Any) -> bool:
        if isinstance(a, fx.Node) and isinstance(b, fx.Node):
            if a is b:
                return root(a) not in written
            if (a, b) in known_alike:
                return True
            if a.op != "call_function" or a.target != b.target or draws(a) or mutates(a):
                return False
            made = alike(a.args, b.args) and alike(a.kwargs, b.kwargs)
            if made:
                known_alike.add((a, b))
            return made
        if isinstance(a, list | tuple) and isinstance(b, list | tuple):
            return len(a) == len(b) and all(alike(x, y) for x, y in zip(a, b, strict=True))
        if isinstance(a, dict) and isinstance(b, dict):
            return a.keys() == b.keys() and all(alike(a[k], b[k]) for k in a)
        return type(a) is type(b) and bool(a == b)

    return a is b or alike(a, b)


def _node(attention: Attention) -> fx.Node:
    assert attention.node is not None
    return attention.node
