"""STC in a whole model: the tower computes what the card's layer computes, and what is left of each frame is the card's choice."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import accelpass
from accelpass.ir.errors import OptionError
from accelpass.passes.visual_tokens.frames.stc import STC, novel
from tests.passes.visual_truth import IMAGE, answer, answered, asked, llava
from tests.small_models import relative_error
from tests.sweep import examples, sweep


@pytest.fixture(autouse=True)
def _one_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRANSFORMERS_DISABLE_TORCH_CHECK", "1")


def card_layer(layer: Any, x: Tensor, ref: Any, ratio: float) -> tuple[Tensor, Any]:
    """The card's, of frames ``(F, T, C)``; ``ref`` None for a full pass."""
    a, frames, tokens, channels = layer.self_attn, *x.shape
    split = lambda t: t.view(frames, -1, a.num_heads, channels // a.num_heads).transpose(1, 2)  # noqa: E731
    att = lambda q, k, v: a.out_proj(  # noqa: E731
        F.scaled_dot_product_attention(split(q), split(k), split(v)).transpose(1, 2).reshape(frames, -1, channels)
    )
    h = layer.layer_norm1(x)
    k = a.k_proj(h)
    if ref is None:
        v = a.v_proj(h)
        added = att(a.q_proj(h), k, v)
        m = layer.mlp(layer.layer_norm2(x + added))
        return x + added + m, (k[-1], v[-1], added[-1], m[-1])
    kr, vr, ar, mr = ref
    u = F.cosine_similarity(k, kr[None], dim=-1).topk(max(1, int(tokens * ratio)), 1, largest=False).indices
    ix = u[..., None].expand(-1, -1, channels)
    hs, base = h.gather(1, ix), lambda r: r[None].repeat(frames, 1, 1)
    v = base(vr).scatter(1, ix, a.v_proj(hs))
    added = base(ar).scatter(1, ix, att(a.q_proj(hs), k, v))
    h = x + added
    return h + base(mr).scatter(1, ix, layer.mlp(layer.layer_norm2(h.gather(1, ix)))), ref


@torch.no_grad()
def card_tower(model: Any, pixels: Tensor, ratio: float, interval: int, chunk: int) -> Tensor:
    """Patches of a video's frames, ``(F, patches, C)``."""
    tower, refs, made = model.model.vision_tower, [None] * 3, []
    for number, frames in enumerate(pixels.split(chunk)):
        x = tower(frames, output_hidden_states=True).hidden_states[0]
        for at, layer in enumerate(tower.encoder.layers[:3]):
            x, refs[at] = card_layer(layer, x, None if number % interval == 0 else refs[at], ratio)
        made.append(x[:, 1:])
    return torch.cat(made)


def card_prune(x: Tensor, tokens: int, mem: list[Tensor], k: int) -> Tensor:
    ch = x.var(0, unbiased=False).topk(x.shape[1] // 2, largest=False).indices
    z = x[:, ch].view(-1, tokens, len(ch))
    mem.append(z.mean((0, 1)))
    f = F.normalize(z, dim=-1)
    mu_m = F.normalize(torch.stack(mem).mean(0), dim=-1)
    g = lambda mu: sum((-((f - mu) ** 2).sum(-1) / (2 * a)).exp() for a in (0.125, 0.25, 0.5, 1.0, 2.0))  # noqa: E731
    s = g(f.mean(1, True)) + g(mu_m)
    idx = s.topk(min(k, tokens), 1, largest=False).indices.sort(1).values
    return (idx + torch.arange(z.shape[0])[:, None] * tokens).flatten()


def card_choice(x: Tensor, tokens: int, chunk: int, k: int) -> Tensor:
    """Of one video ``(F * tokens, C)``, chunk by chunk."""
    mem: list[Tensor] = []
    parts = [card_prune(p, tokens, mem, k) + n * chunk * tokens for n, p in enumerate(x.split(chunk * tokens))]
    return torch.cat(parts)


@settings(max_examples=examples(15), deadline=None)
@given(
    videos=st.integers(1, 2), frames=st.integers(1, 5), patches=st.integers(1, 9), chunk=st.integers(1, 3),
    kept=st.integers(1, 9), seed=st.integers(0, 99),
)  # fmt: skip
def test_the_choice_is_the_cards(videos: int, frames: int, patches: int, chunk: int, kept: int, seed: int):
    torch.manual_seed(seed)
    kept, x = min(kept, patches), torch.randn(videos, frames * patches, 6)
    (got,) = novel(patches, frames, chunk, kept, 6, x)
    for video, rows in enumerate(got.view(videos, -1)):
        want = card_choice(x[video], patches, chunk, kept)
        assert torch.equal(rows - video * frames * patches, want) and bool((rows.diff() > 0).all())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("keep", "update", "interval", "chunk", "texts", "frames"),
    sweep((0.5, 0.3, 2, 1, 1, 3), (0.4, 0.25, 2, 1, 2, 2), (0.5, 0.5, 2, 2, 1, 5), (0.5, 1.0, 3, 1, 1, 3)),
)
def test_the_language_model_reads_what_is_new(keep, update, interval, chunk, texts, frames):
    model, question = llava(), asked(texts, frames)
    pixels = question["pixel_values"].view(texts, frames, 3, 24, 24)
    pixels[:, 1:] = pixels[:, :1] + 0.3 * pixels[:, 1:]  # frames are alike
    options = {"keep": keep, "update": update, "interval": interval, "chunk": chunk}
    got, fast = answered(model, question, {"name": "stc", **options})
    for i in range(texts):
        one = {name: t[i : i + 1] for name, t in question.items()}
        with torch.no_grad():
            features = model.model.multi_modal_projector(card_tower(model, pixels[i], update, interval, chunk))
        kept = card_choice(features.flatten(0, 1), 16, chunk, int(16 * keep))
        stays = one["input_ids"][0] != IMAGE
        stays[stays.logical_not().nonzero()[kept, 0]] = True
        assert relative_error(got[i], answer(model, one, features.flatten(0, 1)[kept], stays)[0]) < 1e-4
    took = {done.what for done in accelpass.explain(fast).passes["stc"].took.values()}
    reusing = sum((f // chunk) % interval > 0 for f in range(frames))
    assert f"{texts * reusing} of {texts * frames} frames compute {max(1, int(17 * update))} of 17 tokens" in took


@pytest.mark.slow
def test_one_frame_is_computed_as_it_is_and_said():
    _, fast = answered(llava(), asked(), {"name": "stc", "keep": 1.0})
    skipped = " ".join(accelpass.explain(fast).passes["stc"].skipped.values())
    assert "1 frame of a text, or one chunk" in skipped and "all of its 16 patches are read" in skipped


@pytest.mark.parametrize("options", [{"keep": 0.0}, {"update": 1.5}, {"interval": 0}, {"chunk": 0}])
def test_options(options: dict[str, Any]):
    with pytest.raises(OptionError, match="is not supported; use"):
        STC(**options)
