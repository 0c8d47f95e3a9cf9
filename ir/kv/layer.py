"""One layer of a cache in one graph: how its tokens are kept, in which buffers, and what stores and attends."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, fx

from accelpass.ir.attention.spec.faults import WrongResult, checked, shapes_said
from accelpass.ir.attention.spec.spec import AttentionSpec, Dense, Native
from accelpass.ir.core.graph import value
from accelpass.ir.core.state import StateSpec
from accelpass.ir.kv.banks import RowFormat
from accelpass.ir.kv.sites import KVSite
from accelpass.ir.kv.storage import Layout, New, Positions, Query, RowSelect, Storage

_NAMES, _FUNCTIONS, _ALONG = "kv_given", "kv_functions", "kv_along"


def give(
    append: fx.Node,
    nodes: Mapping[str, fx.Node],
    functions: Mapping[str, fx.GraphModule],
    along: Mapping[str, int] = MappingProxyType({}),
) -> None:
    """Hand further nodes and functions to the storage of a ``kv_append`` call, which finds them in its ``New``.

    Args:
        along: of each node that has a row for each token, the dimension of tokens.
    """
    append.args = (*append.args[:6], list(nodes.values()))
    append.meta[_NAMES], append.meta[_ALONG] = tuple(nodes), dict(along)
    append.meta[_FUNCTIONS] = dict(functions)


@dataclass(frozen=True)
class Layer:
    """A site, how its tokens are kept, and the nodes of its buffers by name; ``leads`` as in :class:`.storage.New`."""

    site: KVSite
    spec: AttentionSpec
    store: Storage
    format: RowFormat
    layout: Layout
    states: dict[str, tuple[fx.Node, StateSpec]]
    buffers: dict[str, fx.Node]
    leads: bool

    @property
    def select(self) -> RowSelect | None:
        """What one token reads of what is stored; None for all."""
        return self.spec.select if isinstance(self.spec.select, RowSelect) else None

    @property
    def by_position(self) -> bool:
        """The newest tokens are taken back by counting fewer; not where a selection remembers what it chose for them."""
        return self.store.by_position and not (self.select is not None and self.select.states(self.layout))

    @property
    def by_mask(self) -> bool:
        """Several tokens at once see what their mask says, as they would alone; then a tree of them can be read.

        Not of rounded rows: sums of several rows are added in another order than those of one, and where a later layer's row
        is rounded to another code for it, texts part.
        """
        return isinstance(self.store, Positions) and self.select is None and isinstance(self.spec.format, Native)

    @property
    def follows_positions(self) -> bool:
        """Several tokens at once are stored and attended to as they would be one by one; those of a prompt read no stored rows."""
        return self.by_mask and (self.is_dense or not self.site.is_prompt)

    @property
    def is_dense(self) -> bool:
        """All tokens as they are; a selection may read fewer."""
        return isinstance(self.spec.store, Dense) and isinstance(self.spec.format, Native)

    @property
    def given(self) -> dict[str, fx.Node]:
        append = self.site.append
        return dict(zip(append.meta.get(_NAMES, ()), append.args[6], strict=True))

    @property
    def along(self) -> dict[str, int]:
        """Of each given node that has a row for each token, the dimension of tokens."""
        return dict(self.site.append.meta.get(_ALONG, {}))

    @property
    def functions(self) -> dict[str, Callable[..., Tensor]]:
        made: dict[str, fx.GraphModule] = self.site.append.meta.get(_FUNCTIONS, {})
        return {name: fx.Interpreter(gm).run for name, gm in made.items()}

    @property
    def key(self) -> tuple[Any, ...]:
        """Equal for layers whose tokens are kept by the same operations."""
        functions = self.site.append.meta.get(_FUNCTIONS, {})
        calls = tuple((name, _calls(gm)) for name, gm in functions.items())
        return self.store, self.format, self.layout, tuple(self.given), calls, self.leads

    @property
    def operands(self) -> list[fx.Node]:
        """What a traced function takes after its own operands; :meth:`named` gives it its names back."""
        return [*self.given.values(), *self.buffers.values()]

    def named(self, operands: Sequence[Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Buffers and given tensors by name."""
        count = len(self.given)
        buffers = dict(zip(self.buffers, operands[count:], strict=True))
        return buffers, dict(zip(self.given, operands[:count], strict=True))


@dataclass(frozen=True)
class Extension:
    """Stores tokens after others and attends: a function of queries, keys, values, the counter, masks, rows that an earlier layer
    hands on, and a layer's operands."""

    store: Storage
    select: RowSelect | None
    spec: AttentionSpec
    format: RowFormat
    layout: Layout
    given: tuple[str, ...]
    buffers: tuple[str, ...]
    functions: Mapping[str, Callable[..., Tensor]]
    leads: bool
    masks: int
    takes: int

    @staticmethod
    def of(layer: Layer, select: RowSelect | None, spec: AttentionSpec, masks: int, takes: int) -> Extension:
        names = tuple(layer.given), tuple(layer.buffers)
        parts = layer.store, select, spec, layer.format, layer.layout
        return Extension(*parts, *names, layer.functions, layer.leads, masks, takes)

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, count: Tensor, *more: Tensor) -> list[Tensor]:
        masks, more = more[: self.masks], more[self.masks :]
        rows, more = more[: self.takes], more[self.takes :]
        held = dict(zip(self.buffers, more[len(self.given) :], strict=True))
        given = dict(zip(self.given, more[: len(self.given)], strict=True))
        new = New(q, k, v, count, {}, given, self.functions, self.leads)
        query = Query(q, masks, self.spec, self.layout)
        wanted = v.new_empty((*q.shape[:-1], v.shape[-1]))
        if self.select is None:
            made = [self.store.extend(held, new, query, self.layout, self.format)]
        else:
            self.store.fill(held, new, self.layout, self.format)
            both = self.select.attend(held, new, query, self.layout, self.format, rows[0] if rows else None)
            if not isinstance(both, tuple) or len(both) != 2:
                raise WrongResult(
                    self.select, "attend", f"it returned {type(both).__name__}, not (attention, rows or None)"
                )
            made = [tensor for tensor in both if tensor is not None]
        part, method = (self.store, "extend") if self.select is None else (self.select, "attend")
        made[0] = checked(part, method, made[0], wanted)
        count.add_(advance(self.store, new))
        return made


def _calls(gm: fx.GraphModule) -> tuple[str, ...]:
    """A function's operations, whatever its nodes are called."""
    number = {n: f"%{i}" for i, n in enumerate(gm.graph.nodes)}
    return tuple(
        f"{n.op} {n.op == 'call_function' and n.target} {fx.map_arg((n.args, n.kwargs), number.__getitem__)}"
        for n in number
    )


def advance(store: Storage, new: New) -> Tensor | int:
    moved = store.advance(new)
    if not isinstance(moved, Tensor | int | torch.SymInt):
        raise WrongResult(store, "advance", f"it returned {type(moved).__name__}, no number of tokens")
    return moved


def operands_said(layer: Layer, q: fx.Node | None = None) -> str:
    """What a storage's methods are given at a site, in words."""
    keys = dict(zip(("k", "v"), map(value, layer.site.new), strict=True))
    given = shapes_said(({} if q is None else {"q": value(q)}) | keys)
    buffers = shapes_said({name: value(node) for name, node in layer.buffers.items()})
    return f"{given} in the buffers {buffers or 'none'}"
