"""Cases that run the kernels of `weight_only` in Triton's interpreter. `test_triton_weight_only` runs this file.

The tolerance. A sum of K products in float32 is off by at most K * u * (sum of their magnitudes), u = 2**-24, whatever
the order; applying a scale, a zero point and a bias adds a handful of roundings of the same kind. Then y is rounded
once to x's dtype: half an eps of |y| where the rounding is to nearest, a whole eps where the interpreter truncates to
bf16. W itself is never rounded, so no term grows with the eps of x's dtype and K together.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from accelpass.backends.kernels.triton import weight_only_ops as ops
from accelpass.backends.kernels.triton.weight_only import INTERPRETED
from tests.sweep import examples

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
quick = settings(max_examples=examples(6), deadline=None, derandomize=True, database=None)
seeds = st.integers(0, 2**31)
dtypes = st.sampled_from(DTYPES)
splits = st.sampled_from((None, 2, 3))


def case8(seed: int, rows: int, outputs: int, inputs: int, dtype: torch.dtype, bias: bool) -> list[Tensor | None]:
    """x, q, scale, bias."""
    r = torch.Generator().manual_seed(seed)
    return [
        torch.randn(rows, inputs, generator=r).to(dtype),
        torch.randint(-128, 128, (outputs, inputs), generator=r, dtype=torch.int8),
        torch.rand(outputs, generator=r) * 0.01,
        torch.randn(outputs, generator=r).to(dtype) if bias else None,
    ]


def case4(
    seed: int, rows: int, outputs: int, groups: int, group: int, dtype: torch.dtype, zero: bool, bias: bool
) -> list[Tensor | None]:
    """x, q, scale, zero, bias."""
    r = torch.Generator().manual_seed(seed)
    return [
        torch.randn(rows, groups * group, generator=r).to(dtype),
        torch.randint(0, 256, (outputs, groups * group // 2), generator=r, dtype=torch.uint8),
        torch.rand(outputs, groups, generator=r) * 0.1,
        torch.rand(outputs, groups, generator=r) * 15 if zero else None,
        torch.randn(outputs, generator=r) if bias else None,
    ]


def integers4(q: Tensor, zero: Tensor | None, group: int) -> tuple[Tensor, Tensor]:
    """Nibbles in column order, and a zero point for each, as (N, groups, group) float64."""
    stored = q.view(q.shape[0], -1, group // 2)
    nibbles = torch.cat([stored & 15, stored >> 4], 2).double()
    return nibbles, torch.full_like(nibbles, 8.0) if zero is None else zero.double()[:, :, None].expand_as(nibbles)


def weight4(q: Tensor, scale: Tensor, zero: Tensor | None, group: int) -> Tensor:
    nibbles, zeros = integers4(q, zero, group)
    return ((nibbles - zeros) * scale.double()[:, :, None]).flatten(1)


def close(y: Tensor, x: Tensor, weight: Tensor, magnitude: Tensor, bias: Tensor | None) -> None:
    """Hold y to x @ weight^T + bias in float64. magnitude: of the terms that the kernel really sums, per weight."""
    offset = torch.zeros(weight.shape[0]).double() if bias is None else bias.double()
    expected = x.double() @ weight.T + offset
    terms = x.double().abs() @ magnitude.T + offset.abs()
    info = torch.finfo(y.dtype)
    bound = info.eps * expected.abs() + (x.shape[-1] + 8) * 2**-24 * terms + info.smallest_normal
    assert y.dtype == x.dtype
    assert y.shape == expected.shape
    over = (y.double() - expected).abs() / bound
    assert over.max() <= 1, f"{over.max():.3g} times the tolerance at {divmod(int(over.argmax()), over.shape[-1])}"


def check8(arguments: list[Tensor | None], path: str, parts: int | None) -> None:
    x, q, scale, bias = arguments
    weight = q.double() * scale.double()[:, None]
    close(ops.int8_linear(x, q, scale, bias, path, parts), x, weight, weight.abs(), bias)


@quick
@given(seeds, st.integers(1, 40), st.integers(1, 40), st.integers(1, 300), st.booleans(), splits)
def test_codes_times_codes_are_exact_integers(
    seed: int, rows: int, outputs: int, inputs: int, bias: bool, parts: int | None
) -> None:
    """W8A8: what is rounded is the scale's product with an integer, and the bias added to it."""
    _, q, scale, added = case8(seed, rows, outputs, inputs, torch.float32, bias)
    x = torch.randint(-128, 128, (rows, inputs), generator=torch.Generator().manual_seed(seed + 1), dtype=torch.int8)
    assert q is not None and scale is not None
    y = ops.int8_linear(x, q, scale, added, "gemm", parts)
    want = (x.long() @ q.long().T).double() * scale.double() + (0.0 if added is None else added.double())
    assert y.dtype == torch.float32
    torch.testing.assert_close(y.double(), want, rtol=4e-7, atol=1e-5)
    if rows <= 4:
        torch.testing.assert_close(
            ops.int8_linear(x, q, scale, added, "gemv", parts).double(), want, rtol=1e-5, atol=1e-3
        )


