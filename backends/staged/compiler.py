"""Compiles a model whose passes choose variants of its blocks; the result is a :class:`StagedGraph`."""

from __future__ import annotations

import itertools
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, fx
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from accelpass.backends.compile.inductor import compile_whole
from accelpass.backends.compile.rewriting import captured, copied, debug_of, lowered, refuse_released
from accelpass.backends.runtime.caches import CacheCalls, tokens_of
from accelpass.backends.runtime.step_report import combined, describe, planned
from accelpass.backends.staged.by_step import Arguments, SteppedGraph
from accelpass.backends.staged.graph import PolicyGraph, StagedGraph
from accelpass.backends.staged.model import StagedModel
from accelpass.backends.staged.stage import Code, Compile
from accelpass.backends.staged.variants import Variants
from accelpass.ir.core.capture import cut_said
from accelpass.ir.core.graph import argument_name, placeholders, value
from accelpass.ir.core.program import Program
from accelpass.ir.core.tensors import FromInputs
from accelpass.ir.errors import OptionError, PassError
from accelpass.ir.kv.sites import kv_sites
from accelpass.ir.torch_private import FakeTensorMode
from accelpass.ir.transform.steps import LATENTS, TIMESTEP, user_input
from accelpass.passes.core.base import Record
from accelpass.passes.core.manager import ordered, run
from accelpass.passes.core.options import Options
from accelpass.passes.core.report import GraphReport, costs
from accelpass.passes.core.staged import FULL, PolicyPass
from accelpass.passes.step_cache.base import StepPass


def staged_graph(
    gm: fx.GraphModule, program: Program, inputs: Sequence[Any], chosen: Options, report: GraphReport
) -> tuple[StagedGraph, CacheCalls | None] | None:
    """Compile the model in the variants that passes choose from; None if none of them has a choice in this graph.

    Args:
        program: the captured graph.

    Raises:
        OptionError: two passes choose for one block.
        PassError: a pass that chooses by denoising step finds no input that tells it.
    """
    policies = [p for p in chosen.passes if isinstance(p, PolicyPass)]
    program.unfit |= {p.name: why for p in policies if (why := p.unfit(program)) is not None}
    choosing = [p for p in policies if p.stack(program)]
    if not choosing:
        return None
    ordered(chosen.passes)  # refuses what does not go together
    _refuse_rivals(choosing, program)
    tensors, by_step = program.tensors, choosing[0].by_step
    assert isinstance(tensors, FromInputs)
    at = _arguments(program, choosing[0]) if by_step else None
    if chosen.plan is not None:
        chosen.plan.check(program)
    asked = chosen.passes
    if at is not None:
        artefacts = {} if chosen.plan is None else chosen.plan.tensors
        device = inputs[at.latents].device
        chosen = replace(chosen, passes=tuple(p.bound(artefacts, device) for p in chosen.passes))
    names = {p.name for p in choosing}
    passes = cast(list[StepPass], [p for p in chosen.passes if p.name in names])
    symbolic = any(isinstance(n, torch.SymInt) for node in placeholders(program.gm) for n in _sizes(value(node)))
    # What steps keep has the sizes of one run; a policy that needs nothing but the call is compiled for any.
    build = _builder(gm, program, chosen, report, symbolic and by_step, passes)
    if at is not None:
        graph = SteppedGraph(build, tuple(passes), at, (asked, chosen.skip_sites, chosen.lowering))
        if not symbolic:
            graph.model(inputs)
        return graph, None
    sites = kv_sites(program)  # before the graph is used up
    tokens = tokens_of(value(sites[0].new[0]).shape[2], tensors) if sites else None
    policy = PolicyGraph(build, choosing[0], tensors.model())
    made = policy.model(inputs)
    if tokens is None:
        return policy, None
    counts = tuple((at, (*form, *marks(chosen))) for at, form, _ in made.caches)
    owner = tensors.model(sites[0].path)
    return policy, CacheCalls(counts, tokens, sites[0].is_prompt, owner, tuple(kept for *_, kept in made.caches))


