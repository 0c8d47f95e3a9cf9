"""Block-sparse attention on the CPU against the reference, and what edited attentions are lowered to."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from accelpass.ir import attention
from accelpass.ir.attention import AttentionSpec, Band, BlockList, SinksAndWindow, Step, attend
from accelpass.ir.attention.lowering import block_sparse as sparse
from accelpass.ir.attention.lowering import stacked
from accelpass.ir.attention.lowering.block_sparse import BLOCK_SPARSE, band_blocks, listed_blocks
from accelpass.ir.core.capture import from_dynamo
from accelpass.ir.core.verify import signature, verify

# Sums of at most 24 products of standard normals, then of at most 300 weighted values, in float32 and in another order.
ATOL = 2e-5


def operands(batch, kv_heads, groups, rows, columns, width, v_width, seed=0, dtype=torch.float32):
    draw = torch.Generator().manual_seed(seed)
    q = torch.randn(batch, kv_heads * groups, rows, width, generator=draw)
    k = torch.randn(batch, kv_heads, columns, width, generator=draw)
    v = torch.randn(batch, kv_heads, columns, v_width, generator=draw)
    return q.to(dtype), k.to(dtype), v.to(dtype)


def visible(blocks, counts, size, reach, causal, rows, columns):
    """The mask that these arguments mean, entry by entry: (heads of the tables, rows, columns)."""
    seen = torch.zeros(blocks.shape[0], rows, columns, dtype=torch.bool)
    for head in range(blocks.shape[0]):
        for at in range(blocks.shape[1]):
            for one in blocks[head, at, : counts[head, at]].tolist():
                seen[head, at * size : (at + 1) * size, one * size : (one + 1) * size] = True
    i, j = torch.arange(rows)[:, None], torch.arange(columns)
    if reach >= 0:
        seen &= (i - j).abs() <= reach
    return seen & (j <= i) if causal else seen


def expected(q, k, v, mask, scale):
    keep = Step("keep", extra=0, value=-math.inf)
    spec = AttentionSpec(groups=q.shape[1] // k.shape[1], scale=scale, steps=(keep, Step("safe_softmax")))
    out, found = attend(q, k, v, [mask], spec.edited(by="a test", statistics={"lse"}))
    return out, found["lse"]


def random_tables(draw, heads, q_blocks, k_blocks, most):
    blocks = torch.zeros(heads, q_blocks, most, dtype=torch.int32)
    counts = torch.zeros(heads, q_blocks, dtype=torch.int32)
    for head in range(heads):
        for at in range(q_blocks):
            count = int(torch.randint(0, min(most, k_blocks) + 1, (), generator=draw))
            blocks[head, at, :count] = torch.randperm(k_blocks, generator=draw)[:count].sort().values.int()
            counts[head, at] = count
    return blocks, counts


@settings(max_examples=120, deadline=None)
@given(
    batch=st.integers(1, 2),
    kv_heads=st.integers(1, 2),
    groups=st.integers(1, 3),
    rows=st.integers(1, 300),
    columns=st.integers(1, 300),
    widths=st.sampled_from([(4, 4), (24, 24), (16, 8), (8, 12)]),
    size=st.integers(1, 130),
    reach=st.sampled_from([-1, 0, 3, 40, 1000]),
    causal=st.booleans(),
    per_head=st.booleans(),
    seed=st.integers(0, 99),
)
def test_any_list_is_the_reference_under_its_mask(
    batch, kv_heads, groups, rows, columns, widths, size, reach, causal, per_head, seed
):
    q, k, v = operands(batch, kv_heads, groups, rows, columns, *widths, seed)
    draw = torch.Generator().manual_seed(seed)
    k_blocks = -(-columns // size)
    tables = random_tables(draw, kv_heads * groups if per_head else 1, -(-rows // size), k_blocks, min(k_blocks, 5))
    got = BLOCK_SPARSE(q, k, v, *tables, size, reach, causal, 0.3)
    want = expected(q, k, v, visible(*tables, size, reach, causal, rows, columns), 0.3)
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one, other, atol=ATOL, rtol=0)


@settings(max_examples=100, deadline=None)
@given(n=st.integers(1, 90), m=st.integers(1, 90), reach=st.integers(0, 100), size=st.integers(1, 40))
def test_band_tables_list_what_the_band_touches(n, m, reach, size):
    blocks, counts = band_blocks(n, m, reach, size, "cpu")
    band = (torch.arange(n)[:, None] - torch.arange(m)).abs() <= reach
    for at in range(-(-n // size)):
        columns = band[at * size : (at + 1) * size].any(0).nonzero().flatten()
        assert blocks[0, at, : counts[0, at]].tolist() == sorted(set((columns // size).tolist()))
    assert blocks.dtype == counts.dtype == torch.int32


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 300),
    reach=st.integers(0, 150),
    size=st.sampled_from([1, 16, 64, 100]),
    causal=st.booleans(),
    seed=st.integers(0, 9),
)
def test_a_band_is_the_reference(rows, reach, size, causal, seed):
    q, k, v = operands(1, 1, 2, rows, rows, 8, 8, seed)
    out, lse = BLOCK_SPARSE(q, k, v, *band_blocks(rows, rows, reach, size, "cpu"), size, reach, causal, 0.3)
    spec = AttentionSpec(groups=2, scale=0.3, causal=causal)
    want, found = attend(q, k, v, [], spec.edited(by="a test", select=Band(reach), statistics={"lse"}))
    torch.testing.assert_close(out, want, atol=ATOL, rtol=0)
    torch.testing.assert_close(lse, found["lse"], atol=ATOL, rtol=0)


@pytest.mark.parametrize(("dtype", "atol"), [(torch.float64, 1e-6), (torch.bfloat16, 0.03), (torch.float16, 4e-3)])
def test_other_dtypes(dtype, atol):
    """Of bfloat16 and float16 the weights and the output, both below 4, are rounded: a few times 4 * eps."""
    q, k, v = operands(2, 2, 2, 70, 90, 8, 8, dtype=dtype)
    tables = random_tables(torch.Generator().manual_seed(0), 1, 5, 6, 4)
    out, lse = BLOCK_SPARSE(q, k, v, *tables, 16, 30, False, 0.3)
    want, found = expected(q.double(), k.double(), v.double(), visible(*tables, 16, 30, False, 70, 90), 0.3)
    assert out.dtype == dtype and lse.dtype == torch.float32
    torch.testing.assert_close(out.double(), want, atol=atol, rtol=0)
    torch.testing.assert_close(lse.double(), found.double(), atol=atol, rtol=0)


def test_the_body_for_other_devices_is_the_same(monkeypatch):
    """What the op does where it knows of no fused kernel."""
    q, k, v = operands(1, 2, 2, 70, 90, 8, 8)
    tables = random_tables(torch.Generator().manual_seed(1), 1, 5, 6, 4)
    want = BLOCK_SPARSE(q, k, v, *tables, 16, 30, True, 0.3)
    monkeypatch.setattr(stacked, "_fused", stacked._composed)
    got = BLOCK_SPARSE(q, k, v, *tables, 16, 30, True, 0.3)
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one, other, atol=ATOL, rtol=0)


@pytest.mark.parametrize("per_head", [False, True])
def test_blocks_that_are_not_listed_are_not_read(per_head):
    """Each query block alone: what it does not list is not-a-number."""
    q, k, v = operands(1, 2, 2, 64, 80, 8, 8)
    heads = 4 if per_head else 1
    blocks, counts = random_tables(torch.Generator().manual_seed(3), heads, 4, 5, 3)
    clean = BLOCK_SPARSE(q, k, v, blocks, counts, 16, -1, False, 0.3)
    mask = visible(blocks, counts, 16, -1, False, 64, 80).expand(4, 64, 80)
    for head in range(4):
        for at in range(4):
            hidden = mask[head, at * 16].logical_not()
            dirty = [t.masked_fill(hidden.unsqueeze(-1), math.nan) for t in (k, v)]
            out, lse = BLOCK_SPARSE(q, *dirty, blocks, counts, 16, -1, False, 0.3)
            part = slice(at * 16, at * 16 + 16)
            assert torch.equal(out[:, head, part], clean[0][:, head, part])
            assert torch.equal(lse[:, head, part], clean[1][:, head, part])


def test_a_band_computes_on_its_share_alone(monkeypatch):
    """Query-key pairs that reach the dense kernel, of 16 times as many: the band and half a block on either side."""
    computed, dense = [], sparse.dense

    def counted(q, k, *rest):
        computed.append(q.shape[2] * k.shape[2])
        return dense(q, k, *rest)

    monkeypatch.setattr(sparse, "dense", counted)
    n, reach = 4096, 128
    q, k, v = operands(1, 1, 1, n, n, 4, 4)
    BLOCK_SPARSE(q, k, v, *band_blocks(n, n, reach, 64, "cpu"), 64, reach, False, 0.3)
    assert sum(computed) <= n * (2 * reach + 64)
    computed.clear()
    BLOCK_SPARSE(q, k, v, *band_blocks(n, n, reach, 1024, "cpu"), 1024, reach, True, 0.3)  # coarse blocks, cut
    assert sum(computed) <= n * (reach + 64)


def test_query_blocks_with_equal_lists_are_one_call(monkeypatch):
    calls, dense = [], sparse.dense
    monkeypatch.setattr(sparse, "dense", lambda *given: calls.append(given[0].shape) or dense(*given))
    q, k, v = operands(1, 1, 1, 128, 128, 4, 4)
    every = BlockList(16, tuple((i, j) for i in range(8) for j in (range(8) if i < 6 else (0, 5))))
    BLOCK_SPARSE(q, k, v, *listed_blocks(every, 128, 128, "cpu"), 16, -1, False, 0.3)
    assert [shape[2] for shape in calls] == [96, 32]
    calls.clear()
    BLOCK_SPARSE(q, k, v, *band_blocks(128, 128, 127, 16, "cpu"), 16, 127, False, 0.3)  # a band of all keys is no band
    assert [shape[2] for shape in calls] == [128]


def test_opcheck():
    q, k, v = operands(2, 2, 2, 20, 30, 4, 6)
    torch.library.opcheck(BLOCK_SPARSE, (q, k, v, *band_blocks(20, 30, 5, 8, "cpu"), 8, 5, False, 0.3))


@pytest.mark.parametrize(
    ("changed", "error", "says"),
    [
        ({"k": torch.ones(1, 2, 20, 4, dtype=torch.float64)}, TypeError, "they must be of one float dtype"),
        ({"blocks": torch.zeros(1, 3, 2)}, TypeError, "they must be torch.int32"),
        ({"q": torch.ones(4, 20, 4)}, ValueError, "they need 4"),
        ({"k": torch.ones(1, 2, 21, 4)}, ValueError, "they must be"),
        ({"q": torch.ones(1, 3, 20, 4)}, ValueError, "k's heads must divide q's"),
        ({"size": 0}, ValueError, "size=0"),
        ({"reach": -2}, ValueError, "reach=-2"),
        ({"size": 4}, ValueError, r"need \(1 or 4, 5, most\)"),
        ({"counts": torch.zeros(1, 2, dtype=torch.int32)}, ValueError, r"counts is \(1, 2\)"),
        ({"counts": torch.full((1, 3), 3, dtype=torch.int32)}, ValueError, r"lists \[0, 1\] and counts 3"),
        ({"blocks": torch.tensor([[[0, 3]] * 3], dtype=torch.int32)}, ValueError, "of 3 key blocks, ascending"),
        ({"blocks": torch.tensor([[[1, 0]] * 3], dtype=torch.int32)}, ValueError, "ascending"),
    ],
)
def test_refuses(changed, error, says):
    given = {
        "q": torch.ones(1, 4, 20, 4),
        "k": torch.ones(1, 2, 20, 4),
        "v": torch.ones(1, 2, 20, 4),
        "blocks": torch.tensor([[[0, 1]] * 3], dtype=torch.int32),
        "counts": torch.full((1, 3), 2, dtype=torch.int32),
        "size": 8,
        "reach": -1,
    }
    with pytest.raises(error, match="block_sparse_attention: .*" + says):
        BLOCK_SPARSE(**given | changed, causal=False, scale=1.0)


def test_helpers_refuse():
    with pytest.raises(ValueError, match="reach=-1"):
        band_blocks(4, 4, -1, 2, "cpu")
    with pytest.raises(ValueError, match=r"block \(0, 2\) is not one of 2 query blocks and 2 key blocks"):
        listed_blocks(BlockList(2, ((0, 2),)), 4, 4, "cpu")


class Attend(nn.Module):
    def __init__(self, core):
        super().__init__()
        self.core = core

    def forward(self, *given):
        return self.core(*given)


def lowered(core, edit, *inputs, want=None, dynamic=False):
    """(lowerings used, output, what the edited node's reference gives)."""
    got = {}
    torch._dynamo.reset()

    def backend(gm, example):
        program = from_dynamo(gm, example)
        before = signature(program)
        (record,) = attention.insert(program)
        node = record.node
        attention.set_spec(node, edit(attention.spec_of(node)))
        if want:
            attention.want(node, want, by="a test")
        kept = next(n for n in program.graph.nodes if attention.is_attention(n))
        got["spec"] = attention.spec_of(kept)
        got["used"] = set(attention.lower(program).values())
        verify(program, before, "lower")
        return program.gm

    with torch.no_grad():
        out = torch.compile(Attend(core), backend=backend, dynamic=dynamic)(*inputs)
    q, k, v, *masks = inputs
    return got["used"], out, attend(q, k, v, masks, got["spec"])[0]


def selecting(select):
    return lambda spec: spec.edited(by="a test", select=select)


def plain(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, scale=0.3)


def causal(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.3)


def in_float32(q, k, v):
    return torch.softmax(q @ k.mT * 0.3, -1, dtype=torch.float32).to(q.dtype) @ v


def softcapped(q, k, v):
    return (torch.tanh(q @ k.mT * 0.3 / 20) * 20).softmax(-1) @ v


PER_HEAD = BlockList(16, (((0, 0), (1, 1)), ((0, 1), (1, 0), (1, 2), (2, 2))), per_head=True)


@pytest.mark.parametrize("core", [plain, causal, in_float32])
@pytest.mark.parametrize("select", [Band(5), Band(10**12), BlockList(16, ((0, 0), (0, 2), (1, 1), (2, 0)))])
def test_selections_are_lowered_to_the_op(core, select):
    used, out, want = lowered(core, selecting(select), *operands(2, 2, 1, 40, 40, 8, 8))
    assert used == {"block_sparse"}
    torch.testing.assert_close(out, want, atol=ATOL, rtol=0)


def test_a_list_for_each_head_and_a_causal_window():
    for core, select in ((plain, PER_HEAD), (causal, SinksAndWindow(0, 7))):
        used, out, want = lowered(core, selecting(select), *operands(2, 2, 1, 40, 40, 8, 8))
        assert used == {"block_sparse"}
        torch.testing.assert_close(out, want, atol=ATOL, rtol=0)


@pytest.mark.parametrize(
    ("core", "select", "dynamic"),
    [
        (softcapped, Band(5), False),
        (causal, SinksAndWindow(2, 7), False),
        (plain, SinksAndWindow(0, 7), False),
        (plain, Band(5), True),
    ],
)
def test_what_the_op_cannot_do_stays_composed(core, select, dynamic):
    used, out, want = lowered(core, selecting(select), *operands(2, 2, 1, 40, 40, 8, 8), dynamic=dynamic)
    assert used == {"composed"}
    torch.testing.assert_close(out, want, atol=ATOL, rtol=0)


def test_reasons_name_what_was_seen():
    from accelpass.ir.attention.lowering.fused import block_sparse_why_not

    spec = AttentionSpec()
    for changed, says in (
        (spec, "selection all is not one of blocks"),
        (spec.edited(by="t", select=SinksAndWindow(1, 2)), "sinks are not a band"),
        (spec.edited(by="t", select=SinksAndWindow(0, 2)), "not causal"),
        (spec.edited(by="t", select=Band(2), statistics={"column_sums"}), "does not compute column_sums"),
    ):
        assert says in str(block_sparse_why_not(changed, None))


def test_lse_is_computed_with_a_selection():
    used, out, want = lowered(plain, selecting(Band(5)), *operands(2, 2, 1, 40, 40, 8, 8), want="lse")
    assert used == {"block_sparse"}
    torch.testing.assert_close(out, want, atol=ATOL, rtol=0)
    used, _, _ = lowered(plain, selecting(Band(5)), *operands(2, 2, 1, 40, 40, 8, 8), want="column_sums")
    assert used == {"composed"}


def renamed(spec):
    """As a pass that copies a node leaves it: an edit by someone, that changes nothing."""
    return spec.edited(by="a test", select=attention.All())


def heads_viewed(q, k, v):
    """Products leave a contiguous output, which the model may view; a fused operator's is not."""
    out = torch.softmax(q @ k.mT * 0.3, -1) @ v
    return out.view(-1, *out.shape[2:])


@pytest.mark.parametrize(("select", "name"), [(attention.All(), "sdpa"), (Band(3), "block_sparse")])
def test_the_output_has_the_memory_that_the_model_views(select, name):
    used, out, want = lowered(heads_viewed, selecting(select), *operands(2, 2, 1, 12, 12, 8, 8))
    assert used == {name}
    torch.testing.assert_close(out, want.flatten(0, 1), atol=ATOL, rtol=0)


@pytest.mark.parametrize("core", [plain, causal, in_float32])
def test_all_keys_are_lowered_to_sdpa(core):
    used, out, want = lowered(core, renamed, *operands(2, 2, 1, 9, 12, 8, 8))
    assert used == {"sdpa"}
    torch.testing.assert_close(out, want, atol=ATOL, rtol=0)


def grouped(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, scale=0.3, enable_gqa=True)


def test_grouped_heads_are_lowered_to_both():
    for edit, name in ((renamed, "sdpa"), (selecting(Band(3)), "block_sparse")):
        used, out, want = lowered(grouped, edit, *operands(2, 2, 3, 12, 12, 8, 8))
        assert used == {name}
        torch.testing.assert_close(out, want, atol=ATOL, rtol=0)


def masked(q, k, v, mask):
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=0.3)


def filled(q, k, v, mask):
    return (q @ k.mT * 0.3).masked_fill(mask, -math.inf).softmax(-1) @ v


def filled_finite(q, k, v, mask):
    return (q @ k.mT * 0.3).masked_fill(mask, -1e9).softmax(-1) @ v


def test_one_mask_is_lowered_to_sdpa():
    q, k, v = operands(2, 2, 1, 9, 12, 8, 8)
    bias = torch.randn(2, 1, 9, 12)
    for core, mask, name in (
        (masked, bias, "sdpa"),
        (masked, bias > -1, "sdpa"),
        (filled, bias > 1, "sdpa"),
        (filled, (bias > 1)[0, 0], "sdpa"),
        (filled_finite, bias > 1, "composed"),  # a row without keys attends to all of them equally
    ):
        used, out, want = lowered(core, renamed, q, k, v, mask)
        assert used == {name}, core
        torch.testing.assert_close(out, want, atol=ATOL, rtol=0)
