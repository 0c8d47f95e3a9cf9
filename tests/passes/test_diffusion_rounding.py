"""vidit_q and mixdq against eager oracles from their papers, on shapes of real denoisers, and beside step caches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import accelpass
from accelpass.ir.errors import OptionError
from accelpass.passes.core.registry import make
from accelpass.passes.quantization.bases.calibrated import InputMoments
from accelpass.passes.quantization.diffusion.vidit_q import ViDiTQ, rotated
from tests.sweep import examples, sweep


def compiled(model: nn.Module, **options: Any) -> Any:
    torch._dynamo.reset()
    return torch.compile(model, backend="accelpass", options={"lowering": "eager", "passes": [], **options})


def fq_token(x: Tensor, bits: int) -> Tensor:
    s = x.abs().amax(-1, keepdim=True).clamp_min(1e-8) / (2 ** (bits - 1) - 1)
    return (x / s).round().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) * s


def fq_row_asym(w: Tensor, bits: int) -> Tensor:
    lo, hi = w.amin(1, True).clamp(max=0), w.amax(1, True).clamp(min=0)
    d = ((hi - lo) / (2**bits - 1)).clamp_min(1e-8)
    z = (-lo / d).round()
    return ((w / d).round() + z).clamp(0, 2**bits - 1).sub(z) * d


def rotation(width: int) -> Tensor:
    return rotated(torch.eye(width))


def viditq_linear(x: Tensor, w: Tensor, amax: Tensor, alpha: float, signs: Tensor, wb: int, ab: int) -> Tensor:
    """The card's oracle, with the random signs of R written apart."""
    m, r = w.abs().amax(0).pow(alpha) / amax.clamp_min(1e-3).pow(1 - alpha), torch.diag(signs) @ rotation(w.shape[1])
    return F.linear(fq_token((x * m) @ r, ab), fq_row_asym((w / m) @ r, wb))


@settings(max_examples=examples(6), deadline=None)
@given(
    st.sampled_from([8, 24]), st.sampled_from([64, 96, 144]), st.sampled_from([4, 6, 8]), st.sampled_from([4, 6, 8]),
    st.integers(0, 2**16),
)  # fmt: skip
def test_vidit_q_is_the_cards_oracle(out: int, width: int, bits: int, tokens: int, seed: int) -> None:
    rng = torch.Generator().manual_seed(seed)
    layer, x = nn.Linear(width, out, bias=False), torch.randn(2, 5, width, generator=rng) * 3
    with torch.no_grad():
        layer.weight.copy_(torch.randn(out, width, generator=rng))
    given = {"name": "vidit_q", "bits": bits, "activation_bits": tokens}
    plan = accelpass.calibrate(layer, [{"input": x}], [given], progress=False)
    with torch.no_grad():
        got = compiled(layer, plan=plan)(x)
        signs = torch.randint(2, (width,), generator=torch.Generator().manual_seed(0)) * 2.0 - 1
        want = viditq_linear(x, layer.weight, x.abs().amax((0, 1)), 0.5665, signs, bits, tokens)
    # A few numbers lie on the edge of two codes.
    assert (got - want).abs().mean() <= 0.02 * want.abs().mean() / 2**tokens * 16 + 1e-5


@pytest.mark.parametrize("width", [64, 96, 144, 1152])
def test_the_rotation_is_orthogonal(width: int) -> None:
    r = rotation(width)
    torch.testing.assert_close(r @ r.t(), torch.eye(width), rtol=0, atol=1e-5)


@settings(max_examples=examples(6), deadline=None)
@given(st.integers(0, 2**16), st.floats(0, 1), st.booleans())
def test_without_rounding_nothing_changes(seed: int, strength: float, rotate: bool) -> None:
    """For any m and R: what the input and the weight are multiplied by cancels."""
    rng = torch.Generator().manual_seed(seed)
    x, w = torch.randn(9, 96, generator=rng) * 5, torch.randn(7, 96, generator=rng)
    p = make({"name": "vidit_q", "strength": strength, "rotate": rotate})
    assert isinstance(p, ViDiTQ)
    seen = InputMoments.__new__(InputMoments)
    seen.peaks = x.abs().amax(0)
    factors = p.factors([w], seen)
    got = F.linear(p.mixed(x / factors), p.mixed(w * factors))
    torch.testing.assert_close(got, F.linear(x, w), rtol=1e-3, atol=1e-3)


