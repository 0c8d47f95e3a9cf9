"""Attention written anew for the CPU equals the model's own, over random shapes and masks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import accelpass
from tests.small_models import relative_error


class Attend(nn.Module):
    """A cache of few heads read by many, as transformers writes it."""

    def __init__(self, groups: int, scale: float | None = None, causal: bool = False):
        super().__init__()
        self.groups, self.scale, self.causal = groups, scale, causal

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        def repeated(x: Tensor) -> Tensor:
            batch, heads, tokens, width = x.shape
            wide = x[:, :, None].expand(batch, heads, self.groups, tokens, width)
            return wide.reshape(batch, heads * self.groups, tokens, width)

        if self.groups > 1:
            k, v = repeated(k), repeated(v)
        out = F.scaled_dot_product_attention(q, k, v, mask, scale=self.scale, is_causal=self.causal)
        return out.transpose(1, 2).reshape(q.shape[0], q.shape[2], -1)


def run(model: nn.Module, *args: Any, **options: Any) -> tuple[Tensor, Any]:
    torch._dynamo.reset()
    fast = torch.compile(model, backend="accelpass", options={"lowering": "aten", **options}, dynamic=False)
    with torch.no_grad():
        return fast(*args), accelpass.explain(fast).passes


@settings(max_examples=30, deadline=None)
@given(
    batch=st.integers(1, 3),
    kv_heads=st.integers(1, 3),
    groups=st.sampled_from([1, 2, 3, 4, 9]),
    rows=st.sampled_from([1, 1, 3]),
    tokens=st.integers(1, 40),
    width=st.sampled_from([8, 24]),
    mask=st.sampled_from(["none", "bool", "bool per head", "add", "two dimensions"]),
    scale=st.sampled_from([None, 0.3]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=st.integers(0, 1000),
)
def test_equals_sdpa(batch, kv_heads, groups, rows, tokens, width, mask, scale, dtype, seed):
    torch.manual_seed(seed)
    heads = kv_heads * groups
    q = torch.randn(batch, heads, rows, width, dtype=dtype)
    k, v = (torch.randn(batch, kv_heads, tokens, width, dtype=dtype) for _ in range(2))
    shape = {"bool per head": (batch, heads, rows, tokens), "two dimensions": (rows, tokens)}.get(
        mask, (batch, 1, rows, tokens)
    )
    given_mask = None
    if mask != "none":
        seen = torch.rand(shape) < 0.7  # a row may see nothing: sdpa then gives zeros
        given_mask = torch.where(seen, torch.randn(shape), -torch.inf).to(dtype) if mask == "add" else seen
    model = Attend(groups, scale)
    got, passes = run(model, q, k, v, given_mask)
    want = model(q.float(), k.float(), v.float(), given_mask if mask != "add" else given_mask.float())
    if want.abs().max() == 0:
        assert got.abs().max() == 0
    else:
        assert relative_error(got, want) < (1e-5 if dtype == torch.float32 else 2e-2)
    assert not torch.isnan(got).any()
    assert len(passes["cpu_decode_attention"].took) == (rows == 1)
    assert len(passes["grouped_query"].took) == (rows > 1 and groups > 1)


@pytest.mark.parametrize("lowering", ["aten", "inductor"])
def test_equals_sdpa_over_many_keys(lowering: str):
    """Long enough that values are summed in chunks, and no whole number of them."""
    q, k, v = torch.randn(1, 6, 1, 24), torch.randn(1, 2, 1300, 24), torch.randn(1, 2, 1300, 24)
    seen = torch.arange(1300)[None, None, None] < 1203
    model = Attend(3)
    got, passes = run(model, q, k, v, seen, lowering=lowering)
    assert relative_error(got, model(q, k, v, seen)) < 1e-5
    assert len(passes["cpu_decode_attention"].took) == 1


@pytest.mark.parametrize(
    ("model", "rows", "why"),
    [
        (Attend(2, causal=True), 1, "is_causal"),
        (Attend(2), 5, "5 query rows"),
        (Attend(1), 5, "keys and values of its own"),
    ],
)
def test_reasons_of_skips(model: Attend, rows: int, why: str):
    q, k = torch.randn(1, 2 * model.groups, rows, 16), torch.randn(1, 2, 7, 16)
    got, passes = run(model, q, k, k + 1)
    assert relative_error(got, model(q, k, k + 1)) < 1e-5
    said = [*passes["cpu_decode_attention"].skipped.values(), *passes["grouped_query"].skipped.values()]
    assert any(why in one for one in said), said


def test_an_attention_that_another_pass_edited_is_left_to_it():
    from dataclasses import dataclass
    from typing import ClassVar

    from accelpass.ir.attention import SinksAndWindow, detect, set_spec, spec_of
    from accelpass.passes import Done, Pass

    @dataclass(frozen=True)
    class Window(Pass):
        name: ClassVar[str] = "window"
        phase: ClassVar[str] = "attention"
        summary: ClassVar[str] = "the last key alone"

        def apply(self, program, record):
            for one in program.analysis(detect):
                set_spec(one.node, spec_of(one.node).edited(by=self.name, select=SinksAndWindow(0, 1)))
                record.take(one.path, Done("window"))

    q, k, v = torch.randn(1, 4, 1, 16), torch.randn(1, 2, 7, 16), torch.randn(1, 2, 7, 16)
    got, passes = run(Attend(2), q, k, v, passes=[Window()])
    want = v[:, :, -1:].repeat_interleave(2, 1).transpose(1, 2).reshape(1, 1, -1)
    assert relative_error(got, want) < 1e-5
    for name in ("cpu_decode_attention", "grouped_query"):
        assert list(passes[name].skipped.values()) == ["another pass computes this attention"]


@pytest.mark.parametrize("lowering", ["aten", "inductor"])
def test_a_window_reads_the_keys_in_it_alone(lowering):
    """Through the whole compiler: the edited attention becomes the block-sparse op, and the report counts its share."""
    from dataclasses import dataclass
    from typing import ClassVar

    from accelpass.backends.compile.compiler import compiled_graphs
    from accelpass.ir.attention import Band, detect, set_spec, spec_of
    from accelpass.passes import Done, Pass

    @dataclass(frozen=True)
    class Near(Pass):
        name: ClassVar[str] = "near"
        phase: ClassVar[str] = "attention"
        summary: ClassVar[str] = "a band of 4 keys on either side"

        def apply(self, program, record):
            for one in program.analysis(detect):
                set_spec(one.node, spec_of(one.node).edited(by=self.name, select=Band(4)))
                record.take(one.path, Done("band"))

    q, k, v = (torch.randn(1, 4, 50, 16) for _ in range(3))
    model = Attend(1)
    fast = torch.compile(model, backend="accelpass", options={"lowering": lowering, "passes": [Near()]}, dynamic=False)
    with torch.no_grad():
        got = fast(q, k, v)
    near = (torch.arange(50)[:, None] - torch.arange(50)).abs() <= 4
    assert relative_error(got, model(q, k, v, near)) < 1e-5
    report = compiled_graphs()[-1].report  # Dynamo keeps graphs that other tests broke
    assert report.after.flops == 2 * 2 * 4 * int(near.sum()) * 16 == report.before.flops * int(near.sum()) // 2500
