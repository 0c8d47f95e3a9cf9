"""Block-sparse attention on CUDA: the Triton op in the place of the semantic one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from accelpass.ir.attention.lowering.block_sparse import BLOCK_SPARSE, KERNELS

WIDEST = 256  # channels of a tile that shared memory holds


def block_sparse_with_kernel(q: Tensor, k: Tensor, v: Tensor, *listed: Any) -> tuple[Tensor, Tensor]:
    """As :func:`accelpass.ir.attention.lowering.block_sparse.block_sparse_attention`; what the kernel has no tile for runs as there."""
    if q.dtype == torch.float64 or not 0 < q.shape[3] <= WIDEST or not 0 < v.shape[3] <= WIDEST:
        plain, log = BLOCK_SPARSE(q, k, v, *listed)
        return plain, log
    import accelpass.backends.kernels.triton.block_sparse_ops  # noqa: F401  # registers the op; asks for triton if it is missing

    op = torch.ops.accelpass.block_sparse_attention_triton.default
    out, lse = op(q, k, v, *listed)
    return out, lse


KERNELS["cuda"] = block_sparse_with_kernel
