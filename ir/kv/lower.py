"""From appends and reads of a KVCache to buffers: the storage that a pass chose, or all tokens as they are."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx

from accelpass.ir.attention.lowering.lower import like_in_memory
from accelpass.ir.attention.recognition.masks import shows_all_held
from accelpass.ir.attention.spec.block_select import MASKS, BlockSelect
from accelpass.ir.attention.spec.faults import WrongResult, checked, named, shape_said
from accelpass.ir.attention.spec.op import ATTENTION, set_spec, spec_of, want
from accelpass.ir.attention.spec.spec import All, AttentionSpec, Dense, Native, Places, Step, tap_of
from accelpass.ir.core.graph import aten, call, known, refresh, value
from accelpass.ir.core.program import Program
from accelpass.ir.core.state import StateSpec
from accelpass.ir.errors import GraphError, SpecConflict
from accelpass.ir.kv.banks import row_format
from accelpass.ir.kv.layer import Extension, Layer, advance, operands_said
from accelpass.ir.kv.ops import KV_APPEND
from accelpass.ir.kv.ops import form as form_of
from accelpass.ir.kv.sites import KVSite, candidates, kv_sites
from accelpass.ir.kv.storage import Layout, New, Positions, RowSelect, Storage
from accelpass.ir.kv.tail import KV_STEPS, Stepper, whole_of
from accelpass.ir.transform.splice import Tracer, trace_on

_END = 2**63 - 1
MOST_UNROLLED = 16
"""Candidates of a call whose steps are one graph: each is an attention of its own, which takes its time to compile."""


@dataclass(frozen=True)
class CacheUse:
    """What one graph does to one cache layer, for the checks before and after a call.

    Attributes:
        count: the layer's counter among the graph's original inputs.
        tokens: how many tokens a call adds; a symbolic number names a size of an input.
        form: how they are stored.
        method, site: who keeps them, and where.
        by_position: each token has a row of its own; by_mask: and several at once see what their mask says.
        buffers: where they are stored: inputs that states live with, and the states.
        stepper: takes candidates one by one, if the call stores some so.
    """

    count: fx.Node
    tokens: int | torch.SymInt
    form: tuple[str, ...]
    is_prompt: bool
    method: str
    site: str
    by_position: bool
    by_mask: bool
    buffers: tuple[tuple[fx.Node, StateSpec], ...] = ()
    stepper: Stepper | None = None

    @property
    def rounds(self) -> bool:
        """Rows are stored as codes, so that the last bit of what they are made of may count."""
        return any(spec.dtype == torch.uint8 for _, spec in self.buffers)


class _Lowering:
    """Traced functions are shared by layers that are alike."""

    def __init__(self, program: Program, sites: Sequence[KVSite]) -> None:
        self.program = program
        self.counts = [site.count for site in sites]
        self._counting: dict[tuple[Any, ...], bool] = {}
        self.run = Tracer(program).run
        self.rows: dict[str, fx.Node] = {}
        self.leaders: dict[Storage, fx.Node] = {}
        self.candidates = candidates(program) if any(site.records for site in sites) else 0
        self.steppers: dict[Any, Stepper] = {}

    def site(self, site: KVSite) -> CacheUse:
        layer, (k, v) = self.layer(site), map(value, site.new)
        tokens, stepper = k.shape[2], None
        if site.records and site.attention is not None and self.candidates and not layer.follows_positions:
            stepper = self._first_candidates(layer) if site.is_prompt else self._later_candidates(layer)
        elif site.is_prompt:
            self._prompt(layer)
        elif layer.is_dense and isinstance(layer.spec.select, All):
            self._fill(layer)
        else:
            self._extend(layer)
        how = () if layer.is_dense else (repr(layer.store), repr(layer.spec.format))
        method = {part: who for who, part in layer.spec.edits}.get("store", "the model")
        return CacheUse(
            site.count, tokens, form_of(k, v, *how), site.is_prompt, method, site.path, layer.by_position, layer.by_mask,
            tuple(layer.states.values()), stepper,
        )  # fmt: skip

    def layer(self, site: KVSite) -> Layer:
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
            if isinstance(spec.select, RowSelect):
                own += [(site.count, state) for state in _states(spec.select, "states", spec.select.states(layout))]
            common = [(leader, state) for state in _states(store, "shared", store.shared(layout))]
        states = {s.name.removeprefix("kv."): (anchor, s) for anchor, s in (*own, *common)}
        buffers = {name: tensors.state(*state) for name, state in states.items()}
        return Layer(site, spec, store, format, layout, states, buffers, leader is site.count)

    def _prompt(self, layer: Layer, laid: bool = True) -> None:
        """Store a prompt; its attention is the model's own, or the storage's, ``laid`` out in memory as the model's own."""
        if layer.store.computes_prompts and layer.site.attention is not None:
            self._extend(layer, laid)
        else:
            self._fill(layer)

    def _fill(self, layer: Layer) -> None:
        """Store tokens; the model's own attention runs on what it had, or on the buffers of a dense cache."""
        site, store = layer.site, layer.store
        graph, (k, v) = self.program.graph, site.new
        before, found, q = site.append, [], k
        wants = sorted(store.wants)
        if site.is_prompt and site.attention is not None:
            q = site.attention.args[0]
            self._try_taps(layer, wants)
            found = _statistics(site.attention, wants)
            before = max(found, default=site.attention).next

        def run(q: Tensor, k: Tensor, v: Tensor, count: Tensor, *more: Tensor) -> list[Tensor]:
            statistics, more = dict(zip(wants, more, strict=False)), more[len(wants) :]
            buffers, given = layer.named(more)
            new = New(q, k, v, count, statistics, given, layer.functions, layer.leads)
            store.fill(buffers, new, layer.layout, layer.format)
            count.add_(advance(store, new))
            return []

        with named(layer.spec, site.path, f"to store {operands_said(layer)}"):
            self.run(("fill", *layer.key), run, [q, k, v, site.count, *found, *layer.operands], before)
        if site.read is not None:
            for item in list(site.read.users):
                item.replace_all_uses_with(layer.buffers[("keys", "values")[item.args[1]]])
                graph.erase_node(item)
            graph.erase_node(site.read)
        graph.erase_node(site.append)

    def _try_taps(self, layer: Layer, wants: Sequence[str]) -> None:
        """Run each tap once: what is wrong with it would otherwise be told while the model runs, by an operator that knows no pass."""
        heads, rows, keys = layer.layout.kv_heads, 2, 3
        wanted = torch.empty((1, heads, keys))
        said = f"{shape_said(wanted)}, what each key gets of scores (batch=1, kv_heads={heads}, groups, rows={rows}, keys={keys})"
        with named(layer.spec, layer.site.path, said):
            for tap in filter(None, map(tap_of, wants)):
                at = Places(torch.arange(1, 1 + rows), torch.arange(keys), keys)
                made = tap(torch.zeros(1, heads, layer.layout.groups, rows, keys), at)
                checked(tap, "__call__", made, wanted)

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

    def _extend(self, layer: Layer, laid: bool = True) -> None:
        """Store tokens and attend over what is stored."""
        site, spec, store = layer.site, layer.spec, layer.store
        node, (k, v) = site.attention, site.new
        assert node is not None
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
        select = layer.select if value(q).shape[2] == 1 else None
        takes = [self.rows[select.takes]] if select is not None and select.takes else []
        extension = Extension.of(layer, select, spec, len(extras), len(takes))

        def run(*operands: Tensor) -> list[Tensor]:
            made = extension(*operands)
            return [like_in_memory(made[0], wanted) if laid else made[0], *made[1:]]

        key = ("extend", replace(spec, site=""), *layer.key, str(wanted.stride()) if laid else "")
        with named(spec, site.path, f"shape {shape_said(wanted)} of the attention of {operands_said(layer, q)}"):
            out, *rows = self.run(key, run, [q, k, v, site.count, *extras, *takes, *layer.operands], node)
        if rows and select is not None and select.gives:
            self.rows[select.gives] = rows[0]
        self._replace(site, out)

    def _replace(self, site: KVSite, out: fx.Node) -> None:
        """Put ``out`` in the place of the attention, and drop what read the cache for it."""
        graph, node = self.program.graph, site.attention
        assert node is not None
        node.replace_all_uses_with(out)
        graph.erase_node(node)
        graph.erase_node(site.append)
        if site.read is None:
            return
        for item in list(site.read.users):
            for adapter in list(item.users):
                if not adapter.users:
                    graph.erase_node(adapter)
            if not item.users:
                graph.erase_node(item)
        graph.erase_node(site.read)

    def _first_candidates(self, layer: Layer) -> Stepper:
        """A prompt, and candidates after it: its attention is the model's own, theirs is over what is stored of it."""
        site, graph, less = layer.site, self.program.graph, self.candidates
        node = site.attention
        assert node is not None
        q, extras, wanted, spec, along = node.args[0], list(node.args[3]), value(node), layer.spec, layer.along
        with graph.inserting_before(node):
            end = -less if isinstance(less, int) else call(graph, node, operator.neg, less)

            def cut(x: fx.Node, dim: int, low: Any, high: Any) -> fx.Node:
                return call(graph, node, aten.slice.Tensor, x, dim, low, high)

            def of_prompt(mask: fx.Node) -> fx.Node:
                for dim in (-1, -2):
                    if known(value(mask).shape[dim] == value(q).shape[2]):
                        mask = cut(mask, dim, 0, end)
                return mask

            def ends(low: Any, high: Any) -> tuple[list[fx.Node], list[fx.Node]]:
                given = [cut(x, along[n], low, high) if n in along else x for n, x in layer.given.items()]
                return [cut(x, 2, low, high) for x in (q, *site.new)], given

            (mine, held), (last, given) = ends(0, end), ends(end, _END)
            prompt = call(graph, node, ATTENTION, *mine, [of_prompt(e) for e in extras], spec.to_json())
            prompt.meta["attention_spec"] = node.meta.get("attention_spec", spec.to_json())
            append = call(graph, node, KV_APPEND, *mine[1:], *site.append.args[2:6], held)
            append.meta |= {key: kept for key, kept in site.append.meta.items() if key.startswith("kv_")}
            joined = call(graph, node, aten.cat.default, [prompt, prompt], 2)
        self._prompt(replace(layer, site=replace(site, append=append, attention=prompt)), laid=False)
        one = replace(spec, causal=False, select=layer.select or All())
        out, stepper = self._stepped(layer, one, last, extras, given, joined)
        joined.args = ([joined.args[0][0], out], 2)
        refresh(joined)
        (laid,) = self.run(("layout", str(wanted.stride())), _laid_out(wanted), [joined], node)
        node.replace_all_uses_with(laid)
        graph.erase_node(node)
        graph.erase_node(site.append)
        return stepper

    def _later_candidates(self, layer: Layer) -> Stepper:
        """Candidates after tokens that are stored."""
        site, node = layer.site, layer.site.attention
        assert node is not None
        wanted, own = value(node), [node.args[0], *site.new]
        out, stepper = self._stepped(layer, layer.spec, own, list(node.args[3]), list(layer.given.values()), node)
        (laid,) = self.run(("layout", str(wanted.stride())), _laid_out(wanted), [out], node)
        self._replace(site, laid)
        return stepper

    def _stepped(
        self, layer: Layer, spec: AttentionSpec, own: Sequence[fx.Node], masks: Sequence[fx.Node],
        given: Sequence[fx.Node], before: fx.Node,
    ) -> tuple[fx.Node, Stepper]:  # fmt: skip
        """The attention of tokens of which the last are stored one by one, in front of ``before``."""
        site, graph, select = layer.site, self.program.graph, layer.select
        takes = [self.rows[select.takes]] if select is not None and select.takes else []
        dims = tuple(layer.along.get(name) for name in layer.given)
        buffers = list(layer.buffers.values())
        shapes = [[*value(x).shape[:2], 1, value(x).shape[3]] for x in own]
        fakes = [value(own[0]).new_empty(shape, dtype=value(x).dtype) for x, shape in zip(own, shapes, strict=True)]
        for x in masks:
            *lead, rows, columns = value(x).shape
            wide = 1 if known(columns == 1) else site.capacity
            fakes.append(value(x).new_empty([*lead, 1, wide]))
        fakes[3:3] = [value(site.count)]
        fakes += [value(x)[0] for x in takes]
        fakes += [
            value(x) if d is None else value(x).narrow(d, 0, 1).contiguous() for x, d in zip(given, dims, strict=True)
        ]
        fakes += [value(x) for x in buffers]
        key = (replace(spec, site=""), *layer.key, dims, *((str(t.shape), t.dtype) for t in fakes))
        if key not in self.steppers:
            counts = len(masks), len(takes)
            one, several = (Extension.of(layer, by, spec, *counts) for by in (select, None))
            with named(spec, site.path, f"a step of {operands_said(layer, own[0])}"):
                traced = trace_on(self.program, one, fakes)
            (output,) = traced.graph.find_nodes(op="output")
            handed = [tuple(value(n).shape) for n in output.args[0][1:]]
            handed_on = handed[0] if handed else None
            self.steppers[key] = Stepper(traced, several, site.capacity, dims, handed_on, layer.by_position)
            self.steppers[key].whole = self._whole(self.steppers[key], own, masks, takes, list(given), buffers, fakes)
        stepper = self.steppers[key]
        with graph.inserting_before(before):
            operands = list(own), site.count, list(masks), takes, list(given), buffers
            made = call(graph, before, KV_STEPS, stepper.number, self.candidates, *operands)
            out, rows, counted = (call(graph, before, operator.getitem, made, n) for n in range(3))
            call(graph, before, aten.copy_.default, site.count, counted)
        if select is not None and select.gives:
            self.rows[select.gives] = rows
        return out, stepper

    def _whole(
        self, stepper: Stepper, own: Sequence[fx.Node], masks: Sequence[fx.Node], takes: Sequence[fx.Node],
        given: Sequence[fx.Node], buffers: Sequence[fx.Node], fakes: Sequence[Tensor],
    ) -> fx.GraphModule | None:  # fmt: skip
        """The steps of a call as one graph, which a compiler can take; None if they are as many as a call has."""
        tokens, some = value(own[1]).shape[2], self.candidates
        operands = [*(value(n) for n in own), fakes[3], *(value(n) for n in (*masks, *takes, *given, *buffers))]
        if not isinstance(tokens, int) or not isinstance(some, int) or tokens > MOST_UNROLLED:
            return None
        if not all(isinstance(size, int) for t in operands for size in t.shape):
            return None
        laid = [t.new_empty(t.shape) for t in operands]
        return trace_on(self.program, whole_of(stepper, tokens, some, [len(masks), len(takes), len(given)]), laid)


