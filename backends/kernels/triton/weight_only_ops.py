"""The torch ops `accelpass::int8_linear_triton` and `accelpass::int4_linear_triton`: y = x @ dequant(W)^T + bias.

Importing this module registers them. `weight_only` has the packing. Shapes, with any leading dimensions in x:

    int8_linear_triton(x (..., K), q int8 (N, K), scale float32 (N,), bias (N,)?) -> (..., N)
    int4_linear_triton(x (..., K), q uint8 (N, K/2), scale and zero? float32 (N, K/g), bias (N,)?, g) -> (..., N)

x is bf16, fp16 or float32; sums are float32; y has x's dtype. int8_linear_triton also takes int8, the codes of rounded
activations: products are summed as int32 (in tiles; a GEMV of few rows sums floats), and y is float32. bias may have any floating dtype. There is no backward.
The ops are for CUDA tensors (CPU tensors only under TRITON_INTERPRET=1): torch.compile traces into the Triton calls
whatever the device is, so a pass emits them only where x's fake value is on CUDA.
"""

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor
from torch.library import triton_op, wrap_triton

from accelpass.backends.kernels.triton import require_triton
from accelpass.backends.kernels.triton.weight_only import (
    INTERPRETED,
    int4_gemm_middle,
    int4_gemm_narrow,
    int4_gemm_wide,
    int4_gemv,
    int8_gemm_middle,
    int8_gemm_narrow,
    int8_gemm_wide,
    int8_gemv,
    k_step,
)

triton = require_triton()

Path = Literal["auto", "gemv", "gemm"]
Rows = int | torch.SymInt

GROUPS = (32, 64, 128)
GEMV_ROWS = 4  # from here to 16 rows the tensor cores' tile of 16 is cheaper than a multiply-add per weight and row
GEMV_ROWS_LIMIT = 16  # what path="gemv" takes: the kernel unrolls over rows
_X_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_PROGRAMS = 264  # two per multiprocessor of a Hopper chip; fewer leave memory bandwidth unused


def check_linear(
    x: Tensor, q: Tensor, scale: Tensor, zero: Tensor | None, bias: Tensor | None, group: int | None
) -> None:
    """Check what both ops need; group=None means int8.

    Raises:
        TypeError: a dtype is not what the op stores or computes.
        ValueError: a shape, group size, device or memory layout does not fit.
    """
    op = "int8_linear_triton" if group is None else "int4_linear_triton"
    stored = torch.int8 if group is None else torch.uint8
    allowed = (*_X_DTYPES, torch.int8) if group is None else _X_DTYPES
    if x.dtype not in allowed:
        *some, last = (str(d).removeprefix("torch.") for d in allowed)
        raise TypeError(f"{op}: x is {x.dtype}; it must be {', '.join(some)} or {last}")
    if q.dtype != stored:
        raise TypeError(f"{op}: q is {q.dtype}; it must be {stored}")
    for name, tensor in (("scale", scale), ("zero", zero)):
        if tensor is not None and tensor.dtype != torch.float32:
            raise TypeError(f"{op}: {name} is {tensor.dtype}; it must be torch.float32")
    if bias is not None and not bias.dtype.is_floating_point:
        raise TypeError(f"{op}: bias is {bias.dtype}; it must be a floating dtype")
    if x.dim() == 0 or q.dim() != 2:
        raise ValueError(f"{op}: x has {x.dim()} and q {q.dim()} dimensions; x needs at least 1 and q exactly 2")

    outputs, inputs = q.shape[0], x.shape[-1]
    scale_shape: tuple[int, ...] = (outputs,)
    if group is None:
        per_row = inputs
    else:
        if group not in GROUPS:
            raise ValueError(f"{op}: group_size={group} is not supported; use 32, 64 or 128")
        if inputs % group:
            raise ValueError(f"{op}: x has {inputs} columns, not a multiple of group_size={group}")
        per_row, scale_shape = inputs // 2, (outputs, inputs // group)
    expected = (("q", q, (outputs, per_row)), ("scale", scale, scale_shape), ("zero", zero, scale_shape))
    for name, tensor, shape in (*expected, ("bias", bias, (outputs,))):
        if tensor is None:
            continue
        if tuple(tensor.shape) != shape:
            raise ValueError(f"{op}: {name} is {tuple(tensor.shape)}; x with {inputs} columns needs {shape}")
        if tensor.device != x.device:
            raise ValueError(f"{op}: {name} is on {tensor.device} and x on {x.device}; move them to one device")
        if not tensor.is_contiguous():
            raise ValueError(f"{op}: {name} is not contiguous; call .contiguous() once, when it is packed")


