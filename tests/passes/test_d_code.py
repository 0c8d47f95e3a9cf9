"""Which frames and tokens of a video D-CoDe reads are those of its card's plain form."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from accelpass.ir.errors import OptionError
from accelpass.passes.visual_tokens.frames.d_code import answered_in_parts, chosen_frames, merged_tokens, video_tokens
from tests.sweep import examples


def card_frames(emb: Tensor, n: int, ratio: float) -> list[int]:
    e = F.normalize(emb, dim=-1)
    s, f = e @ e.t(), emb.shape[0]
    sel = [int(x) for x in np.linspace(0, f - 1, num=int(n * ratio), dtype=int)]
    while len(sel) < n:
        score = s[:, sel].mean(1)
        score[sel] = float("inf")
        sel.append(int(score.argmin()))
    return sorted(sel)


def card_merge(x: Tensor, k: int, thr: float, compat: bool) -> Tensor:
    x = x[x.norm(dim=-1).topk(min(k, x.shape[0])).indices].clone()
    u = F.normalize(x, dim=-1)
    sim = (u @ u.t()) >= thr
    keep = torch.ones(x.shape[0], dtype=torch.bool)
    for i in range(x.shape[0]):
        if not keep[i]:
            continue
        g = sim[i].nonzero()[:, 0] if compat else (sim[i] & keep).nonzero()[:, 0]
        if len(g) > 1:
            x[i] = x[g].mean(0)
            keep[g[1:]] = False
            if not compat:
                keep[i] = True
    return x[keep]


@settings(max_examples=examples(40), deadline=None)
@given(frames=st.integers(1, 20), share=st.floats(0.05, 1), uniform=st.floats(0.05, 1), seed=st.integers(0, 999))
def test_frames_are_the_cards(frames: int, share: float, uniform: float, seed: int):
    torch.manual_seed(seed)
    count, emb = max(1, int(frames * share)), torch.randn(frames, 6)
    got = chosen_frames(emb, count, uniform)
    assert len(got) == count and got == sorted(set(got)) and got[0] >= 0 and got[-1] < frames
    if int(count * uniform):
        assert got == card_frames(emb, count, uniform)
    assert chosen_frames(emb, frames, uniform) == list(range(frames))


@settings(max_examples=examples(40), deadline=None)
@given(
    tokens=st.integers(1, 24), kept=st.integers(1, 30), threshold=st.floats(-0.5, 1.2), compat=st.booleans(), seed=st.integers(0, 999)
)  # fmt: skip
def test_tokens_are_the_cards(tokens: int, kept: int, threshold: float, compat: bool, seed: int):
    torch.manual_seed(seed)
    x = torch.randn(tokens, 3)
    before = x.clone()
    got = merged_tokens(x, kept, threshold, compat)
    torch.testing.assert_close(got, card_merge(x, kept, threshold, compat))
    assert torch.equal(x, before) and len(got) <= min(kept, tokens)
    if threshold > 1:  # nothing is merged: the tokens in the order of their norms
        assert torch.equal(got, x[x.norm(dim=-1).argsort(descending=True)][:kept])


def test_a_still_video_is_few_tokens():
    still = torch.randn(1, 9, 4).expand(5, 9, 4)
    read = video_tokens(still, torch.ones(5, 2), 3, kept=9, threshold=0.99)
    assert read.shape == (27, 4)
    alike = torch.ones(5, 9, 4)
    assert torch.equal(video_tokens(alike, torch.ones(5, 2), 3, threshold=0.99), torch.ones(3, 4))


def test_a_question_is_asked_behind_the_answers_to_its_parts():
    heard: list[str] = []

    def ask(text: str) -> str:
        heard.append(text)
        return f"a{len(heard)}."

    assert answered_in_parts(ask, "why?", lambda question: ["who?", "where?"]) == "a3."
    assert heard == ["who?", "where?", "who? a1.\nwhere? a2.\nwhy?"]
    assert answered_in_parts(ask, "why?", []) == "a4." and heard[-1] == "why?"


@pytest.mark.parametrize(
    ("run", "why"),
    [
        (lambda: chosen_frames(torch.ones(3, 2), 4), "count=4 frames of 3"),
        (lambda: chosen_frames(torch.ones(3, 2), 0), "count=0 frames of 3"),
        (lambda: chosen_frames(torch.ones(3, 2), 2, 0.0), "uniform=0.0"),
        (lambda: chosen_frames(torch.full((3, 2), float("nan")), 2), "not finite"),
        (lambda: chosen_frames(torch.ones(3), 2), "not finite numbers"),
        (lambda: merged_tokens(torch.ones(2, 3, 4)), "give each frame by itself"),
        (lambda: merged_tokens(torch.full((2, 3), float("inf"))), "not finite"),
        (lambda: merged_tokens(torch.ones(2, 3), 0), "kept=0"),
        (lambda: video_tokens(torch.ones(2, 3, 4), torch.ones(3, 2), 1), "of 3 embeddings"),
    ],
)
def test_bad_input_is_refused(run, why: str):
    with pytest.raises(OptionError, match=why):
        run()
