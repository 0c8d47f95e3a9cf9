"""Decode attention over stored keys and values: `kv_decode`, and the torch op `accelpass::kv_decode_triton` under it.

Importing this module registers the op. `accelpass.ir.kv.decode.attention` has the stores (`PackedRows` or a float tensor), the
results (`Decoded`) and `merge`, which adds up the attention over several stores; `accelpass.ir.kv.decode.reference`
is the same function in plain torch; `kv_attention` says what is computed in which precision. There is no backward.

The op is for CUDA tensors (CPU tensors only under TRITON_INTERPRET=1). It may be captured in a CUDA graph once it has
run, which is when it is tuned: its grid depends on shapes, never on how many slots are valid.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.library import triton_op, wrap_triton

from accelpass.backends.kernels.triton import require_triton
from accelpass.backends.kernels.triton.kv_attention import (
    INTERPRETED,
    MASS_BLOCK,
    SPLIT_STEP,
    _kv_mass,
    _kv_merge,
    kv_split,
)
from accelpass.ir.kv.decode.attention import Decoded, PackedRows, Store, check_want
from accelpass.ir.kv.rows import BITS

triton = require_triton()

Size = int | torch.SymInt

_HALVES = (torch.bfloat16, torch.float16)
_FLOATS = (*_HALVES, torch.float32)
_PROGRAMS = 2  # per multiprocessor: with fewer, nothing is read while a program waits for its last tile
_MULTIPROCESSORS = 132  # of a Hopper chip; for the interpreter


def check_decode(
    q: Tensor, k: Store, v: Store, rows: Tensor | None = None, valid: Tensor | None = None, bias: Tensor | None = None
) -> None:
    """Check what `kv_decode` needs.

    Raises:
        TypeError: a dtype is not what is stored or computed.
        ValueError: a shape, bit width, device or memory layout does not fit.
    """
    if q.dtype not in _FLOATS:
        raise TypeError(f"kv_decode: q is {q.dtype}; it must be bfloat16, float16 or float32")
    if q.dim() != 3:
        raise ValueError(f"kv_decode: q has {q.dim()} dimensions; it must be (sequences, heads, channels)")
    for name, store in (("k", k), ("v", v)):
        _check_store(name, store, q.device)
    batch, heads, width = q.shape
    lead = _codes(k).shape[:3]
    if _codes(v).shape[:3] != lead:
        raise ValueError(f"kv_decode: v is for {tuple(_codes(v).shape[:3])} rows and k for {tuple(lead)}")
    kv_heads, slots = lead[1:]
    if lead[0] != batch or kv_heads == 0 or heads % kv_heads:
        raise ValueError(f"kv_decode: q is {tuple(q.shape)} and k for {tuple(lead)} rows; k's heads must divide q's")
    if _width(k) != width:
        raise ValueError(f"kv_decode: k has rows of {_width(k)} channels and q of {width}")
    for name, tensor, dtypes, counts, length in (
        ("rows", rows, (torch.int32, torch.int64), (kv_heads,), None),
        ("valid", valid, (torch.bool,), (kv_heads,), slots),
        ("bias", bias, _FLOATS, (1, kv_heads, heads), slots),
    ):
        if tensor is None:
            continue
        if tensor.dtype not in dtypes:
            raise TypeError(f"kv_decode: {name} is {tensor.dtype}; it must be {' or '.join(map(str, dtypes))}")
        if tensor.dim() != 3 or tensor.shape[0] != batch or tensor.shape[1] not in counts:
            raise ValueError(f"kv_decode: {name} is {tuple(tensor.shape)}; k is for {tuple(lead)} rows")
        if length is not None and tensor.shape[2] != length:
            raise ValueError(f"kv_decode: {name} is {tuple(tensor.shape)}; k is for {tuple(lead)} rows")
        if tensor.device != q.device:
            raise ValueError(f"kv_decode: {name} is on {tensor.device} and q on {q.device}; move them to one device")


def _check_store(name: str, store: Store, device: torch.device) -> None:
    parts = (
        {name: store} if isinstance(store, Tensor) else {f"{name}.{p}": getattr(store, p) for p in store._fields[:3]}
    )
    for part, tensor in parts.items():
        if tensor.dim() != 4:
            raise ValueError(f"kv_decode: {part} has {tensor.dim()} dimensions; it needs 4")
        if tensor.device != device:
            raise ValueError(f"kv_decode: {part} is on {tensor.device} and q on {device}; move them to one device")
        if tensor.stride(3) != 1 and tensor.shape[3] != 1 and tensor.numel():
            raise ValueError(f"kv_decode: {part} has a row that is not contiguous; store rows whole")
    if isinstance(store, Tensor):
        if store.dtype not in _FLOATS:
            raise TypeError(
                f"kv_decode: {name} is {store.dtype}; pass packed codes as PackedRows(codes, step, low, bits)"
            )
        return
    codes, step, low, bits = store
    if bits not in BITS:
        raise ValueError(f"kv_decode: {name}.bits={bits} is not supported; use {', '.join(map(str, BITS))}")
    if codes.dtype != torch.uint8 or step.dtype != torch.float16 or low.dtype != torch.float16:
        raise TypeError(
            f"kv_decode: {name} is {codes.dtype}, {step.dtype}, {low.dtype}; codes must be torch.uint8, step and low "
            "torch.float16"
        )
    groups = step.shape[3]
    if step.shape != low.shape or step.shape[:3] != codes.shape[:3] or groups == 0 or store.width % groups:
        raise ValueError(
            f"kv_decode: {name}'s step and low are {tuple(step.shape)} and {tuple(low.shape)}; codes {tuple(codes.shape)} "
            f"of {bits} bits need one per group of their {store.width} channels"
        )
    if store.width % 8 or codes.shape[3] * 8 != store.width * bits:
        raise ValueError(f"kv_decode: {name}.codes has {codes.shape[3]} bytes a row, which no row of {bits} bits takes")


def _codes(store: Store) -> Tensor:
    return store if isinstance(store, Tensor) else store.codes


def _width(store: Store) -> int:
    return store.shape[3] if isinstance(store, Tensor) else store.width


def _check_device(q: Tensor) -> None:
    if q.device.type == "cuda" and INTERPRETED:
        raise RuntimeError("kv_decode: TRITON_INTERPRET=1 was set when Triton was imported; unset it to run on a GPU")
    if q.device.type != "cuda" and not INTERPRETED:
        raise RuntimeError(
            f"kv_decode: q is on {q.device}, and Triton kernels run on CUDA. Use decode_reference there, or, to test "
            "the kernel, set TRITON_INTERPRET=1 before Triton is imported"
        )


def _hint(size: Size) -> int:
    """A size to choose a grid for. Of a symbolic one the hint, which installs no guard: any grid is right."""
    if isinstance(size, int):
        return size
    return int(size.node.hint) if size.node.has_hint() else 1 << 15


def split_count(pairs: int, entries: int, programs: int) -> int:
    """Into how many splits the entries of each pair go, so that the GPU, which runs `programs` at once, is full.

    The fewest among the best up to two waves: a last wave that is half empty takes as long as a full one.
    """
    most = max(1, min(entries // SPLIT_STEP, -(-2 * programs // max(1, pairs))))

    def filled(splits: int) -> float:
        return pairs * splits / (-(-pairs * splits // programs) * programs)

    return max(range(1, most + 1), key=lambda splits: (filled(splits), -splits)) if pairs else 1


def _splits(q: Tensor, pairs: Size, entries: Size, splits: int | None) -> tuple[int, Size]:
    """How many splits, and the entries in each."""
    if splits is None:
        cuda = q.device.type == "cuda" and torch.cuda.is_available()
        count = torch.cuda.get_device_properties(q.device).multi_processor_count if cuda else _MULTIPROCESSORS
        splits = split_count(_hint(pairs), _hint(entries), _PROGRAMS * count)
    each = -(-entries // (splits * SPLIT_STEP)) * SPLIT_STEP
    if isinstance(entries, int):
        splits = max(1, -(-entries // each)) if each else 1
    return splits, each


def _layout(name: str, store: Store) -> dict[str, Any]:
    """Kernel arguments for `store`, whose names begin with "k" or "v"."""
    codes = _codes(store)
    step, low = (codes, codes) if isinstance(store, Tensor) else (store.step, store.low)
    bits, width = (0, codes.shape[3]) if isinstance(store, Tensor) else (store.bits, store.width)
    planes = {0: 1, 8: 1, 4: 2, 3: 4, 2: 4}[bits]
    padded = max(triton.next_power_of_2(width // planes), 16 // planes)  # a tensor core takes 16 channels or more
    found: dict[str, Any] = {f"{name}_ptr": codes, f"{name}_step_ptr": step, f"{name}_low_ptr": low}
    for prefix, tensor in ((name, codes), (f"{name}_step", step), (f"{name}_low", low)):
        for axis, stride in zip("bhn", tensor.stride(), strict=False):
            found[f"{prefix}_s{axis}"] = stride
    big = name.upper()
    found |= {f"{big}_BITS": bits, f"{big}_GROUP": store.group if isinstance(store, PackedRows) else width}
    return found | {f"{big}_PLANE": width // planes, f"{big}_PLANE_P2": padded, f"{big}_WIDTH": padded * planes}


def launch(
    q: Tensor,
    k: Store,
    v: Store,
    scale: float,
    rows: Tensor | None,
    valid: Tensor | None,
    bias: Tensor | None,
    logits: bool,
    mass: bool,
    dtype: torch.dtype | None,
    splits: int | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The body of `kv_decode_triton`. `splits` forces what it would choose.

    Raises:
        TypeError, ValueError: as `check_decode`.
        RuntimeError: Triton cannot run on q's device.
    """
    check_decode(q, k, v, rows, valid, bias)
    _check_device(q)
    batch, heads, width = q.shape
    kv_heads, slots = _codes(k).shape[1:3]
    group, out_width = heads // kv_heads, _width(v)
    entries = slots if rows is None else rows.shape[2]
    results = _empty_results(q, k, v, rows, logits, mass, dtype)
    out, lse, summed, masses = results
    if not out.numel():
        return results
    q = q.contiguous()
    # A tensor core multiplies 16 heads even if there is one. It has the time, since reading the store is what costs, and
    # only tiles that go to `tl.dot` are fetched ahead, into shared memory. Operands of 32 bits or of two dtypes would be
    # rounded there: they are multiplied and added in registers.
    dot_k = q.dtype in _HALVES and (isinstance(k, PackedRows) or k.dtype == q.dtype)
    dot_v = q.dtype in _HALVES and (isinstance(v, PackedRows) or v.dtype in _HALVES)
    group_p2 = triton.next_power_of_2(group)
    splits, each = _splits(q, batch * kv_heads, entries, splits)
    part, part_lse = out, lse
    if splits > 1:
        part = q.new_empty((batch, heads, splits, out_width), dtype=torch.float32)
        part_lse = q.new_empty((batch, heads, splits), dtype=torch.float32)
    scores = q.new_empty((batch, heads, entries), dtype=torch.float32) if mass else lse
    wrap_triton(kv_split)[(batch * kv_heads * splits,)](
        q_ptr=q,
        out_ptr=part,
        lse_ptr=part_lse,
        scores_ptr=scores,
        logits_ptr=summed,
        scale=scale,
        kv_heads=kv_heads,
        N=slots,
        R=entries,
        splits=splits,
        split_rows=each,
        bucket=min(triton.next_power_of_2(_hint(each)), 4096),  # from there on a config is in its steady state
        G=group,
        D=width,
        DV=out_width,
        WANT_SCORES=mass,
        WANT_LOGITS=logits,
        DOT_K=dot_k,
        DOT_V=dot_v,
        WIDEN=INTERPRETED,
        G_P2=max(16, group_p2) if dot_k or dot_v else group_p2,
        **_layout("k", k),
        **_layout("v", v),
        **_listed(rows, valid, bias, lse, kv_heads, group),
    )
    if splits > 1:
        wrap_triton(_kv_merge)[(batch * heads,)](
            part_ptr=part,
            part_lse_ptr=part_lse,
            out_ptr=out,
            lse_ptr=lse,
            splits=splits,
            DV=out_width,
            DV_P2=triton.next_power_of_2(out_width),
        )
    if mass and entries:
        blocks = triton.cdiv(entries, MASS_BLOCK)
        wrap_triton(_kv_mass)[(batch * kv_heads * blocks,)](
            scores_ptr=scores, lse_ptr=lse, mass_ptr=masses, R=entries, blocks=blocks, G=group, BLOCK=MASS_BLOCK
        )
    return results


