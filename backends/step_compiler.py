"""Compiles a model with passes that work across denoising steps; the result is a :class:`SteppedGraph`."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from accelpass.backends.compose import Composer
from accelpass.backends.inductor import compile_whole
from accelpass.backends.rewriting import captured, copied, debug_of, lowered, refuse_released
from accelpass.backends.sampling import Arguments, SteppedGraph
from accelpass.backends.step_report import describe, planned
from accelpass.backends.steps import Composition
from accelpass.ir.capture import cut_said
from accelpass.ir.errors import OptionError, PassError
from accelpass.ir.graph import argument_name, placeholders, value
from accelpass.ir.program import Program
from accelpass.ir.steps import LATENTS, TIMESTEP, user_input
from accelpass.ir.tensors import FromInputs
from accelpass.passes.base import Record
from accelpass.passes.manager import run
from accelpass.passes.options import Options
from accelpass.passes.report import GraphReport, costs
from accelpass.passes.step_cache.base import FULL, StepPass


def step_graph(
    gm: fx.GraphModule, program: Program, inputs: Sequence[Any], chosen: Options, report: GraphReport
) -> SteppedGraph:
    """Compile the model for each way in which the step passes compute a block.

    Args:
        program: the captured graph, whose blocks the latents pass through.

    Raises:
        PassError: there is no input that tells the timestep.
    """
    tensors = program.tensors
    assert isinstance(tensors, FromInputs)
    latents, timestep = user_input(program, *LATENTS), user_input(program, *TIMESTEP)
    artefacts = {} if chosen.plan is None else chosen.plan.tensors
    if timestep is None or latents is None:
        cut = cut_said(program)
        raise PassError(
            f"{', '.join(p.name for p in chosen.passes if isinstance(p, StepPass))}: the model has no input named {', '.join(TIMESTEP)}, from which the "
            "denoising step could be told; rename the argument, or wrap the model. If it has one, a graph break cuts the model "
            f"in two, and fullgraph=True shows where{cut and f'; {cut}'}"
        )
    if chosen.plan is not None:
        chosen.plan.check(program)
    device = value(latents).device
    bound = tuple(p.bound(artefacts, device) if isinstance(p, StepPass) else p for p in chosen.passes)
    asked, chosen = chosen.passes, replace(chosen, passes=bound)
    passes = tuple(p for p in bound if isinstance(p, StepPass))
    if len(passes) > 1:
        raise OptionError(
            f"{' and '.join(p.name for p in passes)} both choose what a block computes at a denoising step; use one of them"
        )
    source = copied(gm)
    symbolic = any(isinstance(n, torch.SymInt) for node in placeholders(program.gm) for n in _sizes(value(node)))

    def build(args: Sequence[Any]) -> Composition:
        ready = [] if symbolic else [program]
        # Symbolic sizes stand for one set of numbers at a time: each is compiled when it is first seen.
        mode = FakeTensorMode(shape_env=ShapeEnv()) if symbolic else None

        def capture() -> Program:
            made = ready.pop() if ready else captured(source, args, report, mode)
            if chosen.plan is not None:
                made.artefacts = chosen.plan.tensors
            return made

        def rewrite(made: Program) -> list[Record]:
            debugging = debug_of(made, None, chosen, _variant(made))
            done = run(made, chosen.passes, [] if debugging is None else [debugging.observer], chosen.skip_sites)
            if debugging is not None and debugging.note not in report.note:
                report.add_note(debugging.note)
            if all(action == FULL for of_pass in made.actions.values() for action in of_pass.values()):
                report.after = costs(made)  # of the model in full; its FLOPs are replaced by the mean over the steps
            return done

        composition = Composer(
            capture,
            passes,
            rewrite,
            lambda made: lowered(made, chosen),
            _compiler(chosen, report),
            chosen.free_weights,
        ).compose()
        refuse_released(tensors, composition.derived, args)
        describe(report, composition, planned(composition, passes), passes)
        return composition

    key = (asked, chosen.skip_sites, chosen.lowering)
    graph = SteppedGraph(passes, build, _arguments(tensors, timestep, latents), key)
    if not symbolic:
        graph.composition(inputs)
    return graph


def _arguments(tensors: FromInputs, timestep: fx.Node, latents: fx.Node) -> Arguments:
    others: dict[str, int] = {}
    for node in tensors.callers():
        if node not in (timestep, latents) and isinstance(value(node), Tensor):
            name = argument_name(node)  # several, where a list of tensors is one argument
            others[f"{name} {len(others)}" if name in others else name] = tensors.position(node)
    own = tuple(sorted(tensors.position(n) for n in tensors.paths))
    return Arguments(tensors.position(timestep), tensors.position(latents), others, own)


def _compiler(chosen: Options, report: GraphReport) -> Callable[[fx.GraphModule, list[Any]], Callable[..., Any]]:
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
