# mypy: disable-error-code="no-untyped-def"
"""Kernels for y = x @ dequant(W)^T + bias, with W stored as int8 or int4. `weight_only_ops` makes torch ops of them.

Shapes and packing (rows = M, outputs = N, inputs = K, group = g columns, HALF = g / 2):

    int8   q int8 (N, K), scale float32 (N,)                    W = q * scale[:, None]
    int4   q uint8 (N, K/2), scale and zero float32 (N, K/g)    W = (nibble - zero) * scale; zero is 8 where absent
           byte j of a group holds the group's column j in its low nibble and column j + HALF in its high one, so that
           both nibbles of consecutive bytes meet consecutive elements of x

What all kernels share:

- A quantized integer (at most 8 significant bits) is exact in bf16 and in fp16. Scales are applied to float32 sums, per
  row or per group, so W is never rounded to x's dtype and cannot overflow fp16.
- `program_id` of the last axis is the split of K. Each split writes its own float32 slab of `out`, (splits, M, N), and
  the caller adds them: the result does not depend on the order in which programs finish, as it would with atomics.
- A split is a multiple of BLOCK_K of every config (`k_step`), so `column < K` is the only mask along K.

Kernel arguments have no Python types, and must have none: Inductor copies the source of a kernel into a module where
only `triton`, `tl` and constants exist.
"""

from typing import Any

from accelpass.backends.kernels.triton import require_triton

require_triton()

import triton  # noqa: E402
import triton.language as tl  # noqa: E402
from triton.runtime.jit import JITFunction  # noqa: E402


