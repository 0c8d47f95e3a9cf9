"""Attention experts as one attention, against the method card's oracle: a sum over experts, each by itself."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import accelpass
from accelpass.caches.kv_cache import KVCache
from accelpass.models_zoo import small
from tests.small_models import relative_error
from tests.sweep import examples

IDS = torch.arange(24).view(2, 12)


class Mixture(nn.Module):
    """A layer of BAM: ``h + sum_j g_j MHA_j(h)``; ``form`` is how the sum is written."""

    def __init__(
        self, experts: int, kv: int, groups: int, shared: bool, form: str, top: int = 0, bias: bool = False
    ) -> None:
        super().__init__()
        self.width, self.d, self.kv, self.form, self.top = 16, 4, kv, form, top or experts
        heads = kv * groups * self.d
        self.router = nn.Linear(self.width, experts, bias=False)
        self.q = nn.ModuleList([nn.Linear(self.width, heads, bias=False) for _ in range(experts)])
        one = [nn.Linear(self.width, kv * self.d) for _ in range(2)]
        own = [one if shared else [nn.Linear(self.width, kv * self.d) for _ in range(2)] for _ in range(experts)]
        self.k, self.v = (nn.ModuleList([pair[at] for pair in own]) for at in (0, 1))
        self.o = nn.ModuleList([nn.Linear(heads, self.width, bias=bias) for _ in range(experts)])

    def gates(self, h: Tensor) -> Tensor:
        """Soft; or of the ``top`` experts that the router likes best, by a mask over all of them."""
        p = self.router(h).softmax(-1)
        return p * F.one_hot(p.topk(self.top, -1).indices, p.shape[-1]).sum(-2)

    def attention(self, j: int, h: Tensor) -> Tensor:
        split = lambda x: x.unflatten(-1, (-1, self.d)).transpose(1, 2)  # noqa: E731
        q, k, v = (split(part[j](h)) for part in (self.q, self.k, self.v))
        x = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return self.o[j](x.transpose(1, 2).flatten(2))

    def forward(self, h: Tensor) -> Tensor:
        g, each = self.gates(h), range(len(self.o))
        if self.form == "stacked":
            return h + (torch.stack([self.attention(j, h) for j in each], -2) * g.unsqueeze(-1)).sum(-2)
        made = h
        for j in each:
            made = made + self.attention(j, h) * (
                g[..., j].unsqueeze(-1) if self.form == "selected" else g[..., j : j + 1]
            )
        return made


def by_the_card(model: Mixture, h: Tensor) -> Tensor:
    """The card's, with attention written out."""
    g, made, mask = model.gates(h), h.clone(), torch.ones(h.shape[1], h.shape[1]).tril() == 0
    for j in range(len(model.o)):
        heads = []
        q, k, v = (part[j](h).unflatten(-1, (-1, model.d)) for part in (model.q, model.k, model.v))
        for n in range(q.shape[2]):
            m = n // (q.shape[2] // model.kv)
            scores = (q[:, :, n] @ k[:, :, m].mT / model.d**0.5).masked_fill(mask, float("-inf"))
            heads.append(scores.softmax(-1) @ v[:, :, m])
        made += g[..., j, None] * model.o[j](torch.cat(heads, -1))
    return made


def compiled(model: Any, *passes: Any) -> Any:
    torch._dynamo.reset()
    return torch.compile(model, backend="accelpass", options={"passes": list(passes), "lowering": "eager"})


def report(fast: Any, name: str = "moa_batch") -> Any:
    return accelpass.explain(fast).passes[name]


@settings(max_examples=examples(5), deadline=None)
@given(
    experts=st.integers(2, 4),
    kv=st.integers(1, 2),
    groups=st.integers(1, 2),
    shared=st.booleans(),
    form=st.sampled_from(["loop", "selected", "stacked"]),
    top=st.integers(0, 2),
    copy_weights=st.booleans(),
    seed=st.integers(0, 9),
)
def test_one_attention_is_the_cards_sum(
    experts: int, kv: int, groups: int, shared: bool, form: str, top: int, copy_weights: bool, seed: int
):
    torch.manual_seed(seed)
    model, h = Mixture(experts, kv, groups, shared, form, top).eval(), torch.randn(2, 7, 16)
    fast = compiled(model, {"name": "moa_batch", "copy_weights": copy_weights})
    with torch.no_grad():
        assert torch.allclose(fast(h), by_the_card(model, h), atol=1e-4)
    (done,) = report(fast).took.values()
    keys = kv if shared else kv * experts
    assert done.what.startswith(
        f"{experts} attentions as one of {experts * kv * groups} query heads and {keys} key/value"
    )
    assert ("output projections as one" in done.what) == (copy_weights and form != "stacked")


def mixture(form: str, layers: int = 1) -> Any:
    models = [small.decoder(seed, layers=layers) for seed in (0, 1)]
    return accelpass.upcycle(models, attention=form, top_k=2).model


