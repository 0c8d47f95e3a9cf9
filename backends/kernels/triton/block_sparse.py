# mypy: disable-error-code="no-untyped-def"
"""The kernel of block-sparse attention. `block_sparse_ops` makes a torch op of it.

B sequences, H query heads, Hkv = H / G key heads, N queries, M keys, D channels of a query and a key and DV of a value. One
program takes a tile of BLOCK_M queries of one head, which lies within one block of SIZE queries, and goes over the tiles
of BLOCK_N keys in the key blocks that are listed for that block: one loop over tiles and not one over blocks with one
over tiles inside, since Triton fetches ahead in innermost loops only. The softmax is the online one of FlashAttention-2
(Dao, 2023, arXiv 2307.08691).

Scores, the softmax and the sums are float32. Operands of 16 bits go through tensor cores, with probabilities rounded to
the values' dtype; float32 operands are multiplied in float32.

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
def _block_sparse(
    q_ptr,  # (B, H, N, D)
    k_ptr,  # (B, Hkv, M, D)
    v_ptr,  # (B, Hkv, M, DV)
    blocks_ptr,  # (tables, q_blocks, most)
    counts_ptr,  # (tables, q_blocks)
    order_ptr,  # (orders, places): -1 at places that hold no key
    out_ptr,  # (B, N, H, DV)
    lse_ptr,  # (B, H, N)
    scale,
    heads,
    N,
    places,  # of keys: M, or more where some hold none
    q_blocks,
    most,
    reach,
    tables,  # 1, H or B * H
    orders,  # the same
    bucket,  # keys in the longest list, rounded up to a power of two, for autotuning alone
    q_sb,  # strides: _sb of a sequence, _sh of a head, _sn of a token; the innermost one is 1
    q_sh,
    q_sn,
    k_sb,
    k_sh,
    k_sn,
    v_sb,
    v_sh,
    v_sn,
    G: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    D_P2: tl.constexpr,
    DV_P2: tl.constexpr,
    SIZE: tl.constexpr,
    RAGGED: tl.constexpr,  # the last key block is shorter than SIZE
    HAS_ORDER: tl.constexpr,  # a tile's keys are the tokens that stand at its places, gathered as they are loaded
    HOLES: tl.constexpr,  # some places of an order hold no key
    HAS_REACH: tl.constexpr,
    CAUSAL: tl.constexpr,
    WIDEN: tl.constexpr,  # the interpreter's dot multiplies the bit patterns of bf16 (Triton 3.7); float32 holds them
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    LOG2E: tl.constexpr = 1.4426950408889634
    Q_TILES: tl.constexpr = (SIZE + BLOCK_M - 1) // BLOCK_M
    K_TILES: tl.constexpr = (SIZE + BLOCK_N - 1) // BLOCK_N
    tiles = q_blocks * Q_TILES
    pair = tl.program_id(0) // tiles
    # Later queries read the most keys where the attention is causal: they begin first, and the last wave is short.
    tile = tiles - 1 - tl.program_id(0) % tiles
    sequence = (pair // heads).to(tl.int64)
    head = pair % heads
    kv_head = (head // G).to(tl.int64)
    q_block = tile // Q_TILES
    m = q_block * SIZE + tile % Q_TILES * BLOCK_M + tl.arange(0, BLOCK_M)
    in_m = m < N
    if SIZE % BLOCK_M:
        in_m = in_m & (m < q_block * SIZE + SIZE)
    d = tl.arange(0, D_P2)
    dv = tl.arange(0, DV_P2)
    n = tl.arange(0, BLOCK_N)
    at = sequence * q_sb + head.to(tl.int64) * q_sh + m.to(tl.int64) * q_sn
    mask = in_m[:, None]
    if D_P2 != D:
        mask = mask & (d < D)[None, :]
    q = tl.load(q_ptr + at[:, None] + d[None, :], mask=mask, other=0.0)
    if WIDEN:
        q = q.to(tl.float32)
    table = (pair % tables).to(tl.int64) * q_blocks + q_block
    count = tl.load(counts_ptr + table)
    listed_ptr = blocks_ptr + table * most
    order_base = order_ptr + (pair % orders).to(tl.int64) * places
    k_base = k_ptr + sequence * k_sb + kv_head * k_sh
    v_base = v_ptr + sequence * v_sb + kv_head * v_sh
    top = tl.full((BLOCK_M,), float("-inf"), dtype=tl.float32)
    total = tl.zeros((BLOCK_M,), dtype=tl.float32)
    acc = tl.zeros((BLOCK_M, DV_P2), dtype=tl.float32)
    for t in range(count * K_TILES):
        block = tl.load(listed_ptr + t // K_TILES)
        start = block * SIZE + t % K_TILES * BLOCK_N
        place = start + n
        there = place < tl.minimum(block * SIZE + SIZE, places)
        if HAS_ORDER:
            key = tl.load(order_base + place, mask=there, other=0)
            if HOLES:
                there = there & (key >= 0)
            held = key.to(tl.int64)
            k_at = k_base + (held * k_sn)[:, None] + d[None, :]
            v_at = v_base + (held * v_sn)[:, None] + dv[None, :]
        else:
            key = place
            k_at = k_base + start.to(tl.int64) * k_sn + (n * k_sn)[:, None] + d[None, :]
            v_at = v_base + start.to(tl.int64) * v_sn + (n * v_sn)[:, None] + dv[None, :]
        PART: tl.constexpr = RAGGED or HOLES or SIZE % BLOCK_N != 0  # a tile may go past the end of its block
        if PART and D_P2 != D:
            k = tl.load(k_at, mask=there[:, None] & (d < D)[None, :], other=0.0)
        elif PART:
            k = tl.load(k_at, mask=there[:, None], other=0.0)
        elif D_P2 != D:
            k = tl.load(k_at, mask=(d < D)[None, :], other=0.0)
        else:
            k = tl.load(k_at)
        if WIDEN:
            k = k.to(tl.float32)
        s = tl.dot(q, tl.trans(k), input_precision="ieee") * (scale * LOG2E)
        if PART:
            s = tl.where(there[None, :], s, float("-inf"))
        if HAS_REACH:
            away = m[:, None] - key[None, :]
            s = tl.where((away <= reach) & (away >= -reach), s, float("-inf"))
        if CAUSAL:
            s = tl.where(key[None, :] <= m[:, None], s, float("-inf"))
        new_top = tl.maximum(top, tl.max(s, axis=1))
        base = new_top
        if PART or HAS_REACH or CAUSAL:
            base = tl.where(new_top == float("-inf"), 0.0, new_top)  # no key yet: -inf - 0, and not -inf + inf
        p = tl.exp2(s - base[:, None])
        alpha = tl.exp2(top - base)
        total = total * alpha + tl.sum(p, axis=1)
        acc *= alpha[:, None]
        top = new_top
        if PART and DV_P2 != DV:
            v = tl.load(v_at, mask=there[:, None] & (dv < DV)[None, :], other=0.0)
        elif PART:
            v = tl.load(v_at, mask=there[:, None], other=0.0)
        elif DV_P2 != DV:
            v = tl.load(v_at, mask=(dv < DV)[None, :], other=0.0)
        else:
            v = tl.load(v_at)
        p = p.to(v.dtype)
        if WIDEN:
            p = p.to(tl.float32)
            v = v.to(tl.float32)
        acc = tl.dot(p, v, acc, input_precision="ieee")
    some = tl.where(total > 0.0, total, 1.0)  # no key: the output is 0, and top, the log-sum-exp, -inf
    row = pair.to(tl.int64) * N + m
    mask = in_m[:, None]
    if DV_P2 != DV:
        mask = mask & (dv < DV)[None, :]
    out = (acc / some[:, None]).to(out_ptr.dtype.element_ty)
    out_at = (sequence * N + m) * heads + head
    tl.store(out_ptr + (out_at * DV)[:, None] + dv[None, :], out, mask=mask)
    tl.store(lse_ptr + row, (top + tl.log2(some)) / LOG2E, mask=in_m)


INTERPRETED = not isinstance(_block_sparse, JITFunction)  # TRITON_INTERPRET=1 was set before Triton was imported


def _configs(*shapes: tuple[int, int, int, int]) -> list[triton.Config]:
    """Configs from (BLOCK_M, BLOCK_N, warps, stages). The interpreter runs every program in Python, so it gets one, of
    tiles small enough that small tensors have several."""
    shapes = ((32, 16, 4, 1),) if INTERPRETED else shapes
    return [
        triton.Config({"BLOCK_M": m, "BLOCK_N": n}, num_warps=warps, num_stages=stages)
        for m, n, warps, stages in shapes
    ]


# A tile may be smaller than a block, or larger: then part of it is idle, which tuning sees. The first one fits 256 float32
# channels, and those that do not fit a shape's shared memory are passed over. The key has no exact length.
block_sparse: Any = triton.autotune(
    configs=_configs(
        (32, 32, 4, 1),
        (64, 32, 4, 2),
        (64, 64, 4, 3),
        (64, 128, 4, 3),
        (128, 64, 4, 3),
        (128, 64, 8, 3),
        (128, 128, 8, 2),
        (128, 128, 8, 3),
    ),
    key=["bucket", "D", "DV", "SIZE", "HAS_ORDER", "HOLES", "HAS_REACH", "CAUSAL"],
)(_block_sparse)
