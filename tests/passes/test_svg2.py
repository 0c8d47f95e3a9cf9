"""Sparse VideoGen 2 against an eager one that is written from its card."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import accelpass
from accelpass.ir.attention.lowering.clustered import ClusteredAttention, Layout, clusters
from accelpass.ir.errors import OptionError
from accelpass.models_zoo import small
from accelpass.passes.step_cache.svg2 import SVG2
from tests.passes.step_truth import denoise
from tests.passes.test_re_ttention import model_of
from tests.sweep import examples, sweep

TIMES = [9, 8, 7, 6]


def kmeans(x: Tensor, centroids: Tensor, iterations: int) -> tuple[Tensor, Tensor]:
    """The card's, of one set ``(n, d)``: labels before the last update, and centroids after it."""
    labels = torch.zeros(len(x), dtype=torch.int64)
    for _ in range(iterations):
        labels = torch.cdist(x.double(), centroids.double()).argmin(-1)
        new = torch.stack(
            [x[labels == c].mean(0) if (labels == c).any() else centroids[c] for c in range(len(centroids))]
        )
        shift, centroids = (new - centroids).norm(dim=-1).max(), new
        if shift < 1e-4:
            break
    return labels, centroids


def drawn(x: Tensor, count: int, seed: int) -> Tensor:
    """Tokens that k-means begins at, of sets ``(sets, n, d)``."""
    at = torch.randint(x.shape[1], (len(x), count), generator=torch.Generator().manual_seed(seed))
    return torch.stack([own[i] for own, i in zip(x, at, strict=True)])


def attend(q: Tensor, k: Tensor, v: Tensor, qlab: Tensor, klab: Tensor, cq: Tensor, ck: Tensor, p: float, least: float):
    """The card's oracle, of one head: a mask of tokens and no permutation."""
    nk = torch.bincount(klab, minlength=len(ck)).float()
    w = (cq @ ck.T / q.shape[-1] ** 0.5).softmax(-1) * nk
    w = w / w.sum(-1, keepdim=True).clamp_min(1e-12)
    sp, idx = w.sort(dim=-1, descending=True, stable=True)
    drop = sp.cumsum(-1) > p
    drop = torch.cat([torch.zeros_like(drop[:, :1]), drop[:, :-1]], 1)
    drop[:, : int(least * len(ck))] = False
    keep = torch.zeros_like(drop).scatter_(1, idx, ~drop) | (p >= 1)
    return F.scaled_dot_product_attention(q[None], k[None], v[None], attn_mask=keep[qlab][:, klab][None])[0]