@triton.jit
def _int8_gemv(
    x_ptr,  # (ROWS, K)
    q_ptr,
    scale_ptr,
    bias_ptr,
    out_ptr,
    N,
    K,
    k_split,  # columns of K in one split
    HAS_BIAS: tl.constexpr,
    ROWS: tl.constexpr,
    ROWS_P2: tl.constexpr,  # ROWS rounded up to a power of two
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """A few rows of x: multiply and add in registers, since at 1..4 rows a tensor core would work on padding."""
    rn = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    split = tl.program_id(1)
    row = tl.arange(0, ROWS_P2)
    in_n = rn < N
    q_rows = q_ptr + rn.to(tl.int64) * K
    acc = tl.zeros((BLOCK_N, ROWS_P2), dtype=tl.float32)
    for k in range(split * k_split, tl.minimum(split * k_split + k_split, K), BLOCK_K):
        rk = k + tl.arange(0, BLOCK_K)
        in_k = rk < K
        w = tl.load(q_rows[:, None] + rk[None, :], mask=in_n[:, None] & in_k[None, :], other=0).to(tl.float32)
        for m in tl.static_range(ROWS):
            x = tl.load(x_ptr + m * K + rk, mask=in_k, other=0).to(tl.float32)
            part = tl.sum(w * x[None, :], axis=1)
            acc += tl.where(row[None, :] == m, part[:, None], 0.0)
    acc *= tl.load(scale_ptr + rn, mask=in_n, other=0.0)[:, None]
    if HAS_BIAS:
        acc += tl.load(bias_ptr + rn, mask=in_n, other=0.0).to(tl.float32)[:, None]
    out = out_ptr + split.to(tl.int64) * ROWS * N + row[None, :] * N + rn[:, None]
    tl.store(out, acc.to(out_ptr.dtype.element_ty), mask=in_n[:, None] & (row < ROWS)[None, :])


@triton.jit
def _int4_gemv(
    x_ptr,  # (ROWS, K)
    q_ptr,
    scale_ptr,
    zero_ptr,
    bias_ptr,
    out_ptr,
    N,
    K,
    row_bytes,  # K / 2, an argument so that its divisibility by 16 is known to the compiler
    groups,  # K / g
    k_split,
    HAS_ZERO: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ROWS: tl.constexpr,
    ROWS_P2: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """As `_int8_gemv`. One tile is (BLOCK_N, groups, HALF) bytes; a group is summed before its scale is applied."""
    GROUP: tl.constexpr = 2 * HALF
    BLOCK_G: tl.constexpr = BLOCK_K // GROUP
    rn = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    split = tl.program_id(1)
    row = tl.arange(0, ROWS_P2)
    rb = tl.arange(0, HALF)
    in_n = rn < N
    rn64 = rn.to(tl.int64)
    acc = tl.zeros((BLOCK_N, ROWS_P2), dtype=tl.float32)
    for k in range(split * k_split, tl.minimum(split * k_split + k_split, K), BLOCK_K):
        rg = k // GROUP + tl.arange(0, BLOCK_G)
        in_g = rg < groups
        in_tile = in_n[:, None] & in_g[None, :]
        byte = (rg * HALF)[:, None] + rb[None, :]
        q = tl.load(q_ptr + (rn64 * row_bytes)[:, None, None] + byte[None, :, :], mask=in_tile[:, :, None], other=0)
        low = (q & 15).to(tl.float32)
        high = (q >> 4).to(tl.float32)
        at = (rn64 * groups)[:, None] + rg[None, :]
        scale = tl.load(scale_ptr + at, mask=in_tile, other=0.0)
        column = (rg * GROUP)[:, None] + rb[None, :]
        for m in tl.static_range(ROWS):
            x_low = tl.load(x_ptr + m * K + column, mask=in_g[:, None], other=0.0).to(tl.float32)
            x_high = tl.load(x_ptr + m * K + column + HALF, mask=in_g[:, None], other=0.0).to(tl.float32)
            # The zero point leaves the sum, sum((n - z) * x) = sum(n * x) - z * sum(x): one subtraction per group
            # where there would be one per weight.
            part = tl.sum(low * x_low[None, :, :] + high * x_high[None, :, :], axis=2)
            x_sum = tl.sum(x_low + x_high, axis=1)[None, :]
            if HAS_ZERO:
                part -= tl.load(zero_ptr + at, mask=in_tile, other=0.0) * x_sum
            else:
                part -= 8.0 * x_sum
            acc += tl.where(row[None, :] == m, tl.sum(part * scale, axis=1)[:, None], 0.0)
    if HAS_BIAS:
        acc += tl.load(bias_ptr + rn, mask=in_n, other=0.0).to(tl.float32)[:, None]
    out = out_ptr + split.to(tl.int64) * ROWS * N + row[None, :] * N + rn[:, None]
    tl.store(out, acc.to(out_ptr.dtype.element_ty), mask=in_n[:, None] & (row < ROWS)[None, :])


# In both GEMM kernels the weight is the left operand, acc = W @ x^T of (BLOCK_N, BLOCK_M): Hopper's matrix instruction
# takes its left operand from registers, where the weight has just been converted, and its right one from shared memory,
# where x was copied; and few rows of x then fill its short side instead of a padded long one. WIDEN is for the
# interpreter, whose dot multiplies the bit patterns of bf16 as integers (Triton 3.7); float32 holds products of bf16.


@triton.jit
def _int8_gemm(
    x_ptr,  # (M, K)
    q_ptr,
    scale_ptr,
    bias_ptr,
    out_ptr,
    M,
    N,
    K,
    k_split,
    HAS_BIAS: tl.constexpr,
    WIDEN: tl.constexpr,
    INTEGER: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    rm = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    rn = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    split = tl.program_id(2)
    in_m = rm < M
    in_n = rn < N
    x_rows = x_ptr + rm.to(tl.int64) * K
    q_rows = q_ptr + rn.to(tl.int64) * K
    # Products of eight bits are summed exactly, in 32.
    acc = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.int32 if INTEGER else tl.float32)
    for k in range(split * k_split, tl.minimum(split * k_split + k_split, K), BLOCK_K):
        rk = k + tl.arange(0, BLOCK_K)
        in_k = rk < K
        w = tl.load(q_rows[:, None] + rk[None, :], mask=in_n[:, None] & in_k[None, :], other=0)
        x = tl.load(x_rows[None, :] + rk[:, None], mask=in_m[None, :] & in_k[:, None], other=0)
        if WIDEN:
            x = x.to(tl.float32)
        if INTEGER:
            acc = tl.dot(w, x, acc, out_dtype=tl.int32)
        else:
            acc = tl.dot(w.to(x.dtype), x, acc, input_precision="ieee")
    y = acc.to(tl.float32) * tl.load(scale_ptr + rn, mask=in_n, other=0.0)[:, None]
    if HAS_BIAS:
        y += tl.load(bias_ptr + rn, mask=in_n, other=0.0).to(tl.float32)[:, None]
    out = out_ptr + (split.to(tl.int64) * M + rm)[None, :] * N + rn[:, None]
    tl.store(out, y.to(out_ptr.dtype.element_ty), mask=in_n[:, None] & in_m[None, :])


@triton.jit
def _int4_gemm(
    x_ptr,  # (M, K)
    q_ptr,
    scale_ptr,
    zero_ptr,
    bias_ptr,
    out_ptr,
    M,
    N,
    K,
    row_bytes,
    groups,
    k_split,
    HAS_ZERO: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HALF: tl.constexpr,
    WIDEN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    GROUP: tl.constexpr = 2 * HALF
    rm = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    rn = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    split = tl.program_id(2)
    rb = tl.arange(0, HALF)
    in_m = rm < M
    in_n = rn < N
    rn64 = rn.to(tl.int64)
    x_rows = x_ptr + rm.to(tl.int64) * K
    acc = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
    for k in range(split * k_split, tl.minimum(split * k_split + k_split, K), BLOCK_K):
        # Small groups are unrolled up to BLOCK_K columns, to keep more loads in flight than one group has.
        for i in tl.static_range(BLOCK_K // GROUP):
            group = k // GROUP + i
            in_x = in_m[None, :] & (group < groups)
            in_q = in_n & (group < groups)
            q = tl.load(q_ptr + (rn64 * row_bytes)[:, None] + group * HALF + rb[None, :], mask=in_q[:, None], other=0)
            x_low = tl.load(x_rows[None, :] + group * GROUP + rb[:, None], mask=in_x, other=0.0)
            x_high = tl.load(x_rows[None, :] + group * GROUP + HALF + rb[:, None], mask=in_x, other=0.0)
            if WIDEN:
                x_low = x_low.to(tl.float32)
                x_high = x_high.to(tl.float32)
            low = (q & 15).to(tl.int8)
            high = (q >> 4).to(tl.int8)
            if not HAS_ZERO:
                low -= 8
                high -= 8
            part = tl.dot(low.to(x_low.dtype), x_low, input_precision="ieee")
            part = tl.dot(high.to(x_high.dtype), x_high, part, input_precision="ieee")
            if HAS_ZERO:
                # A zero point may be a fraction, which x's dtype would round: it is applied to the float32 sums.
                x_sum = tl.sum(x_low.to(tl.float32) + x_high.to(tl.float32), axis=0)
                part -= tl.load(zero_ptr + rn64 * groups + group, mask=in_q, other=0.0)[:, None] * x_sum[None, :]
            acc += part * tl.load(scale_ptr + rn64 * groups + group, mask=in_q, other=0.0)[:, None]
    if HAS_BIAS:
        acc += tl.load(bias_ptr + rn, mask=in_n, other=0.0).to(tl.float32)[:, None]
    out = out_ptr + (split.to(tl.int64) * M + rm)[None, :] * N + rn[:, None]
    tl.store(out, acc.to(out_ptr.dtype.element_ty), mask=in_n[:, None] & in_m[None, :])


INTERPRETED = not isinstance(_int8_gemv, JITFunction)  # TRITON_INTERPRET=1 was set before Triton was imported

# The interpreter runs every program in Python, so it gets one config, small enough that small tensors cross its edges.
# On a GPU the configs are few because each one costs a compilation per dtype and shape.


def _gemv_configs(*shapes: tuple[int, int, int]) -> list[triton.Config]:
    """Configs from (BLOCK_N, BLOCK_K, warps)."""
    shapes = ((8, 128, 4),) if INTERPRETED else shapes
    return [triton.Config({"BLOCK_N": n, "BLOCK_K": k}, num_warps=warps) for n, k, warps in shapes]


def _gemm_configs(*shapes: tuple[int, int, int, int, int]) -> list[triton.Config]:
    """Configs from (BLOCK_M, BLOCK_N, BLOCK_K, warps, stages)."""
    shapes = ((16, 16, 128, 4, 1),) if INTERPRETED else shapes
    return [
        triton.Config({"BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": k}, num_warps=warps, num_stages=stages)
        for m, n, k, warps, stages in shapes
    ]


def k_step(kernel: Any) -> int:
    """Columns of K that a split of this tuned kernel must be a multiple of: BLOCK_K are powers of two."""
    return max(config.kwargs["BLOCK_K"] for config in kernel.configs)


def _tuned(kernel: Any, configs: list[triton.Config], *key: str) -> Any:
    return triton.autotune(configs=configs, key=["N", "K", *key])(kernel)


# narrow: up to 16 rows, reading the weight is what costs. middle: up to 64. wide: tensor cores are what costs.
int8_gemv = _tuned(
    _int8_gemv, _gemv_configs((2, 2048, 4), (4, 2048, 4), (8, 1024, 4), (8, 512, 4), (4, 4096, 8)), "ROWS"
)
int4_gemv = _tuned(
    _int4_gemv, _gemv_configs((2, 4096, 4), (4, 4096, 4), (8, 2048, 4), (4, 2048, 2), (8, 1024, 4)), "ROWS", "HALF"
)
int8_gemm_narrow = _tuned(
    _int8_gemm, _gemm_configs((16, 32, 128, 4, 5), (16, 64, 128, 4, 5), (16, 64, 256, 4, 4), (16, 128, 128, 4, 4))
)
int8_gemm_middle = _tuned(
    _int8_gemm, _gemm_configs((32, 64, 128, 4, 4), (64, 64, 128, 4, 4), (64, 128, 128, 8, 3), (64, 128, 64, 4, 4))
)
int8_gemm_wide = _tuned(
    _int8_gemm, _gemm_configs((64, 128, 64, 4, 4), (128, 128, 64, 8, 4), (128, 64, 64, 4, 4), (256, 128, 64, 8, 3))
)
int4_gemm_narrow = _tuned(
    _int4_gemm,
    _gemm_configs((16, 32, 128, 4, 5), (16, 64, 128, 4, 5), (16, 64, 128, 4, 3), (16, 128, 128, 8, 4)),
    "HALF",
)
int4_gemm_middle = _tuned(
    _int4_gemm, _gemm_configs((32, 64, 128, 4, 4), (64, 64, 128, 4, 4), (64, 128, 128, 8, 3)), "HALF"
)
int4_gemm_wide = _tuned(
    _int4_gemm, _gemm_configs((64, 128, 128, 8, 3), (128, 64, 128, 4, 3), (128, 128, 128, 8, 3)), "HALF"
)