def _refuse_rivals(choosing: Sequence[PolicyPass], program: Program) -> None:
    """Policies of denoising steps may share a model if each has blocks of its own; another one runs the stages alone.

    Raises:
        OptionError: names both passes, and the block.
    """
    for one, other in itertools.combinations(choosing, 2):
        both = f"{one.name} and {other.name} both choose what a block computes"
        if not (one.by_step and other.by_step):
            raise OptionError(f"{both}, each at calls of its own choice; use one of them")
        if one.searching or other.searching:
            raise OptionError(f"{both}, and one still searches; search alone, and combine what was found")
        blocks = one.stack(program)
        mine, its = ({place.block.number for place in p.chosen_places(blocks)} for p in (one, other))
        if shared := sorted(mine & its):
            raise OptionError(
                f"{both} ({blocks[shared[0]].path}, for one); use one of them there (include=, exclude= choose sites)"
            )


def marks(chosen: Options) -> list[str]:
    """What tells a cache that policies have filled from others."""
    return [p.cache_mark for p in chosen.passes if p.cache_mark]


def _builder(
    gm: fx.GraphModule,
    program: Program,
    chosen: Options,
    report: GraphReport,
    symbolic: bool,
    passes: Sequence[PolicyPass],
) -> Callable[[Sequence[Any]], StagedModel]:
    """Compiles for the sizes of a call."""
    source, tensors = copied(gm), program.tensors

    def rewrite(made: Program) -> list[Record]:
        debugging = debug_of(made, None, chosen, _variant(made))
        done = run(made, chosen.passes, [] if debugging is None else [debugging.observer], chosen.skip_sites)
        if debugging is not None and debugging.note not in report.note:
            report.add_note(debugging.note)
        if all(action == FULL for of_pass in made.actions.values() for action in of_pass.values()):
            report.after = costs(made)  # of the model in full
        return done

    def build(args: Sequence[Any]) -> StagedModel:
        ready = [] if symbolic else [program]
        # Symbolic sizes stand for one set of numbers at a time: each is compiled when it is first seen.
        mode = FakeTensorMode(shape_env=ShapeEnv()) if symbolic else None

        def capture() -> Program:
            made = ready.pop() if ready else captured(source, args, report, mode)
            if chosen.plan is not None:
                made.artefacts = chosen.plan.tensors
            return made

        def lower(made: Program) -> Any:
            return lowered(made, chosen)

        code = Code(_compiler(chosen, report))
        model = Variants(capture, passes, rewrite, lower, code, chosen.free_weights).compiled()
        assert isinstance(tensors, FromInputs)
        refuse_released(tensors, model.derived, args)
        if passes[0].by_step:
            steps = cast(Sequence[StepPass], passes)
            describe(report, model, planned(model, steps), steps)
        else:
            report.records = list(combined(model.records).values())
            report.parts, report.parts_compiled = len(model.sites) + 2, model.compiled
        return model

    return build


def _arguments(program: Program, by: PolicyPass) -> Arguments:
    """
    Raises:
        PassError: there is no input that tells the timestep.
    """
    tensors = program.tensors
    assert isinstance(tensors, FromInputs)
    latents, timestep = user_input(program, *LATENTS), user_input(program, *TIMESTEP)
    if timestep is None or latents is None:
        cut = cut_said(program)
        raise PassError(
            f"{by.name}: the model has no input named {', '.join(TIMESTEP)}, from which the "
            "denoising step could be told; rename the argument, or wrap the model. If it has one, a graph break cuts the model "
            f"in two, and fullgraph=True shows where{cut and f'; {cut}'}"
        )
    others: dict[str, int] = {}
    for node in tensors.callers():
        if node not in (timestep, latents) and isinstance(value(node), Tensor):
            name = argument_name(node)  # several, where a list of tensors is one argument
            others[f"{name} {len(others)}" if name in others else name] = tensors.position(node)
    own = tuple(sorted(tensors.position(n) for n in tensors.paths))
    return Arguments(tensors.position(timestep), tensors.position(latents), others, own)


def _compiler(chosen: Options, report: GraphReport) -> Compile:
    def compile_part(part: fx.GraphModule, given: list[Any]) -> Callable[..., Any]:
        started = time.perf_counter()
        fn = compile_whole(part, given, chosen)
        report.seconds_compiling += time.perf_counter() - started
        return fn

    return compile_part if chosen.lowering == "inductor" else lambda part, given: part.forward


def _variant(made: Program) -> str:
    """Which of the model's graphs this is, by what its sites do."""
    counts = Counter(f"{p} {action}" for p, of_pass in made.actions.items() for action in of_pass.values())
    return ", ".join(f"{what} x {count}" for what, count in counts.items())


def _sizes(held: Any) -> Sequence[Any]:
    return held.shape if isinstance(held, Tensor) else (held,)
