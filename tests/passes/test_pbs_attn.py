"""PBS-Attn against its eager oracle, where it must equal the dense model, in whole models, and what it refuses."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import accelpass
from accelpass import KVCache
from accelpass.ir.attention import AttentionSpec, attend, detect, set_spec, spec_of
from accelpass.ir.attention.lowering import stacked
from accelpass.ir.attention.lowering.block_sparse import BLOCK_SPARSE
from accelpass.ir.core.program import Program
from accelpass.ir.errors import OptionError, SpecConflict
from accelpass.passes.core.base import Done, Pass, Record
from accelpass.passes.core.registry import registered
from accelpass.passes.sparse_attention.pbs_attn import PBSAttn, PermutedBlocks
from tests.passes import kv_truth
from tests.passes.pbs_truth import PBSOracle, oracle
from tests.passes.test_kv_methods import CAPACITY, compiled, error, llama, tokens
from tests.sweep import sweep

ATOL = 2e-5  # sums of at most 24 products of standard normals, in float32 and in another order
PBS = {"name": "pbs_attn", "block": 4, "segment": 8, "threshold": 0.6}


def operands(batch, kv_heads, groups, n, width=8, v_width=8, seed=0, dtype=torch.float32):
    draw = torch.Generator().manual_seed(seed)
    q = torch.randn(batch, kv_heads * groups, n, width, generator=draw) * 1.5
    k = torch.randn(batch, kv_heads, n, width, generator=draw)
    return q.to(dtype), k.to(dtype), torch.randn(batch, kv_heads, n, v_width, generator=draw).to(dtype)


def spec_for(q: Tensor, k: Tensor) -> AttentionSpec:
    return AttentionSpec(groups=q.shape[1] // k.shape[1], scale=0.3, causal=True)


def sparse(select: PermutedBlocks, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    blocks, counts, size, order = select.blocks(q, k, spec_for(q, k))
    return BLOCK_SPARSE(q, k, v, blocks, counts, size, -1, True, 0.3, order)[0]


SHAPES = st.fixed_dictionaries(
    {
        "batch": st.integers(1, 3),
        "kv_heads": st.integers(1, 2),
        "groups": st.integers(1, 3),
        "n": st.integers(1, 120),
        "seed": st.integers(0, 999),
    }
)
TILES = st.tuples(st.integers(1, 20), st.integers(1, 4)).map(lambda t: (t[0], t[0] * t[1]))


# Derandomized: where a sum reaches the threshold to the last bit, another order of additions takes another block.
@settings(max_examples=150, deadline=None, derandomize=True)
@given(shape=SHAPES, tiles=TILES, threshold=st.sampled_from([0.05, 0.5, 0.9, 1.0]), v_width=st.sampled_from([8, 12]))
def test_equals_the_oracle(shape, tiles, threshold, v_width):
    q, k, v = operands(**shape, v_width=v_width)
    select = PermutedBlocks(*tiles, threshold)
    groups = shape["groups"]
    made = [
        oracle(a, b.repeat_interleave(groups, 0), c.repeat_interleave(groups, 0), *tiles, threshold, 0.3)
        for a, b, c in zip(q, k, v, strict=True)
    ]
    want, seen = (torch.stack(parts) for parts in zip(*made, strict=True))
    causal = torch.ones(shape["n"], shape["n"], dtype=torch.bool).tril()
    assert torch.equal(select.mask(q, k, spec_for(q, k)) & causal, seen)
    torch.testing.assert_close(sparse(select, q, k, v), want, atol=ATOL, rtol=0)
    spec = spec_for(q, k).edited(by="a test", select=select)
    torch.testing.assert_close(attend(q, k, v, [], spec)[0], want, atol=ATOL, rtol=0)


@pytest.mark.parametrize("threshold", [0.3, 1.0])
@pytest.mark.parametrize("tiles", [(4, 4), (4, 8), (3, 12)])
def test_whole_segments_need_no_mask(tiles, threshold, monkeypatch):
    """The kernel reads a segment that it is part of in the tokens' own order, where causality is a switch."""
    q, k, v = operands(2, 2, 2, 6 * tiles[1])
    select = PermutedBlocks(*tiles, threshold)
    want = sparse(select, q, k, v)
    monkeypatch.setattr(stacked, "_mask", None)
    torch.testing.assert_close(sparse(select, q, k, v), want, atol=0, rtol=0)
    seen = select.mask(q, k, spec_for(q, k)) & torch.ones(6 * tiles[1], 6 * tiles[1], dtype=torch.bool).tril()
    exact = F.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=0.3, enable_gqa=True)
    torch.testing.assert_close(want, exact, atol=ATOL, rtol=0)


