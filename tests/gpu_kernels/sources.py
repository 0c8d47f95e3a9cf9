"""What Triton is asked to compile: each kernel with the constants and pointer types that its launcher would give it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import triton
from triton.compiler import ASTSource

from accelpass.backends.kernels.triton import block_sparse, kv_attention, weight_only
from accelpass.backends.kernels.triton import kv_attention_ops as decode
from accelpass.ir.kv.decode.attention import PackedRows
from accelpass.ir.kv.rows import BITS, row_bytes

POINTERS = {torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.float32: "*fp32", torch.int8: "*i8"}
WEIGHT_ONLY = tuple(name for name in vars(weight_only) if re.match(r"int[48]_(gemv|gemm_)", name))


@dataclass(frozen=True)
class Variant:
    """One kernel as it would be launched.

    Attributes:
        name: the kernel; ``setting``, what it is compiled for: dtype, head size, group.
        config: tile sizes, warps and stages; as text too, which identifies the variant together with the names.
    """

    name: str
    setting: str
    config: triton.Config = field(compare=False)
    source: ASTSource = field(compare=False, repr=False)

    @property
    def tiles(self) -> str:
        sizes = "x".join(str(n) for n in self.config.kwargs.values())
        return f"{sizes}, {self.config.num_warps} warps, {self.config.num_stages} stages"

    @property
    def key(self) -> str:
        return f"{self.name} | {self.setting} | {self.tiles}"

    @property
    def options(self) -> dict[str, int]:
        return {"num_warps": self.config.num_warps, "num_stages": self.config.num_stages}


def _source(kernel: Any, fixed: dict[str, Any], kinds: dict[str, str], divisible: set[str]) -> ASTSource:
    names = [p.name for p in kernel.params]
    signature = {name: "constexpr" if name in fixed else kinds.get(name, "i32") for name in names}
    known = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if name in divisible - fixed.keys()}
    return ASTSource(kernel, signature, fixed, known)


def weight_only_source(
    name: str, config: triton.Config, half: int = 64, dtype: torch.dtype = torch.bfloat16
) -> ASTSource:
    """A weight-only kernel, sizes divisible by 16; ``half`` of an int4 group."""
    kernel = getattr(weight_only, name).fn
    names = [p.name for p in kernel.params]
    values = {
        "HAS_BIAS": True,
        "HAS_ZERO": True,
        "WIDEN": False,
        "INTEGER": dtype == torch.int8,
        "HALF": half,
        "ROWS": 1,
        "ROWS_P2": 1,
        **config.kwargs,
    }
    kinds = dict.fromkeys(("x_ptr", "bias_ptr", "out_ptr"), POINTERS[dtype])
    if dtype == torch.int8:
        kinds |= {"bias_ptr": "*fp32", "out_ptr": "*fp32"}
    kinds |= {"scale_ptr": "*fp32", "zero_ptr": "*fp32", "q_ptr": "*u8" if "groups" in names else "*i8"}
    return _source(kernel, {n: values[n] for n in names if n in values}, kinds, set(names) - {"M"})


def decode_source(
    config: triton.Config,
    bits: int = 0,
    width: int = 128,
    dtype: torch.dtype = torch.bfloat16,
    group: int = 4,
    **constants: bool,
) -> ASTSource:
    """Decode attention over keys and values of this format, ``group`` query heads for each key head."""
    kernel = kv_attention.kv_split.fn
    names = [p.name for p in kernel.params]
    rows: Any = torch.empty(2, 2, 10, width, device="meta")
    if bits:
        codes = torch.empty(2, 2, 10, row_bytes(width, bits), dtype=torch.uint8, device="meta")
        step, low = (torch.empty(2, 2, 10, width // 16, dtype=torch.float16, device="meta") for _ in range(2))
        rows = PackedRows(codes, step, low, bits)
    dot = dtype != torch.float32
    values = {
        **dict.fromkeys((name for name in names if re.match("(HAS|WANT)_", name)), False),
        **decode._layout("k", rows),
        **decode._layout("v", rows),
        "G": group,
        "G_P2": 16 if dot else 4,
        "D": width,
        "DV": width,
        "DOT_K": dot,
        "DOT_V": dot,
        "WIDEN": False,
        **constants,
        **config.kwargs,
    }
    plain = {"scale", "kv_heads", "N", "R", "splits"}
    fixed = {name: values[name] for name in names if name.isupper() and name not in plain}
    kinds = dict.fromkeys(("k_step_ptr", "k_low_ptr", "v_step_ptr", "v_low_ptr"), "*fp16")
    kinds |= dict.fromkeys(("bias_ptr", "out_ptr", "lse_ptr", "scores_ptr", "logits_ptr"), "*fp32")
    kinds |= {"rows_ptr": "*i64", "valid_ptr": "*i1", "scale": "fp32", "q_ptr": POINTERS[dtype]}
    kinds |= dict.fromkeys(("k_ptr", "v_ptr"), "*u8" if bits else POINTERS[dtype])
    return _source(kernel, fixed, kinds, set(names) - plain)


def prompt_source(
    config: triton.Config, width: int = 128, dtype: torch.dtype = torch.bfloat16, size: int = 128, **constants: bool
) -> ASTSource:
    """Attention of a prompt over listed blocks of ``size`` keys."""
    kernel = block_sparse.block_sparse.fn
    names = [p.name for p in kernel.params]
    padded = max(16, triton.next_power_of_2(width))
    values = {
        **dict.fromkeys(("RAGGED", "HAS_ORDER", "HOLES", "HAS_REACH", "CAUSAL", "WIDEN"), False),
        "D": width,
        "DV": width,
        "D_P2": padded,
        "DV_P2": padded,
        "G": 4,
        "SIZE": size,
        **constants,
        **config.kwargs,
    }
    fixed = {name: values[name] for name in names if name.isupper() and name != "N"}
    kinds = dict.fromkeys(("q_ptr", "k_ptr", "v_ptr", "out_ptr"), POINTERS[dtype])
    kinds |= {"lse_ptr": "*fp32", "scale": "fp32", **dict.fromkeys(("blocks_ptr", "counts_ptr", "order_ptr"), "*i32")}
    strided = {name for name in names if name.endswith(("_ptr", "_sb", "_sh", "_sn"))}
    return _source(kernel, fixed, kinds, strided)


def helper_source(name: str) -> ASTSource:
    """The small kernels around decode attention: what adds parts up, and what makes probabilities of scores."""
    kernel = getattr(kv_attention, name)
    fixed = {"_kv_merge": {"DV": 128, "DV_P2": 128}, "_kv_mass": {"G": 4, "BLOCK": kv_attention.MASS_BLOCK}}[name]
    kinds = {p.name: "*fp32" for p in kernel.params if p.name.endswith("_ptr")}
    return _source(kernel, fixed, kinds, set())


def variants() -> Iterator[Variant]:
    """Every kernel and config at the dtypes, widths and groups in use."""
    short = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
    for name in WEIGHT_ONLY:
        for config in getattr(weight_only, name).configs:
            for half in (16, 64) if "int4" in name else (64,):
                setting = f"bf16, groups of {2 * half}" if "int4" in name else "bf16"
                yield Variant(name, setting, config, weight_only_source(name, config, half))
            yield Variant(name, "fp16", config, weight_only_source(name, config, 64, torch.float16))
            if name.startswith("int8_gemm"):
                yield Variant(name, "int8 codes", config, weight_only_source(name, config, 64, torch.int8))
    for config in kv_attention.kv_split.configs:
        for bits in (0, *BITS):
            for width in (64, 128):
                rows = f"{bits} bits" if bits else "rows as they are"
                yield Variant("kv_split", f"bf16, width {width}, {rows}", config, decode_source(config, bits, width))
    for config in block_sparse.block_sparse.configs:
        for width in (64, 128):
            for dtype in (torch.bfloat16, torch.float16):
                source = prompt_source(config, width, dtype, CAUSAL=True, HAS_ORDER=True)
                yield Variant("block_sparse", f"{short[dtype]}, width {width}, sorted keys", config, source)
    for name in ("_kv_merge", "_kv_mass"):
        yield Variant(name, "fp32", triton.Config({}, num_warps=4, num_stages=1), helper_source(name))