def _laid_out(wanted: Tensor) -> Callable[[Tensor], list[Tensor]]:
    return lambda out: [like_in_memory(out, wanted)]


def _states(part: Storage | RowSelect, method: str, made: Any) -> list[StateSpec]:
    if not isinstance(made, list) or not all(isinstance(one, StateSpec) for one in made):
        raise WrongResult(part, method, f"it returned {made!r}")
    return made


def _statistics(attention: fx.Node, wants: Sequence[str]) -> list[fx.Node]:
    """The prompt's attention as the model wrote it but for the keys that it reads, with these statistics beside it.

    Raises:
        SpecConflict: statistics of all keys are wanted of an attention that reads some.
    """
    spec = spec_of(attention)
    text = attention.meta.get("attention_spec")  # a copy for fewer rows was never the model's own
    own = AttentionSpec.from_json(text) if text else replace(spec, store=Dense(), format=Native(), edits=())
    makers = {part: who for who, part in spec.edits}
    if not isinstance(spec.select, All | RowSelect):
        if wants:
            what = "some blocks" if isinstance(spec.select, BlockSelect) else "some"
            raise SpecConflict(
                f"{makers['store']!r} scores tokens by the prompt's attention to all of them at "
                f"{spec.site or 'this attention'}, and {makers['select']!r} computes {what} of it alone. Use one of "
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
