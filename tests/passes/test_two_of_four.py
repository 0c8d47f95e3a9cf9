"""Two of four weights: which ones stay, what they take, and that products are those of the masked weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import accelpass
from accelpass.ir.linear.half_sparse import TwoOfFour
from accelpass.models_zoo import small
from accelpass.passes.core.plan import Plan
from tests.small_models import relative_error
from tests.sweep import examples


def by_hand(w: Tensor, norms: Tensor | None = None) -> Tensor:
    """Four by four, the two with the largest score."""
    made = torch.zeros_like(w)
    for r in range(w.shape[0]):
        for c in range(0, w.shape[1], 4):
            scores = [abs(float(w[r, c + i])) * (1 if norms is None else float(norms[c + i])) for i in range(4)]
            for i in sorted(range(4), key=lambda i: (-scores[i], i))[:2]:
                made[r, c + i] = w[r, c + i]
    return made


def compiled(model: Any, *passes: Any, **options: Any) -> Any:
    torch._dynamo.reset()
    return torch.compile(model, backend="accelpass", options={"passes": list(passes), "lowering": "eager", **options})


@settings(max_examples=examples(15), deadline=None)
@given(
    out=st.integers(1, 5),
    eights=st.integers(1, 5),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    seed=st.integers(0, 99),
    whole=st.booleans(),
)
def test_what_stays_is_half_and_takes_half(out: int, eights: int, dtype: torch.dtype, seed: int, whole: bool):
    w = torch.randn(out, 8 * eights, generator=torch.Generator().manual_seed(seed))
    w = (w.round() if whole else w).to(dtype)  # whole numbers have equals among them
    form = TwoOfFour()
    packed = form.pack(w)
    assert torch.equal(form.unpack(packed, dtype), by_hand(w)) and form.width(packed) == 8 * eights
    taken = sum(p.numel() * p.element_size() for p in packed)
    assert taken == w.numel() * w.element_size() // 2 + w.numel() // 8
    stack = form.pack(w.expand(3, *w.shape))
    assert torch.equal(form.unpack(stack, dtype)[2], by_hand(w))


def test_a_model_multiplies_with_what_stays_and_follows_its_weights():
    model, x = small.tiny_lm(0), torch.arange(24).view(2, 12)
    fast = compiled(model, "two_of_four")
    with torch.no_grad():
        for seed in (0, 1):
            model.load_state_dict(small.tiny_lm(seed).state_dict())
            masked = small.tiny_lm(seed)
            for layer in masked.layers:
                for linear in (layer.gate_proj, layer.up_proj, layer.down_proj):
                    linear.weight.copy_(by_hand(linear.weight))
            assert relative_error(fast(x), masked(x)) < 1e-5
    record = accelpass.explain(fast).passes["two_of_four"]
    assert len(record.took) == 6 and "its rows are embeddings, too" in str(record.skipped)
    assert all(d.bytes_after * 32 == d.bytes_before * 17 for d in record.took.values())


def test_with_a_plan_norms_of_inputs_count():
    model = nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 4)).eval()
    x = torch.randn(3, 5, 16) * torch.linspace(0.01, 3, 16)
    with torch.no_grad():
        norms = {"0.weight": x.flatten(0, 1).norm(dim=0), "2.weight": model[1](model[0](x)).flatten(0, 1).norm(dim=0)}
        plan = Plan.of(model, ["two_of_four"], {f"two_of_four/{k}": t for k, t in norms.items()})
        fast = compiled(model, "two_of_four", plan=plan)
        want = x
        for at in (0, 2):
            want = torch.nn.functional.linear(want, by_hand(model[at].weight, norms[f"{at}.weight"]), model[at].bias)
            want = want.relu() if at == 0 else want
        assert relative_error(fast(x), want) < 1e-5
        wrong = Plan.of(model, ["two_of_four"], {"two_of_four/0.weight": torch.ones(4)})
        with pytest.raises(Exception, match="which has 16 input channels"):
            compiled(model, "two_of_four", plan=wrong)(x)


def test_calibration_gathers_the_norms():
    pytest.importorskip("transformers")
    model, ids = small.decoder(0), torch.arange(24).view(2, 12)
    plan = accelpass.calibrate(model, [ids], ["two_of_four"], progress=False)
    seen: list[Tensor] = []
    hook = model.model.layers[1].mlp.down_proj.register_forward_pre_hook(lambda m, x: seen.append(x[0]))
    with torch.no_grad():
        model(ids, use_cache=False)
    hook.remove()
    want = seen[0].flatten(0, 1).norm(dim=0)
    assert relative_error(plan.tensors["two_of_four/model.layers.1.mlp.down_proj.weight"], want) < 1e-4


def test_widths_that_do_not_fit_are_left():
    model, x = nn.Sequential(nn.Linear(12, 8), nn.ReLU()).eval(), torch.randn(3, 12)
    fast = compiled(model, "two_of_four")
    with torch.no_grad():
        assert torch.equal(fast(x), model(x))
    assert "12 input channels are not a multiple of 8" in str(accelpass.explain(fast).passes["two_of_four"].skipped)
