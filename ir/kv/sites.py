"""The analysis: where a graph appends to an ``accelpass.KVCache``, and the attention that reads it."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

from torch import fx

from accelpass.ir.analyses.structure.output_head import returned_logits
from accelpass.ir.attention.recognition.insert import base
from accelpass.ir.attention.spec.op import is_attention
from accelpass.ir.core.graph import aten, call, known, module_path, placeholders, shape, size_among, value
from accelpass.ir.core.program import Program
from accelpass.ir.kv.ops import KV_APPEND, KV_READ


@dataclass(frozen=True, eq=False)
class KVSite:
    """One layer of a cache in one graph.

    Attributes:
        path: the module that attends.
        append: the ``kv_append`` call; read: the ``kv_read`` of the layer, None where the cache was empty and the
            attention reads the new tokens alone.
        attention: the semantic node that attends; None if there is none, ``why`` says so.
        count: the graph input that counts the layer's tokens.
        window: how many of the newest tokens the attention sees; 0 for all.
        records: tokens of the call may be taken back.
    """

    path: str
    append: fx.Node
    read: fx.Node | None
    attention: fx.Node | None
    count: fx.Node
    capacity: int
    window: int = 0
    why: str = ""
    records: bool = False

    @property
    def new(self) -> tuple[Any, Any]:
        """Keys and values that the call adds."""
        return self.append.args[0], self.append.args[1]

    @property
    def is_prompt(self) -> bool:
        """The layer is empty before the call."""
        return self.read is None


def kv_sites(program: Program) -> list[KVSite]:
    """All sites, in execution order."""
    attentions = [n for n in program.graph.nodes if is_attention(n)]
    reads = {n.args[0]: n for n in program.graph.find_nodes(op="call_function", target=KV_READ)}
    found: list[KVSite] = []
    for append in program.graph.find_nodes(op="call_function", target=KV_APPEND):
        count, capacity, window, records = append.args[2:6]
        read = reads.get(count)
        readers = [a for a in attentions if _reads(a, append, read)]
        why = ""
        if not readers:
            why = "no attention that reads this cache layer was recognised"
        elif len(readers) > 1:
            why = f"{len(readers)} attentions read this cache layer"
        elif read is not None and not _alone(read, readers[0]):
            why = "something besides the attention reads this cache layer"
        node = readers[0] if not why else None
        path = module_path(readers[0] if readers else append) or append.name
        found.append(KVSite(path, append, read, node, count, capacity, window, why, records))
    return found


def candidates(program: Program) -> int | fx.Node:
    """How many of a call's last tokens may be taken back: of those whose logits it returns, all but the first.

    Nobody can reject a token without the logits of the one before. A prompt whose logits are all returned has none. A symbolic
    number is a node, in front of all that is computed.
    """
    logits, sites = program.analysis(returned_logits), program.analysis(kv_sites)
    if not logits or not sites or len(shape(logits[0])) != 3:
        return 0
    asked, tokens = shape(logits[0])[1], value(sites[0].new[0]).shape[2]
    if sites[0].is_prompt and known(asked == tokens):
        return 0
    if isinstance(asked, int):
        return asked - 1
    inputs = placeholders(program.gm)
    found = size_among(inputs, asked)
    if found is None:
        return 0  # their number is computed inside: a crop of this call is refused, as nothing of it can be taken back
    at, dim = found
    with program.graph.inserting_before(inputs[-1].next):
        size = inputs[at] if dim is None else call(program.graph, inputs[at], aten.sym_size.int, inputs[at], dim)
        return call(program.graph, inputs[at], operator.sub, size, 1)


def _reads(attention: fx.Node, append: fx.Node, read: fx.Node | None) -> bool:
    k, v = base(attention.args[1]), base(attention.args[2])
    if read is None:
        return k is append.args[0] and v is append.args[1]
    return all(isinstance(n, fx.Node) and n.op == "call_function" and n.args[0] is read for n in (k, v))


def _alone(read: fx.Node, attention: fx.Node) -> bool:
    """Whether nothing but this attention uses what was read."""
    users = [u for item in read.users for u in item.users]
    users += [w for u in users if u.meta.get("attention_adapter") for w in u.users]
    return all(u is attention or u.meta.get("attention_adapter") for u in users)
