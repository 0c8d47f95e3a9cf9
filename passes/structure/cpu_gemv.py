"""A linear of one row, written so that the compiler streams the weight instead of calling the BLAS."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from accelpass.ir.analyses.linear import linears, rows
from accelpass.ir.gemv_probe import blas_and_stream_seconds
from accelpass.ir.graph import aten, call, is_call, replace, shape, stored, value
from accelpass.ir.program import Program
from accelpass.passes.base import Done, Pass, Record, Skip

SLACK = 1.15
"""The BLAS must be slower than a streaming row sum by this factor before it is replaced."""


@dataclass(frozen=True)
class CpuGemv(Pass):
    """Batch-1 linears on CPU as ``(W * x).sum(-1)``, where a measurement on this machine says that it is faster.

    One row times a matrix is bound by the memory that the matrix streams through. The compiler vectorises a product and
    a row sum into one such stream; general matrix code reaches less of the bandwidth at some sizes and more at others,
    so each size is measured once and remembered for this machine.
    """

    name: ClassVar[str] = "cpu_gemv"
    phase: ClassVar[str] = "kernels"
    summary: ClassVar[str] = "batch-1 linears on CPU as a streaming row sum, where measured faster"
    exact: ClassVar[bool] = True

    def apply(self, program: Program, record: Record) -> None:
        for site in program.analysis(linears):
            if not is_call(site.node, aten.linear) or site.transposed or site.node.args[1] is not site.weight:
                continue
            x, dtype = value(site.x), value(site.x).dtype
            if isinstance(wanted := record.wants(site.path), Skip):
                record.skip(site.path, wanted.why)
            elif x.device.type != "cpu":
                record.skip(site.path, f"the input is on {x.device.type}")
            elif (count := rows(site.x)) != 1:
                record.skip(site.path, f"{'a symbolic number of' if count is None else count} rows; a GEMV has one")
            elif dtype != torch.float32 or value(site.weight).dtype != dtype:
                record.skip(site.path, f"{dtype}: measured for float32 alone")
            else:
                blas, stream = blas_and_stream_seconds(site.out_features, site.in_features)
                if blas < stream * SLACK:
                    record.skip(site.path, f"the BLAS takes {blas * 1e6:.0f} us here, a row sum {stream * 1e6:.0f} us")
                    continue
                with program.graph.inserting_before(site.node):
                    flat = call(
                        program.graph, site.node, aten.reshape.default, stored(site.operand()), [1, site.in_features]
                    )
                    product = call(program.graph, site.node, aten.mul.Tensor, site.weight, flat)
                    y = call(program.graph, site.node, aten.sum.dim_IntList, product, [-1])
                    if site.bias is not None:
                        y = call(program.graph, site.node, aten.add.Tensor, y, site.bias)
                    y = call(program.graph, site.node, aten.reshape.default, y, list(shape(site.node)))
                replace(site.node, y)
                record.take(site.path, Done(f"row sum, {stream * 1e6:.0f} us; the BLAS takes {blas * 1e6:.0f} us"))
