"""Re-ttention against an eager one that is written from its card."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import accelpass
from accelpass.ir.errors import OptionError
from accelpass.models_zoo import tiny_diffusers
from accelpass.passes.step_cache.re_ttention import ReTtention
from tests.passes.step_truth import band, denoise
from tests.sweep import examples, sweep

TIMES = [9, 8, 7, 6, 5, 4, 2, 1]


def masked_rescaled(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, rho: Tensor) -> Tensor:
    """The card's: ``(batch, heads, n, d)``, a boolean mask ``(n, n)``, and a ratio ``(batch, heads, n, 1)``."""
    s = (q @ k.mT) / q.shape[-1] ** 0.5
    return rho * (s.masked_fill(~mask, float("-inf")).softmax(-1) @ v)


class Reshaped(nn.Module):
    """Stands in the place of a diffusers ``Attention``; the residual is that of the module, as in the card."""

    def __init__(self, inner: nn.Module, asked: ReTtention) -> None:
        super().__init__()
        self.inner, self.asked, self.step = inner, asked, 0
        self.rho, self.rest = torch.empty(0), torch.empty(0)

    def forward(self, hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
        a, since, heads = self.asked, self.step - self.asked.start, self.inner.heads
        self.step += 1
        parts = (self.inner.to_q, self.inner.to_k, self.inner.to_v)
        q, k, v = (p(hidden_states).unflatten(-1, (heads, -1)).transpose(1, 2) for p in parts)
        mask = band(q.shape[2], int(q.shape[2] * a.keep) // 2)
        proj = lambda h: self.inner.to_out[0](h.transpose(1, 2).flatten(2))  # noqa: E731
        s = (q @ k.mT) / q.shape[-1] ** 0.5
        if since < 0 or a.interval == 1:
            return proj(s.softmax(-1) @ v)
        if since % a.interval == 0:
            self.rho = (s.masked_fill(~mask, float("-inf")).logsumexp(-1, True) - s.logsumexp(-1, True)).exp()
            full = proj(s.softmax(-1) @ v)
            self.rest = full - proj(masked_rescaled(q, k, v, mask, self.rho))
            return full
        rho = self.rho + a.growth * (since % a.interval - 1)
        return proj(masked_rescaled(q, k, v, mask, rho)) + self.rest


def truth_of(model: nn.Module, asked: ReTtention) -> nn.Module:
    model = copy.deepcopy(model)
    for block in model.transformer_blocks:
        block.attn1 = Reshaped(block.attn1, asked)
    return model


def model_of(name: str) -> tuple[nn.Module, dict[str, Any]]:
    torch.manual_seed(0)
    model, call = tiny_diffusers.build(name)
    return model.eval(), call


def compiled(model: nn.Module, lowering: str = "eager", skip: tuple[str, ...] = (), **options: Any) -> Any:
    torch._dynamo.reset()
    given = {
        "passes": [{"name": "re_ttention", **options}],
        "lowering": lowering,
        "skip_sites": {"re_ttention": list(skip)},
    }
    return torch.compile(model, backend="accelpass", options=given)


@settings(max_examples=examples(4), deadline=None, database=None, suppress_health_check=list(HealthCheck))
@given(
    keep=st.floats(0.05, 2), start=st.integers(0, 3), interval=st.integers(1, 4), growth=st.sampled_from([0.0, 0.04, 0.3])
)  # fmt: skip
def test_follows_the_oracle(keep: float, start: int, interval: int, growth: float) -> None:
    model, call = model_of("dit")
    asked = {"keep": keep, "start": start, "interval": interval, "growth": growth}
    fast = compiled(model, **asked)
    for _ in range(2):  # a second run begins anew
        truth = denoise(truth_of(model, ReTtention(**asked)), call, TIMES)
        for step, (a, b) in enumerate(zip(denoise(fast, call, TIMES), truth, strict=True)):
            torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-4, msg=lambda m, step=step: f"step {step}: {m}")


@pytest.mark.slow
@pytest.mark.parametrize(("name", "lowering"), sweep(("dit", "inductor"), ("pixart", "inductor")))
def test_other_models_and_inductor(name: str, lowering: str) -> None:
    model, call = model_of(name)
    asked = {"keep": 0.4, "start": 1, "interval": 3}
    fast = compiled(model, lowering, **asked)
    truth = denoise(truth_of(model, ReTtention(**asked)), call, TIMES)
    for a, b in zip(denoise(fast, call, TIMES), truth, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-3)
    took = accelpass.explain(fast).passes["re_ttention"].took
    assert {done.what for done in took.values()} == {"in 8 model calls that ran: window 4, full+ratio 3, full 1"}


def test_all_keys_without_growth_are_the_dense_model() -> None:
    model, call = model_of("dit")
    dense = denoise(model, call, TIMES)
    for a, b in zip(
        denoise(compiled(model, keep=2.0, start=0, interval=3, growth=0.0), call, TIMES), dense, strict=True
    ):
        torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-4)


def test_a_joint_attention_is_left_as_it_is() -> None:
    model, call = model_of("sd3")
    dense = denoise(model, call, TIMES, guided=False)
    fast = compiled(
        model, skip=("transformer_blocks.0.attn2",), keep=0.2, start=0, interval=2
    )  # attn2 is of the image alone
    for a, b in zip(denoise(fast, call, TIMES, guided=False), dense, strict=True):
        torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-4)
    assert "a window along both has no meaning" in str(accelpass.explain(fast).passes["re_ttention"].skipped)


@pytest.mark.parametrize(
    "options", [{"keep": 0}, {"keep": 2.5}, {"start": -1}, {"interval": 0}, {"growth": float("nan")}]
)
def test_options(options: dict[str, Any]) -> None:
    with pytest.raises(OptionError, match=next(iter(options))):
        ReTtention(**options)