def test_a_token_is_rounded_by_itself() -> None:
    torch.manual_seed(0)
    layer, x = nn.Linear(64, 8, bias=False), torch.randn(1, 6, 64)
    plan = accelpass.calibrate(layer, [{"input": x}], ["vidit_q"], progress=False)
    fast, order = compiled(layer, plan=plan), torch.tensor([3, 1, 5, 0, 2, 4])
    with torch.no_grad():
        want = fast(x)
        torch.testing.assert_close(fast(x[:, order]), want[:, order])
        louder = x.clone()
        louder[:, 2] *= 64
        got = fast(louder)
    torch.testing.assert_close(got[:, 2], want[:, 2] * 64)
    assert torch.equal(got[:, 3:], want[:, 3:])


# --- mixdq ---


class Cross(nn.Module):
    """Pixels that read a text, one block of an SDXL-shaped UNet's cross-attention."""

    def __init__(self) -> None:
        super().__init__()
        self.to_q, self.to_k, self.to_v, self.to_out = (
            nn.Linear(n, 32, bias=bias) for n, bias in ((32, False), (24, False), (24, True), (32, True))
        )

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        q, k, v = (y.unflatten(-1, (4, 8)).transpose(1, 2) for y in (self.to_q(x), self.to_k(text), self.to_v(text)))
        return x + self.to_out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


@pytest.fixture(scope="module")
def cross() -> Cross:
    torch.manual_seed(0)
    return Cross().eval()


def prompts(count: int = 3, bos: bool = True, seed: int = 0) -> list[dict[str, Tensor]]:
    draw = torch.Generator().manual_seed(seed)
    made = [
        {"x": torch.randn(2, 10, 32, generator=draw), "text": torch.randn(2, 7, 24, generator=draw)}
        for _ in range(count)
    ]
    for one in made if bos else []:
        one["text"][:, 0] = 500 * torch.linspace(-1, 1, 24)  # the same in all, and far larger
    return made


def static(x: Tensor, most: Tensor) -> Tensor:
    return (x / (most / 127)).round().clamp(-128, 127) * (most / 127)


def symmetric(w: Tensor, bits: int) -> Tensor:
    """A scale for each row."""
    if bits == 8:
        size = w.abs().amax(1, True) / 127
        return (w / size).round() * size
    size = w.gather(1, w.abs().argmax(1, True)) / -(2 ** (bits - 1))
    return (w / size).round().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) * size


def bos_linear(text: Tensor, lin: nn.Linear, most: Tensor, bits: int) -> Tensor:
    """The card's oracle."""
    rest = F.linear(static(text[:, 1:], most), symmetric(lin.weight, bits), lin.bias)
    return torch.cat([lin(text[:, :1]), rest], 1)


@pytest.mark.parametrize("bits", [8, 4, 2])
def test_mixdq_is_the_cards_oracle(cross: Cross, bits: int) -> None:
    data = prompts()
    plan = accelpass.calibrate(cross, data, [{"name": "mixdq", "bits": bits}], progress=False)
    assert {k for k in plan.tensors if k.endswith("/bos")} == {f"mixdq/{n}.weight/bos" for n in ("to_k", "to_v")}
    fast, one = compiled(cross, plan=plan), prompts(1, seed=5)[0]

    def most(name: str) -> Tensor:
        return plan.tensors[f"mixdq/{name}.weight/range"]

    with torch.no_grad():
        x, text = one["x"], one["text"]
        k, v = (bos_linear(text, lin, most(n), bits) for n, lin in (("to_k", cross.to_k), ("to_v", cross.to_v)))
        q = F.linear(static(x, most("to_q")), symmetric(cross.to_q.weight, bits))
        q, k, v = (y.unflatten(-1, (4, 8)).transpose(1, 2) for y in (q, k, v))
        heads = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        want = x + F.linear(static(heads, most("to_out")), symmetric(cross.to_out.weight, bits), cross.to_out.bias)
        got = fast(**one)
    assert (got - want).abs().mean() <= 2e-3 * want.abs().mean()


def test_the_first_token_of_any_prompt_is_exact(cross: Cross) -> None:
    """Its key and value are those of the dense model; rounded beside the others it would make their steps coarse."""
    plan = accelpass.calibrate(cross, prompts(), ["mixdq"], progress=False)
    assert plan.tensors["mixdq/to_k.weight/range"] < 10
    one = prompts(1, seed=9)[0]
    alone = {"x": one["x"], "text": one["text"][:, :1]}
    only = {"exclude": ["to_q", "to_out"], "name": "mixdq"}
    plan = accelpass.calibrate(cross, prompts(), [only], progress=False)
    with torch.no_grad():
        torch.testing.assert_close(compiled(cross, plan=plan)(**alone), cross(**alone), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("data", "what"),
    [
        (prompts(bos=False), "its first token differs"),
        ([{k: v[:1] for k, v in prompts(1)[0].items()}], "one prompt says nothing of the first token"),
    ],
)
def test_the_first_token_is_rounded_where_data_do_not_show_that_it_is_constant(
    cross: Cross, data: Sequence[dict[str, Tensor]], what: str
) -> None:
    plan = accelpass.calibrate(cross, data, ["mixdq"], progress=False)
    assert not [k for k in plan.tensors if k.endswith("/bos")], what
    with torch.no_grad():
        got, want = compiled(cross, plan=plan)(**data[0]), cross(**data[0])
    assert (got - want).abs().max() < 0.1 * want.abs().max()


