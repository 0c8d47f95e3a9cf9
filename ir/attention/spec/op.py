"""The semantic op ``accelpass::attention``: one node, one spec, a reference that defines what it means."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, fx

from accelpass.ir.attention.spec import steps
from accelpass.ir.attention.spec.block_select import BlockSelect, causal_form
from accelpass.ir.attention.spec.spec import All, AttentionSpec, Band, BlockList, Places, Select, SinksAndWindow
from accelpass.ir.core.graph import call, is_call
from accelpass.ir.errors import GraphError

_OPERANDS = 3  # q, k and v come before the extras and the spec.


@lru_cache(maxsize=4096)
def _parsed(text: str) -> AttentionSpec:
    return AttentionSpec.from_json(text)


def attend(
    q: Tensor, k: Tensor, v: Tensor, extras: Sequence[Tensor], spec: AttentionSpec
) -> tuple[Tensor, dict[str, Tensor]]:
    """The reference: plain ATen that any lowering can be checked against, and that composed lowerings trace.

    Args:
        q: ``(..., q_heads, q_tokens, d)``.
        k: ``(..., kv_heads, k_tokens, d)``, q_heads = spec.groups * kv_heads.
        v: ``(..., kv_heads, k_tokens, d_v)``.
        extras: what the spec's steps read.
        spec: its store is ignored, as k and v are whatever the store gives back.

    Returns:
        The output ``(..., q_heads, q_tokens, d_v)`` and the statistics by name.
    """
    rows, columns = q.shape[-2], k.shape[-2]
    scores = masked_scores(q, k, extras, spec)
    v = v.repeat_interleave(spec.groups, -3) if spec.groups > 1 else v
    found: dict[str, Tensor] = {}
    if "lse" in spec.statistics:
        found["lse"] = torch.logsumexp(scores.float(), -1).reshape(q.shape[:-1])
    for name, tap in spec.taps.items():
        if name != "column_sums":
            masked = scores.float().reshape(*q.shape[:-1], columns).unflatten(-3, (-1, spec.groups))
            query = torch.arange(rows, device=q.device) + (0 if spec.causal else columns - rows)
            found[name] = tap(masked, Places(query, torch.arange(columns, device=q.device), columns))
    probabilities = _probabilities(scores, extras, spec).reshape(*q.shape[:-1], columns)
    if "column_sums" in spec.statistics:
        sums = torch.nan_to_num(probabilities.float()).sum(-2)  # a row without keys (padding) is in no sum
        found["column_sums"] = sums.unflatten(-2, (-1, spec.groups)).sum(-2)
    probabilities = probabilities.to(v.dtype)
    return torch.matmul(probabilities, v), found


def masked_scores(q: Tensor, k: Tensor, extras: Sequence[Tensor], spec: AttentionSpec, first: Any = 0) -> Tensor:
    """Scores as the softmax takes them, ``(..., q_heads, q_tokens, k_tokens)``, with a column more for each sink.

    Args:
        first: how many queries of the call come before those of ``q``, of an attention to all keys.
    """
    rows, columns = q.shape[-2], k.shape[-2]
    if isinstance(spec.select, BlockSelect):
        mask: Tensor | None = spec.select.mask(q, k, causal_form(spec, rows, columns))
    else:
        mask = selection(spec.select, rows, columns, 0 if spec.causal else columns - rows, q)
    if spec.groups > 1:
        k = k.repeat_interleave(spec.groups, -3)
    scores = torch.matmul(q, k.transpose(-1, -2))
    if spec.scale != 1.0:
        scores = scores * spec.scale
    if spec.causal:
        allowed = torch.ones(rows, columns, dtype=torch.bool, device=q.device).tril()
        if not (isinstance(first, int) and first == 0):
            query = torch.arange(rows, device=q.device).unsqueeze(-1) + first
            allowed = torch.arange(columns, device=q.device) <= query
        scores = scores.masked_fill(allowed.logical_not(), float("-inf"))
    # Sinks are columns that no selection may remove, so the selection comes before the first of them is added.
    at = next((i for i, s in enumerate(spec.before) if s.kind == "sink"), len(spec.before))
    scores = steps.apply(scores, spec.before[:at], extras)
    if mask is not None:
        scores = scores.masked_fill(mask.logical_not(), float("-inf"))
    return steps.apply(scores, spec.before[at:], extras)


def attention_probabilities(q: Tensor, k: Tensor, extras: Sequence[Tensor], spec: AttentionSpec) -> Tensor:
    """What values are weighed with, ``(..., q_heads, q_tokens, k_tokens)``."""
    made = _probabilities(masked_scores(q, k, extras, spec), extras, spec)
    return made.reshape(*q.shape[:-1], k.shape[-2])


def _probabilities(scores: Tensor, extras: Sequence[Tensor], spec: AttentionSpec) -> Tensor:
    return steps.apply(scores, (spec.softmax, *spec.after), extras)


def selection(select: Select, rows: int, columns: int, offset: int, like: Tensor) -> Tensor | None:
    """Which keys each query attends to as a boolean mask, True where it does; None for all.

    A :class:`BlockSelect` needs more than sizes, and has its own :meth:`~BlockSelect.mask`.

    Args:
        offset: position of the first query among the keys.
    """
    if isinstance(select, All):
        return None
    query = torch.arange(rows, device=like.device).unsqueeze(-1)
    key = torch.arange(columns, device=like.device)
    if isinstance(select, Band):
        return (query - key).abs() <= select.reach
    if isinstance(select, SinksAndWindow):
        return (key < select.sinks) | ((query + offset - key) < select.window)
    if isinstance(select, BlockList):
        heads = select.blocks if select.per_head else (select.blocks,)
        pairs = [(head, i, j) for head, listed in enumerate(heads) for i, j in listed]  # heads may list unlike numbers
        at = torch.tensor(pairs, dtype=torch.long, device=like.device).reshape(-1, 3)
        q_blocks, k_blocks = -(-rows // select.size), -(-columns // select.size)
        grid = torch.zeros(len(heads), q_blocks, k_blocks, dtype=torch.bool, device=like.device)
        grid[at[:, 0], at[:, 1], at[:, 2]] = True
        full = grid.repeat_interleave(select.size, 1).repeat_interleave(select.size, 2)[:, :rows, :columns]
        return full if select.per_head else full[0]
    raise GraphError(f"select={select.part} has no reference; register a lowering for it (register_lowering)")


@torch.library.custom_op("accelpass::attention", mutates_args=())
def attention(q: Tensor, k: Tensor, v: Tensor, extras: Sequence[Tensor], spec: str) -> Tensor:
    """Attention as ``spec`` (JSON of an :class:`AttentionSpec`) says; see :func:`attend`."""
    return attend(q, k, v, extras, _parsed(spec))[0]


@attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, extras: Sequence[Tensor], spec: str) -> Tensor:
    return v.new_empty((*q.shape[:-1], v.shape[-1]))


@torch.library.custom_op("accelpass::attention_stats", mutates_args=())
def attention_stats(q: Tensor, k: Tensor, v: Tensor, extras: Sequence[Tensor], spec: str) -> list[Tensor]:
    """The same with the spec's statistics after the output, sorted by name."""
    out, found = attend(q, k, v, extras, _parsed(spec))
    return [out, *(found[name] for name in sorted(found))]


