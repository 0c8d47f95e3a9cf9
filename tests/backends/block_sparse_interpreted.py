"""Cases that run the kernel of `block_sparse` in Triton's interpreter. `test_triton_block_sparse` runs this file.

The tolerance, per row, against the reference in float64. A logit, a sum of D products in float32, is off by at most
`delta`. That multiplies each probability by at most exp(2 * delta), and moves the log-sum-exp by delta. The output adds
the rounding of probabilities to the values' dtype: a whole eps, as the interpreter truncates. `noise` stands for the
float32 roundings of exp2, log2 and the running sum, of which there are a few per key.
"""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from accelpass.backends.kernels.triton.block_sparse import INTERPRETED
from accelpass.backends.kernels.triton.block_sparse_ops import block_sparse_attention_triton
from accelpass.ir.attention import AttentionSpec, BlockList, Blocks, Step, attend
from accelpass.ir.attention.lowering.block_sparse import band_blocks, listed_blocks
from accelpass.ir.attention.spec.block_select import listed_mask
from tests.backends.tolerance import within
from tests.sweep import examples

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
WIDTHS = (16, 24, 64, 72, 80, 96, 128, 256)
quick = settings(max_examples=examples(3), deadline=None, derandomize=True, database=None)
U = 2.0**-24


def operands(seed, dtype=torch.float32, batch=1, kv_heads=1, ratio=2, rows=40, columns=40, width=64, out_width=64):
    r = torch.Generator().manual_seed(seed)
    shapes = ((batch, kv_heads * ratio, rows, width), (batch, kv_heads, columns, width))
    q, k = (torch.randn(shape, generator=r).to(dtype) for shape in shapes)
    return q, k, (torch.randn(batch, kv_heads, columns, out_width, generator=r) + 0.5).to(dtype)


def random_pairs(r: torch.Generator, q_blocks: int, k_blocks: int, density: float) -> tuple[tuple[int, int], ...]:
    return tuple((i, j) for i, j in (torch.rand(q_blocks, k_blocks, generator=r) < density).nonzero().tolist())


def mask_of(select: BlockList, rows: int, columns: int, reach: int, causal: bool) -> Tensor:
    """(heads or 1, rows, columns), entry by entry."""
    heads = select.blocks if select.per_head else (select.blocks,)
    seen = torch.zeros(len(heads), rows, columns, dtype=torch.bool)
    size = select.size
    for head, pairs in enumerate(heads):
        for i, j in pairs:
            seen[head, i * size : (i + 1) * size, j * size : (j + 1) * size] = True
    at = torch.arange(rows)[:, None] - torch.arange(columns)
    if reach >= 0:
        seen &= at.abs() <= reach
    return seen & (at >= 0) if causal else seen


def check(q: Tensor, k: Tensor, v: Tensor, select: BlockList, reach: int = -1, causal: bool = False) -> None:
    """Hold the output and the log-sum-exp to the reference."""
    rows, columns = q.shape[2], k.shape[2]
    tables = listed_blocks(select, rows, columns, "cpu")
    hold(q, k, v, Blocks(*tables, select.size), mask_of(select, rows, columns, reach, causal), reach, causal)


