"""Thresholds and patterns of heads, found by calibration: XAttention's and MInference's."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import accelpass
from accelpass.ir.errors import OptionError, PassError
from accelpass.passes.core.plan import Plan
from accelpass.passes.sparse_attention.head_plan import most_within
from accelpass.passes.sparse_attention.minference import MInference
from accelpass.passes.sparse_attention.patterns.head_patterns import A_SHAPE, BLOCKS, LINES, HeadPatterns
from accelpass.passes.sparse_attention.patterns.vertical_slash import VerticalSlash
from accelpass.passes.sparse_attention.xattention import Antidiagonals, XAttention, fewest_errors
from tests.passes.test_kv_methods import llama
from tests.passes.test_moa import data
from tests.passes.test_pbs_attn import SHAPES, operands, spec_for
from tests.passes.test_prompt_blocks import antidiagonal_blocks, check
from tests.sweep import examples

X = {"name": "xattention", "block": 4, "stride": 2}
M = {"name": "minference", "block": 4, "vertical": 3, "slash": 4, "first": 1, "local": 2}


@settings(max_examples=examples(15), deadline=None, derandomize=True)
@given(shape=SHAPES, stride=st.integers(1, 3), inside=st.integers(1, 3), seed=st.integers(0, 9))
def test_each_head_has_its_threshold(shape, stride, inside, seed):
    q, k, v = operands(**shape)
    block, n, heads, groups = stride * inside, shape["n"], q.shape[1], shape["groups"]
    draw = torch.Generator().manual_seed(seed)
    each = tuple((torch.randint(1, 11, (heads,), generator=draw) / 10).tolist())
    pairs = zip(q.flatten(0, 1), k.repeat_interleave(groups, 1).flatten(0, 1), each * len(q), strict=True)
    want = torch.stack([antidiagonal_blocks(a, b, block, stride, t, 0.3) for a, b, t in pairs])
    seen = want.repeat_interleave(block, 1).repeat_interleave(block, 2)[:, :n, :n].view(len(q), -1, n, n)
    check(Antidiagonals(block, stride, each), seen, q, k, v)


@settings(max_examples=examples(20), deadline=None)
@given(heads=st.integers(1, 4), most=st.integers(1, 3), seed=st.integers(0, 999))
def test_steps_go_where_they_cost_least(heads, most, seed):
    costs = torch.rand(heads, most + 1, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    taken = fewest_errors(costs)
    for steps in range(heads * most + 1):
        made = taken(steps)
        assert int(made.sum()) == steps
        ways = [w for w in product(range(most + 1), repeat=heads) if sum(w) == steps]
        least = min(sum(float(costs[h, own]) for h, own in enumerate(way)) for way in ways)
        assert float(costs[torch.arange(heads), made].sum()) == pytest.approx(least)


def a_shape(n: int, block: int, first: int, local: int) -> Tensor:
    """Whole blocks that hold a pair of the A-shape, ``(n, n)``."""
    at = torch.arange(n)
    away = at[:, None] - at
    return whole((away >= 0) & ((at < first) | (away < local)), block)


def whole(pairs: Tensor, block: int) -> Tensor:
    n = len(pairs)
    count = -(-n // block)
    # Rows beyond the end lie in the last block too: their lines go on there.
    tiles = F.pad(pairs, (0, count * block - n, 0, count * block - n)).view(count, block, count, block).any(3).any(1)
    return tiles.repeat_interleave(block, 0).repeat_interleave(block, 1)[:n, :n]


def alike(q: Tensor, k: Tensor, block: int, most: int, scale: float) -> Tensor:
    """The blocks of keys whose mean goes with the mean of a block of queries, of one head."""
    means = [torch.stack([part.mean(0) for part in x.split(block)]) for x in (q, k)]
    scores = means[0] @ means[1].T * scale
    tiles = torch.zeros_like(scores, dtype=torch.bool)
    for r, row in enumerate(scores):
        order = sorted(range(r + 1), key=lambda c: -float(row[c]))
        tiles[r, [*order[:most], r]] = True
    return tiles.repeat_interleave(block, 0).repeat_interleave(block, 1)[: len(q), : len(q)]


@settings(max_examples=examples(15), deadline=None, derandomize=True)
@given(shape=SHAPES, block=st.integers(1, 9), seed=st.integers(0, 99))
def test_each_head_has_its_pattern(shape, block, seed):
    q, k, v = operands(**shape)
    n, heads, groups, spec = shape["n"], q.shape[1], shape["groups"], spec_for(q, k)
    draw = torch.Generator().manual_seed(seed)
    drawn = torch.randint(1, 9, (heads, 3), generator=draw)
    each = tuple((int(a) % 3, int(b), int(c)) for a, b, c in drawn)
    select, seen = HeadPatterns(block, each, 2, 3), torch.zeros(len(q), heads, n, n, dtype=torch.bool)
    wide = k.repeat_interleave(groups, 1)
    for h, (kind, a, b) in enumerate(each):
        if kind == A_SHAPE:
            seen[:, h] = a_shape(n, block, a, b)
        elif kind == BLOCKS:
            seen[:, h] = torch.stack([alike(x, y, block, a, 0.3) for x, y in zip(q[:, h], wide[:, h], strict=True)])
        else:
            seen[:, h] = VerticalSlash(block, a, b, 2, 3).mask(q, k, spec)[:, h]
    check(select, seen, q, k, v)


def test_halving_finds_the_last_that_is_within():
    for most, last in product(range(9), range(9)):
        assert most_within(most, lambda n, last=last: n <= last) == min(most, last)


def compiled(model: Any, plan: Plan) -> Any:
    torch._dynamo.reset()
    return torch.compile(model, backend="accelpass", options={"plan": plan, "lowering": "eager"})


@pytest.mark.slow
@pytest.mark.parametrize("asked", [{**X, "loss": 0.5}, {**M, "density": 0.7}])
def test_calibrated_saved_loaded_compiled(asked, tmp_path):
    model, name = llama(layers=2), asked["name"]
    plan = accelpass.calibrate(model, data(28, 32, 40), [asked], progress=False)
    plan.save(tmp_path / "plan.json")
    plan = Plan.load(tmp_path / "plan.json")
    sites = sorted(key for key in plan.tensors if not key.endswith("/perplexity"))
    assert [key.split("/")[0] for key in sites] == [name] * 2
    before, after = plan.tensors[f"{name}/perplexity"].tolist()
    ids = data(28, 32, 40)[-1]
    with torch.no_grad():
        dense = model(input_ids=ids, use_cache=False).logits
        loss = F.cross_entropy(dense[0, :-1], ids[0, 1:])
        assert before == pytest.approx(float(loss.exp()), rel=1e-4)
        fast = compiled(model, plan)
        made = fast(input_ids=ids, use_cache=False).logits
        assert after == pytest.approx(float(F.cross_entropy(made[0, :-1], ids[0, 1:]).exp()), rel=1e-3)
    assert not torch.allclose(made, dense, atol=1e-3)
    took = accelpass.explain(fast).passes[name].took
    assert len(took) == 2 and all("head" in done.what for done in took.values())
    if name == "xattention":
        each = torch.cat([plan.tensors[key].flatten() for key in sites])
        assert after <= 1.5 * before and each.max() <= 0.9 and each.min() < 0.9, "some heads give up blocks"


@pytest.mark.slow
def test_a_model_that_no_calibration_saw():
    model = llama(layers=2)
    plan = Plan.of(model, [X], {"xattention/thresholds/model.layers.0.self_attn": torch.full((4, 1), 0.5)})
    ids = data(32)[0]
    with torch.no_grad():
        fast = compiled(model, plan)
        fast(input_ids=ids, use_cache=False)
        said = {site: done.what for site, done in accelpass.explain(fast).passes["xattention"].took.items()}
        assert "as the plan has no thresholds for it" in said["model.layers.1.self_attn"]
        assert "of each head" in said["model.layers.0.self_attn"]
        for wrong in (torch.full((3, 1), 0.5), torch.full((4, 1), float("nan"))):
            plan.tensors["xattention/thresholds/model.layers.0.self_attn"] = wrong
            with pytest.raises(Exception, match=r"thresholds of \[\d, 1\] for model.layers.0.* calibrate again"):
                compiled(model, plan)(input_ids=ids, use_cache=False)
        patterns = torch.tensor([[LINES, 3, 4], [7, 1, 1], [A_SHAPE, 1, 3], [BLOCKS, 1, 0]])
        plan = Plan.of(model, [M], {"minference/patterns/model.layers.0.self_attn": patterns})
        with pytest.raises(Exception, match="no pattern"):
            compiled(model, plan)(input_ids=ids, use_cache=False)


def test_nothing_to_calibrate():
    padded = {"input_ids": data(32)[0], "attention_mask": (torch.arange(32) > 4).long()[None]}
    with pytest.raises(PassError, match=r"xattention found no attention to calibrate: model\.layers\.0"):
        accelpass.calibrate(llama(), [padded], [X], progress=False)
    with pytest.raises(PassError, match="found no attention to calibrate: none is wanted"):
        accelpass.calibrate(llama(), data(32), [{**M, "include": ["nothing"]}], progress=False)


@pytest.mark.parametrize(
    ("method", "options"),
    [(XAttention, {"loss": -0.1}), (XAttention, {"loss": float("nan")}), (MInference, {"density": 0})],
)
def test_options(method, options):
    with pytest.raises(OptionError, match=next(iter(options))):
        method(**options)
