"""Re-ttention on videos: a band in each frame, against the card's mask of tokens."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import accelpass
from accelpass.ir.attention.lowering.frame_band import frame_band
from accelpass.ir.errors import OptionError
from accelpass.passes.step_cache.re_ttention import ReTtention
from tests.passes.step_truth import denoise
from tests.passes.test_re_ttention import TIMES, compiled, masked_rescaled, model_of
from tests.sweep import examples, sweep


def frame_mask(tokens: int, frame: int, text: int, reach: int) -> Tensor:
    """The card's, entry by entry: text sees and is seen by all, and each frame has a band at the same places."""
    seen = torch.zeros(tokens, tokens, dtype=torch.bool)
    for i in range(tokens):
        for j in range(tokens):
            seen[i, j] = i < text or j < text or abs((i - text) % frame - (j - text) % frame) <= reach
    return seen


@settings(max_examples=examples(15), deadline=None)
@given(
    batch=st.integers(1, 2), kv_heads=st.integers(1, 2), groups=st.integers(1, 2), frames=st.integers(1, 4),
    frame=st.integers(1, 9), text=st.integers(0, 9), reach=st.integers(0, 9), seed=st.integers(0, 99),
)  # fmt: skip
def test_any_band_is_attention_under_the_cards_mask(batch, kv_heads, groups, frames, frame, text, reach, seed) -> None:
    draw, n = torch.Generator().manual_seed(seed), text + frames * frame
    q = torch.randn(batch, kv_heads * groups, n, 8, generator=draw)
    k, v = (torch.randn(batch, kv_heads, n, 8, generator=draw) for _ in range(2))
    mask = frame_mask(n, frame, text, reach)
    out, lse = frame_band(q, k, v, 0.3, frame, text, reach)
    want = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=0.3, enable_gqa=True)
    torch.testing.assert_close(out, want, atol=2e-5, rtol=0)
    scores = (q @ k.repeat_interleave(groups, 1).mT * 0.3).masked_fill(~mask, -torch.inf)
    torch.testing.assert_close(lse, scores.logsumexp(-1), atol=2e-5, rtol=0)


@contextmanager
def reshaped(asked: ReTtention, layers: int) -> Iterator[None]:
    """In the place of torch's attention: the method for self-attention, call by call, with what is kept for each layer.

    The rest is that in front of the out-projection; after it, as on the card, it is the same.
    """
    kept: dict[int, tuple[Tensor, Tensor]] = {}
    calls, real = [0], F.scaled_dot_product_attention

    def sdpa(query: Tensor, key: Tensor, value: Tensor, *args: Any, **given: Any) -> Tensor:
        q, k, v = query, key, value
        if q.shape[2] != k.shape[2]:
            return real(q, k, v, *args, **given)
        step, layer = divmod(calls[0], layers)
        calls[0] += 1
        mask = frame_mask(q.shape[2], asked.frame, asked.text, int(asked.frame * asked.keep) // 2)
        since = step - asked.start
        if since < 0 or asked.interval == 1:
            return real(q, k, v)
        if since % asked.interval == 0:
            s = (q @ k.mT) / q.shape[-1] ** 0.5
            rho = (s.masked_fill(~mask, float("-inf")).logsumexp(-1, True) - s.logsumexp(-1, True)).exp()
            full = s.softmax(-1) @ v
            kept[layer] = rho, full - masked_rescaled(q, k, v, mask, rho)
            return full
        rho, rest = kept[layer]
        return masked_rescaled(q, k, v, mask, rho + asked.growth * (since % asked.interval - 1)) + rest

    F.scaled_dot_product_attention = sdpa
    try:
        yield
    finally:
        F.scaled_dot_product_attention = real


@pytest.mark.parametrize(
    ("name", "lowering"), sweep(("cogvideox", "eager"), ("wan", "eager"), ("cogvideox", "inductor"), fast=1)
)
def test_video_models_follow_the_card(name: str, lowering: str) -> None:
    model, call = model_of(name)
    text = call["encoder_hidden_states"].shape[1] if name == "cogvideox" else 0
    asked = {"keep": 0.3, "start": 1, "interval": 3, "frame": 16, "text": text}
    fast = compiled(model, lowering, **asked)
    with reshaped(ReTtention(**asked), 2):
        truth = denoise(model, call, TIMES, guided=False)
    for step, (a, b) in enumerate(zip(denoise(fast, call, TIMES, guided=False), truth, strict=True)):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-3, msg=lambda m, step=step: f"step {step}: {m}")
    took = accelpass.explain(fast).passes["re_ttention"].took
    assert {done.what for done in took.values()} == {"in 8 model calls that ran: window 4, full+ratio 3, full 1"}


def test_other_layouts_are_left_dense() -> None:
    model, call = model_of("wan")
    dense = denoise(model, call, TIMES)
    fast = compiled(model, frame=15, keep=0.2, start=0, interval=2)
    for a, b in zip(denoise(fast, call, TIMES), dense, strict=True):
        torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-4)
    skipped = str(accelpass.explain(fast).passes["re_ttention"].skipped)
    assert "its 48 tokens are not 0 of text and then frames of 15 each" in skipped


@pytest.mark.parametrize("options", [{"frame": -1}, {"text": -1}, {"text": 3}])
def test_options(options: dict[str, int]) -> None:
    with pytest.raises(OptionError, match=next(iter(options))):
        ReTtention(**options)