@settings(max_examples=60, deadline=None)
@given(shape=SHAPES, tiles=TILES)
def test_threshold_one_and_one_segment_are_dense(shape, tiles):
    q, k, v = operands(**shape)
    want = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.3, enable_gqa=True)
    torch.testing.assert_close(sparse(PermutedBlocks(*tiles, 1.0), q, k, v), want, atol=ATOL, rtol=0)
    block, segments = tiles[0], -(-shape["n"] // tiles[0])
    one = PermutedBlocks(block, block * segments, 0.01)
    torch.testing.assert_close(sparse(one, q, k, v), want, atol=ATOL, rtol=0)


@settings(max_examples=60, deadline=None)
@given(shape=SHAPES, tiles=TILES, threshold=st.floats(0.05, 0.95))
def test_order_and_blocks_are_as_the_method_says(shape, tiles, threshold):
    """A bijection inside each segment; the estimate's mass reaches the threshold, by no block too many; what is forced
    is there; a higher threshold only adds."""
    q, k, _ = operands(**shape)
    n, (b, g), spec = shape["n"], tiles, spec_for(q, k)
    select = PermutedBlocks(b, g, threshold)
    order = select.order(q, k, spec)
    whole = n // g * g
    inside = order[:, :whole].view(len(order), -1, g) if whole else order[:, :0]
    if whole:
        assert torch.equal(inside.sort(-1).values.flatten(1), torch.arange(whole).expand(len(order), -1))
    assert torch.equal(order[:, whole:], torch.arange(whole, n).expand(len(order), -1))
    chosen = select.chosen(q, k, order, spec)
    segment = torch.arange(chosen.shape[-1]) * b // g
    early = segment[None] < segment[:, None]
    assert not (chosen & (segment[None] > segment[:, None])).any()
    assert (chosen | (segment[None] != segment[:, None])).all()
    first = (order == 0).int().argmax(-1) // b
    assert chosen[torch.arange(len(order)), :, first].all()
    blocks = torch.arange(n) // b
    mean_of = F.one_hot(blocks).float().T / torch.bincount(blocks)[:, None]
    wide = k.repeat_interleave(spec.groups, 1).flatten(0, 1)
    placed = wide.gather(1, order[..., None].expand(-1, -1, wide.shape[-1]))
    logits = mean_of @ q.flatten(0, 1) @ (mean_of @ placed).mT * spec.scale
    shares = torch.nan_to_num(logits.masked_fill(~early, -math.inf).softmax(-1))
    mass = (shares * chosen).sum(-1)[:, early.any(-1)]
    assert (mass > threshold - 1e-5).all()
    free = torch.where(chosen & early & (torch.arange(len(segment)) != first[:, None, None]), shares, math.inf)
    least = free.amin(-1, keepdim=True)
    assert ((shares * (shares > least)).sum(-1) < threshold + 1e-5).all()  # the last one taken was needed
    assert (PermutedBlocks(b, g, min(1.0, threshold + 0.2)).chosen(q, k, order, spec) | ~chosen).all()


def test_a_later_token_changes_no_earlier_output():
    """What is attended to is causal. Which blocks are read also depends on the last queries, in the paper too: with all
    blocks nothing of later tokens is seen, with some the values of later tokens are not."""
    q, k, v = operands(2, 2, 2, 77)
    for threshold, moved in ((1.0, (q, k, v)), (0.5, (v,))):
        select = PermutedBlocks(8, 16, threshold)
        before = sparse(select, q, k, v)
        for token in (0, 15, 16, 40, 76):
            changed = [t.clone() for t in (q, k, v)]
            for t, own in zip(changed, (q, k, v), strict=True):
                if any(own is m for m in moved):
                    t[:, :, token:] += 3
            after = sparse(select, *changed)
            torch.testing.assert_close(after[:, :, :token], before[:, :, :token], atol=ATOL, rtol=0)
            assert not torch.allclose(after[:, :, token:], before[:, :, token:])


@pytest.mark.parametrize(
    ("dtype", "atol"), sweep((torch.bfloat16, 0.05), (torch.float64, 1e-6), (torch.float16, 6e-3), fast=2)
)
def test_other_dtypes(dtype, atol):
    """Against exact attention over the same blocks: the estimate is computed from what the dtype holds."""
    q, k, v = operands(2, 2, 2, 90, dtype=dtype)
    select = PermutedBlocks(8, 16, 0.7)
    seen = select.mask(q, k, spec_for(q, k)) & torch.ones(90, 90, dtype=torch.bool).tril()
    want = F.scaled_dot_product_attention(
        q.double(), k.double(), v.double(), attn_mask=seen, scale=0.3, enable_gqa=True
    )
    got = sparse(select, q, k, v)
    assert got.dtype == dtype
    torch.testing.assert_close(got.double(), want, atol=atol, rtol=0)


def test_rounding_does_not_empty_a_selection():
    """Equal shares of many blocks: their sum in a half type would stop growing below the threshold."""
    select = PermutedBlocks(1, 1, 0.999)
    q, k, _ = operands(1, 1, 1, 1200, dtype=torch.bfloat16)
    chosen = select.chosen(q * 0, k, select.order(q * 0, k, spec_for(q, k)), spec_for(q, k))
    assert 0.99 * 1199 <= chosen[0, -1].sum() <= 1200


# Whole models


@pytest.mark.parametrize("batch", sweep(2, 1))
@pytest.mark.parametrize("lowering", sweep("eager", "inductor"))
def test_a_model_with_a_cache_equals_the_oracle(batch, lowering):
    """A prompt, single tokens, a further piece, which is dense."""
    pieces = tokens(batch, 29, 1, 1, 5, 1)
    assert error(llama(), PBSOracle(4, 8, 0.6), [PBS], pieces, lowering) < 1e-5
    torch._dynamo.reset()
    assert error(llama(), kv_truth.Dense(), [PBS], pieces) > 1e-3  # it does leave something out


def test_threshold_one_is_the_dense_model():
    assert error(llama(), kv_truth.Dense(), [PBS | {"threshold": 1.0}], tokens(2, 29, 1, 1)) < 1e-5


def forward(model: Any, ids: Tensor, **more: Any) -> Tensor:
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False, **more).logits