@attention_stats.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, extras: Sequence[Tensor], spec: str) -> list[Tensor]:
    return [v.new_empty((*q.shape[:-1], v.shape[-1])), *fake_statistics(q, k, _parsed(spec))]


def fake_statistics(q: Tensor, k: Tensor, spec: AttentionSpec) -> list[Tensor]:
    """Empty tensors of the statistics' shapes, sorted by name: ``lse`` ``(..., q_heads, q_tokens)``, that of a tap
    ``(..., kv_heads, k_tokens)``; float32."""
    shapes = ((q if name == "lse" else k).shape[:-1] for name in sorted(spec.statistics))
    return [q.new_empty(shape, dtype=torch.float32) for shape in shapes]


ATTENTION = torch.ops.accelpass.attention.default
ATTENTION_STATS = torch.ops.accelpass.attention_stats.default


def is_attention(node: object) -> bool:
    """True for a semantic attention node."""
    return is_call(node, ATTENTION, ATTENTION_STATS)


def spec_of(node: fx.Node) -> AttentionSpec:
    """The spec of a semantic attention node."""
    text = node.args[-1]
    assert is_attention(node) and isinstance(text, str)
    return _parsed(text)


def set_spec(node: fx.Node, spec: AttentionSpec) -> None:
    """Give a semantic attention node another spec.

    Raises:
        ValueError: the spec reads extras that the node does not have, or wants statistics (see :func:`want`).
    """
    extras = node.args[_OPERANDS]
    assert isinstance(extras, Sequence)
    if spec.extras > len(extras):
        raise ValueError(f"the spec reads {spec.extras} extras, the node {node.name} has {len(extras)}")
    if spec.statistics != spec_of(node).statistics:
        raise ValueError("statistics are further outputs of the node: ask for them with want(node, name, by=...)")
    node.args = (*node.args[:-1], spec.to_json())


def want(node: fx.Node, statistic: str, *, by: str) -> fx.Node:
    """The node of a statistic of ``node``, which is asked for if it is not yet computed.

    ``node`` itself may be replaced: a node with statistics is a list, and its users read item 0. Use the
    ``args[0]`` of the returned node for later edits.
    """
    spec = spec_of(node).edited(by=by, statistics={statistic})
    graph = node.graph
    old = {n.args[1]: n for n in node.users} if is_call(node, ATTENTION_STATS) else {}
    names = sorted(spec_of(node).statistics)
    if statistic in names and (1 + names.index(statistic)) in old:
        return old[1 + names.index(statistic)]
    with graph.inserting_before(node):
        many = call(graph, node, ATTENTION_STATS, *node.args[:-1], spec.to_json())
    many.meta.update({k: v for k, v in node.meta.items() if k.startswith("attention_")})
    wanted = sorted(spec.statistics)
    items = {}
    with graph.inserting_before(node):
        for index in range(1 + len(wanted)):
            items[index] = call(graph, node, operator.getitem, many, index)
    if old:
        for index, user in old.items():
            assert isinstance(index, int)
            position = 0 if index == 0 else 1 + wanted.index(names[index - 1])
            user.replace_all_uses_with(items[position])
            graph.erase_node(user)
    else:
        items[0].meta["val"] = node.meta.get("val", items[0].meta["val"])
        node.replace_all_uses_with(items[0])
    graph.erase_node(node)
    return items[1 + wanted.index(statistic)]
