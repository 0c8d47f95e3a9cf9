"""Cases about the kernels of `weight_only` as a GPU would get them, on a machine without one.

`test_triton_weight_only` runs this file with TRITON_INTERPRET unset.
"""

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

from accelpass.backends.kernels.triton import weight_only as kernels
from accelpass.backends.kernels.triton import weight_only_ops as ops
from tests.gpu_kernels.sources import WEIGHT_ONLY, weight_only_source

OP8 = torch.ops.accelpass.int8_linear_triton
OP4 = torch.ops.accelpass.int4_linear_triton


def arguments8(**changed: Any) -> dict[str, Any]:
    """Meta tensors: what is refused does not depend on values."""
    e = torch.empty
    given = {"x": e(2, 96, device="meta"), "q": e(8, 96, dtype=torch.int8, device="meta"), "scale": e(8, device="meta")}
    return {**given, "bias": None, **changed}


def arguments4(**changed: Any) -> dict[str, Any]:
    e = torch.empty
    given = {"x": e(2, 96, device="meta"), "q": e(8, 48, dtype=torch.uint8, device="meta")}
    given |= {"scale": e(8, 3, device="meta"), "zero": e(8, 3, device="meta"), "bias": e(8, device="meta")}
    return {**given, "group_size": 32, **changed}


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def test_fakes_give_shape_and_dtype():
    assert OP8(**arguments8(x=meta(2, 5, 96, dtype=torch.bfloat16))).shape == (2, 5, 8)
    assert OP4(**arguments4(x=meta(96, dtype=torch.float16))).shape == (8,)
    assert OP4(**arguments4(x=meta(96, dtype=torch.float16))).dtype == torch.float16


@pytest.mark.parametrize(
    ("changed", "error", "says"),
    [
        ({"x": meta(2, 96, dtype=torch.float64)}, TypeError, "x is torch.float64; it must be bfloat16"),
        ({"q": meta(8, 96, dtype=torch.uint8)}, TypeError, "q is torch.uint8; it must be torch.int8"),
        ({"scale": meta(8, dtype=torch.bfloat16)}, TypeError, "scale is torch.bfloat16; it must be torch.float32"),
        ({"bias": meta(8, dtype=torch.int32)}, TypeError, "bias is torch.int32"),
        ({"x": meta(2, 95)}, ValueError, r"q is \(8, 96\); x with 95 columns needs \(8, 95\)"),
        ({"x": meta()}, ValueError, "x has 0"),
        ({"scale": meta(7)}, ValueError, r"scale is \(7,\)"),
        ({"bias": meta(1)}, ValueError, r"bias is \(1,\)"),
        ({"q": meta(96, 8, dtype=torch.int8).T}, ValueError, "q is not contiguous"),
        ({"scale": torch.ones(8)}, ValueError, "scale is on cpu and x on meta"),
    ],
)
def test_int8_refuses(changed, error, says):
    with pytest.raises(error, match="int8_linear_triton: .*" + says):
        ops.int8_linear(**arguments8(**changed))


@pytest.mark.parametrize(
    ("changed", "error", "says"),
    [
        ({"x": meta(2, 100)}, ValueError, "x has 100 columns, not a multiple of group_size=32"),
        ({"group_size": 48}, ValueError, "group_size=48 is not supported; use 32, 64 or 128"),
        ({"q": meta(8, 48, dtype=torch.int8)}, TypeError, "q is torch.int8; it must be torch.uint8"),
        ({"zero": meta(8, 3, dtype=torch.uint8)}, TypeError, "zero is torch.uint8"),
        ({"zero": meta(8)}, ValueError, r"zero is \(8,\)"),
        ({"scale": meta(8, 2)}, ValueError, r"scale is \(8, 2\).*needs \(8, 3\)"),
        ({"q": meta(8, 96, dtype=torch.uint8)}, ValueError, r"q is \(8, 96\).*needs \(8, 48\)"),
    ],
)
def test_int4_refuses(changed, error, says):
    with pytest.raises(error, match="int4_linear_triton: .*" + says):
        ops.int4_linear(**arguments4(**changed))


def test_cpu_tensors_are_refused_by_name():
    x, q8, q4 = torch.ones(2, 32), torch.ones(4, 32, dtype=torch.int8), torch.ones(4, 16, dtype=torch.uint8)
    says = "x is on cpu, and Triton kernels run on CUDA.*TRITON_INTERPRET=1 before Triton is imported"
    with pytest.raises(RuntimeError, match="int8_linear_triton: " + says):
        OP8(x, q8, torch.ones(4))
    with pytest.raises(RuntimeError, match="int4_linear_triton: " + says):
        OP4(x, q4, torch.ones(4, 1), None, None, 32)