def oracle_forward(model: Any, ids: Tensor, oracle_: kv_truth.Oracle) -> Tensor:
    with kv_truth.attending(model, oracle_):
        return forward(model, ids)


@pytest.mark.slow
@pytest.mark.parametrize("dynamic", sweep(None, False, True))
def test_a_plain_forward_of_any_length(dynamic):
    """Lengths that are no multiples of a block, one graph for all of them once a second one was seen."""
    model = llama()
    options = {"lowering": "eager", "passes": [PBS]}
    fast = torch.compile(model, backend="accelpass", options=options, dynamic=dynamic)
    lengths = (21, 34, 43, 57, 60) if dynamic is not False else (21, 34)
    for n in lengths:
        (ids,) = tokens(2, n, seed=n)
        want = oracle_forward(model, ids, PBSOracle(4, 8, 0.6))
        torch.testing.assert_close(forward(fast, ids), want, atol=1e-4, rtol=1e-4)
    graphs = accelpass.explain(fast).graphs
    assert len(graphs) == {False: 2, True: 1, None: 2}[dynamic]


@pytest.mark.slow
def test_compiled_by_inductor_for_any_length():
    model = llama()
    fast = torch.compile(model, backend="accelpass", options={"passes": [PBS]}, dynamic=True)
    for n in (21, 43, 60):
        (ids,) = tokens(2, n, seed=n)
        want = oracle_forward(model, ids, PBSOracle(4, 8, 0.6))
        torch.testing.assert_close(forward(fast, ids), want, atol=1e-4, rtol=1e-4)
    assert len(accelpass.explain(fast).graphs) == 1


@pytest.mark.slow
def test_prompts_of_any_length_share_a_graph():
    model, graphs = llama(), []
    fast = compiled(model, PBS)
    for n in (21, 34, 43, 37):
        kv_truth.fed(fast, KVCache(model, CAPACITY), tokens(1, n, 1))
        graphs.append(len(accelpass.explain(fast).graphs))
    assert graphs == [2, 3, 3, 3]  # the first length and decoding, then any length


