"""Operators of torch that its exporter has no translation for, or one that is wrong for what passes do (torch 2.13).

Each was found by a pass's file that ONNX Runtime computed otherwise than torch.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

from accelpass.ir.core.graph import aten
from accelpass.passes.sparse_attention.pbs_attn import sorted_in_segments as pbs_sort


def gaps() -> dict[Any, Callable[..., Any]]:
    """Translations by operator."""
    import onnx_ir as ir
    from onnxscript import opset18 as op

    def floor_divided(a: Any, b: Any) -> Any:
        # The exporter's Div cuts off towards zero, so that -(-n // 64), as ceilings are written, is one too few.
        return op.Div(op.Sub(a, op.Mod(a, b)), b)

    def same(x: Any, number: int) -> Any:
        return op.Constant(value=ir.tensor(number, dtype=x.dtype))

    # The exporter computes shifts of unsigned integers in signed ones, and the types no longer fit together.
    def shifted_right(x: Any, by: int) -> Any:
        return op.BitShift(x, same(x, by), direction="RIGHT")

    def shifted_left(x: Any, by: int) -> Any:
        return op.BitShift(x, same(x, by), direction="LEFT")

    def sorted_stably(x: Any, stable: bool | None = None, dim: int = -1, descending: bool = False) -> Any:
        # Of equal values TopK puts the one that comes first in front, whichever way it sorts.
        count = op.Gather(op.Shape(x), op.Constant(value_ints=[dim]))
        return op.TopK(x, count, axis=dim, largest=int(descending), sorted=1)

    def sorted_in_segments(score: Any, size: int, count: Any) -> Any:
        segments = op.Reshape(score, op.Constant(value_ints=[0, -1, size]))
        _, inside = op.TopK(segments, op.Constant(value_ints=[size]), axis=-1, largest=1, sorted=1)
        length = op.Squeeze(op.Shape(score, start=1, end=2))
        step = op.Constant(value_int=size)
        start = op.Unsqueeze(op.Range(op.Constant(value_int=0), length, step), op.Constant(value_ints=[-1]))
        flat = op.Reshape(op.Add(inside, start), op.Constant(value_ints=[0, -1]))
        end = (
            op.Reshape(count, op.Constant(value_ints=[1]))
            if not isinstance(count, int)
            else op.Constant(value_ints=[count])
        )
        return op.Slice(flat, op.Constant(value_ints=[0]), end, op.Constant(value_ints=[1]))

    return {
        operator.floordiv: floor_divided,
        aten.__rshift__.Scalar: shifted_right,
        aten.__lshift__.Scalar: shifted_left,
        aten.sort.stable: sorted_stably,
        pbs_sort._opoverload: sorted_in_segments,
    }
