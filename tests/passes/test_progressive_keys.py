"""Progressive quantization of keys against its card, what it reads, and a model with a cache."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import accelpass
from accelpass import KVCache
from accelpass.ir.attention import AttentionSpec
from accelpass.ir.errors import OptionError
from accelpass.ir.kv.banks import Floats
from accelpass.ir.kv.storage import Layout, New, Query
from accelpass.passes.kv_cache.reading import progressive_keys
from accelpass.passes.kv_cache.reading.progressive_keys import (
    UPPER,
    HalvedKeys,
    ProgressiveKeys,
    halves,
    refined_by_all,
    refined_scores,
    upper,
)
from tests.passes.kv_truth import fed
from tests.passes.test_kv_methods import compiled, llama, tokens
from tests.sweep import examples


def progressive(q: Tensor, k: Tensor, scale: float, thr: float) -> Tensor:
    """The card's, of one head: probabilities of ``q (rows, d)`` over ``k (n, d)``, with a step for each key."""
    step = k.abs().amax(-1, keepdim=True) / 127
    full = (k / step).round()
    coarse = torch.floor(full / 16) * 16
    of = lambda codes: ((q @ (codes * step).mT) * scale).softmax(-1)  # noqa: E731
    p = of(coarse)
    return torch.where(p.amax(-1, True) < thr, of(full), p)


@settings(max_examples=examples(15), deadline=None)
@given(
    st.integers(1, 2),
    st.sampled_from([1, 3]),
    st.integers(1, 25),
    st.sampled_from([0.0, 0.1, 0.3, 1.5]),
    st.integers(0, 2**31),
)
def test_attention_is_the_cards(batch, groups, held_tokens, threshold, seed):
    random, width = torch.Generator().manual_seed(seed), 16
    layout, store, format = Layout(2, groups, width, width, torch.float32, 32), HalvedKeys(threshold), Floats()
    start = torch.zeros(batch, dtype=torch.int64)
    held = {s.name.removeprefix("kv."): s.start(start) for s in store.states(layout, format)}
    k, v = (torch.randn(batch, 2, held_tokens + 1, width, generator=random) for _ in "kv")
    q = torch.randn(batch, 2 * groups, 1, width, generator=random)
    store.fill(held, New(q, k[:, :, :-1], v[:, :, :-1], start), layout, format)
    new = New(q, k[:, :, -1:], v[:, :, -1:], start + held_tokens)
    got = store.extend(held, new, Query(q, [], AttentionSpec(groups=groups, scale=0.5), layout), layout, format)
    for b in range(batch):
        for head in range(2 * groups):
            at = head // groups
            want = progressive(q[b, head], k[b, at], 0.5, threshold) @ v[b, at]
            torch.testing.assert_close(got[b, head], want, atol=1e-4, rtol=1e-3)
    assert held["keys.high"].nbytes + held["keys.low"].nbytes == k[:, :, :1].nbytes // 4 * 32  # 8 bits of 32


def test_lower_halves_are_read_for_flat_heads_alone(monkeypatch):
    """Of two heads, the one with a peak is left as it is, and its lower half is not touched."""
    k = torch.randn(1, 2, 40, 8, generator=torch.Generator().manual_seed(0))
    high, low, step = halves(k)
    q = torch.zeros(1, 2, 1, 8)
    q[0, 0] = 20 * k[0, 0, 3]
    scores, seen = torch.matmul(q, coarse(high, step).mT), []
    monkeypatch.setattr(progressive_keys, "unpack", lambda codes, bits: seen.append(codes) or real(codes, bits))
    made = refined_scores(scores, q, low, step, 0.5)
    (codes,) = seen
    assert torch.equal(codes, low[0, 1]) and torch.equal(made[0, 0], scores[0, 0])
    torch.library.opcheck(refined_scores, (scores, q, low, step, 0.5))


real = progressive_keys.unpack


def coarse(high: Tensor, step: Tensor) -> Tensor:
    return UPPER.decode(upper(high, step), torch.float32)


def test_halves_are_the_byte():
    k = torch.randn(2, 3, 5, 16, generator=torch.Generator().manual_seed(0))
    high, low, step = halves(k)
    whole = coarse(high, step) + real(low, 4).float() * step
    assert ((whole - k).abs() <= 0.5001 * step).all()
    assert (coarse(high, step) <= whole).all() and high.shape == low.shape == (2, 3, 5, 8)


