# mypy: disable-error-code="no-untyped-def"
"""Kernels for decode attention over stored keys and values, float or packed. `kv_attention_ops` makes a torch op of them.

One query token per sequence: B sequences, H query heads, Hkv key heads of G = H / Hkv query heads each, N slots, D
channels of a key and DV of a value; R entries are read, all N slots or a list of them. A pair is a (sequence, key head).

- `_kv_split`: one program reads a range of the entries of one pair, once for all of its G query heads, and writes a
  normalised part of the output with its log-sum-exp.
- `_kv_merge` adds the parts up. `_kv_mass` turns stored logits into softmax probabilities, when the log-sum-exp is known.

A float row is read as it is. A packed row (`accelpass.ir.kv.rows`) is planes of contiguous channels, so tiles have their
channels in "plane order": entry f of a tile is channel f // PLANE_P2 * PLANE + f % PLANE_P2, PLANE channels per plane,
padded to a power of two. Where D is a power of two, that is the order of the channels; a float row is one plane.

Arithmetic is float32, but for what goes through tensor cores (DOT_K, DOT_V), which is where queries have 16 bits: products
are summed in float32, but probabilities are rounded to the value's dtype and packed rows to float16.
float16 and not the query's dtype, since bf16 would cost an 8-bit code its last bit; a step and a low are float16, so
their rows are in its range, and queries are brought into it by their largest element.

Kernel arguments have no Python types, and must have none: Inductor copies the source of a kernel into a module where
only `triton`, `tl` and constants exist.
"""

from typing import Any

from accelpass.backends.kernels.triton import require_triton

require_triton()

import triton  # noqa: E402
import triton.language as tl  # noqa: E402
from triton.runtime.jit import JITFunction  # noqa: E402

# Planes are joined, which keeps what came from a byte in its thread. A byte that is broadcast along a new axis, shifted
# and reshaped becomes one load of shared memory per code, and these take longer than reading the store.


@triton.jit
def _joined(byte, low: tl.constexpr, high: tl.constexpr):
    """Two planes of byte (BLOCK_N, J), those that begin at these bits, as (BLOCK_N, J, 2), with higher bits left in."""
    return tl.join(byte >> low, byte >> high)


@triton.jit
def _in_order(even, odd):
    """even and odd planes (BLOCK_N, J, ...), the later axes counting them, as (BLOCK_N, ..., 2, J)."""
    both = tl.join(even, odd)
    if len(both.shape) == 3:
        both = tl.permute(both, (0, 2, 1))
    elif len(both.shape) == 4:
        both = tl.permute(both, (0, 2, 3, 1))
    else:
        both = tl.permute(both, (0, 2, 3, 4, 1))
    return both


