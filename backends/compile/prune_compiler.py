"""Compiles a decoder with a pass that drops tokens between blocks; the result is a :class:`PrunedModel`."""

from __future__ import annotations

import operator
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from accelpass.backends.compile.pruned import PrunedModel, kept
from accelpass.backends.compile.pruned_graph import PrunedGraph, Stage
from accelpass.backends.compile.rewriting import Rewritten, captured, code_for, copied, rewritten
from accelpass.backends.runtime.caches import CacheCalls
from accelpass.backends.staged.stage import Held, Part, Ref, part_of
from accelpass.ir.core.graph import fake_mode, placeholders, size_among, value
from accelpass.ir.core.program import Program
from accelpass.ir.core.tensors import FromInputs
from accelpass.ir.errors import OptionError
from accelpass.ir.kv.lower import CacheUse
from accelpass.ir.kv.sites import kv_sites
from accelpass.ir.torch_private import FakeTensorMode, TracingContext, tracing
from accelpass.ir.transform.tokens import CannotCut, Cut, cut, decoder_blocks
from accelpass.passes.core.options import Options
from accelpass.passes.core.report import GraphReport
from accelpass.passes.token_pruning.base import CUT, TokenPruning, importance_name


def pruning_pass(chosen: Options) -> TokenPruning | None:
    """The pass that drops tokens.

    Raises:
        OptionError: there are two.
    """
    found = [p for p in chosen.passes if isinstance(p, TokenPruning)]
    if len(found) > 1:
        raise OptionError(f"{' and '.join(p.name for p in found)} both drop tokens between blocks; use one of them")
    return found[0] if found else None


def pruned_model(
    gm: fx.GraphModule,
    program: Program,
    inputs: Sequence[Any],
    chosen: Options,
    pruning: TokenPruning,
    report: GraphReport,
) -> tuple[PrunedModel, CacheCalls | None] | None:
    """Compile the graph stretch by stretch; None if no token can leave it (the pass says why when it runs).

    Args:
        program: the captured graph.
    """
    ends = pruning.ends(program)
    if not ends:
        return None
    builder = _Builder(copied(gm), chosen, report, tuple(ends))
    keep = tuple(ends.values())
    sites = program.analysis(kv_sites)
    fresh = not sites or sites[0].is_prompt
    made = _tokens(program)
    try:
        if fresh and isinstance(made, int):
            sizes: list[int] = []
            for share in keep:
                sizes.append(kept(sizes[-1] if sizes else made, share))
            graph = builder.graph(program, inputs, sizes)
        else:
            graph = builder.graph(program, inputs, None)
    except CannotCut as cause:
        report.add_note(f"{pruning.name}: {cause}")
        return None
    tensors = program.tensors
    assert isinstance(tensors, FromInputs)
    counts = tuple(tensors.position(s.count) for s in sites)
    wider = builder.again if not fresh and isinstance(made, int) else None
    model = PrunedModel(graph, wider, keep, counts, fresh, tensors.model)
    report.derived_bytes = graph.binder.derived_bytes()
    calls = CacheCalls.of(builder.uses, tensors) if builder.uses else None
    return model, calls


def _tokens(program: Program) -> Any:
    return value(decoder_blocks(program)[0].input).shape[1]