def test_forced_gemv_refuses_many_rows():
    with pytest.raises(ValueError, match=r"up to 16 rows.*x has 17"):
        ops._use_gemv("gemv", 17)


def test_k_is_split_only_where_programs_are_few():
    assert ops._k_split(kernels.int8_gemv, 1, 4096, 4096, None) == (1, 4096)
    assert ops._k_split(kernels.int8_gemm_narrow, 16, 1024, 4096, None) == (4, 1024)  # 32 tiles leave SMs idle
    assert ops._k_split(kernels.int8_gemm_narrow, 16, 128256, 4096, None)[0] == 1
    assert ops._k_split(kernels.int4_gemm_wide, 4096, 4096, 4096, None)[0] == 1
    for kernel in (kernels.int8_gemm_narrow, kernels.int4_gemv):
        parts, columns = ops._k_split(kernel, 3, 256, 11008, None)
        assert columns % kernels.k_step(kernel) == 0
        assert (parts - 1) * columns < 11008 <= parts * columns


def test_torch_finds_the_kernels_for_its_cache_key():
    for op, prefix in (("int8_linear_triton", "_int8_"), ("int4_linear_triton", "_int4_")):
        found = {kernel.base_fn.__name__ for kernel in get_triton_kernels_for_op(f"accelpass::{op}")}
        assert found == {prefix + "gemv", prefix + "gemm"}


def symbolic(env: ShapeEnv, mode: FakeTensorMode, rows: int, inputs: int) -> Tensor:
    """A CUDA activation (1, rows, inputs) whose middle dimension is symbolic."""
    dims = StatelessSymbolicContext([DimDynamic.STATIC, DimDynamic.DYNAMIC, DimDynamic.STATIC])
    shape = mode.from_tensor(torch.empty(1, rows, inputs), symbolic_context=dims).shape
    with mode:
        return torch.empty(shape, dtype=torch.bfloat16, device="cuda")


@pytest.mark.parametrize("rows", [7, 500])
def test_a_symbolic_row_count_is_traced_without_guards(rows):
    """One graph serves every row count: neither the fakes nor the choice of a kernel may specialise it."""
    env = ShapeEnv()
    mode = FakeTensorMode(shape_env=env)
    x = symbolic(env, mode, rows, 256)

    def both(x: Tensor, q8: Tensor, s8: Tensor, q4: Tensor, s4: Tensor) -> Tensor:
        return OP8(x, q8, s8, s8) + OP4(x, q4, s4, s4, None, 64)

    with mode:
        weights = [torch.empty(512, 256, dtype=torch.int8, device="cuda"), torch.empty(512, device="cuda")]
        weights += [torch.empty(512, 128, dtype=torch.uint8, device="cuda"), torch.empty(512, 4, device="cuda")]
        y = both(x, *weights)
        assert str(y.shape[1]) == str(x.shape[1])
        graph = make_fx(dispatch_functionalize(both))(x, *weights)
    called = [node.target.name() for node in graph.graph.nodes if node.op == "call_function" and "triton" in str(node)]
    assert called == ["triton_kernel_wrapper_functional"] * 2
    assert not env.guards


def test_one_row_takes_gemv_when_traced():
    with FakeTensorMode():
        x, q, scale = (torch.empty(s, device="cuda") for s in ((1, 1, 256), (512, 256), (512,)))
        graph = make_fx(dispatch_functionalize(lambda *a: OP8(*a, None)))(x, q.to(torch.int8), scale)
    assert re.search(r"'ROWS': 1\b", graph.code)


def hopper(name: str, config: triton.Config, half: int = 64) -> Any:
    """The kernel compiled to machine code for compute capability 9.0, with sizes divisible by 16."""
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
    return triton.compile(weight_only_source(name, config, half), GPUTarget("cuda", 90, 32), options)


@pytest.mark.parametrize("name", ["int4_gemv", "int8_gemm_narrow"])
def test_compiles_for_hopper(name):
    tuned = getattr(kernels, name)
    built = hopper(name, tuned.configs[0])
    ptx = built.asm["ptx"]
    assert built.asm["cubin"]
    if "gemv" in name:  # a thread reads 16 bytes of the weight at once
        assert re.search(r"ld\.global\.v4\.b32", ptx)
    else:  # 16-byte copies to shared memory, and the matrix unit
        assert re.search(r"cp\.async\.cg\.shared\.global.*, 0x10", ptx)
        assert "wgmma.mma_async" in ptx or "mma.sync" in ptx


@pytest.mark.slow
@pytest.mark.parametrize("name", WEIGHT_ONLY)
def test_every_config_fits_hopper(name):
    tuned = getattr(kernels, name)
    for config in tuned.configs:
        for half in (16, 64) if "int4" in name else (64,):
            built = hopper(name, config, half)
            assert built.metadata.shared <= 227 * 1024
