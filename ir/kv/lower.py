"""From appends and reads of a KVCache to buffers: the storage that a pass chose, or all tokens as they are."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx

from accelpass.ir.attention.lower import like_in_memory
from accelpass.ir.attention.op import set_spec, spec_of, want
from accelpass.ir.attention.spec import All, AttentionSpec, Dense, Native
from accelpass.ir.errors import GraphError
from accelpass.ir.graph import value
from accelpass.ir.kv.banks import RowFormat, row_format
from accelpass.ir.kv.ops import dense_form
from accelpass.ir.kv.sites import KVSite, kv_sites
from accelpass.ir.kv.storage import Layout, New, Positions, Query, RowSelect, Storage
from accelpass.ir.program import Program
from accelpass.ir.splice import splice, trace
from accelpass.ir.tensors import FromInputs

_NAMES, _FUNCTIONS = "kv_given", "kv_functions"


def give(append: fx.Node, nodes: Mapping[str, fx.Node], functions: Mapping[str, Callable[..., Tensor]]) -> None:
    """Hand further nodes and functions to the storage of a ``kv_append`` call, which finds them in its ``New``."""
    append.args = (*append.args[:5], list(nodes.values()))
    append.meta[_NAMES] = tuple(nodes)
    append.meta[_FUNCTIONS] = functions


def _given(append: fx.Node) -> dict[str, fx.Node]:
    return dict(zip(append.meta.get(_NAMES, ()), append.args[5], strict=True))


@dataclass(frozen=True)
class CacheUse:
    """What one graph does to one cache layer, for the checks before and after a call.

    Attributes:
        count: the layer's counter among the graph's original inputs.
        tokens: how many tokens a call adds; a symbolic number names a size of an input.
        form: how they are stored.
    """

    count: fx.Node
    tokens: int | torch.SymInt
    capacity: int
    form: tuple[str, ...]
    is_prompt: bool


class _Lowering:
    """Traced functions are shared by layers that are alike."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.traced: dict[Any, fx.GraphModule] = {}
        self.rows: dict[str, fx.Node] = {}
        self.leaders: dict[Storage, fx.Node] = {}

    def run(self, key: Any, function: Any, operands: Sequence[fx.Node], before: fx.Node) -> list[fx.Node]:
        layouts = tuple((str(value(n).shape), str(value(n).stride()), value(n).dtype) for n in operands)
        if (key, layouts) not in self.traced:
            self.traced[key, layouts] = trace(self.program, function, operands)
        return splice(self.program, self.traced[key, layouts], operands, before)

    def site(self, site: KVSite) -> CacheUse:
        k, v = site.new
        spec = spec_of(site.attention) if site.attention is not None else AttentionSpec()
        plain = isinstance(spec.store, Dense)
        store = Positions() if plain else spec.store
        if not isinstance(store, Storage):
            raise GraphError(f"the store {spec.store.part} does not say how tokens are kept; make it a Storage")
        format = row_format(spec.format)
        _, heads, tokens, width = value(k).shape
        layout = Layout(heads, spec.groups, width, value(v).shape[3], value(k).dtype, site.capacity)
        tensors = self.program.tensors
        assert isinstance(tensors, FromInputs)
        states = store.states(layout, format)
        names = [s.name.removeprefix("kv.") for s in states]
        held = [tensors.state(site.count, s) for s in states]
        leader = self.leaders.setdefault(store, site.count)
        for common in store.shared(layout):
            names.append(common.name.removeprefix("kv."))
            held.append(tensors.state(leader, common))
        leads = leader is site.count
        dense = plain and isinstance(spec.format, Native)
        form = dense_form(value(k)) if dense else (repr(store), repr(spec.format), str(layout.dtype))
        if site.is_prompt or (dense and isinstance(spec.select, All)):
            self._fill(site, spec, store, format, layout, names, held, leads)
        else:
            self._extend(site, spec, store, format, layout, names, held, leads)
        return CacheUse(site.count, tokens, site.capacity, form, site.is_prompt)

    def _fill(
        self,
        site: KVSite,
        spec: AttentionSpec,
        store: Storage,
        format: RowFormat,
        layout: Layout,
        names: list[str],
        held: list[fx.Node],
        leads: bool,
    ) -> None:
        """Store tokens; the model's own attention runs on what it had, or on the buffers of a dense cache."""
        graph, (k, v) = self.program.graph, site.new
        before, found, q = site.append, [], k
        wants = sorted(store.wants)
        if site.is_prompt and site.attention is not None:
            q = site.attention.args[0]
            found = _statistics(site.attention, wants)
            before = max(found, default=site.attention).next
        given = _given(site.append)
        functions = site.append.meta.get(_FUNCTIONS, {})

        def run(q: Tensor, k: Tensor, v: Tensor, count: Tensor, *more: Tensor) -> list[Tensor]:
            statistics = dict(zip(wants, more, strict=False))
            rest = more[len(wants) :]
            new = New(q, k, v, count, statistics, dict(zip(given, rest, strict=False)), functions, leads)
            store.fill(dict(zip(names, rest[len(given) :], strict=True)), new, layout, format)
            count.add_(k.shape[2])
            return []

        operands = [q, k, v, site.count, *found, *given.values(), *held]
        self.run(("fill", store, spec.format, layout, tuple(given), leads), run, operands, before)
        if site.read is not None:
            banks = dict(zip(names, held, strict=True))
            for item in list(site.read.users):
                item.replace_all_uses_with(banks[("keys", "values")[item.args[1]]])
                graph.erase_node(item)
            graph.erase_node(site.read)
        graph.erase_node(site.append)

    def _extend(
        self,
        site: KVSite,
        spec: AttentionSpec,
        store: Storage,
        format: RowFormat,
        layout: Layout,
        names: list[str],
        held: list[fx.Node],
        leads: bool,
    ) -> None:
        """Store tokens and attend over what is stored."""
        graph, node, (k, v) = self.program.graph, site.attention, site.new
        assert node is not None and site.read is not None
        if node.target is not torch.ops.accelpass.attention.default:
            raise GraphError(
                f"statistics are wanted of the cached attention at {site.path}; only its storage gives them"
            )
        q, extras, wanted = node.args[0], list(node.args[3]), value(node)
        # The selection is for single tokens; several at once (a further prompt) attend to all.
        select = spec.select if isinstance(spec.select, RowSelect) and value(q).shape[2] == 1 else None
        takes = [self.rows[select.takes]] if select is not None and select.takes else []
        given = _given(site.append)
        functions = site.append.meta.get(_FUNCTIONS, {})

        def run(q: Tensor, k: Tensor, v: Tensor, count: Tensor, *more: Tensor) -> list[Tensor]:
            masks, more = more[: len(extras)], more[len(extras) :]
            rows, more = more[: len(takes)], more[len(takes) :]
            handed, buffers = more[: len(given)], dict(zip(names, more[len(given) :], strict=True))
            new = New(q, k, v, count, {}, dict(zip(given, handed, strict=True)), functions, leads)
            query = Query(q, masks, spec, layout)
            if select is None:
                made = [store.extend(buffers, new, query, layout, format)]
            else:
                store.fill(buffers, new, layout, format)
                out, rows_on = select.attend(buffers, new, query, layout, format, rows[0] if rows else None)
                made = [out] if rows_on is None else [out, rows_on]
            made[0] = like_in_memory(made[0], wanted)
            count.add_(k.shape[2])
            return made

        operands = [q, k, v, site.count, *extras, *takes, *given.values(), *held]
        key = ("extend", store, replace(spec, site=""), layout, tuple(given), leads, str(wanted.stride()))
        out, *rows = self.run(key, run, operands, node)
        if rows and select is not None and select.gives:
            self.rows[select.gives] = rows[0]
        node.replace_all_uses_with(out)
        graph.erase_node(node)
        for item in list(site.read.users):
            for adapter in list(item.users):
                if not adapter.users:
                    graph.erase_node(adapter)
            if not item.users:
                graph.erase_node(item)
        graph.erase_node(site.read)
        graph.erase_node(site.append)


def _statistics(attention: fx.Node, wants: Sequence[str]) -> list[fx.Node]:
    """The prompt's attention as the model wrote it, with these statistics beside it."""
    spec = spec_of(attention)
    own = AttentionSpec.from_json(attention.meta["attention_spec"])
    makers = {part: who for who, part in spec.edits}
    set_spec(attention, own)
    found: list[fx.Node] = []
    node = attention
    for name in wants:
        found.append(want(node, name, by=makers.get("store", "kv_cache")))
        node = found[-1].args[0]
    # Asking for one may have renewed the node that the others hang on.
    return [next(u for u in node.users if u.args[1] == f.args[1]) for f in found] if found else []


def lower(program: Program) -> list[CacheUse]:
    """Give every append and read of a KVCache its buffers. Runs before attentions are lowered."""
    sites = kv_sites(program)
    if not sites:
        return []
    lowering = _Lowering(program)
    uses = [lowering.site(site) for site in sites]
    program.graph.eliminate_dead_code()
    program.gm.recompile()
    program.changed()
    return uses
