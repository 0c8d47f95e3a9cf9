"""The semantic op ``accelpass::expert_linear``: each row times the weight of one expert, for as many rows as an expert has."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from accelpass.ir.linear.op import LINEAR


@torch.library.custom_op("accelpass::expert_linear", mutates_args=())
def expert_linear(x: Tensor, ids: Tensor, operands: Sequence[Tensor], spec: str, transposed: bool) -> Tensor:
    """y (rows, out): y[r] = x[r] W[ids[r]]^T, and 0 where ``ids[r]`` is no expert's number.

    Rows are brought together by expert, so that each weight is read once and none is copied.

    Args:
        x: ``(rows, in)``.
        ids: ``(rows,)``, integers from 0.
        operands: W ``(experts, out, in)`` itself if ``spec`` is empty, ``(experts, in, out)`` if it is ``transposed``; else the
            operands of a packed one, as ``accelpass::matrix`` has them.
    """
    experts = operands[0].shape[0]
    sorted_ids, order = ids.clamp(max=experts).sort(stable=True)
    ends = torch.bincount(sorted_ids, minlength=experts + 1).cumsum(0).tolist()
    made = x.new_zeros((x.shape[0], operands[0].shape[-1 if transposed else -2]))
    start = 0
    for expert, end in enumerate(ends[:experts]):
        if end > start:
            rows, own = order[start:end], [o[expert] for o in operands]
            mine = x[rows]
            if spec:
                made[rows] = LINEAR(mine, own, None, spec)
            else:
                made[rows] = mine @ own[0] if transposed else F.linear(mine, own[0])
        start = end
    return made


@expert_linear.register_fake
def _(x: Tensor, ids: Tensor, operands: Sequence[Tensor], spec: str, transposed: bool) -> Tensor:
    return x.new_empty((x.shape[0], operands[0].shape[-1 if transposed else -2]))


EXPERT_LINEAR = torch.ops.accelpass.expert_linear.default
