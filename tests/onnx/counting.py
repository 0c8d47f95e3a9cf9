"""A third party's pass that remembers a number beside each weight."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from accelpass.ir.analyses.structure.linear import linears
from accelpass.ir.core.graph import aten, call
from accelpass.ir.core.program import Program
from accelpass.ir.core.state import StateSpec
from accelpass.passes.core.base import Done, Pass, Record


@dataclass(frozen=True)
class Counting(Pass):
    """Adds to each linear how often it was called, which it remembers beside the weight."""

    name: ClassVar[str] = "counting"
    phase: ClassVar[str] = "fusion"
    summary: ClassVar[str] = ""

    def apply(self, program: Program, record: Record) -> None:
        for site in program.analysis(linears):
            calls = program.tensors.state(site.weight, StateSpec("calls", (1,), torch.float32, "model"))
            with program.graph.inserting_after(site.node):
                more = call(program.graph, site.node, aten.add_.Tensor, calls, 1.0)
            with program.graph.inserting_after(more):
                made = call(program.graph, site.node, aten.add.Tensor, site.node, more)
            site.node.replace_all_uses_with(made, delete_user_cb=lambda user, made=made: user is not made)
            record.take(site.path, Done("counted"))
