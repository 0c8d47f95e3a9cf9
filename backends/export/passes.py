"""Passes on a captured program, with the checks that a file needs besides those of the manager."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch.fx.experimental.symbolic_shapes import free_symbols

from accelpass.backends.compile.rewriting import debug_of
from accelpass.backends.export.capture import Captured
from accelpass.backends.export.functional import fixed
from accelpass.ir import attention
from accelpass.ir.attention.spec.op import spec_of
from accelpass.ir.attention.spec.spec import All
from accelpass.ir.core.graph import value
from accelpass.ir.core.program import Program
from accelpass.passes.core.base import Pass, Record
from accelpass.passes.core.manager import Observer, run
from accelpass.passes.core.options import Options

if TYPE_CHECKING:
    from accelpass.backends.debug.debug_mode import Debugging


def applied(
    found: Captured, passes: Sequence[Pass], chosen: Options, who: str, asked: Collection[str] | None = None
) -> tuple[list[Record], Debugging | None]:
    """Apply ``passes``; what is left is to be lowered, and looked at with :func:`refuse_guarded` once more.

    Args:
        asked: see :func:`accelpass.passes.core.manager.run`.

    Raises:
        PlanError: the plan is for another model.
        ExportError: the model, or a pass, fixes a dimension that was to be dynamic.
    """
    program, plan = found.program, chosen.plan
    if plan is not None:
        plan.check(program)
        program.artefacts = plan.tensors
    refuse_guarded(found, "the model")

    def after(program: Program, record: Record) -> None:
        refuse_guarded(found, f"the pass {record.name!r}")

    debugging = debug_of(program, list(found.inputs.values()) + found.counts, chosen)
    observers = [Observer(after), *([] if debugging is None else [debugging.observer])]
    return run(program, passes, observers, chosen.skip_sites, asked), debugging


def after_prompt(chosen: Options, prompt: Sequence[Record]) -> tuple[Options, list[Record]]:
    """What is asked for of the calls after a prompt, and records of the passes that stand aside there.

    A pass that marks the caches which it fills, and left this prompt whole, has filled none: nothing is to follow it.

    Args:
        prompt: what the passes did to the prompt's graph.
    """
    did = {record.name: record for record in prompt}
    idle = [p for p in chosen.passes if p.for_prompts and p.cache_mark and p.name in did and not did[p.name].took]
    records = []
    for p in idle:
        why = "; ".join(did[p.name].skipped.values())
        left = Record(p.name)
        left.skip("later tokens", f"the prompt was left whole ({why}), so that its cache is as the caller counts it")
        records.append(left)
    return replace(chosen, passes=tuple(p for p in chosen.passes if p not in idle)), records


def computed_in_full(program: Program, why: str) -> list[str]:
    """Notes on what passes leave out of attentions, and a file computes all the same; ``why`` it does, for users."""
    sites: dict[str, int] = {}
    for node in program.graph.nodes:
        if attention.is_attention(node) and not isinstance((spec := spec_of(node)).select, All):
            who = next(name for name, part in spec.edits if part == "select")
            sites[who] = sites.get(who, 0) + 1
    return [
        f"{who}: {count} attentions are computed in full and masked, as {why}: the results are the pass's, the time is the dense "
        "model's or more"
        for who, count in sites.items()
    ]


def refuse_guarded(found: Captured, who: str) -> None:
    """Raise :class:`ExportError` if a guard has given a dynamic dimension one size."""
    for name, wishes in found.wishes.items():
        for dim in wishes:
            size = value(found.placeholder(name)).shape[dim]
            if isinstance(size, torch.SymInt):
                now = size.node.shape_env.simplify(size.node.expr)
                if free_symbols(now):
                    continue
                raise fixed(name, dim, now, who)
            raise fixed(name, dim, size, who)
