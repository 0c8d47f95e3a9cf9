"""Cases about the kernels of `kv_attention` as a GPU would get them, on a machine without one.

`test_triton_kv_attention` runs this file with TRITON_INTERPRET unset.
"""

import functools
import re
from typing import Any

import pytest
import torch
import triton
from torch import Tensor
from torch._library.triton import get_triton_kernels_for_op
from torch._subclasses import FakeTensorMode
from torch._subclasses.functional_tensor import dispatch_functionalize
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext
from triton.backends.compiler import GPUTarget

from accelpass.backends.kernels.triton import kv_attention as kernels
from accelpass.backends.kernels.triton import kv_attention_ops as ops
from accelpass.ir.kv.decode.attention import PackedRows
from accelpass.ir.kv.rows import BITS, row_bytes
from tests.gpu_kernels.sources import decode_source, helper_source

OP = torch.ops.accelpass.kv_decode_triton


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def packed(bits: int = 4, width: int = 64, group: int = 16, slots: int = 10) -> PackedRows:
    """For 2 sequences of 2 heads."""
    codes = meta(2, 2, slots, row_bytes(width, bits), dtype=torch.uint8)
    return PackedRows(codes, *(meta(2, 2, slots, width // group, dtype=torch.float16) for _ in range(2)), bits)


def arguments(**changed: Any) -> dict[str, Any]:
    """Meta tensors: what is refused does not depend on values."""
    return {"q": meta(2, 4, 64), "k": meta(2, 2, 10, 64), "v": meta(2, 2, 10, 64), "scale": 1.0, **changed}


def test_fakes_give_shapes_and_dtypes():
    k, v = packed(3), packed(2, 128)
    q, rows = meta(2, 4, 64, dtype=torch.bfloat16), meta(2, 2, 7, dtype=torch.int32)
    out, lse, logits, mass = OP(q, *k, *v, 1.0)
    assert out.shape == (2, 4, 128) and out.dtype == torch.bfloat16
    assert lse.shape == (2, 4) and lse.dtype == torch.float32
    assert logits.shape == mass.shape == (0,)
    out, _, logits, mass = OP(q, *k, *v, 1.0, rows, None, None, True, True, torch.float32)
    assert logits.shape == mass.shape == (2, 2, 7) and out.dtype == torch.float32
    assert OP(q, *k, *v, 1.0, None, None, None, True)[2].shape == (2, 2, 10)


@pytest.mark.parametrize(
    ("changed", "error", "says"),
    [
        ({"q": meta(2, 4, 64, dtype=torch.float64)}, TypeError, "q is torch.float64; it must be bfloat16"),
        ({"q": meta(2, 4, 1, 64)}, ValueError, "q has 4 dimensions; it must be"),
        ({"q": meta(2, 3, 64)}, ValueError, r"q is \(2, 3, 64\).*k's heads must divide q's"),
        ({"q": meta(3, 4, 64)}, ValueError, r"q is \(3, 4, 64\) and k for \(2, 2, 10\) rows"),
        ({"q": meta(2, 4, 80)}, ValueError, "k has rows of 64 channels and q of 80"),
        ({"k": packed(4, 128)}, ValueError, "k has rows of 128 channels and q of 64"),
        ({"k": meta(2, 2, 10, 64, dtype=torch.uint8)}, TypeError, r"k is torch.uint8; pass packed codes as PackedRows"),
        ({"k": meta(2, 10, 64)}, ValueError, "k has 3 dimensions; it needs 4"),
        ({"v": meta(2, 2, 11, 64)}, ValueError, r"v is for \(2, 2, 11\) rows and k for \(2, 2, 10\)"),
        ({"v": meta(2, 2, 64, 10).mT}, ValueError, "v has a row that is not contiguous"),
        ({"v": torch.ones(2, 2, 10, 64)}, ValueError, "v is on cpu and q on meta"),
        ({"k": packed()._replace(bits=5)}, ValueError, "k.bits=5 is not supported; use 2, 3, 4, 8"),
        ({"k": packed()._replace(step=meta(2, 2, 10, 4))}, TypeError, "k is torch.uint8, torch.float32, torch.float16"),
        ({"k": packed()._replace(low=meta(2, 2, 10, 2, dtype=torch.float16))}, ValueError, "k's step and low are"),
        (
            {"k": packed(4, 64, 32)._replace(codes=meta(2, 2, 10, 31, dtype=torch.uint8))},
            ValueError,
            "has 31 bytes a row",
        ),
        ({"rows": meta(2, 2, 5)}, TypeError, "rows is torch.float32; it must be torch.int32 or torch.int64"),
        ({"rows": meta(2, 4, 5, dtype=torch.int64)}, ValueError, r"rows is \(2, 4, 5\); k is for \(2, 2, 10\) rows"),
        ({"valid": meta(2, 2, 10)}, TypeError, "valid is torch.float32; it must be torch.bool"),
        ({"valid": meta(2, 2, 9, dtype=torch.bool)}, ValueError, r"valid is \(2, 2, 9\)"),
        ({"bias": meta(2, 3, 10)}, ValueError, r"bias is \(2, 3, 10\)"),
        ({"bias": torch.ones(2, 1, 10)}, ValueError, "bias is on cpu and q on meta"),
    ],
)
def test_refuses(changed, error, says):
    with pytest.raises(error, match="kv_decode: .*" + says):
        ops.kv_decode(**arguments(**changed))


def test_cpu_tensors_are_refused_by_name():
    given = {name: torch.ones(x.shape) if isinstance(x, Tensor) else x for name, x in arguments().items()}
    says = "kv_decode: q is on cpu, and Triton kernels run on CUDA.*TRITON_INTERPRET=1 before Triton is imported"
    with pytest.raises(RuntimeError, match=says):
        ops.kv_decode(**given)


def test_splits_fill_the_gpu():
    assert ops.split_count(8, 32768, 264) == 33
    assert ops.split_count(128, 131072, 264) == 2
    assert ops.split_count(132, 131072, 264) == 2
    assert ops.split_count(264, 131072, 264) == ops.split_count(1000, 131072, 264) == 1
    assert ops.split_count(8, 1024, 264) == 8  # a split is a tile of the largest config, or more
    assert ops.split_count(8, 0, 264) == ops.split_count(0, 100, 264) == 1


@pytest.mark.parametrize("entries", [1, 127, 128, 4096, 32768, 131072 + 5])
def test_splits_cover_all_entries(entries):
    splits, each = ops._splits(meta(1, 32, 128), 8, entries, None)
    assert each % kernels.SPLIT_STEP == 0
    assert (splits - 1) * each < entries <= splits * each


def test_torch_finds_the_kernels_for_its_cache_key():
    found = {
        getattr(kernel, "base_fn", kernel).__name__
        for kernel in get_triton_kernels_for_op("accelpass::kv_decode_triton")
    }
    assert found == {"_kv_split", "_kv_merge", "_kv_mass"}


@pytest.mark.parametrize("slots", [7, 5000])
def test_a_symbolic_length_is_traced_without_guards(slots):
    """One graph serves a growing cache: neither the fakes nor the choice of splits may specialise its length."""
    env = ShapeEnv()
    mode = FakeTensorMode(shape_env=env)
    dims = StatelessSymbolicContext([DimDynamic.STATIC] * 2 + [DimDynamic.DYNAMIC, DimDynamic.STATIC])
    n = mode.from_tensor(torch.empty(2, 2, slots, 64), symbolic_context=dims).shape[2]

    def decode(q: Tensor, k: Tensor, step: Tensor, low: Tensor, v: Tensor, valid: Tensor) -> Tensor:
        out, lse, logits, mass = OP(q, k, step, low, 4, v, None, None, 0, 0.125, None, valid, None, True, True)
        return out.sum() + lse.sum() + logits.sum() + mass.sum()

    with mode:
        k = torch.empty(2, 2, n, 32, dtype=torch.uint8, device="cuda")
        step, low = (torch.empty(2, 2, n, 4, dtype=torch.float16, device="cuda") for _ in range(2))
        q, v = (torch.empty(shape, dtype=torch.bfloat16, device="cuda") for shape in ((2, 8, 64), (2, 2, n, 64)))
        given = (q, k, step, low, v, torch.empty(2, 2, n, dtype=torch.bool, device="cuda"))
        graph = make_fx(dispatch_functionalize(decode))(*given)
    called = [node.target.name() for node in graph.graph.nodes if node.op == "call_function" and "triton" in str(node)]
    assert len(called) == (2 if slots == 7 else 3)  # one split needs no merge
    assert set(called) == {"triton_kernel_wrapper_functional"}
    assert not env.guards


@functools.cache
def hopper(config: triton.Config, *format: Any, **constants: Any) -> Any:
    """`_kv_split` compiled to machine code for compute capability 9.0, keys and values both in this format."""
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
    return triton.compile(decode_source(config, *format, **constants), GPUTarget("cuda", 90, 32), options)


MIDDLE = kernels.kv_split.configs[2]


@pytest.mark.parametrize("bits", [0, *BITS])
def test_compiles_for_hopper(bits):
    built = hopper(MIDDLE, bits)
    ptx = built.asm["ptx"]
    assert built.asm["cubin"]
    assert "mma.sync" in ptx or "wgmma.mma_async" in ptx
    # Rows are copied to shared memory ahead of their use, 16 bytes at a time where rows are 32 bytes or more.
    assert re.search(r"cp\.async\.cg\.shared\.global.*, 0x10", ptx)
    assert "ld.local" not in ptx
    # Shared memory is read in whole vectors too, but for steps. One load per code would take longer than the store does.
    assert len(re.findall(r"ld\.shared\.[bu](8|16)\b", ptx)) <= 32


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_a_byte_is_copied_once(bits):
    """And not once per code in it: per thread, its share of 64 rows of keys and values and of 8 steps and lows."""
    ptx = hopper(MIDDLE, bits).asm["ptx"]
    copied = sum(int(size, 16) for size in re.findall(r"cp\.async\.c[ag]\.shared\.global.*?, (0x\w+)", ptx))
    rows, threads, times = MIDDLE.kwargs["BLOCK_N"], 32 * MIDDLE.num_warps, MIDDLE.num_stages
    assert 0 < copied * threads <= times * rows * 2 * (row_bytes(128, bits) + 2 * 2 * 8)


def test_a_growing_cache_is_tuned_few_times():
    assert "bucket" in kernels.kv_split.keys
    assert not {"N", "R", "split_rows"} & set(kernels.kv_split.keys)


@pytest.mark.parametrize(
    ("bits", "width", "dtype"), [(0, 96, torch.float16), (3, 80, torch.float16), (4, 64, torch.float32)]
)
def test_every_option_compiles(bits, width, dtype):
    options = dict.fromkeys(("HAS_ROWS", "HAS_VALID", "HAS_BIAS", "WANT_SCORES", "WANT_LOGITS"), True)
    assert hopper(kernels.kv_split.configs[0], bits, width, dtype, **options).asm["cubin"]


def test_merge_and_mass_compile():
    for name in ("_kv_merge", "_kv_mass"):
        assert triton.compile(helper_source(name), GPUTarget("cuda", 90, 32)).asm["cubin"]


@pytest.mark.slow
@pytest.mark.parametrize("width", [64, 80, 96, 128, 256])
@pytest.mark.parametrize("bits", [0, *BITS])
def test_configs_fit_hopper(bits, width):
    """In bf16, all of them up to 128 channels; the first one always."""
    for config in kernels.kv_split.configs[: None if width <= 128 else 1]:
        assert hopper(config, bits, width).metadata.shared <= 227 * 1024
    assert hopper(kernels.kv_split.configs[0], bits, width, torch.float32).metadata.shared <= 227 * 1024