def took(fast: Any) -> tuple[list[str], list[str]]:
    done = accelpass.explain(fast).passes["pbs_attn"]
    return sorted(done.took), sorted(set(done.skipped.values()))


SITES = ["model.layers.0.self_attn", "model.layers.1.self_attn"]


@pytest.mark.parametrize(
    "others",
    sweep(
        [{"name": "tidaldecode", "budget": 6, "first": 0, "reselect": 5}],
        [{"name": "int8_weights"}],
        [{"name": "int4_weights", "group_size": 32}],
        [{"name": "kv_quant", "bits": 8}],
        [{"name": "kv_window", "budget": 0.5}],
    ),
    ids=lambda given_: given_[0]["name"],
)
def test_with_other_passes_the_prompt_is_that_of_the_oracle(others):
    """With each, the first logits come from the same blocks as without, and later tokens from the other pass's cache."""
    pieces = tokens(1, 29, 1, 1)
    fast = compiled(llama(), PBS, *others)
    both = kv_truth.fed(fast, KVCache(llama(), CAPACITY), pieces)
    assert took(fast)[0] == SITES
    assert accelpass.explain(fast).passes[others[0]["name"]].took
    torch._dynamo.reset()
    model = llama()
    if "weights" not in others[0]["name"]:
        with kv_truth.attending(model, PBSOracle(4, 8, 0.6)) as cache:
            want = kv_truth.fed(model, cache, pieces[:1])
        torch.testing.assert_close(both[:1], want, atol=1e-4, rtol=1e-4)
        torch._dynamo.reset()
    alone = kv_truth.fed(compiled(model, PBS), KVCache(model, CAPACITY), pieces)
    assert not torch.allclose(both[1:], alone[1:], atol=1e-5)
    # Each of the two changes the model on its own account: together they are near neither, and near what they are.
    torch._dynamo.reset()
    dense = kv_truth.fed(compiled(model, *others), KVCache(model, CAPACITY), pieces)
    assert not torch.allclose(both[0], dense[0], atol=1e-4)


@pytest.mark.slow
def test_the_two_passes_that_choose_tokens_decode_as_tidaldecode_says():
    """At a budget of all tokens its decoding is dense, whatever the prompt read."""
    tidal = {"name": "tidaldecode", "budget": CAPACITY, "first": 0, "reselect": 5}
    assert error(llama(), PBSOracle(4, 8, 0.6), [PBS, tidal], tokens(2, 29, 1, 1, 1)) < 1e-5


@pytest.mark.parametrize("other", sweep("h2o", "mikv"))
def test_a_pass_that_scores_the_prompt_is_refused_by_name(other):
    fast = compiled(llama(), PBS, other)
    with pytest.raises(
        Exception, match=f"'{other}' scores tokens.*'pbs_attn' computes some blocks.*include="
    ) as caught:
        kv_truth.fed(fast, KVCache(llama(), CAPACITY), tokens(1, 29))
    assert SpecConflict.__name__ in repr(caught.value) or isinstance(caught.value, SpecConflict)
    torch._dynamo.reset()
    apart = [PBS | {"include": ["*.0.*"]}, {"name": other, "include": ["*.1.*"]}]
    assert kv_truth.fed(compiled(llama(), *apart), KVCache(llama(), CAPACITY), tokens(1, 29, 1)).isfinite().all()


@dataclass(frozen=True)
class Everywhere(Pass):
    """A pass that does not look whether an attention is a prompt's."""

    name: ClassVar[str] = "everywhere"
    phase: ClassVar[str] = "attention"
    summary: ClassVar[str] = "for a test"

    def apply(self, program: Program, record: Record) -> None:
        for found in program.analysis(detect):
            edited = spec_of(found.node).edited(by=self.name, select=PermutedBlocks(4, 8, 0.6))
            set_spec(found.node, edited)
            record.take(found.path, Done("blocks"))


def test_blocks_of_a_cache_are_refused_and_not_dropped():
    model = llama()
    fast, cache = compiled(model, Everywhere()), KVCache(model, CAPACITY)
    kv_truth.fed(fast, cache, tokens(1, 29))
    with pytest.raises(Exception, match=r"the selection pbs_attn at model\.layers\.0\.self_attn is for prompts"):
        kv_truth.fed(fast, cache, tokens(1, 1))