# --- models ---


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "given", "most"),
    sweep(
        ("pixart", {"name": "vidit_q", "bits": 4}, 0.5),
        *((name, {"name": "mixdq"}, 0.08) for name in ("pixart", "dit", "sd3", "flux")),
        *((name, {"name": "vidit_q"}, 0.08) for name in ("pixart", "dit", "sd3", "flux")),
    ),
)
def test_denoisers(name: str, given: dict[str, Any], most: float) -> None:
    diffusers = pytest.importorskip("accelpass.models_zoo.tiny_diffusers")
    torch._dynamo.reset()
    torch.manual_seed(0)
    model, call = diffusers.build(name)
    model = model.eval()
    plan = accelpass.calibrate(model, [call], [given], progress=False)
    fast = compiled(model, plan=plan)
    with torch.no_grad():
        want = model(**call).sample
        far = float((fast(**call).sample - want).norm() / want.norm())
    made = accelpass.explain(fast).passes[given["name"]]
    assert 0 < far < most
    assert len([site for site in made.took if "block" in site]) >= 8
    if given["name"] == "vidit_q":
        kept = [site for site in made.skipped if "proj_out" in site or "time" in site]
        assert kept and not any("time" in site for site in made.took)


@pytest.mark.slow
@pytest.mark.parametrize("caching", sweep("delta_cache", "ditfastattn", "tokencache"))
def test_beside_a_step_cache(caching: str) -> None:
    """At the caching pass's own setting, a run is as far from the run without rounding as rounding goes."""
    from accelpass.passes.core.plan import Plan
    from accelpass.testing.subjects import SUBJECTS, Shape
    from tests.pass_settings import setting

    subject, given = SUBJECTS["denoiser"], setting(caching)
    model = subject.build(0)
    call = {
        "hidden_states": torch.randn(2, 4, 8, 8),
        "timestep": torch.tensor([9.0, 9.0]),
        "class_labels": torch.arange(2),
    }
    plan = accelpass.calibrate(model, [call], ["vidit_q"], progress=False)

    def run(tensors: dict[str, Tensor], *passes: Any) -> list[Tensor]:
        torch._dynamo.reset()
        fast = torch.compile(
            model,
            backend="accelpass",
            options={
                "lowering": "eager",
                "passes": list(passes),
                "plan": Plan.of(model, [], tensors | dict(given.tensors)),
            },
        )
        with torch.no_grad():
            made = list(subject.drive(fast, model, Shape()))
        if len(passes) == 2:
            assert accelpass.explain(fast).passes["vidit_q"].took and accelpass.explain(fast).passes[caching].took
        return made

    alone = run({}, {"name": caching, **given.options})
    both = run(plan.tensors, {"name": caching, **given.options}, "vidit_q")
    for a, b in zip(alone, both, strict=True):
        assert 0 < (a - b).norm() <= 0.1 * a.norm()


# --- what is refused ---


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"name": "vidit_q", "bits": 5}, "use 4, 6 or 8"),
        ({"name": "vidit_q", "activation_bits": 2}, "use 4, 6 or 8"),
        ({"name": "vidit_q", "strength": 1.5}, "use 0 to 1"),
        ({"name": "mixdq", "bits": 3}, "use 2, 4 or 8"),
    ],
)
def test_options_out_of_range(given: dict[str, Any], said: str) -> None:
    with pytest.raises(OptionError, match=said):
        make(given)


def test_dead_channels_and_outliers_stay_finite() -> None:
    torch.manual_seed(0)
    layer, x = nn.Linear(64, 8), torch.randn(1, 6, 64)
    x[..., 3], x[..., 4] = 0, 1e4
    for name in ("vidit_q", "mixdq"):
        plan = accelpass.calibrate(layer, [{"input": x}], [name], progress=False)
        with torch.no_grad():
            got, want = compiled(layer, plan=plan)(x), layer(x)
        assert got.isfinite().all() and (got - want).norm() <= 0.05 * want.norm()