def _check_device(op: str, x: Tensor) -> None:
    if x.device.type == "cuda" and INTERPRETED:
        raise RuntimeError(f"{op}: TRITON_INTERPRET=1 was set when Triton was imported; unset it to run on a GPU")
    if x.device.type != "cuda" and not INTERPRETED:
        raise RuntimeError(
            f"{op}: x is on {x.device}, and Triton kernels run on CUDA. Use the ATen form of this op there, or, to "
            "test the kernel, set TRITON_INTERPRET=1 before Triton is imported"
        )


def _row_count(rows: Rows) -> int:
    """How many rows to choose a kernel for. Reads a symbolic size's hint, which installs no guard: any kernel is right
    for any number of rows, and one graph must serve them all."""
    if isinstance(rows, int):
        return rows
    return int(rows.node.hint) if rows.node.has_hint() else 1 << 20


def _use_gemv(path: Path, rows: Rows) -> bool:
    # The GEMV kernel unrolls over rows, so it needs a plain number. torch.compile makes one of a single row.
    if path == "gemv" and not (isinstance(rows, int) and rows <= GEMV_ROWS_LIMIT):
        raise ValueError(f"path='gemv' takes up to {GEMV_ROWS_LIMIT} rows, a plain number of them; x has {rows}")
    return path == "gemv" or (path == "auto" and isinstance(rows, int) and rows <= GEMV_ROWS)


# torch finds the kernels of an op by their names in the source of what the op calls, and puts them in its cache key.


def _int8_kernel(gemv: bool, rows: int) -> Any:
    if gemv:
        return int8_gemv
    if rows <= 16:
        return int8_gemm_narrow
    return int8_gemm_middle if rows <= 64 else int8_gemm_wide


def _int4_kernel(gemv: bool, rows: int) -> Any:
    if gemv:
        return int4_gemv
    if rows <= 16:
        return int4_gemm_narrow
    return int4_gemm_middle if rows <= 64 else int4_gemm_wide


