"""Attention over parameter tokens in blocks: the card's formulas, whatever the norm, growth, and what is left as it is."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import accelpass
from accelpass.passes.core.registry import make
from tests.small_models import relative_error
from tests.sweep import examples

NORMS = ("l2_norm_gelu", "gelu_l2_norm", "softmax")


class Pattention(nn.Module):
    """As the authors write it."""

    def __init__(self, width: int, tokens: int, out: int, norm: str, scale: float = 1.0) -> None:
        super().__init__()
        self.key_param_tokens = nn.Parameter(torch.randn(tokens, width) / 2)
        self.value_param_tokens = nn.Parameter(torch.randn(tokens, out) / 4)
        self.norm_activation_type, self.scale = norm, scale

    def forward(self, x: Tensor) -> Tensor:
        a = x @ self.key_param_tokens.transpose(-2, -1) * self.scale
        a *= torch.ones(x.shape[-2], a.shape[-1], dtype=x.dtype)
        match self.norm_activation_type:
            case "softmax":
                e = torch.exp(a)
                a = e / torch.norm(e, p=1, dim=-1, keepdim=True) * a.shape[-1]
            case "gelu_l2_norm":
                g = F.gelu(a)
                a = g / torch.norm(g, p=2, dim=-1, keepdim=True) * math.sqrt(a.shape[-1])
            case _:
                a = F.gelu(a / torch.norm(a, p=2, dim=-1, keepdim=True) * math.sqrt(a.shape[-1]))
        return a @ self.value_param_tokens


def patt(x: Tensor, k: Tensor, v: Tensor, tau: float | None = None) -> Tensor:
    """The card's."""
    a = x @ k.T
    return F.gelu(a * (tau or k.shape[0] ** 0.5) / a.norm(dim=-1, keepdim=True)) @ v


def compiled(model: Any, **options: Any) -> Any:
    torch._dynamo.reset()
    asked = {"passes": [{"name": "pattention", **options}], "lowering": "eager"}
    return torch.compile(model, backend="accelpass", options=asked)


@settings(max_examples=examples(6), deadline=None)
@given(
    norm=st.sampled_from(NORMS),
    width=st.integers(2, 12),
    tokens=st.integers(5, 40),
    scale=st.sampled_from([1.0, 0.5]),
    block=st.integers(1, 4),
)
def test_blocks_give_what_all_tokens_do(norm: str, width: int, tokens: int, scale: float, block: int):
    torch.manual_seed(tokens)
    model = nn.Sequential(Pattention(width, tokens, 7, norm, scale), nn.LayerNorm(7)).eval()
    x = torch.randn(2, 5, width)
    fast = compiled(model, block=max(block, tokens // 4))
    with torch.no_grad():
        assert relative_error(fast(x), model(x)) < 1e-4
        if norm == "l2_norm_gelu":
            own = model[0]
            want = F.layer_norm(patt(x, own.key_param_tokens, own.value_param_tokens), (7,))
            assert relative_error(fast(x), want) < 1e-4
    assert len(accelpass.explain(fast).passes["pattention"].took) == 1


def test_no_value_of_all_tokens_is_left_and_weights_may_change():
    from accelpass.backends.export.capture import bound, captured
    from accelpass.passes.core.base import Record

    torch.manual_seed(0)
    model, x = nn.Sequential(Pattention(8, 48, 8, "l2_norm_gelu")).eval(), torch.randn(3, 6, 8)
    program, record = captured(model, bound(model, (x,), {}), None).program, Record("pattention")
    make({"name": "pattention", "block": 16}).apply(program, record)
    program.graph.eliminate_dead_code()
    sizes = [tuple(n.meta["val"].shape) for n in program.graph.nodes if n.op == "call_function"]
    assert record.took and (3, 6, 16) in sizes and (3, 6, 48) not in sizes
    fast = compiled(model, block=16)
    with torch.no_grad():
        fast(x)
        model[0].key_param_tokens.mul_(torch.rand(48, 1))
        assert relative_error(fast(x), model(x)) < 1e-4
        half = copy.deepcopy(model).bfloat16()
        wide = half.float()
        want = wide(x)
        assert relative_error(compiled(half.bfloat16(), block=16)(x.bfloat16()).float(), want) < 0.05


@settings(max_examples=examples(4), deadline=None)
@given(new=st.integers(1, 9), seed=st.integers(0, 9))
def test_grown_layers_compute_what_they_did_and_are_found(new: int, seed: int):
    torch.manual_seed(seed)
    model = nn.Sequential(Pattention(6, 20, 6, "l2_norm_gelu"), Pattention(6, 24, 4, "l2_norm_gelu")).eval()
    x = torch.randn(2, 3, 6)
    with torch.no_grad():
        want = model(x)
        assert accelpass.grow_pattention(model, new) == ["0", "1"]
        assert model[0].key_param_tokens.shape == (20 + new, 6) and model[0].tau == 20**0.5
        assert relative_error(model(x), want) < 1e-4
        again = copy.deepcopy(model)
        again[0].tau = 1.0
        again.load_state_dict(model.state_dict())
        assert again[0].tau == model[0].tau, "a state dict has it"
        accelpass.grow_pattention(model, 2)
        assert relative_error(model(x), want) < 1e-4
        fast = compiled(model, block=8)
        assert relative_error(fast(x), want) < 1e-4
        assert len(accelpass.explain(fast).passes["pattention"].took) == 2
        accelpass.grow_pattention(model, 2, keep_function=False)
        assert relative_error(model(x), want) > 1e-3


def test_what_does_not_fit_says_so():
    with pytest.raises(accelpass.OptionError, match="at least 1"):
        make({"name": "pattention", "block": 0})
    torch.manual_seed(0)
    x = torch.randn(2, 3, 6)
    for model, why in (
        (nn.Sequential(Pattention(6, 20, 6, "l2_norm_gelu")), "its 20 parameter tokens are one block"),
        (nn.Sequential(nn.Linear(6, 20), nn.GELU(), nn.Linear(20, 6)), "no attention over parameter tokens was found"),
    ):
        fast = compiled(model.eval())
        with torch.no_grad():
            assert relative_error(fast(x), model(x)) < 1e-6
        assert why in str(accelpass.explain(fast).passes["pattention"].skipped)
    fast = compiled(nn.Sequential(Pattention(6, 20, 6, "l2_norm_gelu")).eval(), block=8)
    with torch.no_grad():
        zeros = torch.zeros(1, 2, 6)
        assert torch.isnan(fast(zeros)).all(), "a row of zeros has no norm, here as in the model"
    with pytest.raises(accelpass.AccelpassError, match="tokens=0 adds nothing"):
        accelpass.grow_pattention(nn.Linear(2, 2), 0)
    with pytest.raises(accelpass.AccelpassError, match="no module has key_param_tokens"):
        accelpass.grow_pattention(nn.Linear(2, 2), 4)
    with pytest.raises(accelpass.AccelpassError, match="has the norm 'softmax'; only l2_norm_gelu can grow"):
        accelpass.grow_pattention(nn.Sequential(Pattention(6, 20, 6, "softmax")), 4)
