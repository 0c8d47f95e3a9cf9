"""Selections made of blocks for each head on its own: the op with an order, and what they are lowered to."""

import math
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from accelpass.ir import attention
from accelpass.ir.attention import AttentionSpec, Blocks, BlockSelect, Step, attend
from accelpass.ir.attention.lowering.block_sparse import BLOCK_SPARSE
from accelpass.ir.attention.spec.block_select import causal_form, listed_mask
from accelpass.ir.attention.spec.spec import Part
from accelpass.ir.core.capture import from_dynamo
from accelpass.ir.core.verify import signature, verify
from tests.ir.test_block_sparse import ATOL, expected, operands, random_tables, visible
from tests.sweep import examples


def random_order(draw, tables, columns):
    return torch.stack([torch.randperm(columns, generator=draw) for _ in range(tables)]).int()


@settings(max_examples=150, deadline=None)
@given(
    batch=st.integers(1, 3),
    kv_heads=st.integers(1, 2),
    groups=st.integers(1, 3),
    rows=st.integers(1, 200),
    columns=st.integers(1, 200),
    widths=st.sampled_from([(4, 4), (16, 8), (8, 12)]),
    size=st.integers(1, 70),
    reach=st.sampled_from([-1, -1, 5, 60]),
    causal=st.booleans(),
    tables=st.sampled_from(["one", "heads", "all"]),
    orders=st.sampled_from(["none", "one", "heads", "all"]),
    seed=st.integers(0, 99),
)
def test_any_tables_and_any_order_are_the_reference_under_their_mask(
    batch, kv_heads, groups, rows, columns, widths, size, reach, causal, tables, orders, seed
):
    q, k, v = operands(batch, kv_heads, groups, rows, columns, *widths, seed)
    draw = torch.Generator().manual_seed(seed)
    heads, k_blocks = kv_heads * groups, -(-columns // size)
    many = {"none": 0, "one": 1, "heads": heads, "all": batch * heads}
    blocks, counts = random_tables(draw, many[tables], -(-rows // size), k_blocks, min(k_blocks, 6))
    order = random_order(draw, many[orders], columns) if many[orders] else None
    got = BLOCK_SPARSE(q, k, v, blocks, counts, size, reach, causal, 0.3, order)
    # By places first, then each token at its place; entry by entry, apart from the code of the library.
    place = visible(blocks, counts, size, -1, False, rows, columns)
    mask = torch.zeros(batch * heads, rows, columns, dtype=torch.bool)
    i, j = torch.arange(rows)[:, None], torch.arange(columns)
    for n in range(batch * heads):
        at = range(columns) if order is None else order[n % len(order)].tolist()
        for where, token in enumerate(at):
            mask[n, :, token] = place[n % len(place), :, where]
    if reach >= 0:
        mask &= (i - j).abs() <= reach
    if causal:
        mask &= j <= i
    want = expected(q, k, v, mask.view(batch, heads, rows, columns), 0.3)
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one, other, atol=ATOL, rtol=0)
    if reach < 0:
        seen = listed_mask(Blocks(blocks, counts, size, order), heads, rows, columns).expand(batch, heads, -1, -1)
        seen = seen & (j <= i) if causal else seen
        assert torch.equal(seen, mask.view(batch, heads, rows, columns))


@pytest.mark.parametrize(("dtype", "atol"), [(torch.float64, 1e-6), (torch.bfloat16, 0.03), (torch.float16, 4e-3)])
def test_other_dtypes(dtype, atol):
    """Of bfloat16 and float16 the weights and the output, both below 4, are rounded: a few times 4 * eps."""
    q, k, v = operands(2, 2, 2, 90, 90, 8, 8, dtype=dtype)
    draw = torch.Generator().manual_seed(0)
    listed = Blocks(*random_tables(draw, 8, 6, 6, 4), 16, random_order(draw, 8, 90))
    out, lse = BLOCK_SPARSE(q, k, v, listed.blocks, listed.counts, 16, -1, True, 0.3, listed.order)
    mask = listed_mask(listed, 4, 90, 90) & torch.ones(90, 90, dtype=torch.bool).tril()
    want, found = expected(q.double(), k.double(), v.double(), mask, 0.3)
    assert out.dtype == dtype and lse.dtype == torch.float32
    torch.testing.assert_close(out.double(), want, atol=atol, rtol=0)
    torch.testing.assert_close(lse.double(), found.double(), atol=atol, rtol=0)


def test_an_order_changes_nothing_where_all_blocks_are_listed():
    q, k, v = operands(2, 2, 2, 77, 77, 8, 8)
    blocks = torch.arange(5, dtype=torch.int32).repeat(1, 5, 1)
    order = random_order(torch.Generator().manual_seed(0), 8, 77)
    for causal in (False, True):
        got, _ = BLOCK_SPARSE(q, k, v, blocks, torch.full((1, 5), 5, dtype=torch.int32), 16, -1, causal, 0.3, order)
        want = F.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=0.3, enable_gqa=True)
        torch.testing.assert_close(got, want, atol=ATOL, rtol=0)


@settings(max_examples=examples(30), deadline=None)
@given(
    columns=st.integers(1, 90), holes=st.integers(1, 60), size=st.integers(1, 40), tables=st.sampled_from([1, 4, 8]),
    causal=st.booleans(), seed=st.integers(0, 99),
)  # fmt: skip
def test_places_may_hold_no_key(columns, holes, size, tables, causal, seed):
    """Keys in more places than there are keys: what stands nowhere is not read, and the mask is of tokens."""
    q, k, v = operands(2, 2, 2, columns, columns, 8, 8, seed)
    draw, places = torch.Generator().manual_seed(seed), columns + holes
    at = torch.stack([torch.randperm(places, generator=draw) for _ in range(tables)])
    order = torch.where(at < columns, at, -1).int()
    k_blocks = -(-places // size)
    blocks, counts = random_tables(draw, tables, -(-columns // size), k_blocks, k_blocks)
    listed = Blocks(blocks, counts, size, order)
    mask = torch.zeros(tables, columns, columns, dtype=torch.bool)
    for n in range(tables):
        for row in range(columns):
            own = set(blocks[n, row // size, : counts[n, row // size]].tolist())
            for place, token in enumerate(order[n].tolist()):
                if token >= 0 and place // size in own:
                    mask[n, row, token] = not causal or token <= row
    seen = listed_mask(listed, 4, columns, columns)
    if causal:
        seen = seen & torch.ones(columns, columns, dtype=torch.bool).tril()
    assert torch.equal(seen, mask.view(-1, *((4,) if tables > 1 else (1,)), columns, columns))
    got = BLOCK_SPARSE(q, k, v, blocks, counts, size, -1, causal, 0.3, order)
    for one, other in zip(got, expected(q, k, v, seen.expand(2, 4, -1, -1), 0.3), strict=True):
        torch.testing.assert_close(one, other, atol=ATOL, rtol=0)


def test_no_queries_and_no_lists():
    q, k, v = operands(2, 2, 2, 20, 20, 4, 6)
    order = torch.arange(20, dtype=torch.int32).flip(0).unsqueeze(0)
    none = torch.zeros(8, 3, 0, dtype=torch.int32), torch.zeros(8, 3, dtype=torch.int32)
    out, lse = BLOCK_SPARSE(q, k, v, *none, 8, -1, True, 0.3, order)
    assert not out.any() and (lse == -math.inf).all()
    none = torch.zeros(8, 0, 0, dtype=torch.int32), torch.zeros(8, 0, dtype=torch.int32)
    out, lse = BLOCK_SPARSE(q[:, :, :0], k, v, *none, 8, -1, True, 0.3, order)
    assert out.shape == (2, 4, 0, 6) and lse.shape == (2, 4, 0)


def test_opcheck_with_an_order():
    q, k, v = operands(2, 2, 2, 20, 30, 4, 6)
    draw = torch.Generator().manual_seed(0)
    tables = random_tables(draw, 8, 3, 4, 3)
    torch.library.opcheck(BLOCK_SPARSE, (q, k, v, *tables, 8, -1, True, 0.3, random_order(draw, 4, 30)))


@pytest.mark.parametrize(
    ("changed", "error", "says"),
    [
        ({"order": torch.zeros(1, 20, dtype=torch.int32)}, ValueError, "does not name each of the 20 tokens once"),
        ({"order": torch.arange(1, 21).int()[None]}, ValueError, "does not name each of the 20 tokens once"),
        ({"order": torch.arange(-2, 19).int()[None]}, ValueError, "does not name each of the 20 tokens once"),
        ({"order": torch.arange(20)[None]}, TypeError, r"order is torch\.int64"),
        ({"order": torch.arange(20).int().repeat(3, 1)}, ValueError, r"order is \(3, 20\).* need \(1 or 4 or 8, 20\)"),
        ({"order": torch.arange(19).int()[None]}, ValueError, r"order is \(1, 19\)"),
        ({"blocks": torch.zeros(2, 3, 1, dtype=torch.int32)}, ValueError, r"need \(1 or 4 or 8, 3, most\)"),
    ],
)
def test_refuses(changed, error, says):
    given_ = {
        "q": torch.ones(2, 4, 20, 4),
        "k": torch.ones(2, 2, 20, 4),
        "v": torch.ones(2, 2, 20, 4),
        "blocks": torch.zeros(1, 3, 1, dtype=torch.int32),
        "counts": torch.ones(1, 3, dtype=torch.int32),
    }
    with pytest.raises(error, match="block_sparse_attention: .*" + says):
        BLOCK_SPARSE(**given_ | changed, size=8, reach=-1, causal=False, scale=1.0)


@dataclass(frozen=True)
class Likely(BlockSelect):
    """A selection by data, per sequence and head: blocks whose first key has a positive product with the block's first
    query, and the first; keys in the order of their first channel."""

    part: ClassVar[str] = "test_likely"
    size: int
    reorder: bool = True

    def blocks(self, q, k, spec):
        k = k.repeat_interleave(spec.groups, 1)
        order = k[..., 0].argsort(-1) if self.reorder else None
        # Contiguous: matmul asks how its operands lie in memory, and a slice's strides would become a guard on its length.
        at = [t[:, :, :: self.size].contiguous().flatten(0, 1) for t in (q, k)]
        firsts = torch.bmm(at[0], at[1].mT)
        at = torch.arange(firsts.shape[-1], device=q.device)
        chosen = (firsts > 0) | (at == 0)
        listed = torch.where(chosen, at, firsts.shape[-1]).sort(-1).values.clamp_max(firsts.shape[-1] - 1)
        order = None if order is None else order.flatten(0, 1).int()
        return Blocks(listed.int(), chosen.sum(-1).int(), self.size, order)


class Attend(nn.Module):
    def __init__(self, core):
        super().__init__()
        self.core = core

    def forward(self, *given_):
        return self.core(*given_)


def plain(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, scale=0.3, enable_gqa=True)


def causal(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.3, enable_gqa=True)


def masked(q, k, v):
    at = torch.arange(q.shape[2])
    return F.scaled_dot_product_attention(q, k, v, attn_mask=at <= at[:, None], scale=0.3, enable_gqa=True)


def softcapped(q, k, v):
    return (torch.tanh(q @ k.mT * 0.3 / 20) * 20).softmax(-1) @ v


def compiled(core, select, used, want=None):
    """``core`` compiled with a selection; ``used`` gets the names of lowerings of each compilation."""
    torch._dynamo.reset()

    def backend(gm, example):
        program = from_dynamo(gm, example)
        before = signature(program)
        (record,) = attention.insert(program)
        attention.set_spec(record.node, attention.spec_of(record.node).edited(by="a test", select=select))
        if want:
            attention.want(record.node, want, by="a test")
        used.append(set(attention.lower(program).values()))
        verify(program, before, "lower")
        return program.gm

    return torch.compile(Attend(core), backend=backend)


def reference(q, k, v, select, is_causal):
    steps = (Step("safe_softmax"),)  # a row may see none of its blocks
    spec = AttentionSpec(groups=q.shape[1] // k.shape[1], scale=0.3, causal=is_causal, steps=steps)
    return attend(q, k, v, [], spec.edited(by="a test", select=select))[0]


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("reorder", [False, True])
@pytest.mark.parametrize(("core", "is_causal"), [(plain, False), (causal, True)])
@torch.no_grad()
def test_one_graph_serves_all_lengths(core, is_causal, reorder, dynamic):
    used, select = [], Likely(8, reorder)
    run = compiled(core, select, used)
    for batch, rows in ((2, 40), (3, 61), (2, 17)) if dynamic else ((2, 41),):
        q, k, v = operands(batch, 2, 2, rows, rows, 8, 8, seed=rows)
        for tensor in (q, k, v) if dynamic else ():  # not the heads, which a model's weights fix
            torch._dynamo.mark_dynamic(tensor, (0, 2))
        torch.testing.assert_close(run(q, k, v), reference(q, k, v, select, is_causal), atol=ATOL, rtol=0)
    assert used == [{"block_sparse"}]


@torch.no_grad()
def test_a_causal_mask_is_dropped():
    used = []
    q, k, v = operands(2, 2, 2, 40, 40, 8, 8)
    out = compiled(masked, Likely(8), used)(q, k, v)
    assert used == [{"block_sparse"}]
    torch.testing.assert_close(out, reference(q, k, v, Likely(8), True), atol=ATOL, rtol=0)


@torch.no_grad()
def test_what_the_op_cannot_do_is_composed():
    q, k, v = operands(2, 2, 1, 40, 40, 8, 8)
    for core, want in ((softcapped, None), (plain, "column_sums")):
        used = []
        compiled(core, Likely(8), used, want)(q, k, v)
        assert used == [{"composed"}]
    used = []
    out = compiled(plain, Likely(8), used, "lse")(q, k, v)
    assert used == [{"block_sparse"}]
    torch.testing.assert_close(out, reference(q, k, v, Likely(8), False), atol=ATOL, rtol=0)


def test_the_causal_form():
    keep = (Step("keep", extra=0, value=-math.inf), Step("safe_softmax"))
    spec = AttentionSpec(bias="causal", steps=keep)
    assert causal_form(spec, 8, 8) == AttentionSpec(bias="causal", causal=True, steps=keep[1:])
    assert causal_form(spec, 1, 8) is spec  # the last query, and not the first
    padded = AttentionSpec(bias="tensor", steps=keep)
    assert causal_form(padded, 8, 8) is padded


def test_a_selection_survives_json():
    spec = AttentionSpec().edited(by="a test", select=Likely(8))
    assert AttentionSpec.from_json(spec.to_json()) == spec and Part.from_json({"part": "test_likely", "size": 8})