def check4(arguments: list[Tensor | None], group: int, path: str, parts: int | None) -> None:
    x, q, scale, zero, bias = arguments
    nibbles, zeros = integers4(q, zero, group)
    magnitude = ((nibbles + zeros) * scale.double()[:, :, None]).flatten(1)
    y = ops.int4_linear(x, q, scale, zero, bias, group, path, parts)
    close(y, x, weight4(q, scale, zero, group), magnitude, bias)


def test_the_interpreter_is_in_effect():
    assert INTERPRETED, "run test_triton_weight_only, which sets TRITON_INTERPRET=1"


@quick
@given(seeds, st.integers(1, 4), st.integers(1, 12), st.integers(1, 200), dtypes, st.booleans(), splits)
def test_int8_gemv(seed, rows, outputs, inputs, dtype, bias, parts):
    check8(case8(seed, rows, outputs, inputs, dtype, bias), "gemv", parts)


@quick
@given(seeds, st.integers(1, 33), st.integers(1, 33), st.integers(1, 200), dtypes, st.booleans(), splits)
def test_int8_gemm(seed, rows, outputs, inputs, dtype, bias, parts):
    check8(case8(seed, rows, outputs, inputs, dtype, bias), "gemm", parts)


int4_options = (st.integers(1, 7), st.sampled_from(ops.GROUPS), dtypes, st.booleans(), st.booleans(), splits)