@triton.jit
def _packed_tile(
    code_ptr,
    step_ptr,
    low_ptr,
    code_at,  # (BLOCK_N,) int64, where each row's bytes, steps and lows begin
    step_at,
    low_at,
    live,  # (BLOCK_N,): rows to read; the others are 0
    D: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    PLANE_P2: tl.constexpr,
):
    """Rows (BLOCK_N, 8 / BITS * PLANE_P2) in float32, channels in plane order; padding channels hold anything finite."""
    LOW: tl.constexpr = 2 if BITS == 3 else BITS  # 3 bits are a row of 2 and a row of 1
    PLANES: tl.constexpr = 8 // LOW
    PLANE: tl.constexpr = D // PLANES
    WIDTH: tl.constexpr = PLANES * PLANE_P2
    BLOCK_N: tl.constexpr = code_at.shape[0]
    j = tl.arange(0, PLANE_P2)
    f = tl.arange(0, WIDTH)
    channel = f // PLANE_P2 * PLANE + f % PLANE_P2
    in_row = f % PLANE_P2 < PLANE
    # A byte is read once and shifted in registers: reading it once per code would ask the L2 cache for as many bytes as
    # 8-bit codes do, which at 2 bits is what the format was to save.
    byte = tl.load(code_ptr + code_at[:, None] + j[None, :], mask=live[:, None] & (j < PLANE)[None, :], other=0)
    if PLANES == 1:
        codes = byte
    elif PLANES == 2:
        codes = _in_order(byte & 15, byte >> 4)
    else:
        codes = _in_order(_joined(byte, 0, 4) & 3, _joined(byte, 2, 6) & 3)
    codes = tl.reshape(codes, (BLOCK_N, WIDTH))
    if BITS == 3:
        EIGHTH: tl.constexpr = D // 8
        high_ptr = code_ptr + PLANE
        if EIGHTH * 2 == PLANE_P2:  # D is a power of two, and planes of any width are in the order of the channels
            j8 = tl.arange(0, EIGHTH)
            byte = tl.load(high_ptr + code_at[:, None] + j8[None, :], mask=live[:, None], other=0)
            even = tl.join(_joined(byte, 0, 4), _joined(byte, 2, 6))
            high = _in_order(even, tl.join(_joined(byte, 1, 5), _joined(byte, 3, 7)))
            high = tl.reshape(high & 1, (BLOCK_N, WIDTH))
        else:
            at = code_at[:, None] + (channel % EIGHTH)[None, :]
            byte = tl.load(high_ptr + at, mask=live[:, None] & in_row[None, :], other=0)
            high = (byte >> (channel // EIGHTH).to(tl.uint8)[None, :]) & 1
        codes |= high << 2
    if PLANE == PLANE_P2:
        GROUPS: tl.constexpr = D // GROUP
        g = tl.arange(0, GROUPS)
        step = tl.load(step_ptr + step_at[:, None] + g[None, :], mask=live[:, None], other=0.0).to(tl.float32)
        low = tl.load(low_ptr + low_at[:, None] + g[None, :], mask=live[:, None], other=0.0).to(tl.float32)
        grouped = tl.reshape(codes, (BLOCK_N, GROUPS, GROUP)).to(tl.float32)
        rows = tl.reshape(grouped * step[:, :, None] + low[:, :, None], (BLOCK_N, WIDTH))
    else:  # a group may begin and end within a plane, so each channel asks for its own step
        g = channel // GROUP
        mask = live[:, None] & in_row[None, :]
        step = tl.load(step_ptr + step_at[:, None] + g[None, :], mask=mask, other=0.0).to(tl.float32)
        low = tl.load(low_ptr + low_at[:, None] + g[None, :], mask=mask, other=0.0).to(tl.float32)
        rows = codes.to(tl.float32) * step + low
    return rows


@triton.jit
def _kv_split(
    q_ptr,  # (B, H, D)
    k_ptr,
    k_step_ptr,
    k_low_ptr,
    v_ptr,
    v_step_ptr,
    v_low_ptr,
    rows_ptr,  # (B, Hkv, R)
    valid_ptr,  # (B, Hkv, N)
    bias_ptr,  # (B, 1 or Hkv or H, N)
    out_ptr,  # (B, H, splits, DV)
    lse_ptr,  # (B, H, splits)
    scores_ptr,  # (B, H, R)
    logits_ptr,  # (B, Hkv, R)
    scale,
    kv_heads,
    N,
    R,
    splits,
    split_rows,  # entries in one split, a multiple of BLOCK_N of every config
    bucket,  # split_rows rounded up to a power of two, for autotuning alone
    k_sb,  # strides: _sb of a sequence, _sh of a key head, _sn of a slot; the innermost one is 1
    k_sh,
    k_sn,
    k_step_sb,
    k_step_sh,
    k_step_sn,
    k_low_sb,
    k_low_sh,
    k_low_sn,
    v_sb,
    v_sh,
    v_sn,
    v_step_sb,
    v_step_sh,
    v_step_sn,
    v_low_sb,
    v_low_sh,
    v_low_sn,
    rows_sb,
    rows_sh,
    valid_sb,
    valid_sh,
    bias_sb,
    bias_sh,
    bias_sg,  # of a query head within its key head
    G: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    K_BITS: tl.constexpr,  # 0: float
    K_GROUP: tl.constexpr,
    V_BITS: tl.constexpr,
    V_GROUP: tl.constexpr,
    HAS_ROWS: tl.constexpr,
    HAS_VALID: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    WANT_SCORES: tl.constexpr,
    WANT_LOGITS: tl.constexpr,
    DOT_K: tl.constexpr,
    DOT_V: tl.constexpr,
    WIDEN: tl.constexpr,  # the interpreter's dot multiplies the bit patterns of bf16 (Triton 3.7); float32 holds them
    G_P2: tl.constexpr,
    K_PLANE: tl.constexpr,
    K_PLANE_P2: tl.constexpr,
    K_WIDTH: tl.constexpr,
    V_PLANE: tl.constexpr,
    V_PLANE_P2: tl.constexpr,
    V_WIDTH: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    pair = tl.program_id(0) // splits
    split = tl.program_id(0) % splits
    sequence = (pair // kv_heads).to(tl.int64)
    kv_head = (pair % kv_heads).to(tl.int64)
    m = tl.arange(0, G_P2)
    head = pair.to(tl.int64) * G + m
    k_f = tl.arange(0, K_WIDTH)
    k_channel = k_f // K_PLANE_P2 * K_PLANE + k_f % K_PLANE_P2
    in_k = k_f % K_PLANE_P2 < K_PLANE
    v_f = tl.arange(0, V_WIDTH)
    v_channel = v_f // V_PLANE_P2 * V_PLANE + v_f % V_PLANE_P2
    in_v = v_f % V_PLANE_P2 < V_PLANE
    k_at = sequence * k_sb + kv_head * k_sh
    k_step_at = sequence * k_step_sb + kv_head * k_step_sh
    k_low_at = sequence * k_low_sb + kv_head * k_low_sh
    v_at = sequence * v_sb + kv_head * v_sh
    v_step_at = sequence * v_step_sb + kv_head * v_step_sh
    v_low_at = sequence * v_low_sb + kv_head * v_low_sh
    if DOT_K:
        q = tl.load(q_ptr + head[:, None] * D + k_channel[None, :], mask=(m < G)[:, None] & in_k[None, :], other=0.0)
        if K_BITS:
            largest = tl.max(tl.abs(q.to(tl.float32)), axis=1)
            largest = tl.where(largest > 0.0, largest, 1.0)
            q = (q.to(tl.float32) / largest[:, None]).to(tl.float16)
        elif WIDEN:
            q = q.to(tl.float32)
    top = tl.full((G_P2,), float("-inf"), dtype=tl.float32)
    total = tl.zeros((G_P2,), dtype=tl.float32)
    acc = tl.zeros((G_P2, V_WIDTH), dtype=tl.float32)
    stop = tl.minimum(split * split_rows + split_rows, R)
    for start in range(split * split_rows, stop, BLOCK_N):
        entry = start + tl.arange(0, BLOCK_N)
        live = entry < stop
        slot = entry.to(tl.int64)
        if HAS_ROWS:
            slot = tl.load(rows_ptr + sequence * rows_sb + kv_head * rows_sh + entry, mask=live, other=-1).to(tl.int64)
            live = (slot >= 0) & (slot < N)
        if HAS_VALID:
            live = tl.load(valid_ptr + sequence * valid_sb + kv_head * valid_sh + slot, mask=live, other=0) != 0
        if K_BITS:
            k = _packed_tile(
                k_ptr,
                k_step_ptr,
                k_low_ptr,
                k_at + slot * k_sn,
                k_step_at + slot * k_step_sn,
                k_low_at + slot * k_low_sn,
                live,
                D,
                K_BITS,
                K_GROUP,
                K_PLANE_P2,
            )
        else:
            at = k_at + (slot * k_sn)[:, None] + k_channel[None, :]
            k = tl.load(k_ptr + at, mask=live[:, None] & in_k[None, :], other=0.0)
        if DOT_K:
            if K_BITS:
                k = k.to(tl.float16)
            elif WIDEN:
                k = k.to(tl.float32)
            s = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
            if K_BITS:
                s *= largest[:, None]
        else:
            k = k.to(tl.float32)
            s = tl.zeros((G_P2, BLOCK_N), dtype=tl.float32)
            for i in tl.static_range(G):
                one = tl.load(q_ptr + (pair.to(tl.int64) * G + i) * D + k_channel, mask=in_k, other=0.0).to(tl.float32)
                s += tl.where(m[:, None] == i, tl.sum(k * one[None, :], axis=1)[None, :], 0.0)
            s *= scale
        if HAS_BIAS:
            at = (sequence * bias_sb + kv_head * bias_sh + m * bias_sg)[:, None] + slot[None, :]
            s += tl.load(bias_ptr + at, mask=(m < G)[:, None] & live[None, :], other=0.0).to(tl.float32)
        s = tl.where(live[None, :], s, float("-inf"))
        if WANT_SCORES:
            at = head[:, None] * R + entry[None, :]
            tl.store(scores_ptr + at, s, mask=(m < G)[:, None] & (entry < stop)[None, :])
        if WANT_LOGITS:
            both = tl.sum(tl.where((m < G)[:, None], s, 0.0), axis=0)
            tl.store(logits_ptr + pair.to(tl.int64) * R + entry, both, mask=entry < stop)

        new_top = tl.maximum(top, tl.max(s, axis=1))
        base = tl.where(new_top == float("-inf"), 0.0, new_top)  # no key yet: exp(-inf - 0) is 0, exp(-inf + inf) nan
        p = tl.exp(s - base[:, None])
        alpha = tl.exp(top - base)
        total = total * alpha + tl.sum(p, axis=1)
        acc *= alpha[:, None]
        top = new_top
        if V_BITS:
            v = _packed_tile(
                v_ptr,
                v_step_ptr,
                v_low_ptr,
                v_at + slot * v_sn,
                v_step_at + slot * v_step_sn,
                v_low_at + slot * v_low_sn,
                live,
                DV,
                V_BITS,
                V_GROUP,
                V_PLANE_P2,
            )
        else:
            at = v_at + (slot * v_sn)[:, None] + v_channel[None, :]
            v = tl.load(v_ptr + at, mask=live[:, None] & in_v[None, :], other=0.0)
        if DOT_V:
            if V_BITS:
                v = v.to(tl.float16)
            # 1024: a float16 below 2**-14 loses bits, and in a context of 100 000 keys most probabilities are.
            p = (p * 1024.0).to(v.dtype)
            if WIDEN:
                p = p.to(tl.float32)
                v = v.to(tl.float32)
            acc = tl.dot(p, v, acc, input_precision="ieee")
        else:
            v = v.to(tl.float32)
            for i in tl.static_range(G):
                one = tl.sum(tl.where(m[:, None] == i, p, 0.0), axis=0)
                acc += tl.where(m[:, None] == i, tl.sum(one[:, None] * v, axis=0)[None, :], 0.0)
    if DOT_V:
        acc *= 1.0 / 1024.0
    some = tl.where(total > 0.0, total, 1.0)  # no key: the output is 0 and top, the log-sum-exp, -inf
    out = acc / some[:, None]
    at = head * splits + split
    out_at = at[:, None] * DV + v_channel[None, :]
    tl.store(out_ptr + out_at, out.to(out_ptr.dtype.element_ty), mask=(m < G)[:, None] & in_v[None, :])
    tl.store(lse_ptr + at, top + tl.log(some), mask=m < G)


@triton.jit
def _kv_merge(part_ptr, part_lse_ptr, out_ptr, lse_ptr, splits, DV: tl.constexpr, DV_P2: tl.constexpr):
    """One query head: parts (splits, DV) and their lse (splits,) into one. The order of the sum is fixed."""
    BLOCK: tl.constexpr = 16
    head = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, DV_P2)
    top = tl.max(tl.full((BLOCK,), float("-inf"), dtype=tl.float32), axis=0)
    total = tl.sum(tl.zeros((BLOCK,), dtype=tl.float32), axis=0)
    acc = tl.zeros((DV_P2,), dtype=tl.float32)
    for start in range(0, splits, BLOCK):
        s = start + tl.arange(0, BLOCK)
        lse = tl.load(part_lse_ptr + head * splits + s, mask=s < splits, other=float("-inf"))
        at = (head * splits + s)[:, None] * DV + c[None, :]
        part = tl.load(part_ptr + at, mask=(s < splits)[:, None] & (c < DV)[None, :], other=0.0)
        new_top = tl.maximum(top, tl.max(lse, axis=0))
        base = tl.where(new_top == float("-inf"), 0.0, new_top)
        weight = tl.exp(lse - base)
        alpha = tl.exp(top - base)
        total = total * alpha + tl.sum(weight, axis=0)
        acc = acc * alpha + tl.sum(weight[:, None] * part, axis=0)
        top = new_top
    some = tl.where(total > 0.0, total, 1.0)
    out = acc / some
    tl.store(out_ptr + head * DV + c, out.to(out_ptr.dtype.element_ty), mask=c < DV)
    tl.store(lse_ptr + head, top + tl.log(some))


@triton.jit
def _kv_mass(scores_ptr, lse_ptr, mass_ptr, R, blocks, G: tl.constexpr, BLOCK: tl.constexpr):
    """scores (pairs, G, R) and lse (pairs, G) into mass (pairs, R)."""
    pair = (tl.program_id(0) // blocks).to(tl.int64)
    entry = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    mass = tl.zeros((BLOCK,), dtype=tl.float32)
    for i in tl.static_range(G):
        lse = tl.load(lse_ptr + pair * G + i)
        lse = tl.where(lse == float("-inf"), 0.0, lse)
        mass += tl.exp(tl.load(scores_ptr + (pair * G + i) * R + entry, mask=entry < R, other=0.0) - lse)
    tl.store(mass_ptr + pair * R + entry, mass, mask=entry < R)


INTERPRETED = not isinstance(_kv_split, JITFunction)  # TRITON_INTERPRET=1 was set before Triton was imported
MASS_BLOCK = 1024


def _configs(*shapes: tuple[int, int, int]) -> list[triton.Config]:
    """Configs from (BLOCK_N, warps, stages). The interpreter runs every program in Python, so it gets one, and blocks
    small enough that small tensors have several."""
    shapes = ((16, 4, 1),) if INTERPRETED else shapes
    return [triton.Config({"BLOCK_N": n}, num_warps=warps, num_stages=stages) for n, warps, stages in shapes]


# The list is short because each config costs a compilation per format; the first fits 256 float32 channels, and those
# that do not fit a shape's shared memory are passed over. The key has no exact length: a cache may grow at every token.
kv_split: Any = triton.autotune(
    configs=_configs((32, 4, 2), (64, 4, 2), (64, 4, 3), (64, 4, 4), (128, 8, 3)),
    key=["bucket", "G", "D", "DV", "K_BITS", "V_BITS", "HAS_ROWS"],
)(_kv_split)
SPLIT_STEP = max(config.kwargs["BLOCK_N"] for config in kv_split.configs)
