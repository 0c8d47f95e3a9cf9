"""The analysis: every attention of a program, and what looked like one and is not taken."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, fx

from accelpass.ir.attention.recognition.effects import Effects
from accelpass.ir.attention.recognition.masks import bias_of
from accelpass.ir.attention.recognition.match import SOFTMAX, match_sdpa, match_softmax
from accelpass.ir.attention.recognition.projections import kind_of, output_projection, source_of
from accelpass.ir.attention.recognition.region import Match, NoAttention, NoMatch
from accelpass.ir.attention.recognition.score_steps import aten
from accelpass.ir.attention.spec.op import is_attention, spec_of
from accelpass.ir.attention.spec.spec import AttentionSpec
from accelpass.ir.core.graph import is_call, module_path, value
from accelpass.ir.core.program import Program


@dataclass(frozen=True, eq=False)
class Attention:
    """One attention of the model.

    Attributes:
        path: module that computes it (``layers.3.self_attn``).
        spec: what it computes.
        q, k, v: its operands, before any transposition that the op's layout needs.
        extras: masks, biases, sinks.
        out: what the rest of the model reads; the semantic node (or the adapter after it) once inserted.
        region: the nodes that it occupied.
        q_proj, k_proj, v_proj: linears that feed it. Fused QKV: the same one. MLA, joint attention: several.
        o_proj: the linear that reads its output.
        rope: a rotary embedding was seen.
        node: the semantic node; None before :func:`~accelpass.ir.attention.recognition.insert.insert`.
    """

    path: str
    spec: AttentionSpec
    q: fx.Node
    k: fx.Node
    v: fx.Node
    extras: tuple[fx.Node, ...]
    out: fx.Node
    region: tuple[fx.Node, ...]
    q_proj: tuple[fx.Node, ...]
    k_proj: tuple[fx.Node, ...]
    v_proj: tuple[fx.Node, ...]
    o_proj: fx.Node | None
    rope: bool
    heads: Any
    kv_heads: Any
    head_dim: Any
    match: Match | None
    node: fx.Node | None = None

    @property
    def kind(self) -> str:
        return self.spec.kind

    @property
    def fused_qkv(self) -> bool:
        return len(self.q_proj) == 1 and self.q_proj == self.k_proj == self.v_proj


@dataclass(frozen=True)
class NearMiss:
    """A softmax (or an attention call) that is not taken for an attention, and why.

    Attributes:
        like: it has the two products of an attention around it; a router's softmax has not.
    """

    path: str
    node: str
    why: str
    like: bool = True


@dataclass(frozen=True)
class Survey:
    """What :func:`survey` found."""

    attentions: tuple[Attention, ...]
    near_misses: tuple[NearMiss, ...]


def survey(program: Program) -> Survey:
    """Every attention of the program, in execution order, and the near misses. Changes nothing."""
    effects = Effects(program.graph)
    found, misses = [], []
    inserted = [n for n in program.graph.nodes if is_attention(n)]
    # Probabilities that the model returns stay as they were beside the semantic node.
    kept = {old.meta.get("attention_was") for n in inserted for old in _origin_nodes(n)}
    for node in program.graph.nodes:
        try:
            if is_attention(node):
                found.append(_from_node(program, node))
                continue
            if node.name in kept:
                continue
            if is_call(node, aten.scaled_dot_product_attention):
                match = match_sdpa(node, effects)
            elif is_call(node, *SOFTMAX):
                match = match_softmax(node, effects)
            elif node.op == "call_function" and "flex_attention" in str(node.target):
                raise NoMatch("flex_attention carries its own mask function, and is left as it is")
            else:
                continue
        except NoMatch as no:
            misses.append(NearMiss(module_path(node), node.name, str(no), not isinstance(no, NoAttention)))
            continue
        found.append(_described(program, match))
    return Survey(tuple(found), tuple(misses))


def detect(program: Program) -> list[Attention]:
    """Every attention of the program, in execution order. Changes nothing."""
    return list(program.analysis(survey).attentions)


def near_misses(program: Program) -> list[NearMiss]:
    """What looked like an attention and is not taken, with the reason."""
    return list(program.analysis(survey).near_misses)


def _described(program: Program, match: Match) -> Attention:
    """The record of a match."""
    path = module_path(match.out)
    operands = (match.q.node, match.k.node, match.v.node)
    spec = AttentionSpec(
        groups=match.groups, scale=match.scale, causal=match.causal, steps=tuple(match.steps), site=path
    )
    bias, window = bias_of(spec, match.extras, match.q.shape()[-2], match.k.shape()[-2])
    spec = replace(spec, bias=bias, window=window)
    shapes = (match.q.shape(), match.k.shape())
    found = _record(program, spec, operands, match.extras, match.out, shapes)
    return replace(found, match=match, region=tuple(sorted(match.region)))


def _from_node(program: Program, node: fx.Node) -> Attention:
    """The record of an attention that was inserted earlier."""
    q, k, v = node.args[:3]
    extras = node.args[3]
    assert isinstance(q, fx.Node) and isinstance(k, fx.Node) and isinstance(v, fx.Node)
    assert isinstance(extras, list | tuple)
    out = node if isinstance(value(node), Tensor) else next(u for u in node.users if u.args[1] == 0)
    out = next((u for u in out.users if u.meta.get("attention_adapter")), out)
    found = _record(program, spec_of(node), (q, k, v), extras, out, (value(q).shape, value(k).shape))
    return replace(found, node=node)


def _origin_nodes(node: fx.Node) -> list[fx.Node]:
    origin = node.meta.get("attention_origin")
    return list(origin.graph.nodes) if origin is not None else []


def _record(
    program: Program,
    spec: AttentionSpec,
    operands: tuple[fx.Node, fx.Node, fx.Node],
    extras: Sequence[Any],
    out: fx.Node,
    shapes: tuple[Sequence[Any], Sequence[Any]],
) -> Attention:
    q, k, v = (source_of(program, operand) for operand in operands)
    if spec.kind == "unknown":
        spec = replace(spec, kind=kind_of(program, q, k, *operands[:2]))
    return Attention(
        path=spec.site,
        spec=spec,
        q=operands[0],
        k=operands[1],
        v=operands[2],
        extras=tuple(extras),
        out=out,
        region=(),
        q_proj=q.linears,
        k_proj=k.linears,
        v_proj=v.linears,
        o_proj=output_projection(program, out),
        rope=q.rope and k.rope,
        heads=shapes[0][-3],
        kv_heads=shapes[1][-3],
        head_dim=shapes[0][-1],
        match=None,
    )
