"""A linear of one row, written so that the compiler streams the weight instead of calling the BLAS."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from accelpass.ir.analyses.structure.linear import Linear, linears, rows
from accelpass.ir.core.graph import aten, is_call, shape, stored, value
from accelpass.ir.core.program import Program
from accelpass.ir.linear.gemv_probe import blas_and_stream_seconds
from accelpass.passes.core.base import Done, Skip, Take, Verdict
from accelpass.passes.core.site_pass import Edits, SitePass

SLACK = 1.15
"""The BLAS must be slower than a streaming row sum by this factor before it is replaced."""


@dataclass(frozen=True)
class CpuGemv(SitePass):
    """Batch-1 linears on CPU as ``(W * x).sum(-1)``, where a measurement on this machine says that it is faster.

    One row times a matrix is bound by the memory that the matrix streams through. The compiler vectorises a product and
    a row sum into one such stream; general matrix code reaches less of the bandwidth at some sizes and more at others,
    so each size is measured once and remembered for this machine.
    """

    name: ClassVar[str] = "cpu_gemv"
    phase: ClassVar[str] = "kernels"
    summary: ClassVar[str] = "batch-1 linears on CPU as a streaming row sum, where measured faster"
    exact: ClassVar[bool] = True
    edits: ClassVar[frozenset[str]] = frozenset({"linear.kernel"})
    nothing: ClassVar[str] = "no linear layer with a float weight was found in this graph"

    def find(self, program: Program) -> list[Linear]:
        found = program.analysis(linears)
        return [s for s in found if is_call(s.node, aten.linear) and not s.transposed and s.node.args[1] is s.weight]

    def check(self, site: Linear, program: Program) -> Verdict:
        x, dtype = value(site.x), value(site.x).dtype
        if x.device.type != "cpu":
            return Skip(f"the input is on {x.device.type}")
        if (count := rows(site.x)) != 1:
            return Skip(f"{'a symbolic number of' if count is None else count} rows; a GEMV has one")
        if dtype != torch.float32 or value(site.weight).dtype != dtype:
            return Skip(f"{dtype}: measured for float32 alone")
        blas, stream = blas_and_stream_seconds(site.out_features, site.in_features)
        if blas < stream * SLACK:
            return Skip(f"the BLAS takes {blas * 1e6:.0f} us here, a row sum {stream * 1e6:.0f} us")
        return Take()

    def rewrite(self, site: Linear, edit: Edits) -> Done:
        node = site.node
        with edit.program.graph.inserting_before(node):
            x = stored(site.operand())
        flat = edit.call(node, aten.reshape.default, x, [1, site.in_features])
        y = edit.call(node, aten.sum.dim_IntList, edit.call(node, aten.mul.Tensor, site.weight, flat), [-1])
        if site.bias is not None:
            y = edit.call(node, aten.add.Tensor, y, site.bias)
        y = edit.call(node, aten.reshape.default, y, list(shape(node)))
        edit.replace(node, y)
        blas, stream = blas_and_stream_seconds(site.out_features, site.in_features)
        return Done(f"row sum, {stream * 1e6:.0f} us; the BLAS takes {blas * 1e6:.0f} us")