def _k_split(kernel: Any, rows: int, outputs: int, inputs: int, splits: int | None) -> tuple[int, int]:
    """How many splits of K, and the columns in each. splits=None: as many as fill the GPU, and no more."""
    config = kernel.configs[0].kwargs
    step = k_step(kernel)
    if splits is None:
        tiles = -(-outputs // config["BLOCK_N"]) * -(-rows // config.get("BLOCK_M", rows))
        # Under a thousand columns a split saves less than the second pass over its sums costs.
        splits = max(1, min(_PROGRAMS // tiles, inputs // 1024, 8))
    columns = -(-inputs // (splits * step)) * step
    return -(-inputs // columns), columns


def _grid(rows: Rows, outputs: int, splits: int) -> Callable[[dict[str, Any]], tuple[Any, ...]]:
    def grid(meta: dict[str, Any]) -> tuple[Any, ...]:
        tiles = triton.cdiv(outputs, meta["BLOCK_N"])
        # Tiles of rows come first: programs that run together then share a tile of the weight.
        return (triton.cdiv(rows, meta["BLOCK_M"]), tiles, splits) if "BLOCK_M" in meta else (tiles, splits)

    return grid


def _dtype_of(x: Tensor) -> torch.dtype:
    """Of the product."""
    return x.dtype if x.is_floating_point() else torch.float32


def _slabs(x: Tensor, rows: Rows, outputs: int, splits: int) -> Tensor:
    """What a kernel writes: (rows, outputs) in the product's dtype, or that shape in float32 once per split."""
    if splits > 1:
        return x.new_empty((splits, rows, outputs), dtype=torch.float32)
    return x.new_empty((rows, outputs), dtype=_dtype_of(x))


def _finished(out: Tensor, x: Tensor, bias: Tensor | None) -> Tensor:
    if out.dim() == 3:
        total = out.sum(0)
        out = (total if bias is None else total + bias.float()).to(_dtype_of(x))
    return out.reshape(*x.shape[:-1], out.shape[-1])


def int8_linear(
    x: Tensor, q: Tensor, scale: Tensor, bias: Tensor | None = None, path: Path = "auto", splits: int | None = None
) -> Tensor:
    """The body of `int8_linear_triton`. `path` and `splits` force what it would choose.

    Raises:
        TypeError, ValueError: as `check_linear`; also path="gemv" with more rows than it takes.
        RuntimeError: Triton cannot run on x's device.
    """
    check_linear(x, q, scale, None, bias, None)
    _check_device("int8_linear_triton", x)
    outputs, inputs = q.shape
    flat = x.reshape(-1, inputs).contiguous()
    rows, count = flat.shape[0], _row_count(flat.shape[0])
    if isinstance(rows, int) and not rows:  # of a number known at run time alone, none launch no program
        return x.new_zeros((*x.shape[:-1], outputs), dtype=_dtype_of(x))
    gemv = _use_gemv(path, rows)
    kernel = _int8_kernel(gemv, count)
    parts, columns = _k_split(kernel, count, outputs, inputs, splits)
    out = _slabs(x, rows, outputs, parts)
    codes = x.dtype == torch.int8
    wide = (
        {"ROWS": rows, "ROWS_P2": triton.next_power_of_2(rows)}
        if gemv
        else {"M": rows, "WIDEN": INTERPRETED and not codes}
    )
    wide |= {} if gemv else {"INTEGER": codes}
    wrap_triton(kernel)[_grid(rows, outputs, parts)](
        x_ptr=flat,
        q_ptr=q,
        scale_ptr=scale,
        bias_ptr=scale if bias is None else bias,  # a kernel that is told HAS_BIAS=False does not read it
        out_ptr=out,
        N=outputs,
        K=inputs,
        k_split=columns,
        HAS_BIAS=bias is not None and parts == 1,
        **wide,
    )
    return _finished(out, x, bias)


def int4_linear(
    x: Tensor,
    q: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    bias: Tensor | None,
    group_size: int,
    path: Path = "auto",
    splits: int | None = None,
) -> Tensor:
    """The body of `int4_linear_triton`; `path`, `splits` and errors as in `int8_linear`."""
    check_linear(x, q, scale, zero, bias, group_size)
    _check_device("int4_linear_triton", x)
    outputs, inputs = q.shape[0], x.shape[-1]
    flat = x.reshape(-1, inputs).contiguous()
    rows, count = flat.shape[0], _row_count(flat.shape[0])
    if isinstance(rows, int) and not rows:  # of a number known at run time alone, none launch no program
        return x.new_zeros((*x.shape[:-1], outputs))
    gemv = _use_gemv(path, rows)
    kernel = _int4_kernel(gemv, count)
    parts, columns = _k_split(kernel, count, outputs, inputs, splits)
    out = _slabs(x, rows, outputs, parts)
    wide = {"ROWS": rows, "ROWS_P2": triton.next_power_of_2(rows)} if gemv else {"M": rows, "WIDEN": INTERPRETED}
    wrap_triton(kernel)[_grid(rows, outputs, parts)](
        x_ptr=flat,
        q_ptr=q,
        scale_ptr=scale,
        zero_ptr=scale if zero is None else zero,
        bias_ptr=scale if bias is None else bias,
        out_ptr=out,
        N=outputs,
        K=inputs,
        row_bytes=inputs // 2,
        groups=inputs // group_size,
        k_split=columns,
        HAS_ZERO=zero is not None,
        HAS_BIAS=bias is not None and parts == 1,
        HALF=group_size // 2,
        **wide,
    )
    return _finished(out, x, bias)


@triton_op("accelpass::int8_linear_triton", mutates_args=())
def int8_linear_triton(x: Tensor, q: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    return int8_linear(x, q, scale, bias)


@triton_op("accelpass::int4_linear_triton", mutates_args=())
def int4_linear_triton(
    x: Tensor, q: Tensor, scale: Tensor, zero: Tensor | None, bias: Tensor | None, group_size: int
) -> Tensor:
    return int4_linear(x, q, scale, zero, bias, group_size)


# triton_op would run the body as the fake; these only compute shapes, so that a fake run makes no Triton call.


@int8_linear_triton.register_fake
def _(x: Tensor, q: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    check_linear(x, q, scale, None, bias, None)
    return x.new_empty((*x.shape[:-1], q.shape[0]), dtype=_dtype_of(x))


@int4_linear_triton.register_fake
def _(x: Tensor, q: Tensor, scale: Tensor, zero: Tensor | None, bias: Tensor | None, group_size: int) -> Tensor:
    check_linear(x, q, scale, zero, bias, group_size)
    return x.new_empty((*x.shape[:-1], q.shape[0]))