def test_in_a_model():
    """A prompt, tokens one by one, a further prompt; always in full is near the dense model, never is farther."""
    model, pieces, far = llama(layers=1), tokens(1, 12, 1, 1, 3, 1), []
    with torch.no_grad():
        dense = fed(model, KVCache(model, 32), pieces)
        for threshold in (2.0, 0.0):
            torch._dynamo.reset()
            fast = compiled(model, {"name": "progressive_keys", "threshold": threshold})
            got = fed(fast, KVCache(model, 32), pieces)
            far.append(float((got - dense).abs().max() / dense.abs().max()))
    assert far[0] < 0.02 < far[1]
    assert accelpass.explain(fast).passes["progressive_keys"].took


@torch.no_grad()
def test_guesses_are_read_as_single_tokens_are():
    """Not in full, as several tokens that are no guesses are; those taken back leave no trace."""
    model = llama(layers=1)
    fast = compiled(model, {"name": "progressive_keys", "threshold": 0.0})
    prompt, first, guesses, last = tokens(1, 12, 1, 2, 1)
    cache, alone = KVCache(model, 32), KVCache(model, 32)
    wanted = [fed(fast, alone, [piece])[0] for piece in (prompt, first, guesses[:, :1], last)]
    cache.activate_past_recording()
    fed(fast, cache, [prompt])
    logits = fast(input_ids=torch.cat([first, guesses], 1), past_key_values=cache).logits
    torch.testing.assert_close(logits[:, :2], torch.stack(wanted[1:3], 1), atol=1e-4, rtol=1e-4)
    cache.crop(-1)
    torch.testing.assert_close(fed(fast, cache, [last])[0], wanted[3], atol=1e-4, rtol=1e-4)


def test_both_forms_give_the_same():
    """Lower halves read for flat heads alone, and for all: what a GPU and a file do."""
    draw = torch.Generator().manual_seed(1)
    k, q = torch.randn(2, 2, 30, 8, generator=draw), 2 * torch.randn(2, 2, 3, 8, generator=draw)
    high, low, step = halves(k)
    scores = torch.matmul(q, coarse(high, step).mT)
    for threshold in (0.0, 0.3, 2.0):
        made = refined_scores(scores, q, low, step, threshold)
        torch.testing.assert_close(made, refined_by_all(scores, q, low, step, threshold), atol=1e-4, rtol=1e-4)


@pytest.mark.slow
def test_an_onnx_file(tmp_path):
    """A file reads both halves of all heads, and uses the lower ones where the pass does."""
    model, (ids,) = llama(layers=1), tokens(1, 12)
    asked = {"input_ids": ids, "past_key_values": KVCache(model, 32)}
    report = accelpass.export_onnx(model, (), tmp_path / "m.onnx", ["progressive_keys"], kwargs=asked)
    assert report.difference < 1e-4


@pytest.mark.slow
@torch.no_grad()
def test_compiled_code_gives_the_same():
    """Prompt, single tokens, a further prompt, and candidates of which some are taken back."""
    model, pieces = llama(layers=1), tokens(1, 12, 1, 1, 3, 1)
    for threshold in (0.3, 2.0):
        made = []
        for lowering in ("eager", "inductor"):
            torch._dynamo.reset()
            fast = compiled(model, {"name": "progressive_keys", "threshold": threshold}, lowering=lowering)
            cache = KVCache(model, 32)
            out = [fed(fast, cache, pieces)]
            cache.activate_past_recording()
            out.append(fast(input_ids=pieces[3], past_key_values=cache).logits)
            cache.crop(-2)
            out.append(fed(fast, cache, pieces[1:2]))
            made.append(torch.cat([one.flatten() for one in out]))
        torch.testing.assert_close(made[1], made[0], atol=2e-4, rtol=1e-3)


def test_refused():
    model = llama(layers=1, head_dim=12, groups=1)
    fast = compiled(model, "progressive_keys")
    fed(fast, KVCache(model, 32), tokens(1, 5, 1))
    skipped = accelpass.explain(fast).passes["progressive_keys"].skipped
    assert any("12 channels do not divide" in why for why in skipped.values()), skipped
    with pytest.raises(OptionError, match="0 or more"):
        ProgressiveKeys(threshold=float("nan"))