class Sparse:
    """An attention with centroids that go on, all heads apart."""

    def __init__(self, asked: SVG2) -> None:
        self.asked, self.step = asked, 0
        self.centroids: list[list[Tensor]] = []

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        a, groups = self.asked, q.shape[1] // k.shape[1]
        is_dense, self.step = self.step < a.start, self.step + 1
        dense = F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
        if is_dense and not a.warm:
            return dense
        iterations, found = a.again if self.centroids else a.begin, []
        for number, (x, count) in enumerate(((q, a.q_clusters), (k, a.k_clusters))):
            flat = x.flatten(0, 1)
            first = self.centroids[number] if self.centroids else drawn(flat, count, a.seed + number)
            found.append([kmeans(own, c, iterations) for own, c in zip(flat, first, strict=True)])
        self.centroids = [[c for _, c in side] for side in found]
        if is_dense:
            return dense
        made = []
        for n, own in enumerate(q.flatten(0, 1)):
            (ql, cq), (kl, ck) = found[0][n], found[1][n // groups]
            of_head = (t.flatten(0, 1)[n // groups] for t in (k, v))
            made.append(attend(own, *of_head, ql, kl, cq, ck, a.top_p, a.least))
        return torch.stack(made).view(*q.shape[:3], -1)


@settings(max_examples=examples(12), deadline=None, derandomize=True)
@given(
    batch=st.integers(1, 2), kv_heads=st.integers(1, 2), groups=st.integers(1, 2), n=st.integers(2, 70),
    clusters=st.tuples(st.integers(1, 9), st.integers(1, 9)), block=st.integers(1, 9),
    top_p=st.sampled_from([0.05, 0.5, 0.9, 1.0]), least=st.sampled_from([0.0, 0.4, 1.0]), seed=st.integers(0, 99),
)  # fmt: skip
def test_attention_is_the_cards(batch, kv_heads, groups, n, clusters, block, top_p, least, seed) -> None:
    draw = torch.Generator().manual_seed(seed)
    q = torch.randn(batch, kv_heads * groups, n, 8, generator=draw)
    k, v = (torch.randn(batch, kv_heads, n, 8, generator=draw) for _ in range(2))
    options = {"q_clusters": clusters[0], "k_clusters": clusters[1], "top_p": top_p, "least": least, "seed": seed}
    truth = Sparse(SVG2(**options, start=0, begin=6))
    how = ClusteredAttention(*clusters, top_p, least, block, seed)
    known, iterations = None, 6
    for _ in range(2):
        made, *known = how(q, k, v, 8**-0.5, known, iterations)
        torch.testing.assert_close(made, truth(q, k, v), atol=2e-5, rtol=1e-4)
        iterations = 2
    if top_p == 1 or least == 1:
        torch.testing.assert_close(made, F.scaled_dot_product_attention(q, k, v, enable_gqa=True), atol=2e-5, rtol=1e-4)


@settings(max_examples=examples(8), deadline=None, derandomize=True)
@given(
    n=st.integers(2, 40), text=st.integers(1, 9), behind=st.booleans(), clusters=st.tuples(st.integers(1, 6), st.integers(1, 6)),
    block=st.integers(1, 7), top_p=st.sampled_from([0.1, 0.6, 1.0]), seed=st.integers(0, 99),
)  # fmt: skip
def test_text_reads_all_and_is_read_by_all(n, text, behind, clusters, block, top_p, seed) -> None:
    """The card's two extra rows of the map, without padding: clusters are of the video's tokens alone."""
    draw = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(1, 2, n + text, 8, generator=draw) for _ in range(3))
    how = ClusteredAttention(*clusters, top_p, 0.0, block, seed, -text if behind else text)
    made, *_ = how(q, k, v, 8**-0.5, None, 5)
    video = slice(0, n) if behind else slice(text, None)
    for head in range(2):
        own = [x[0, head] for x in (q, k)]
        (ql, cq), (kl, ck) = (
            kmeans(x[video], drawn(t[0, :, video], count, seed + i)[head], 5)
            for i, (x, t, count) in enumerate(zip(own, (q, k), clusters, strict=True))
        )
        seen = torch.ones(n + text, n + text, dtype=torch.bool)
        seen[video, video] = _reads(ql, kl, cq, ck, top_p)
        want = F.scaled_dot_product_attention(q[0, head], k[0, head], v[0, head], attn_mask=seen)
        torch.testing.assert_close(made[0, head], want, atol=2e-5, rtol=1e-4)


def _reads(qlab: Tensor, klab: Tensor, cq: Tensor, ck: Tensor, p: float) -> Tensor:
    """Which tokens of the video read which: :func:`attend` of values that tell the keys apart."""
    n = len(klab)
    same = torch.zeros(n, cq.shape[1])
    return attend(same, same, torch.eye(n), qlab, klab, cq, ck, p, 0.0) > 0


@pytest.mark.parametrize("text", [5, -5, 3])
def test_a_model_whose_text_attends_with_the_video(text: int) -> None:
    """CogVideoX: text stands in front; all that is read is the dense model, less is not, and another number of words is refused."""
    model, call = model_of("cogvideox")
    words = next(t for n, t in call.items() if n == "encoder_hidden_states").shape[1]
    text = words if text == 5 else -words if text == -5 else words + 1
    asked = {**SMALL, "dense_layers": 0.0, "start": 0, "text": text}
    dense = denoise(model, call, TIMES[:2])
    fast = compiled(model, **asked, top_p=1.0)
    for a, b in zip(denoise(fast, call, TIMES[:2]), dense, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-3)
    record = accelpass.explain(fast).passes["svg2"]
    if text != words:
        assert not any("clusters" in d.what for d in record.took.values())
        assert any(f"text={text}" in why for why in record.skipped.values()), record.skipped
        return
    assert any("clusters" in done.what for done in record.took.values())
    few = denoise(compiled(model, **asked, top_p=0.1, least=0.0), call, TIMES[:2])
    assert not torch.allclose(few[-1], dense[-1], atol=1e-4)


def test_symbolic_numbers_of_tokens() -> None:
    """An encoder that is compiled once for texts of any length; all read is the dense model, of each."""
    model = small.encoder(0)
    torch._dynamo.reset()
    given = {"passes": [{"name": "svg2", **SMALL, "top_p": 1.0}], "lowering": "eager"}
    fast = torch.compile(model, backend="accelpass", options=given)
    for length in (21, 13, 30):
        ids = torch.randint(1, 40, (2, length), generator=torch.Generator().manual_seed(length))
        torch._dynamo.mark_dynamic(ids, 1)
        with torch.no_grad():
            torch.testing.assert_close(
                fast(input_ids=ids).last_hidden_state, model(input_ids=ids).last_hidden_state, atol=2e-5, rtol=1e-4
            )
    assert accelpass.explain(fast).passes["svg2"].took


def test_clusters_fill_blocks_of_their_own_and_lose_no_token() -> None:
    labels = torch.tensor([[2, 0, 2, 2, 0, 2, 2], [1, 1, 1, 1, 1, 1, 1]])
    order, owner, sizes = Layout.of(labels, 4, 2)
    assert sizes.tolist() == [[2, 0, 5, 0], [0, 7, 0, 0]]
    assert order[0].tolist() == [1, 4, 0, 2, 3, 5, 6, -1, -1, -1]
    assert owner.tolist() == [[0, 2, 2, 2, 4], [1, 1, 1, 1, 4]]


def test_few_blocks_are_computed() -> None:
    """What is listed is what the chosen clusters need: products are saved, not masked."""
    draw = torch.Generator().manual_seed(0)
    centres = 6 * torch.randn(8, 16, generator=draw)
    x = centres.repeat_interleave(64, 0)[torch.randperm(512, generator=draw)] + 0.1 * torch.randn(
        512, 16, generator=draw
    )
    how = ClusteredAttention(16, 16, 0.9, 0.0, 16)
    (ql, cq), (kl, ck) = how.centroids(x[None, None], x[None, None], None, 50)
    sizes = Layout.of(kl, 16, 16).sizes
    kept = how.chosen(cq, ck, sizes, 0.25)
    pairs = (kept * sizes.unsqueeze(1) * Layout.of(ql, 16, 16).sizes.unsqueeze(2)).sum()
    assert 0 < pairs < 0.5 * 512 * 512


def test_a_cluster_without_tokens_stays() -> None:
    x = torch.tensor([[[0.0, 0.0], [0.1, 0.0], [4.0, 0.0]]])
    begun = torch.tensor([[[0.0, 0.0], [4.0, 0.0], [50.0, 50.0]]])
    labels, made = clusters(x, begun, 3, 5, 0)
    assert labels.tolist() == [[0, 0, 1]]
    torch.testing.assert_close(made, torch.tensor([[[0.05, 0.0], [4.0, 0.0], [50.0, 50.0]]]))
    torch.library.opcheck(clusters, (x, begun, 3, 2, 0))
    torch.library.opcheck(clusters, (x, None, 2, 2, 0))


class Truth(nn.Module):
    """Stands in the place of a diffusers ``Attention``."""

    def __init__(self, inner: nn.Module, asked: SVG2) -> None:
        super().__init__()
        self.inner, self.sparse = inner, Sparse(asked)

    def forward(self, hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
        parts = (self.inner.to_q, self.inner.to_k, self.inner.to_v)
        q, k, v = (p(hidden_states).unflatten(-1, (self.inner.heads, -1)).transpose(1, 2) for p in parts)
        return self.inner.to_out[0](self.sparse(q, k, v).transpose(1, 2).flatten(2))


def compiled(model: nn.Module, lowering: str = "eager", **options: Any) -> Any:
    torch._dynamo.reset()
    given = {"passes": [{"name": "svg2", **options}], "lowering": lowering}
    return torch.compile(model, backend="accelpass", options=given, dynamic=False)


SMALL = {"q_clusters": 3, "k_clusters": 4, "block": 3, "begin": 4, "dense_layers": 0.5}


@settings(max_examples=examples(2), deadline=None, database=None, suppress_health_check=list(HealthCheck))
@given(
    start=st.integers(0, 2), warm=st.booleans(), top_p=st.sampled_from([0.3, 0.7]), least=st.sampled_from([0.0, 0.5])
)
def test_a_sampling_run_follows_the_oracle(start: int, warm: bool, top_p: float, least: float) -> None:
    model, call = model_of("dit")
    asked = {**SMALL, "start": start, "warm": warm, "top_p": top_p, "least": least}
    fast = compiled(model, **asked)
    for _ in range(2):  # a second run begins anew
        truth = copy.deepcopy(model)
        for block in truth.transformer_blocks[1:]:
            block.attn1 = Truth(block.attn1, SVG2(**asked))
        wanted = denoise(truth, call, TIMES)
        for step, (a, b) in enumerate(zip(denoise(fast, call, TIMES), wanted, strict=True)):
            torch.testing.assert_close(a, b, atol=5e-5, rtol=1e-3, msg=lambda m, step=step: f"step {step}: {m}")


@pytest.mark.parametrize("lowering", sweep("eager", "inductor", fast=1))
def test_everything_read_is_the_dense_model(lowering: str) -> None:
    model, call = model_of("wan")
    dense = denoise(model, call, TIMES)
    fast = compiled(model, lowering, **{**SMALL, "dense_layers": 0.0}, start=1, top_p=1.0)
    for a, b in zip(denoise(fast, call, TIMES), dense, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-3)
    took = accelpass.explain(fast).passes["svg2"].took
    assert any("clusters+recalled 2" in done.what for done in took.values())


def test_an_encoder_clusters_at_each_call_and_a_decoder_is_left_alone() -> None:
    ids = torch.randint(1, 40, (2, 21), generator=torch.Generator().manual_seed(0))
    model = small.encoder(0)
    with torch.no_grad():
        dense = model(input_ids=ids).last_hidden_state
        exact = compiled(model, **SMALL, top_p=1.0)
        torch.testing.assert_close(exact(input_ids=ids).last_hidden_state, dense, atol=2e-5, rtol=1e-4)
        few = compiled(model, **SMALL, top_p=0.1, least=0.0)
        assert not torch.allclose(few(input_ids=ids).last_hidden_state, dense, atol=1e-3)
        causal = small.decoder(0)
        fast = compiled(causal, **SMALL)
        fast(input_ids=ids, use_cache=False)
    skipped = accelpass.explain(fast).passes["svg2"].skipped
    assert skipped and all("causal" in why for why in skipped.values())


@pytest.mark.parametrize(
    "options",
    [
        {"top_p": 0}, {"top_p": float("nan")}, {"q_clusters": 0}, {"k_clusters": 0}, {"least": 1.5}, {"start": -1},
        {"dense_layers": 2.0}, {"begin": 0}, {"again": 0}, {"block": 0},
    ],
)  # fmt: skip
def test_options(options: dict[str, Any]) -> None:
    with pytest.raises(OptionError, match=next(iter(options))):
        SVG2(**options)
