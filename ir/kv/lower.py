"""From appends and reads of a KVCache to buffers: the storage that a pass chose, or all tokens as they are."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx

from accelpass.ir.attention.block_select import MASKS, BlockSelect
from accelpass.ir.attention.faults import WrongResult, checked, named, shape_said, shapes_said
from accelpass.ir.attention.lower import like_in_memory
from accelpass.ir.attention.masks import shows_all_held
from accelpass.ir.attention.op import set_spec, spec_of, want
from accelpass.ir.attention.spec import All, AttentionSpec, Dense, Native, Step
from accelpass.ir.derived import StateSpec
from accelpass.ir.errors import GraphError, SpecConflict
from accelpass.ir.graph import value
from accelpass.ir.kv.banks import RowFormat, row_format
from accelpass.ir.kv.ops import form as form_of
from accelpass.ir.kv.sites import KVSite, kv_sites
from accelpass.ir.kv.storage import Layout, New, Positions, Query, RowSelect, Storage
from accelpass.ir.program import Program
from accelpass.ir.splice import Tracer

_NAMES, _FUNCTIONS = "kv_given", "kv_functions"


def give(append: fx.Node, nodes: Mapping[str, fx.Node], functions: Mapping[str, fx.GraphModule]) -> None:
    """Hand further nodes and functions to the storage of a ``kv_append`` call, which finds them in its ``New``."""
    append.args = (*append.args[:5], list(nodes.values()))
    append.meta[_NAMES] = tuple(nodes)
    append.meta[_FUNCTIONS] = dict(functions)


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
    form: tuple[str, ...]
    is_prompt: bool


@dataclass(frozen=True)
class _Layer:
    """A site, how its tokens are kept, and the nodes of its buffers by name; ``leads`` as in :class:`.storage.New`."""

    site: KVSite
    spec: AttentionSpec
    store: Storage
    format: RowFormat
    layout: Layout
    buffers: dict[str, fx.Node]
    leads: bool

    @property
    def is_dense(self) -> bool:
        """All tokens as they are; a selection may read fewer."""
        return isinstance(self.spec.store, Dense) and isinstance(self.spec.format, Native)

    @property
    def given(self) -> dict[str, fx.Node]:
        append = self.site.append
        return dict(zip(append.meta.get(_NAMES, ()), append.args[5], strict=True))

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


def _calls(gm: fx.GraphModule) -> tuple[str, ...]:
    """A function's operations, whatever its nodes are called."""
    number = {n: f"%{i}" for i, n in enumerate(gm.graph.nodes)}
    return tuple(
        f"{n.op} {n.op == 'call_function' and n.target} {fx.map_arg((n.args, n.kwargs), number.__getitem__)}"
        for n in number
    )