@quick
@given(seeds, st.integers(1, 3), st.integers(1, 12), *int4_options)
def test_int4_gemv(seed, rows, outputs, thirty_twos, group, dtype, zero, bias, parts):
    groups = max(1, thirty_twos * 32 // group)
    check4(case4(seed, rows, outputs, groups, group, dtype, zero, bias), group, "gemv", parts)


@quick
@given(seeds, st.integers(1, 33), st.integers(1, 33), *int4_options)
def test_int4_gemm(seed, rows, outputs, thirty_twos, group, dtype, zero, bias, parts):
    groups = max(1, thirty_twos * 32 // group)
    check4(case4(seed, rows, outputs, groups, group, dtype, zero, bias), group, "gemm", parts)


@pytest.mark.parametrize("path", ["gemv", "gemm"])
@pytest.mark.parametrize("zero", [False, True])
@pytest.mark.parametrize("group", ops.GROUPS)
def test_every_group_size(group, zero, path):
    check4(case4(7, 2, 9, 3, group, torch.bfloat16, zero, True), group, path, None)


def test_sixteen_rows_through_gemv():
    check8(case8(3, 16, 5, 130, torch.bfloat16, True), "gemv", None)
    check4(case4(3, 16, 5, 3, 32, torch.bfloat16, True, True), 32, "gemv", None)


@pytest.mark.parametrize("path", ["gemv", "gemm"])
def test_small_integers_are_exact(path):
    """Every product and sum is an integer below 2**24 times a power of two: no tolerance at all."""
    r = torch.Generator().manual_seed(0)
    x = torch.randint(-8, 9, (3, 160), generator=r).float()
    q8 = torch.randint(-128, 128, (11, 160), generator=r, dtype=torch.int8)
    half, quarter = torch.full((11,), 0.5), torch.full((11, 5), 0.25)
    assert torch.equal(ops.int8_linear(x, q8, half, None, path), x @ (q8.float() * 0.5).T)
    q4 = torch.randint(0, 256, (11, 80), generator=r, dtype=torch.uint8)
    zero = torch.randint(0, 16, (11, 5), generator=r).float()
    for z in (None, zero):
        expected = x @ weight4(q4, quarter, z, 32).float().T
        assert torch.equal(ops.int4_linear(x, q4, quarter, z, None, 32, path), expected)


@pytest.mark.parametrize("group", ops.GROUPS)
def test_low_nibble_is_the_first_half_of_a_group(group):
    """Written with loops, unlike the reference: column c of a group is byte c, or the high nibble of c - half."""
    _, q, scale, _, _ = case4(5, 1, 2, 2, group, torch.float32, False, False)
    weight = torch.empty(2, 2 * group)
    for row in range(2):
        for column in range(2 * group):
            byte = int(q[row, column // group * (group // 2) + column % (group // 2)])
            nibble = byte & 15 if column % group < group // 2 else byte >> 4
            weight[row, column] = (nibble - 8) * scale[row, column // group]
    got = ops.int4_linear(torch.eye(2 * group), q, scale, None, None, group)
    torch.testing.assert_close(got, weight.T, rtol=2**-22, atol=0)


def test_rows_choose_the_kernel():
    for rows, path in ((1, "gemv"), (ops.GEMV_ROWS, "gemv"), (ops.GEMV_ROWS + 1, "gemm")):
        arguments = case8(1, rows, 10, 70, torch.float32, True)
        op = torch.ops.accelpass.int8_linear_triton
        assert torch.equal(op(*arguments), ops.int8_linear(*arguments, path))
        x, q, scale, zero, bias = case4(1, rows, 10, 3, 32, torch.float32, True, True)
        op = torch.ops.accelpass.int4_linear_triton
        assert torch.equal(op(x, q, scale, zero, bias, 32), ops.int4_linear(x, q, scale, zero, bias, 32, path))


@pytest.mark.parametrize("lead", [(), (1,), (2, 3), (2, 1, 3), (0,), (2, 0)])
def test_leading_dimensions(lead):
    x = torch.randn(*lead, 64)
    _, q, scale, bias = case8(2, 1, 6, 64, torch.float32, True)
    y = torch.ops.accelpass.int8_linear_triton(x, q, scale, bias)
    torch.testing.assert_close(y, torch.nn.functional.linear(x, q * scale[:, None], bias))
    _, q, scale, zero, bias = case4(2, 1, 6, 2, 32, torch.float32, True, True)
    y = torch.ops.accelpass.int4_linear_triton(x, q, scale, zero, bias, 32)
    expected = torch.nn.functional.linear(x, weight4(q, scale, zero, 32).float(), bias)
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("view", ["transposed", "strided", "expanded"])
def test_x_that_is_not_contiguous(view):
    x = {
        "transposed": torch.randn(96, 6).T,
        "strided": torch.randn(6, 192)[:, ::2],
        "expanded": torch.randn(1, 96).expand(6, 96),
    }[view]
    _, q, scale, _ = case8(4, 1, 7, 96, torch.float32, False)
    op = torch.ops.accelpass.int8_linear_triton
    assert torch.equal(op(x, q, scale), op(x.contiguous(), q, scale))
    _, q, scale, _, _ = case4(4, 1, 7, 3, 32, torch.float32, False, False)
    op = torch.ops.accelpass.int4_linear_triton
    assert torch.equal(op(x, q, scale, None, None, 32), op(x.contiguous(), q, scale, None, None, 32))


def test_fp16_weights_beyond_its_range():
    """W = 127000 overflows fp16; its product with a small x does not, and W is never made in fp16."""
    x = torch.full((1, 64), 2.0**-12, dtype=torch.float16)
    q = torch.full((3, 64), 127, dtype=torch.int8)
    for path in ("gemv", "gemm"):
        y = ops.int8_linear(x, q, torch.full((3,), 1000.0), None, path)
        assert torch.equal(y, torch.full((1, 3), 127000 * 64 / 4096).half())


def test_opcheck():
    parts = ("test_schema", "test_faketensor")  # the others trace Triton calls, which an interpreted kernel is not
    torch.library.opcheck(
        torch.ops.accelpass.int8_linear_triton, tuple(case8(1, 2, 5, 33, DTYPES[1], True)), test_utils=parts
    )
    arguments = (*case4(1, 2, 5, 2, 32, DTYPES[1], True, True), 32)
    torch.library.opcheck(torch.ops.accelpass.int4_linear_triton, arguments, test_utils=parts)