@dataclass(eq=False)
class _Builder:
    """Makes the graphs of one model for different numbers of rows; equal parts share code."""

    gm: fx.GraphModule
    chosen: Options
    report: GraphReport
    ends: tuple[int, ...]
    uses: list[CacheUse] = field(default_factory=list)
    code: dict[Hashable, Callable[..., Any]] = field(default_factory=dict)

    def again(self, args: Sequence[Any], rows: int) -> PrunedGraph:
        """A graph for the sizes that the first was captured for, but ``rows`` in the later stretches."""
        self.report = GraphReport(self.report.number)  # the one that the model's owner sees is finished
        return self.graph(captured(self.gm, args, self.report), args, [rows] * len(self.ends))

    def graph(self, program: Program, args: Sequence[Any], sizes: Sequence[int] | None) -> PrunedGraph:
        """Cut, rewritten and compiled for these rows in the stretches after the first."""
        made = rewritten(
            program,
            args,
            self.chosen,
            self.report,
            lambda it: it.gm.meta.update({CUT: cut(it, self.ends, sizes)}),
        )
        self.report.records, self.report.after = made.records, made.cost
        self.uses = made.uses
        return self._compiled(made, program.gm.meta[CUT], sizes)

    def _compiled(self, made: Rewritten, found: Cut, sizes: Sequence[int] | None) -> PrunedGraph:
        program, gm, tensors = made.program, made.program.gm, made.program.tensors
        assert isinstance(tensors, FromInputs)
        counts = [tensors.position(u.count) for u in made.uses]
        own, pins, remembered = program.results()
        importance = dict(zip(program.remembered, remembered, strict=True))
        segments = _segments(gm.graph, pins[: found.pins])
        symbol = found.tokens.node.expr if isinstance(found.tokens, torch.SymInt) else None
        bound = [n for n in placeholders(gm) if n not in tensors.recalled]
        place = {n: i for i, n in enumerate(bound)}

        def ref(node: Any) -> Ref:
            if not isinstance(node, fx.Node):
                return "literal", node
            if (
                isinstance(value(node), torch.SymInt)
                and symbol is not None
                and symbol in value(node).node.expr.free_symbols
            ):
                return "size", value(node).node.expr
            if node in place:
                return "bound", place[node]
            if node in tensors.recalled:
                return "recalled", tensors.recalled[node]
            if node.op == "get_attr":
                return "held", Held(operator.attrgetter(str(node.target))(gm))
            return "value", node.name

        mode = fake_mode(gm)
        assert mode is not None
        wanted = frozenset(n.name for n in (*own, *pins, *remembered) if isinstance(n, fx.Node))
        stages, layers = [], 0
        for number, nodes in enumerate(segments):
            last = number == len(segments) - 1
            stretch = None if last else found.stretches[number]
            part = part_of(nodes, wanted)
            layers += 0 if stretch is None else len(stretch.attentions)
            name = importance.get(importance_name(number))
            stages.append(
                Stage(
                    "" if stretch is None else stretch.blocks[0],
                    self._code(part, mode, made.exact),
                    tuple(ref(n) for n in part.given),
                    tuple(n.name for n in part.made),
                    pins[number].name if not last else "",
                    "" if name is None else name.name,
                    {} if stretch is None else stretch.taken,
                    counts[layers - 1] if counts else -1,
                )
            )
        tokens = int(sizes[-1]) if sizes else (found.tokens if isinstance(found.tokens, int) else 0)
        return PrunedGraph(
            stages,
            tuple(ref(n) for n in own),
            tuple(ref(n) for n in pins),
            made.binder,
            symbol,
            _asked(bound, found.tokens) if symbol is not None else None,
            tokens,
            found.width,
            found.dtype,
        )

    def _code(self, part: Part, mode: FakeTensorMode, exact: bool) -> Callable[..., Any]:
        with tracing(TracingContext(mode)):
            given = [value(n) for n in part.given]
            return code_for(part.gm, given, self.chosen, exact, self.report, self.code)


def _segments(graph: fx.Graph, ends: Sequence[fx.Node]) -> list[list[fx.Node]]:
    """The calls up to each end, and those after the last."""
    segments: list[list[fx.Node]] = [[]]
    left = list(ends)
    for node in graph.nodes:
        if node.op != "call_function":
            continue
        segments[-1].append(node)
        if left and node is left[0]:
            left.pop(0)
            segments.append([])
    if left:
        raise CannotCut(f"{left[0].name}, the end of a stretch of blocks, is not where it was; leave another pass out")
    return segments


def _asked(bound: Sequence[fx.Node], tokens: torch.SymInt) -> tuple[int, int | None]:
    found = size_among(bound, tokens)
    if found is None:
        raise CannotCut(f"no input of the graph says how many tokens ({tokens}) it has")
    return found