def _empty_results(
    q: Tensor, k: Store, v: Store, rows: Tensor | None, logits: bool, mass: bool, dtype: torch.dtype | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """out, lse, logits and mass to be filled; those that are not asked for have no elements."""
    batch, heads = q.shape[:2]
    kv_heads, slots = _codes(k).shape[1:3]
    per_entry = (batch, kv_heads, slots if rows is None else rows.shape[2])
    return (
        q.new_empty((batch, heads, _width(v)), dtype=dtype or q.dtype),
        q.new_empty((batch, heads), dtype=torch.float32),
        q.new_empty(per_entry if logits else (0,), dtype=torch.float32),
        q.new_empty(per_entry if mass else (0,), dtype=torch.float32),
    )


def _listed(
    rows: Tensor | None, valid: Tensor | None, bias: Tensor | None, absent: Tensor, kv_heads: int, group: int
) -> dict[str, Any]:
    """Kernel arguments for these three. One that is None still needs some pointer, `absent`, which is not read."""
    found: dict[str, Any] = {"bias_sg": 0}
    for name, tensor in (("rows", rows), ("valid", valid), ("bias", bias)):
        if tensor is not None and tensor.stride(2) != 1:
            tensor = tensor.contiguous()
        found[f"HAS_{name.upper()}"] = tensor is not None
        found[f"{name}_ptr"] = absent if tensor is None else tensor
        found[f"{name}_sb"], found[f"{name}_sh"] = (0, 0) if tensor is None else tensor.stride()[:2]
    if bias is not None and bias.shape[1] == 1:
        found["bias_sh"] = 0
    elif bias is not None and bias.shape[1] != kv_heads:
        found["bias_sg"] = found["bias_sh"]
        found["bias_sh"] *= group
    return found


@triton_op("accelpass::kv_decode_triton", mutates_args=())
def kv_decode_triton(
    q: Tensor,
    k: Tensor,
    k_step: Tensor | None,
    k_low: Tensor | None,
    k_bits: int,
    v: Tensor,
    v_step: Tensor | None,
    v_low: Tensor | None,
    v_bits: int,
    scale: float,
    rows: Tensor | None = None,
    valid: Tensor | None = None,
    bias: Tensor | None = None,
    logits: bool = False,
    mass: bool = False,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """out, lse, logits, mass; the last two have no elements unless asked for. Bits are 0 for a float store."""
    stored_k, stored_v = _store(k, k_step, k_low, k_bits), _store(v, v_step, v_low, v_bits)
    return launch(q, stored_k, stored_v, scale, rows, valid, bias, logits, mass, dtype)


# As in `weight_only_ops`: a fake run computes shapes and makes no Triton call.
@kv_decode_triton.register_fake
def _(
    q: Tensor,
    k: Tensor,
    k_step: Tensor | None,
    k_low: Tensor | None,
    k_bits: int,
    v: Tensor,
    v_step: Tensor | None,
    v_low: Tensor | None,
    v_bits: int,
    scale: float,
    rows: Tensor | None = None,
    valid: Tensor | None = None,
    bias: Tensor | None = None,
    logits: bool = False,
    mass: bool = False,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    stored_k, stored_v = _store(k, k_step, k_low, k_bits), _store(v, v_step, v_low, v_bits)
    check_decode(q, stored_k, stored_v, rows, valid, bias)
    return _empty_results(q, stored_k, stored_v, rows, logits, mass, dtype)


def _store(codes: Tensor, step: Tensor | None, low: Tensor | None, bits: int) -> Store:
    if step is None or low is None:
        return codes
    return PackedRows(codes, step, low, bits)


def _fields(store: Store) -> tuple[Tensor, Tensor | None, Tensor | None, int]:
    return (store, None, None, 0) if isinstance(store, Tensor) else (store.codes, store.step, store.low, store.bits)


def kv_decode(
    q: Tensor,
    k: Store,
    v: Store,
    *,
    scale: float,
    rows: Tensor | None = None,
    valid: Tensor | None = None,
    bias: Tensor | None = None,
    want: Sequence[str] = (),
    dtype: torch.dtype | None = None,
) -> Decoded:
    """Softmax attention of one query token per sequence over stored keys and values.

    Args:
        q: ``(B, H, D)`` bfloat16, float16 or float32.
        k, v: ``(B, Hkv, N, D)`` and ``(B, Hkv, N, Dv)`` in these dtypes, or packed rows of these widths; Hkv divides H.
            Any strides, but a row is contiguous. Slots that hold no key are not read; the others must be finite.
        rows: int32 or int64 ``(B, Hkv, R)``: the slots to read. Entries outside ``0 .. N - 1`` are no key.
        valid: bool ``(B, Hkv, N)``: the slots that hold a key.
        bias: float ``(B, Hb, N)``, added to scaled logits; Hb is 1, Hkv or H.
        want: results beside ``out``: "lse", "logits", "mass". The last one costs a second pass over B * H * R logits.
        dtype: of ``out``; None is q's. Ask for float32 where `merge` takes it.

    Raises:
        TypeError, ValueError: as `check_decode`.
        RuntimeError: Triton cannot run on q's device.
    """
    check_want(want)
    out, lse, logits, mass = kv_decode_triton(
        q, *_fields(k), *_fields(v), scale, rows, valid, bias, "logits" in want, "mass" in want, dtype
    )
    return Decoded(
        out,
        lse if "lse" in want else None,
        logits if "logits" in want else None,
        mass if "mass" in want else None,
    )
