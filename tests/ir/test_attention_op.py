"""The semantic op: its reference against torch's own attention, and specs as values."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from accelpass.ir import SpecConflict
from accelpass.ir.attention import All, AttentionSpec, Band, BlockList, SinksAndWindow, Step, attend
from accelpass.ir.attention.spec.op import ATTENTION, ATTENTION_STATS

# Both sides are f32 sums of at most 16 products, then of at most 9 weighted values; each rounds to 2**-24 relative to
# values that stay below 8, in another order: 16 * 8 * 2**-24 is under 1e-5.
ATOL = 1e-5


def operands(lead, kv_heads, groups, rows, columns, width, v_width, seed=0):
    draw = torch.Generator().manual_seed(seed)
    q = torch.randn(*lead, kv_heads * groups, rows, width, generator=draw)
    k = torch.randn(*lead, kv_heads, columns, width, generator=draw)
    v = torch.randn(*lead, kv_heads, columns, v_width, generator=draw)
    return q, k, v


shapes = {
    "lead": st.sampled_from([(), (2,), (1, 2), (2, 1, 3)]),
    "kv_heads": st.integers(1, 2),
    "groups": st.integers(1, 3),
    "rows": st.integers(1, 6),
    "columns": st.integers(1, 9),
    "width": st.sampled_from([1, 4, 16]),
    "v_width": st.sampled_from([1, 3, 8]),
    "seed": st.integers(0, 99),
}


def torch_attention(q, k, v, groups, **kwargs):
    return F.scaled_dot_product_attention(q, k.repeat_interleave(groups, -3), v.repeat_interleave(groups, -3), **kwargs)


@settings(max_examples=40, deadline=None)
@given(**shapes, causal=st.booleans())
def test_reference_is_torch_attention(groups, causal, **shape):
    q, k, v = operands(groups=groups, **shape)
    spec = AttentionSpec(groups=groups, scale=0.3, causal=causal, steps=(Step("safe_softmax"),))
    want = torch_attention(q, k, v, groups, is_causal=causal, scale=0.3)
    torch.testing.assert_close(ATTENTION(q, k, v, [], spec.to_json()), want, atol=ATOL, rtol=0)


@settings(max_examples=40, deadline=None)
@given(**shapes, boolean=st.booleans())
def test_reference_takes_masks_as_torch_does(groups, boolean, **shape):
    q, k, v = operands(groups=groups, **shape)
    bias = torch.randn(q.shape[-2], k.shape[-2], generator=torch.Generator().manual_seed(1))
    mask = bias > 0 if boolean else bias
    step = Step("keep", extra=0, value=-math.inf) if boolean else Step("add", extra=0)
    spec = AttentionSpec(groups=groups, scale=0.3, steps=(step, Step("safe_softmax")))
    want = torch_attention(q, k, v, groups, attn_mask=mask, scale=0.3)
    torch.testing.assert_close(ATTENTION(q, k, v, [mask], spec.to_json()), want, atol=ATOL, rtol=0)


@settings(max_examples=40, deadline=None)
@given(**shapes)
def test_softcap_sinks_and_lse(groups, **shape):
    q, k, v = operands(groups=groups, **shape)
    sink = torch.randn(q.shape[-3], 1, 1, generator=torch.Generator().manual_seed(2))
    steps = (Step("softcap", value=2.0), Step("sink", extra=0), Step("softmax"), Step("drop", value=1))
    spec = AttentionSpec(groups=groups, scale=0.3, steps=steps)
    lse = spec.edited(by="a test", statistics={"lse"})
    out, found = ATTENTION_STATS(q, k, v, [sink], lse.to_json())
    scores = 2 * torch.tanh(q @ k.repeat_interleave(groups, -3).mT * 0.3 / 2)
    total = scores.exp().sum(-1, keepdim=True) + sink.exp()
    want = (scores.exp() / total) @ v.repeat_interleave(groups, -3)
    torch.testing.assert_close(out, want, atol=ATOL, rtol=0)
    torch.testing.assert_close(found, total.log().squeeze(-1), atol=ATOL, rtol=0)
    assert spec.sinks
    assert spec.softcap == 2.0


def test_opcheck():
    q, k, v = operands((2,), 2, 2, 3, 5, 4, 6)
    spec = AttentionSpec(groups=2, steps=(Step("add", extra=0), Step("softmax")))
    torch.library.opcheck(ATTENTION, (q, k, v, [torch.zeros(3, 5)], spec.to_json()))
    wanted = spec.edited(by="a test", statistics={"lse"})
    torch.library.opcheck(ATTENTION_STATS, (q, k, v, [torch.zeros(3, 5)], wanted.to_json()))


def test_selection_of_everything_is_dense():
    q, k, v = operands((2,), 2, 2, 5, 5, 4, 6)
    dense = attend(q, k, v, [], AttentionSpec(groups=2, causal=True))[0]
    every = tuple((i, j) for i in range(3) for j in range(3))
    for select in (Band(4), SinksAndWindow(sinks=0, window=5), SinksAndWindow(sinks=5, window=1), BlockList(2, every)):
        spec = AttentionSpec(groups=2, causal=True).edited(by="a test", select=select)
        assert torch.equal(attend(q, k, v, [], spec)[0], dense), select


def test_sinks_and_window():
    q, k, v = operands((1,), 1, 1, 3, 7, 4, 4)
    spec = AttentionSpec().edited(by="a test", select=SinksAndWindow(sinks=1, window=2))
    # The last query stands at the last key: query i at position 4 + i.
    mask = torch.zeros(3, 7, dtype=torch.bool)
    for row in range(3):
        mask[row, [0, 3 + row, 4 + row]] = True
        mask[row, 5 + row :] = True  # keys after the query are the causal mask's business
    want = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=1.0)
    torch.testing.assert_close(attend(q, k, v, [], spec)[0], want, atol=ATOL, rtol=0)


steps = st.lists(
    st.builds(
        Step,
        kind=st.sampled_from(["scale", "add", "fill", "clamp", "cast"]),
        extra=st.none() | st.integers(0, 3),
        other=st.none() | st.integers(0, 3),
        value=st.none() | st.floats(allow_nan=False) | st.tuples(st.none(), st.floats(0, 1)),
    ),
    max_size=4,
)


@given(
    before=steps,
    after=steps,
    groups=st.integers(1, 8),
    scale=st.floats(allow_nan=False, allow_infinity=False),
    select=st.sampled_from([All(), Band(3), SinksAndWindow(4, 8), BlockList(2, ((0, 0), (1, 0)))]),
)
def test_spec_round_trip(before, after, groups, scale, select):
    spec = AttentionSpec(groups=groups, scale=scale, steps=(*before, Step("softmax", value="float32"), *after))
    spec = spec.edited(by="one", select=select, statistics={"lse"})
    again = AttentionSpec.from_json(spec.to_json())
    assert again == spec
    assert hash(again) == hash(spec)
    assert again.softmax_dtype is torch.float32
    assert (again.before, again.after) == (tuple(before), tuple(after))


def test_conflicting_edits_name_both_passes_and_the_site():
    spec = AttentionSpec(site="layers.3.attn").edited(by="streaming", select=SinksAndWindow(4, 64))
    with pytest.raises(SpecConflict, match=r"'blocks'.*layers\.3\.attn.*'streaming'"):
        spec.edited(by="blocks", select=BlockList(2, ((0, 0),)))
    same = spec.edited(by="blocks", select=SinksAndWindow(4, 64), statistics={"lse"})
    assert same.edits == (("streaming", "select"), ("blocks", "select"), ("blocks", "statistics"))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"kind": "sideways"}, "kind='sideways'"),
        ({"bias": "some"}, "bias='some'"),
        ({"steps": ()}, "exactly one softmax"),
        ({"statistics": frozenset({"mean"})}, "mean"),
    ],
)
def test_illegal_specs(wrong, message):
    with pytest.raises(ValueError, match=message):
        AttentionSpec(**wrong)


def test_illegal_parts():
    with pytest.raises(ValueError, match="window >= 1"):
        SinksAndWindow(sinks=0, window=0)
    with pytest.raises(ValueError, match="reach >= 0"):
        Band(-1)
    with pytest.raises(ValueError, match="at least one token"):
        BlockList(0, ())
