"""Cases about the kernel of `block_sparse` as a GPU would get it, on a machine without one.

`test_triton_block_sparse` runs this file with TRITON_INTERPRET unset.
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
from triton.backends.compiler import GPUTarget

import accelpass.backends.kernels.triton.block_sparse_ops  # noqa: F401  # registers the op
from accelpass.backends.kernels.cuda.block_sparse import block_sparse_with_kernel
from accelpass.backends.kernels.triton import block_sparse as kernels
from accelpass.ir.attention import AttentionSpec, Band, BlockList
from accelpass.ir.attention.lowering import fused
from tests.gpu_kernels.sources import prompt_source

OP = torch.ops.accelpass.block_sparse_attention_triton


def meta(*shape: int, dtype: torch.dtype = torch.float32, device: str = "meta") -> Tensor:
    return torch.empty(shape, dtype=dtype, device=device)


def given(device: str = "meta", **changed: Any) -> dict[str, Any]:
    found = {
        "q": meta(2, 4, 100, 64, device=device),
        "k": meta(2, 2, 90, 64, device=device),
        "v": meta(2, 2, 90, 80, device=device),
        "blocks": meta(1, 2, 2, dtype=torch.int32, device=device),
        "counts": meta(1, 2, dtype=torch.int32, device=device),
    }
    return {**found, "size": 64, "reach": -1, "causal": False, "scale": 1.0, **changed}


def test_fakes_give_shapes_and_dtypes():
    half = {name: meta(*given()[name].shape, dtype=torch.bfloat16) for name in "qkv"}
    out, lse = OP(**given(**half))
    assert out.shape == (2, 4, 100, 80) and out.dtype == torch.bfloat16
    assert lse.shape == (2, 4, 100) and lse.dtype == torch.float32


def test_refuses_what_it_has_no_tile_for():
    wide = {name: meta(1, 2, 90, 257) for name in "qkv"}
    with pytest.raises(ValueError, match="q has 257 channels; use 1 to 256"):
        OP(**given(**wide))
    double = {name: given()[name].double() for name in "qkv"}
    with pytest.raises(TypeError, match=r"q is torch\.float64"):
        OP(**given(**double))
    with pytest.raises(ValueError, match=r"blocks is \(1, 2, 2\)"):
        OP(**given(size=32))


def test_cpu_tensors_are_refused_by_name():
    arguments = {name: torch.zeros_like(x, device="cpu") if isinstance(x, Tensor) else x for name, x in given().items()}
    with pytest.raises(RuntimeError, match=r"q is on cpu, and Triton kernels run on CUDA.*TRITON_INTERPRET=1"):
        OP(**arguments)


def test_torch_finds_the_kernel_for_its_cache_key():
    (found,) = get_triton_kernels_for_op("accelpass::block_sparse_attention_triton")
    assert getattr(found, "base_fn", found).__name__ == "_block_sparse"


def traced(run: Any, *operands: Tensor) -> list[str]:
    graph = make_fx(run)(*operands)
    return [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]


def test_cuda_tensors_go_to_the_kernel():
    """And there the op is one Triton call, for Inductor to compile."""
    with FakeTensorMode():
        q, k, v, blocks, counts = (x for x in given("cuda").values() if isinstance(x, Tensor))

        def attend(*tensors: Tensor) -> Tensor:
            return block_sparse_with_kernel(*tensors, 64, 9, True, 1.0)[0]

        assert "accelpass.block_sparse_attention_triton.default" in traced(attend, q, k, v, blocks, counts)
        called = traced(dispatch_functionalize(attend), q, k, v, blocks, counts)
        assert [name for name in called if "triton" in name] == ["triton_kernel_wrapper_functional"]
        wide = (x.double() for x in (q, k, v))
        assert "accelpass.block_sparse_attention.default" in traced(attend, *wide, blocks, counts)


@pytest.mark.parametrize("select", [Band(30), BlockList(64, ((0, 0), (1, 1)))])
def test_the_lowering_of_cuda_operands_is_the_kernel(select):
    spec = AttentionSpec(groups=2, scale=0.3).edited(by="a test", select=select)
    with FakeTensorMode():
        q, k, v = (given("cuda")[name] for name in "qkv")
        called = traced(lambda q, k, v: fused._block_sparse(q, k, v, [], spec)[0], q, k, v)
    assert "accelpass.block_sparse_attention_triton.default" in called
    assert "accelpass.block_sparse_attention.default" not in called


@functools.cache
def hopper(config: triton.Config, *shape: Any, **constants: bool) -> Any:
    """`_block_sparse` compiled to machine code for compute capability 9.0."""
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
    return triton.compile(prompt_source(config, *shape, **constants), GPUTarget("cuda", 90, 32), options)


FIRST, *_ = kernels.block_sparse.configs
MIDDLE = next(
    c for c in kernels.block_sparse.configs if c.kwargs == {"BLOCK_M": 128, "BLOCK_N": 64} and c.num_warps == 8
)


def test_compiles_for_hopper():
    built = hopper(MIDDLE)
    ptx = built.asm["ptx"]
    assert built.asm["cubin"]
    assert "wgmma.mma_async" in ptx
    assert re.search(r"cp\.async\.cg\.shared\.global.*, 0x10", ptx)  # keys and values are fetched ahead of their use
    assert "ld.local" not in ptx


@pytest.mark.parametrize(
    ("width", "dtype", "size"), [(72, torch.float16, 128), (96, torch.bfloat16, 64), (16, torch.float16, 24)]
)
def test_every_option_compiles(width, dtype, size):
    options = dict.fromkeys(("RAGGED", "HAS_ORDER", "HOLES", "HAS_REACH", "CAUSAL"), True)
    built = hopper(kernels.block_sparse.configs[2], width, dtype, size, **options)
    assert built.asm["cubin"] and "ld.local" not in built.asm["ptx"]


def test_gathered_keys_are_fetched_ahead():
    """With an order too, keys and values come by asynchronous copies of 16 bytes, and products use tensor cores."""
    ptx = hopper(MIDDLE, HAS_ORDER=True, CAUSAL=True).asm["ptx"]
    assert "wgmma.mma_async" in ptx and "ld.local" not in ptx
    assert re.search(r"cp\.async\.cg\.shared\.global.*, 0x10", ptx)


def test_tuning_does_not_depend_on_an_exact_length():
    assert not {"N", "M", "most", "q_blocks", "reach"} & set(kernels.block_sparse.keys)


@pytest.mark.slow
@pytest.mark.parametrize("width", [64, 72, 96, 128, 256])
def test_configs_fit_hopper(width):
    """In bf16, all of them up to 128 channels; the first one always, in float32 too."""
    for config in kernels.block_sparse.configs[: None if width <= 128 else 1]:
        assert hopper(config, width, HAS_REACH=True).metadata.shared <= 227 * 1024
    assert hopper(FIRST, width, torch.float32).metadata.shared <= 227 * 1024
