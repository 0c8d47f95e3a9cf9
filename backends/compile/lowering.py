"""What computes the library's own formats of weights: ATen for Inductor on a CPU, Triton kernels for linears on CUDA."""

from __future__ import annotations

import torch
from torch import fx

from accelpass.backends.kernels.cpu.linear import Int4Forms, Int8Forms
from accelpass.ir.core.graph import value
from accelpass.ir.linear.formats import GROUP_SIZES, Int4, Int4Half, Int8
from accelpass.ir.linear.lower import TRACED, Emit, Nodes, register_lowering
from accelpass.ir.linear.lower import lower as lower
from accelpass.ir.linear.spec import WeightFormat


class _Int8Kernel(Int8Forms):
    def linear(self, e: Emit, weight: WeightFormat, x: fx.Node, packed: Nodes, bias: fx.Node | None) -> fx.Node:
        if value(x).dtype == torch.int8:  # codes: multiplied as such, summed exactly
            return _op(e, "int8_linear_triton", x, *packed, bias)
        return _kernel(e, "int8_linear_triton", x, *packed, bias)


class _Int4Kernel(Int4Forms):
    def linear(self, e: Emit, weight: WeightFormat, x: fx.Node, packed: Nodes, bias: fx.Node | None) -> fx.Node:
        assert isinstance(weight, Int4)
        if weight.group_size not in GROUP_SIZES:  # of somebody else's checkpoint
            return TRACED.linear(e, weight, x, packed, bias)
        q, *numbers = packed
        scale, zero = (*(e.cast(t, torch.float32) for t in numbers), None)[:2]
        return _kernel(e, "int4_linear_triton", x, q, scale, zero, bias, weight.group_size)


def _kernel(e: Emit, name: str, x: fx.Node, *args: fx.Node | int | None) -> fx.Node:
    floats = x if value(x).is_floating_point() else e.cast(x, torch.float32)  # integers: their sums come in x's dtype
    return _op(e, name, floats, *args)


def _op(e: Emit, name: str, *args: fx.Node | int | None) -> fx.Node:
    import accelpass.backends.kernels.triton.weight_only_ops  # noqa: F401  # registers the op; asks for triton if it is missing

    return e(getattr(torch.ops.accelpass, name).default, *args)


register_lowering(Int8, "cpu", Int8Forms())
register_lowering(Int4, "cpu", Int4Forms())
register_lowering(Int4Half, "cpu", Int4Forms())
register_lowering(Int8, "cuda", _Int8Kernel())
register_lowering(Int4, "cuda", _Int4Kernel())
register_lowering(Int4Half, "cuda", _Int4Kernel())
