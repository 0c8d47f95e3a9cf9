"""Block-sparse attention in Triton: the torch op `accelpass::block_sparse_attention_triton`, registered by the import.

The same function as `accelpass.ir.attention.lowering.block_sparse.block_sparse_attention`, whose docstring says what the arguments
are, for CUDA tensors of 32 bits or less (CPU tensors only under TRITON_INTERPRET=1). Unlike there, the lists are not
looked at: an entry must be a key block that exists, and an order must have tokens that do. There is no backward.

The op may be captured in a CUDA graph once it has run, which is when it is tuned.
"""

import torch
from torch import Tensor
from torch.library import triton_op, wrap_triton

from accelpass.backends.kernels.cuda.block_sparse import WIDEST
from accelpass.backends.kernels.triton import require_triton
from accelpass.backends.kernels.triton.block_sparse import INTERPRETED, block_sparse
from accelpass.ir.attention.lowering.block_sparse import check_block_sparse, effective_reach, empty_results

triton = require_triton()

_FLOATS = (torch.bfloat16, torch.float16, torch.float32)
_NARROW = 16  # channels that a tensor core takes at least


def check_triton(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    blocks: Tensor,
    counts: Tensor,
    size: int,
    reach: int,
    order: Tensor | None = None,
) -> None:
    """Check what the kernel needs.

    Raises:
        TypeError, ValueError: as `check_block_sparse`, or the kernel has no tile for this dtype or width.
    """
    check_block_sparse(q, k, v, blocks, counts, size, reach, order)
    if q.dtype not in _FLOATS:
        raise TypeError(f"block_sparse_attention_triton: q is {q.dtype}; it must be bfloat16, float16 or float32")
    for name, tensor in (("q", q), ("v", v)):
        if not 0 < tensor.shape[3] <= WIDEST:
            raise ValueError(
                f"block_sparse_attention_triton: {name} has {tensor.shape[3]} channels; use 1 to {WIDEST}, or "
                "block_sparse_attention"
            )


def _check_device(q: Tensor) -> None:
    if q.device.type == "cuda" and INTERPRETED:
        raise RuntimeError(
            "block_sparse_attention_triton: TRITON_INTERPRET=1 was set when Triton was imported; unset it to run on a GPU"
        )
    if q.device.type != "cuda" and not INTERPRETED:
        raise RuntimeError(
            f"block_sparse_attention_triton: q is on {q.device}, and Triton kernels run on CUDA. Use "
            "block_sparse_attention there, or, to test the kernel, set TRITON_INTERPRET=1 before Triton is imported"
        )


@triton_op("accelpass::block_sparse_attention_triton", mutates_args=())
def block_sparse_attention_triton(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    blocks: Tensor,
    counts: Tensor,
    size: int,
    reach: int,
    causal: bool,
    scale: float,
    order: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The output ``(B, Hq, N, dv)`` and the log-sum-exp, float32 ``(B, Hq, N)``.

    Raises:
        TypeError, ValueError: as `check_triton`.
        RuntimeError: Triton cannot run on q's device.
    """
    check_triton(q, k, v, blocks, counts, size, reach, order)
    _check_device(q)
    out, lse = empty_results(q, v)
    if not lse.numel() or not v.shape[3]:
        return out, lse
    q, k, v = (t if t.stride(3) == 1 else t.contiguous() for t in (q, k, v))
    blocks, counts = blocks.contiguous(), counts.contiguous()
    held = blocks if order is None else order.contiguous()  # a pointer that is not read is a pointer all the same
    batch, heads, rows, width = q.shape
    kv_heads, columns = k.shape[1:3]
    places = columns if order is None else order.shape[1]
    q_blocks, most = blocks.shape[1:]
    reach = effective_reach(reach, rows, columns)

    def grid(config: dict[str, int]) -> tuple[int]:
        return (batch * heads * q_blocks * triton.cdiv(size, config["BLOCK_M"]),)

    wrap_triton(block_sparse)[grid](
        q_ptr=q,
        k_ptr=k,
        v_ptr=v,
        blocks_ptr=blocks,
        counts_ptr=counts,
        order_ptr=held,
        out_ptr=out,
        lse_ptr=lse,
        scale=scale,
        heads=heads,
        N=rows,
        places=places,
        q_blocks=q_blocks,
        most=most,
        reach=reach,
        tables=blocks.shape[0],
        orders=held.shape[0],
        bucket=min(triton.next_power_of_2(max(1, most * size)), 4096),  # from there on a config is in its steady state
        q_sb=q.stride(0),
        q_sh=q.stride(1),
        q_sn=q.stride(2),
        k_sb=k.stride(0),
        k_sh=k.stride(1),
        k_sn=k.stride(2),
        v_sb=v.stride(0),
        v_sh=v.stride(1),
        v_sn=v.stride(2),
        G=heads // kv_heads,
        D=width,
        DV=v.shape[3],
        D_P2=max(_NARROW, triton.next_power_of_2(width)),
        DV_P2=max(_NARROW, triton.next_power_of_2(v.shape[3])),
        SIZE=size,
        RAGGED=places % size != 0,
        HAS_ORDER=order is not None,
        HOLES=places != columns,
        HAS_REACH=reach >= 0,
        CAUSAL=causal,
        WIDEN=INTERPRETED,
    )
    return out, lse


# As in `weight_only_ops`: a fake run computes shapes and makes no Triton call.
@block_sparse_attention_triton.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    blocks: Tensor,
    counts: Tensor,
    size: int,
    reach: int,
    causal: bool,
    scale: float,
    order: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    check_triton(q, k, v, blocks, counts, size, reach, order)
    return empty_results(q, v)