# What it does not take


class Attend(nn.Module):
    def __init__(self, **options: Any):
        super().__init__()
        self.options = options

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=True, **self.options)


def skipped(module: nn.Module, *given_: Tensor, **options: Any) -> list[str]:
    torch._dynamo.reset()
    fast = compiled(module, PBS | options)
    with torch.no_grad():
        got = fast(*given_)
        torch.testing.assert_close(got, module(*given_))
    sites, reasons = took(fast)
    assert not sites
    return reasons


def test_reasons():
    q, k, v = operands(2, 2, 2, 30)
    (reason,) = skipped(Attend(), q, k, v)
    assert "it is not causal" in reason
    (reason,) = skipped(Attend(), q[:, :, -1:], k, v)
    assert "decoding stays dense" in reason
    (reason,) = skipped(Attend(is_causal=True), q[:, :, -5:], k, v)
    assert "5 queries read 30 keys" in reason
    (reason,) = skipped(Attend(is_causal=True), q[:, :, :8], k[:, :, :8], v[:, :, :8])
    assert "no more than one segment of 8" in reason
    near = torch.ones(30, 30, dtype=torch.bool).tril().triu(-4)
    (reason,) = skipped(Attend(), q, k, v, near)
    assert "its mask may be more than causal" in reason
    (reason,) = skipped(Attend(is_causal=True), q, k, v, exclude=["*"])
    assert "exclude" in reason


def test_padding_is_left_dense_with_a_reason():
    model, (ids,) = llama(), tokens(2, 20)
    mask = torch.ones(2, 20, dtype=torch.long)
    mask[0, :5] = 0
    fast = compiled(model, PBS)
    got = forward(fast, ids, attention_mask=mask)
    torch.testing.assert_close(got, forward(model, ids, attention_mask=mask), atol=1e-4, rtol=1e-4)
    sites, (reason,) = took(fast)
    assert not sites and "padding" in reason


def test_sites_have_settings_of_their_own():
    model, (ids,) = llama(), tokens(1, 30)
    fast = compiled(model, PBS | {"threshold": 1.0, "sites": {"*.1.*": {"threshold": 0.01}}})
    forward(fast, ids)
    done = accelpass.explain(fast).passes["pbs_attn"].took
    assert ["100%" in done[SITES[0]].what, "1% of" in done[SITES[1]].what] == [True, True]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"block": 0}, "block=0 is not supported; use 1 token or more"),
        ({"segment": 100}, "segment=100 is not supported; use a multiple of block=128"),
        ({"segment": 64}, "segment=64 is not supported; use a multiple of block=128"),
        ({"threshold": 0.0}, "threshold=0.0 is not supported; use a share above 0"),
        ({"threshold": 1.5}, "threshold=1.5 is not supported"),
        ({"threshold": math.nan}, "threshold=nan is not supported"),
        ({"treshold": 0.5}, "unknown option 'treshold' .did you mean 'threshold'"),
        ({"block": 1.5}, "option 'block' is 1.5"),
        ({"sites": {"*": {"segment": 3}}}, "segment=3 is not supported; use a multiple of block=128"),
    ],
)
def test_bad_options_name_the_legal_ones(options, says):
    with pytest.raises(OptionError, match="pbs_attn: " + says):
        PBSAttn.from_options(options)


def test_is_registered():
    assert registered()["pbs_attn"] is PBSAttn


@pytest.mark.slow
@pytest.mark.parametrize("tokens_", sweep(50, 33, 64))
def test_keys_after_the_last_whole_segment_keep_their_places_in_compiled_code(tokens_):
    """Inductor's own code for the sort once forgot them, or wrote past the end."""
    select, spec = PermutedBlocks(8, 16, 0.6), AttentionSpec(groups=2, scale=0.3, causal=True)
    torch.manual_seed(0)
    q, k = torch.randn(1, 4, tokens_, 8), torch.randn(1, 2, tokens_, 8)

    def listed(q: torch.Tensor, k: torch.Tensor) -> list[torch.Tensor]:
        made = select.blocks(q, k, spec)
        return [made.blocks, made.counts, made.order]

    for got, want in zip(torch.compile(listed)(q, k), listed(q, k), strict=True):
        assert torch.equal(got, want)