def hold(q: Tensor, k: Tensor, v: Tensor, listed: Blocks, mask: Tensor, reach: int = -1, causal: bool = False) -> None:
    """The kernel on ``listed`` against the reference under ``mask``."""
    scale, columns = q.shape[3] ** -0.5, k.shape[2]
    blocks, counts, size, order = listed
    out, lse = block_sparse_attention_triton(q, k, v, blocks, counts, size, reach, causal, scale, order)
    keep = Step("keep", extra=0, value=-math.inf)
    spec = AttentionSpec(groups=q.shape[1] // k.shape[1], scale=scale, steps=(keep, Step("safe_softmax")))
    spec = spec.edited(by="a test", statistics={"lse"})
    expected, found = attend(q.double(), k.double(), v.double(), [mask], spec)
    spread, _ = attend(q.double(), k.double(), v.double().abs(), [mask], spec)
    terms = q.double().abs() @ k.double().abs().repeat_interleave(spec.groups, 1).mT * scale
    delta = terms.amax(-1, keepdim=True) * (q.shape[3] + 16) * U + 2.0**-20
    noise = (columns + 32) * U
    rounded = 0.0 if q.dtype == torch.float32 else torch.finfo(q.dtype).eps
    bound = (torch.expm1(2 * delta + noise) + rounded + noise) * spread
    within(out, expected, bound + torch.finfo(out.dtype).eps * expected.abs() + 1e-6)
    # The reference rounds the log-sum-exp to float32, and so does the kernel, once more for the change of base.
    within(lse, found["lse"], delta.squeeze(-1) + noise + 4 * U * found["lse"].abs())
    assert out.dtype == q.dtype and lse.dtype == torch.float32


def test_the_interpreter_is_in_effect():
    assert INTERPRETED, "run test_triton_block_sparse, which sets TRITON_INTERPRET=1"


@quick
@given(st.data())
def test_everything_at_once(data):
    draw = data.draw
    seed, kv_heads, ratio = draw(st.integers(0, 2**31)), draw(st.integers(1, 2)), draw(st.integers(1, 8))
    rows, columns, size = draw(st.integers(1, 60)), draw(st.integers(1, 70)), draw(st.sampled_from((5, 16, 24, 32, 64)))
    given_ = operands(
        seed,
        draw(st.sampled_from(DTYPES)),
        draw(st.integers(1, 2)),
        kv_heads,
        ratio,
        rows,
        columns,
        draw(st.sampled_from(WIDTHS)),
        draw(st.sampled_from(WIDTHS)),
    )
    r = torch.Generator().manual_seed(seed)
    grid, density = (-(-rows // size), -(-columns // size)), draw(st.sampled_from((0.1, 0.5, 1.0)))
    per_head = draw(st.booleans())
    pairs = [random_pairs(r, *grid, density) for _ in range(kv_heads * ratio if per_head else 1)]
    select = BlockList(size, tuple(pairs) if per_head else pairs[0], per_head)
    check(*given_, select, draw(st.sampled_from((-1, 0, 7, 30, 1000))), draw(st.booleans()))


@pytest.mark.parametrize(("width", "dtype"), [(w, DTYPES[i % 3]) for i, w in enumerate(WIDTHS)])
def test_every_width(width, dtype):
    given_ = operands(width, dtype, rows=21, columns=37, width=width, out_width=width)
    check(*given_, BlockList(16, ((0, 0), (0, 2), (1, 1))))


@pytest.mark.parametrize("ratio", [1, 2, 3, 5, 8])
def test_every_number_of_heads_per_key(ratio):
    r = torch.Generator().manual_seed(ratio)
    given_ = operands(ratio, torch.float16, 2, 2, ratio, 20, 33, 16, 16)
    check(*given_, BlockList(16, tuple(random_pairs(r, 2, 3, 0.6) for _ in range(2 * ratio)), per_head=True))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("reach", [0, 5, 40])
def test_a_band(reach, causal):
    q, k, v = operands(3, rows=70, columns=70, width=16, out_width=16)
    blocks, counts = band_blocks(70, 70, reach, 16, "cpu")
    pairs = [(i, j) for i in range(5) for j in blocks[0, i, : counts[0, i]].tolist()]
    check(q, k, v, BlockList(16, tuple(pairs)), reach, causal)


def listed_at_random(seed: int, tables: int, orders: int, rows: int, columns: int, size: int) -> Blocks:
    r = torch.Generator().manual_seed(seed)
    q_blocks, k_blocks = -(-rows // size), -(-columns // size)
    chosen = torch.rand(tables, q_blocks, k_blocks, generator=r) < 0.6
    at = torch.where(chosen, torch.arange(k_blocks), k_blocks).sort(-1).values.clamp_max(k_blocks - 1)
    order = torch.stack([torch.randperm(columns, generator=r) for _ in range(orders)]).int() if orders else None
    return Blocks(at.int(), chosen.sum(-1).int(), size, order)


@pytest.mark.parametrize(("tables", "orders", "size"), [(1, 4, 24), (8, 1, 8), (8, 8, 24), (4, 8, 24), (8, 0, 8)])
def test_an_order_and_tables_of_each_sequence_and_head(tables, orders, size):
    """Two sequences of four heads; the keys of a tile lie anywhere, and causality goes by token."""
    q, k, v = operands(tables + orders, torch.float16, 2, 2, 2, 53, 53, 24, 16)
    listed = listed_at_random(size, tables, orders, 53, 53, size)
    seen = listed_mask(listed, 4, 53, 53)
    at = torch.arange(53)[:, None] - torch.arange(53)
    hold(q, k, v, listed, seen)
    hold(q, k, v, listed, seen & (at >= 0), causal=True)
    hold(q, k, v, listed, seen & (at.abs() <= 9), reach=9)


@pytest.mark.parametrize(("holes", "size"), [(5, 24), (19, 8)])
def test_places_that_hold_no_key(holes, size):
    q, k, v = operands(holes, torch.float32, 1, 1, 2, 37, 53, 24, 16)
    listed = listed_at_random(size, 2, 2, 37, 53 + holes, size)
    listed = listed._replace(order=torch.where(listed.order < 53, listed.order, -1).int())
    hold(q, k, v, listed, listed_mask(listed, 2, 37, 53))


def test_an_order_changes_nothing_where_all_blocks_are_listed():
    q, k, v = operands(8, torch.float32, 1, 1, 2, 40, 40, 16, 16)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(0)).int().repeat(2, 1)
    every = Blocks(torch.arange(3, dtype=torch.int32).repeat(1, 3, 1), torch.full((1, 3), 3, dtype=torch.int32), 16)
    causal = torch.ones(1, 40, 40, dtype=torch.bool).tril()
    hold(q, k, v, every._replace(order=order), causal, causal=True)


def test_rows_without_keys():
    q, k, v = operands(4, rows=40, columns=40, width=16, out_width=16)
    tables = listed_blocks(BlockList(16, ((1, 2),)), 40, 40, "cpu")
    out, lse = block_sparse_attention_triton(q, k, v, *tables, 16, -1, False, 1.0)
    for part in (slice(0, 16), slice(32, 40)):
        assert not out[:, :, part].any() and (lse[:, :, part] == -torch.inf).all()
    assert lse[:, :, 16:32].isfinite().all()
    tables = listed_blocks(BlockList(16, ()), 40, 40, "cpu")
    out, lse = block_sparse_attention_triton(q, k, v, *tables, 16, -1, False, 1.0)
    assert not out.any() and (lse == -torch.inf).all()


def test_blocks_that_are_not_listed_are_not_read():
    q, k, v = operands(5, rows=64, columns=64, width=16, out_width=16)
    select = BlockList(16, tuple((i, j) for i in range(4) for j in (0, 2)))
    tables = listed_blocks(select, 64, 64, "cpu")
    clean = block_sparse_attention_triton(q, k, v, *tables, 16, -1, False, 1.0)
    for x in (k, v):
        x[:, :, 16:32] = x[:, :, 48:] = math.nan
    for one, other in zip(block_sparse_attention_triton(q, k, v, *tables, 16, -1, False, 1.0), clean, strict=True):
        assert torch.equal(one, other)


def test_any_strides():
    q, k, v = (t.transpose(1, 2).contiguous().transpose(1, 2) for t in operands(6, batch=2, kv_heads=2))
    check(q, k.mT.contiguous().mT, v, BlockList(16, ((0, 0), (1, 1), (2, 0), (2, 2))))


def test_opcheck():
    parts = ("test_schema", "test_faketensor")  # the others trace Triton calls, which an interpreted kernel is not
    q, k, v = operands(7, torch.bfloat16, width=16, out_width=24)
    given_ = (q, k, v, *band_blocks(40, 40, 5, 16, "cpu"), 16, 5, False, 1.0)
    torch.library.opcheck(torch.ops.accelpass.block_sparse_attention_triton, given_, test_utils=parts)
    given_ = (*given_[:-1], 1.0, torch.arange(40).flip(0).int()[None])
    torch.library.opcheck(torch.ops.accelpass.block_sparse_attention_triton, given_, test_utils=parts)


@pytest.mark.slow
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_width_and_dtype(width, dtype):
    test_every_width(width, dtype)


@pytest.mark.slow
@pytest.mark.parametrize("size", [8, 16, 24, 64])
@pytest.mark.parametrize(("tables", "orders"), [(1, 4), (8, 1), (8, 8), (4, 8), (8, 0)])
def test_more_orders_and_tables(tables, orders, size):
    test_an_order_and_tables_of_each_sequence_and_head(tables, orders, size)


@pytest.mark.slow
@settings(max_examples=200, deadline=None, derandomize=True, database=None)
@given(st.data())
def test_more_of_everything(data):
    test_everything_at_once.hypothesis.inner_test(data)