class _Lowering:
    """Traced functions are shared by layers that are alike."""

    def __init__(self, program: Program, sites: Sequence[KVSite]) -> None:
        self.program = program
        self.counts = [site.count for site in sites]
        self._counting: dict[tuple[Any, ...], bool] = {}
        self.run = Tracer(program).run
        self.rows: dict[str, fx.Node] = {}
        self.leaders: dict[Storage, fx.Node] = {}

    def site(self, site: KVSite) -> CacheUse:
        layer, (k, v) = self.layer(site), map(value, site.new)
        if site.is_prompt or (layer.is_dense and isinstance(layer.spec.select, All)):
            self._fill(layer)
        else:
            self._extend(layer)
        how = () if layer.is_dense else (repr(layer.store), repr(layer.spec.format))
        return CacheUse(site.count, k.shape[2], form_of(k, v, *how), site.is_prompt)

    def layer(self, site: KVSite) -> _Layer:
        """What is to be done at a site, and its buffers."""
        k, v = map(value, site.new)
        spec = spec_of(site.attention) if site.attention is not None else AttentionSpec()
        store = Positions() if isinstance(spec.store, Dense) else spec.store
        if not isinstance(store, Storage):
            raise GraphError(f"the store {spec.store.part} does not say how tokens are kept; make it a Storage")
        layout = Layout(k.shape[1], spec.groups, k.shape[3], v.shape[3], k.dtype, site.capacity)
        leader = self.leaders.setdefault(store, site.count)
        tensors = self.program.tensors
        format = row_format(spec.format)
        with named(spec, site.path, f"a list of StateSpec for {layout}"):
            own = [(site.count, state) for state in _states(store, "states", store.states(layout, format))]
            common = [(leader, state) for state in _states(store, "shared", store.shared(layout))]
        buffers = {s.name.removeprefix("kv."): tensors.state(anchor, s) for anchor, s in (*own, *common)}
        return _Layer(site, spec, store, format, layout, buffers, leader is site.count)

    def _fill(self, layer: _Layer) -> None:
        """Store tokens; the model's own attention runs on what it had, or on the buffers of a dense cache."""
        site, store = layer.site, layer.store
        graph, (k, v) = self.program.graph, site.new
        before, found, q = site.append, [], k
        wants = sorted(store.wants)
        if site.is_prompt and site.attention is not None:
            q = site.attention.args[0]
            found = _statistics(site.attention, wants)
            before = max(found, default=site.attention).next

        def run(q: Tensor, k: Tensor, v: Tensor, count: Tensor, *more: Tensor) -> list[Tensor]:
            statistics, more = dict(zip(wants, more, strict=False)), more[len(wants) :]
            buffers, given = layer.named(more)
            new = New(q, k, v, count, statistics, given, layer.functions, layer.leads)
            store.fill(buffers, new, layer.layout, layer.format)
            count.add_(_advance(store, new))
            return []

        with named(layer.spec, site.path, f"to store {_operands(layer)}"):
            self.run(("fill", *layer.key), run, [q, k, v, site.count, *found, *layer.operands], before)
        if site.read is not None:
            for item in list(site.read.users):
                item.replace_all_uses_with(layer.buffers[("keys", "values")[item.args[1]]])
                graph.erase_node(item)
            graph.erase_node(site.read)
        graph.erase_node(site.append)

    def _without_counting(
        self, spec: AttentionSpec, q: fx.Node, extras: Sequence[fx.Node], capacity: int
    ) -> AttentionSpec:
        """Of one new token, the spec without masks that hide what is not stored yet."""
        if value(q).shape[2] != 1:
            return spec

        def counts(step: Step) -> bool:
            if step.kind not in MASKS or step.extra is None:
                return False
            mask = extras[step.extra]
            known = (step.kind, mask, capacity)
            if known not in self._counting:
                self._counting[known] = shows_all_held(step, mask, self.counts, capacity)
            return self._counting[known]

        return replace(spec, steps=tuple(s for s in spec.steps if not counts(s)))

    def _extend(self, layer: _Layer) -> None:
        """Store tokens and attend over what is stored."""
        site, spec, store = layer.site, layer.spec, layer.store
        graph, node, (k, v) = self.program.graph, site.attention, site.new
        assert node is not None and site.read is not None
        if node.target is not torch.ops.accelpass.attention.default:
            raise GraphError(
                f"statistics are wanted of the cached attention at {site.path}; only its storage gives them"
            )
        q, extras, wanted = node.args[0], list(node.args[3]), value(node)
        if store.knows_held:
            spec = self._without_counting(spec, q, extras, site.capacity)
        if not isinstance(spec.select, All | RowSelect):
            raise GraphError(
                f"the selection {spec.select.part} at {site.path} is for prompts, and this one reads a cache"
            )
        # The selection is for single tokens; several at once (a further prompt) attend to all.
        select = spec.select if isinstance(spec.select, RowSelect) and value(q).shape[2] == 1 else None
        takes = [self.rows[select.takes]] if select is not None and select.takes else []

        def run(q: Tensor, k: Tensor, v: Tensor, count: Tensor, *more: Tensor) -> list[Tensor]:
            masks, more = more[: len(extras)], more[len(extras) :]
            rows, more = more[: len(takes)], more[len(takes) :]
            buffers, given = layer.named(more)
            new = New(q, k, v, count, {}, given, layer.functions, layer.leads)
            query = Query(q, masks, spec, layer.layout)
            if select is None:
                made = [store.extend(buffers, new, query, layer.layout, layer.format)]
            else:
                store.fill(buffers, new, layer.layout, layer.format)
                both = select.attend(buffers, new, query, layer.layout, layer.format, rows[0] if rows else None)
                if not isinstance(both, tuple) or len(both) != 2:
                    raise WrongResult(
                        select, "attend", f"it returned {type(both).__name__}, not (attention, rows or None)"
                    )
                made = [tensor for tensor in both if tensor is not None]
            part, method = (store, "extend") if select is None else (select, "attend")
            made[0] = like_in_memory(checked(part, method, made[0], wanted), wanted)
            count.add_(_advance(store, new))
            return made

        key = ("extend", replace(spec, site=""), *layer.key, str(wanted.stride()))
        with named(spec, site.path, f"shape {shape_said(wanted)} of the attention of {_operands(layer, q)}"):
            out, *rows = self.run(key, run, [q, k, v, site.count, *extras, *takes, *layer.operands], node)
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


def _states(store: Storage, method: str, made: Any) -> list[StateSpec]:
    if not isinstance(made, list) or not all(isinstance(one, StateSpec) for one in made):
        raise WrongResult(store, method, f"it returned {made!r}")
    return made


def _advance(store: Storage, new: New) -> Tensor | int:
    moved = store.advance(new)
    if not isinstance(moved, Tensor | int | torch.SymInt):
        raise WrongResult(store, "advance", f"it returned {type(moved).__name__}, no number of tokens")
    return moved


def _operands(layer: _Layer, q: fx.Node | None = None) -> str:
    """What a storage's methods are given at a site, in words."""
    keys = dict(zip(("k", "v"), map(value, layer.site.new), strict=True))
    given = shapes_said(({} if q is None else {"q": value(q)}) | keys)
    buffers = shapes_said({name: value(node) for name, node in layer.buffers.items()})
    return f"{given} in the buffers {buffers or 'none'}"


def _statistics(attention: fx.Node, wants: Sequence[str]) -> list[fx.Node]:
    """The prompt's attention as the model wrote it but for the blocks that it reads, with these statistics beside it.

    Raises:
        SpecConflict: statistics of all keys are wanted of an attention that reads some.
    """
    spec = spec_of(attention)
    text = attention.meta.get("attention_spec")  # a copy for fewer rows was never the model's own
    own = AttentionSpec.from_json(text) if text else replace(spec, store=Dense(), format=Native(), edits=())
    makers = {part: who for who, part in spec.edits}
    if isinstance(spec.select, BlockSelect):
        if wants:
            raise SpecConflict(
                f"{makers['store']!r} scores tokens by the prompt's attention to all of them at "
                f"{spec.site or 'this attention'}, and {makers['select']!r} computes some blocks of it alone. Use one of "
                "the two there (include=, exclude= choose sites), or a cache pass that needs no scores (kv_window, kv_quant)."
            )
        own = own.edited(by=makers["select"], select=spec.select)
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
    lowering = _Lowering(program, sites)
    uses = [lowering.site(site) for site in sites]
    program.graph.eliminate_dead_code()
    program.gm.recompile()
    program.changed()
    return uses
