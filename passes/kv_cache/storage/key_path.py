"""How a layer's keys and values come from its input: the projection, and what lies between it and the cache."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from accelpass.ir.attention.recognition.projections import is_constant
from accelpass.ir.core.graph import aten, is_call, value
from accelpass.ir.core.program import Program
from accelpass.ir.kv.sites import KVSite

_LAYOUT = (aten.view, aten.reshape, aten._unsafe_view, aten.unflatten, aten.transpose, aten.permute, aten.clone,
           aten.contiguous, aten.to, aten._to_copy)  # fmt: skip
_FAR = 64


@dataclass(frozen=True, eq=False)
class Projected:
    """Keys, or values, of one layer.

    Attributes:
        linear: the ``aten.linear`` call that projects the layer's input.
        split: its result as ``(batch, tokens, kv_heads, d)``.
        path: nodes from ``split`` to what the cache is given, in order; empty if that is ``split`` transposed.
        tables: what they read that differs from token to token, ``(1 or batch, 1, tokens, width)``: cosines and sines.
    """

    linear: fx.Node
    split: fx.Node
    path: tuple[fx.Node, ...]
    tables: tuple[fx.Node, ...]

    @property
    def x(self) -> fx.Node:
        return self.linear.args[0]

    @property
    def weight(self) -> fx.Node:
        return self.linear.args[1]

    @property
    def bias(self) -> fx.Node | None:
        return self.linear.args[2] if len(self.linear.args) > 2 else None

    def function(self) -> fx.GraphModule:
        """``path`` as a function of ``split`` and the tables, for any number of tokens; constants are left to the graph."""
        graph = fx.Graph()
        env: dict[fx.Node, fx.Node] = {self.split: graph.placeholder("split")}
        for index, table in enumerate(self.tables):
            env[table] = graph.placeholder(f"table{index}")
        for node in self.path:
            env[node] = graph.node_copy(node, env.__getitem__)
        graph.output(env[self.path[-1]] if self.path else env[self.split])
        return fx.GraphModule(torch.nn.Module(), graph)


def projected(program: Program, made: fx.Node) -> Projected | str:
    """Where ``made`` (new keys or values ``(batch, kv_heads, tokens, d)``) comes from, or why that cannot be told."""
    seen, front = [made], [made]
    linears = []
    while front and len(seen) < _FAR:
        node = front.pop(0)
        if is_call(node, aten.linear):
            linears.append(node)
            continue
        for parent in node.all_input_nodes:
            if parent not in seen and isinstance(value(parent), Tensor) and not is_constant(program, parent):
                seen.append(parent)
                front.append(parent)
    if len(set(linears)) != 1:
        return f"they come from {len(set(linears)) or 'no'} linears; one is needed"
    (linear,) = set(linears)
    if not program.tensors.is_constant(linear.args[1]):
        return "their projection's weight is computed in the graph"
    descend = {linear}
    for node in program.graph.nodes:
        if node in seen and any(p in descend for p in node.all_input_nodes):
            descend.add(node)
    inner = [n for n in program.graph.nodes if n in descend and n is not linear]
    _, heads, tokens, width = value(made).shape
    if value(linear).shape[-1] != heads * width:
        return "their linear makes more than them (a fused projection)"
    split = next((n for n in inner if value(n).dim() == 4), None)
    chain = inner[: inner.index(split) + 1] if split is not None else []
    if split is None or not all(is_call(n, *_LAYOUT) for n in chain) or value(split).shape[-1] != width:
        return "their heads are not split right after the projection"
    rest = inner[len(chain) :]
    if value(split).shape[1] is not tokens and value(split).shape[1] != tokens:
        return "their heads come before their tokens"
    tables = list(dict.fromkeys(p for n in rest for p in n.all_input_nodes if p not in descend))
    for table in tables:
        held = value(table)
        if not isinstance(held, Tensor) or held.dim() != 4 or held.shape[1] != 1:
            return f"{table.name}, which changes them, is not one row for each token"
    return Projected(linear, split, tuple(rest), tuple(tables))


def keys_and_values(program: Program, site: KVSite) -> tuple[Projected, Projected] | str:
    """Both sides of a site, or why not."""
    sides = []
    for name, made in zip(("keys", "values"), site.new, strict=True):
        side = projected(program, made)
        if isinstance(side, str):
            return f"{name}: {side}"
        sides.append(side)
    k, v = sides
    if v.tables or any(not is_call(n, *_LAYOUT) for n in v.path):
        return "values: they are changed after their projection"
    return k, v


def replays(keys: Projected, heads: int, width: int, tokens: int) -> str | None:
    """Why the path to the cache does not run for another number of tokens, or None."""
    like = value(keys.split)
    try:
        with like.fake_mode, torch.no_grad():
            split = like.new_empty((like.shape[0], tokens, heads, width))
            tables = [t.new_empty((t.shape[0], 1, tokens, t.shape[3])) for t in map(value, keys.tables)]
            out = fx.Interpreter(keys.function()).run(split, *tables)
    except Exception as cause:  # whatever an operator says of shapes that it was not traced for
        return f"keys: their rotation cannot be run for {tokens} tokens ({type(cause).__name__})"
    wanted: Sequence[object] = (like.shape[0], heads, tokens, width)
    return (
        None
        if tuple(out.shape) == tuple(wanted)
        else f"keys: their rotation gives {tuple(out.shape)} for {tokens} tokens"
    )