def steps(fast: Any, model: Any) -> list[Tensor]:
    cache = KVCache(model, capacity=64, batch_size=2)
    with torch.no_grad():
        prompt = fast(input_ids=IDS, past_key_values=cache, logits_to_keep=1).logits
        return [prompt, fast(input_ids=IDS[:, :1], past_key_values=cache, logits_to_keep=1).logits]


def test_experts_that_share_keys_read_one_cache_which_passes_then_take():
    model = mixture("shared_kv")
    want = steps(model, model)
    fast = compiled(model, "moa_batch", {"name": "h2o", "budget": 1.0})
    assert all(relative_error(a, b) < 1e-4 for a, b in zip(steps(fast, model), want, strict=True))
    assert "2 attentions as one of 8 query heads and 2 key/value" in str(report(fast).took["model.layers.0.self_attn"])
    assert "model.layers.0.self_attn.experts.0" in report(fast, "h2o").took, "called as the first expert"


@pytest.mark.slow
def test_without_it_two_attentions_read_the_cache():
    model = mixture("shared_kv")
    fast = compiled(model, {"name": "h2o", "budget": 1.0})
    steps(fast, model)
    assert "2 attentions read this cache layer" in str(report(fast, "h2o").skipped)


def test_experts_with_caches_of_their_own_are_left_alone_and_told_why():
    model = mixture("expert_kv")
    want = steps(model, model)
    fast = compiled(model, "moa_batch")
    assert all(relative_error(a, b) < 1e-4 for a, b in zip(steps(fast, model), want, strict=True))
    found = report(fast)
    assert not found.took and "each of its 2 experts has keys and values in a cache of its own" in str(found.skipped)
    assert "attention='shared_kv'" in str(found.skipped)
    with torch.no_grad():
        assert relative_error(fast(IDS, use_cache=False).logits, model(IDS, use_cache=False).logits) < 1e-4
    assert "model.layers.0.self_attn" in report(fast).took, "without a cache they are one attention"


@pytest.mark.slow
@pytest.mark.slow
def test_packed_weights_are_those_of_the_experts():
    model = mixture("shared_kv")
    want = steps(compiled(model, "int8_weights"), model)
    fast = compiled(model, "moa_batch", "int8_weights")
    assert all(relative_error(a, b) < 1e-4 for a, b in zip(steps(fast, model), want, strict=True))
    one = compiled(model, {"name": "moa_batch", "copy_weights": True}, {"name": "int4_weights", "group_size": 32})
    want = steps(compiled(model, {"name": "int4_weights", "group_size": 32}), model)
    assert all(relative_error(a, b) < 1e-4 for a, b in zip(steps(one, model), want, strict=True)), (
        "groups are inside experts"
    )
    assert any("o_proj" in path and "+" in path for path in report(one, "int4_weights").took)


def test_biases_keep_output_projections_apart():
    torch.manual_seed(0)
    model, h = Mixture(2, 2, 1, True, "loop", bias=True).eval(), torch.randn(2, 7, 16)
    fast = compiled(model, {"name": "moa_batch", "copy_weights": True})
    with torch.no_grad():
        assert torch.allclose(fast(h), by_the_card(model, h), atol=1e-4)
    assert "output projections stay apart" in str(report(fast).took)


class Biased(Mixture):
    """Each head has a slope of its own (ALiBi), or an expert another window than the rest, or reads the expert before it."""

    kind = "slopes"

    def attention(self, j: int, h: Tensor) -> Tensor:
        split = lambda x: x.unflatten(-1, (-1, self.d)).transpose(1, 2)  # noqa: E731
        q, k, v = (split(part[j](h)) for part in (self.q, self.k, self.v))
        far = torch.arange(h.shape[1]) - torch.arange(h.shape[1])[:, None]
        mask: Tensor | None = None
        if self.kind == "slopes":
            mask = far * torch.arange(1, q.shape[1] + 1).view(-1, 1, 1) * 0.1
        elif self.kind == "windows":
            mask = far.abs() <= j
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.o[j](x.transpose(1, 2).flatten(2))

    def forward(self, h: Tensor) -> Tensor:
        if self.kind != "chained":
            return super().forward(h)
        g = self.gates(h)
        first = self.attention(0, h)
        return g[..., :1] * first + g[..., 1:] * self.attention(1, first)


@pytest.mark.parametrize(
    ("kind", "why"),
    [
        ("slopes", "a bias or a sink differs between heads"),
        ("windows", "attends in another way than"),
        ("chained", "an expert reads what another gives"),
    ],
)
def test_what_is_no_one_attention_says_so(kind: str, why: str):
    torch.manual_seed(0)
    model, h = Biased(2, 2, 1, kind != "chained", "loop").eval(), torch.randn(2, 7, 16)
    model.kind = kind
    fast = compiled(model, "moa_batch")
    with torch.no_grad():
        assert torch.allclose(fast(h), model(h), atol=1e-5)
    assert not report(fast).took and why in str(report(fast).skipped)


def test_a_model_without_experts_says_what_was_looked_for():
    fast = compiled(small.decoder(layers=1), "moa_batch")
    with torch.no_grad():
        fast(IDS, use_cache=False)
    assert "whose results a router weighs and adds" in str(report(fast).skipped)
