"""hqq, gptq, awq and smoothquant against eager oracles written from their papers, and what they refuse."""

from __future__ import annotations

import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import accelpass
from accelpass.backends import graphs_of
from accelpass.ir.errors import OptionError, PassError, PlanError
from accelpass.ir.linear.formats import Int3, Int4
from accelpass.passes.core.plan import Plan
from accelpass.passes.core.registry import make
from accelpass.passes.quantization.bases.calibrated import InputMoments
from accelpass.passes.quantization.hqq import HQQ
from tests.small_models import tiny_lm
from tests.sweep import examples

IDS = torch.arange(24).reshape(2, 12) % 16
SHAPES = st.tuples(st.sampled_from([8, 24]), st.sampled_from([64, 128, 192]), st.integers(0, 2**16))


class Layer(nn.Module):
    """A linear behind a norm, in a residual block."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.up(self.norm(x))))


class Stack(nn.Module):
    def __init__(self, width: int = 64, hidden: int = 128, layers: int = 2) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(width, hidden) for _ in range(layers))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


@pytest.fixture(scope="module")
def stack() -> Stack:
    torch.manual_seed(0)
    return Stack().eval()


def data(count: int = 3, seed: int = 0, width: int = 64) -> list[dict[str, Tensor]]:
    rng = torch.Generator().manual_seed(seed)
    spread = torch.linspace(0.1, 4, width)
    return [{"x": torch.randn(2, 40, width, generator=rng) * spread} for _ in range(count)]


def moments_of(x: Tensor) -> InputMoments:
    made = InputMoments.__new__(InputMoments)
    made.products, made.rows = torch.zeros(x.shape[-1], x.shape[-1]), 0
    made.peaks, made.sizes = (torch.zeros(x.shape[-1]) for _ in range(2))
    made.see(x)
    return made


def rounded(given: dict[str, object], w: Tensor, x: Tensor) -> Tensor:
    """What a pass makes of one weight for these inputs."""
    p = make(given)
    (kept,) = p.learn([w], moments_of(x))
    return p.values(kept.tensors)


def answer(model: nn.Module, x: Tensor, **options: object) -> Tensor:
    torch._dynamo.reset()
    with torch.no_grad():
        return torch.compile(model, backend="accelpass", options={"lowering": "eager", **options})(x)


# --- oracles, from the papers ---


def gptq_oracle(w: Tensor, x: Tensor, group: int, damping: float) -> Tensor:
    """Algorithm 1 of the paper without lazy batches: all columns to come are updated after each."""
    w, hessian = w.double().clone(), (x.double().t() @ x.double())
    hessian += damping * hessian.diagonal().mean() * torch.eye(len(hessian))
    upper = torch.linalg.cholesky(torch.linalg.inv(hessian)).mT
    out = torch.empty_like(w)
    for column in range(w.shape[1]):
        if column % group == 0:
            part = w[:, column : column + group]
            extreme = part.gather(1, part.abs().argmax(1, keepdim=True))
            scale = extreme / -8
        code = (w[:, column : column + 1] / scale + 8).round().clamp(0, 15)
        out[:, column] = ((code - 8) * scale)[:, 0]
        error = (w[:, column] - out[:, column]) / upper[column, column]
        w[:, column:] -= error[:, None] * upper[column, column:]
    return out.float()


def awq_oracle(weights: list[Tensor], x: Tensor, form: Int4, steps: int) -> Tensor:
    """The grid search of section 3.2, with outputs computed and not their moments."""
    size, best = x.abs().mean(0).clamp_min(1e-4), None
    for step in range(steps):
        factors = size ** (step / steps)
        factors = factors / (factors.max() * factors.min()).sqrt()
        lost = 0.0
        for w in weights:
            rounded = form.unpack(form.pack(w * factors), torch.float32) / factors
            lost += float((x @ (rounded - w).t()).pow(2).sum())
        if best is None or lost < best[0]:
            best = (lost, factors)
    assert best is not None
    return best[1]


@settings(max_examples=examples(8), deadline=None)
@given(SHAPES, st.sampled_from([32, 64]))
def test_gptq_equals_algorithm_1(sizes, group) -> None:
    outputs, inputs, seed = sizes
    rng = torch.Generator().manual_seed(seed)
    w = torch.randn(outputs, inputs, generator=rng)
    x = torch.randn(3 * inputs, inputs, generator=rng) @ torch.randn(inputs, inputs, generator=rng)
    kept = rounded({"name": "gptq", "group_size": group}, w, x)
    want = gptq_oracle(w, x, group, 0.01)
    # A code may fall to the other side where float32 and float64 disagree about a half; all later ones follow it.
    same = (kept - want).abs() <= 1e-3 * want.abs().max()
    assert same.float().mean() > 0.97
    form = Int4(group)
    nearest = form.unpack(form.pack(w), torch.float32)
    lost = [float((x @ (v - w).t()).pow(2).sum()) for v in (kept, nearest, want)]
    assert lost[0] < lost[1] and abs(lost[0] - lost[2]) < 0.05 * lost[2]


def test_gptq_in_three_bits(stack: Stack) -> None:
    rng = torch.Generator().manual_seed(3)
    w = torch.randn(24, 128, generator=rng)
    x = torch.randn(400, 128, generator=rng) @ torch.randn(128, 128, generator=rng)
    kept = rounded({"name": "gptq", "bits": 3, "group_size": 32}, w, x)
    form = Int3(32)
    lost = [float((x @ (v - w).t()).pow(2).sum()) for v in (kept, form.unpack(form.pack(w), torch.float32))]
    assert lost[0] < 0.9 * lost[1]
    made, held = {"name": "gptq", "bits": 3, "group_size": 32}, data(1, seed=5)[0]["x"]
    plan = accelpass.calibrate(stack, data(), [made], progress=False)
    far = [float((answer(stack, held, **o) - stack(held)).norm()) for o in ({"plan": plan}, {"passes": [made]})]
    assert far[0] < far[1]
    with pytest.raises(Exception, match=r"which is not int3.group_size=64"):  # wrapped by Dynamo
        answer(stack, held, plan=plan, passes=[{**made, "group_size": 64}])


@settings(max_examples=examples(8), deadline=None)
@given(SHAPES, st.booleans())
def test_awq_finds_the_best_of_its_grid(sizes, symmetric) -> None:
    outputs, inputs, seed = sizes
    rng = torch.Generator().manual_seed(seed)
    weights = [torch.randn(n, inputs, generator=rng) for n in (outputs, 2 * outputs)]
    x = torch.randn(90, inputs, generator=rng) * torch.rand(inputs, generator=rng).exp()
    p = make({"name": "awq", "group_size": 32, "symmetric": symmetric, "steps": 6})
    kept = p.learn(weights, moments_of(x))
    torch.testing.assert_close(
        kept[0].tensors["factors"], awq_oracle(weights, x, p.spec.weight, 6), rtol=1e-4, atol=1e-5
    )
    assert kept[0].tensors["factors"] is kept[1].tensors["factors"]


@settings(max_examples=examples(8), deadline=None)
@given(SHAPES, st.sampled_from([0.0, 0.5, 0.75, 1.0]))
def test_smoothquant_factors(sizes, strength) -> None:
    outputs, inputs, seed = sizes
    rng = torch.Generator().manual_seed(seed)
    weights, x = [torch.randn(outputs, inputs, generator=rng)], torch.randn(50, inputs, generator=rng)
    x[:, 3] = 0
    (kept,) = make({"name": "smoothquant", "strength": strength}).learn(weights, moments_of(x))
    want = x.abs().amax(0) ** strength / weights[0].abs().amax(0) ** (1 - strength)
    want[3] = 1
    torch.testing.assert_close(kept.tensors["factors"], want.clamp_min(1e-5), rtol=1e-5, atol=1e-6)


def hqq_oracle(w: Tensor, group: int, p: float, steps: int) -> Tensor:
    """The authors' loop in their own terms: codes = w * s + z, where s is the inverse of a step."""
    g = w.reshape(-1, group)
    low, high = g.amin(1, keepdim=True), g.amax(1, keepdim=True)
    s = (15 / (high - low)).clamp(max=2e4)
    z = (-low * s).round()
    best, least, beta = z, 1e9, 10.0
    for _ in range(steps):
        q = (g * s + z).round().clamp(0, 15)
        r = (q - z) / s
        lost = float((g - r).abs().mean())
        if lost >= least:
            break
        best, least = z, lost
        e = torch.sign(g - r) * torch.relu((g - r).abs() - (1 / beta) * (g - r).abs() ** (p - 1))
        z = (q - (g - e) * s).mean(1, keepdim=True)
        beta *= 1.01
    q = (g * s + best).round().clamp(0, 15)
    return ((q - best) / s).reshape(w.shape)


@settings(max_examples=examples(8), deadline=None)
@given(SHAPES, st.sampled_from([32, 64]), st.sampled_from([0.5, 0.7, 1.0]))
def test_hqq_equals_the_authors_loop(sizes, group, p) -> None:
    outputs, inputs, seed = sizes
    w = torch.randn(outputs, inputs, generator=torch.Generator().manual_seed(seed))
    method = HQQ(group_size=group, p=p)
    got = method.spec.weight.unpack(method.pack(w), torch.float32)
    want = hqq_oracle(w, group, p, method.steps)
    assert ((got - want).abs() <= 1e-4 * w.abs().max()).float().mean() > 0.99
    form = Int4(group, False)
    plain = form.unpack(form.pack(w), torch.float32)
    assert (got - w).abs().mean() <= 1.001 * (plain - w).abs().mean()


def test_hqq_of_constant_groups_and_zeros() -> None:
    w = torch.cat([torch.full((2, 32), 0.37), torch.zeros(2, 32)], 1)
    method = HQQ(group_size=32)
    torch.testing.assert_close(method.spec.weight.unpack(method.pack(w), torch.float32), w, atol=1e-4, rtol=0)


# --- in a model ---


@pytest.mark.parametrize("name", ["gptq", "awq", "smoothquant"])
def test_better_than_the_nearest_and_what_the_plan_says(stack, name) -> None:
    option = {} if name == "smoothquant" else {"group_size": 64}
    plan = accelpass.calibrate(stack, data(), [{"name": name, **option}], progress=False)
    x = data(1, seed=9)[0]["x"]
    want = stack(x)
    plain = {"smoothquant": "int8_dynamic"}.get(name, "int4_weights")
    errors = [
        float((answer(stack, x, **chosen) - want).norm())
        for chosen in ({"plan": plan}, {"passes": [{"name": plain, **option}]})
    ]
    assert errors[0] < errors[1]
    took = next(r for r in graphs_of(stack)[-1].report.records if r.name == plain).took
    assert len(took) == 4


def test_gptq_blocks_read_what_rounded_blocks_give(stack) -> None:
    """The second block's codes are those of inputs that the rounded first block made."""
    plan = accelpass.calibrate(stack, data(), [{"name": "gptq", "group_size": 64}], progress=False)
    form = Int4(64)

    def held(path: str) -> Tensor:
        return form.unpack([plan.tensors[f"gptq/{path}.weight/{part}"] for part in form.operands], torch.float32)

    first, second = stack.layers
    with torch.no_grad():
        x = torch.cat([b["x"] for b in data()])
        inner = torch.relu(nn.functional.linear(first.norm(x), held("layers.0.up"), first.up.bias))
        after = x + nn.functional.linear(inner, held("layers.0.down"), first.down.bias)
    kept = rounded({"name": "gptq", "group_size": 64}, second.up.weight.detach(), second.norm(after).detach())
    assert (kept - held("layers.1.up")).abs().gt(1e-5).float().mean() < 0.01


def test_a_plan_survives_its_file(stack, tmp_path) -> None:
    plan = accelpass.calibrate(stack, data(), [{"name": "gptq", "group_size": 64}], progress=False)
    plan.save(tmp_path / "plan.json")
    x = data(1, seed=9)[0]["x"]
    assert torch.equal(answer(stack, x, plan=plan), answer(stack, x, plan=str(tmp_path / "plan.json")))


def test_balanced_weights_follow_a_swap(stack) -> None:
    """Factors are of the plan, weights are live."""
    plan = accelpass.calibrate(stack, data(), ["awq"], progress=False)
    torch.manual_seed(5)
    other = Stack().eval()
    x = data(1, seed=9)[0]["x"]
    got, want = answer(other, x, plan=plan), other(x)
    assert (got - want).norm() < 0.2 * want.norm()


def test_gptq_refuses_other_weights(stack) -> None:
    plan = accelpass.calibrate(stack, data(), [{"name": "gptq", "group_size": 64}], progress=False)
    torch.manual_seed(5)
    with pytest.raises(Exception, match="is not the weight that the plan was made for"):
        answer(Stack().eval(), data(1)[0]["x"], plan=plan)


def test_language_model_with_a_tied_head() -> None:
    model = tiny_lm()
    batches = [{"ids": IDS}, {"ids": IDS.flip(1)}]
    for name in ("gptq", "awq"):
        plan = accelpass.calibrate(model, batches, [{"name": name, "group_size": 32}], progress=False)
        assert not any("embed" in key or "lm_head" in key for key in plan.tensors)
        got = answer(model, IDS, plan=plan)
        assert got.isfinite().all()


def test_without_a_plan_it_says_so(stack) -> None:
    answer(stack, data(1)[0]["x"], passes=["gptq"])
    record = next(r for r in graphs_of(stack)[-1].report.records if r.name == "gptq")
    assert "not calibrated" in record.skipped["(model)"] and len(record.took) == 4


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"name": "gptq", "damping": 0.0}, "damping=0.0 is not supported"),
        ({"name": "awq", "steps": 0}, "use 1 or more"),
        ({"name": "smoothquant", "strength": 1.5}, "use 0 to 1"),
        ({"name": "hqq", "symmetric": True}, "fits zero points"),
        ({"name": "hqq", "p": 0.0}, "p=0.0"),
        ({"name": "gptq", "group_size": 48}, "use 32, 64 or 128"),
    ],
)
def test_bad_options(options, says) -> None:
    with pytest.raises(OptionError, match=re.escape(says)):
        make(options)


def test_bad_data(stack) -> None:
    bad = data(1)
    bad[0]["x"][0, 0, 0] = float("nan")
    with pytest.raises(PassError, match="not finite"):
        accelpass.calibrate(stack, bad, ["awq"], progress=False)
    with pytest.raises(PassError, match="found no linear"):
        accelpass.calibrate(stack, data(1), [{"name": "awq", "include": ["nothing"]}], progress=False)


def test_dead_channels_and_outliers(stack) -> None:
    batches = data(2)
    for batch in batches:
        batch["x"][..., 7] = 1e4
        batch["x"][..., 5] = 0
    for name in ("gptq", "awq", "smoothquant"):
        plan = accelpass.calibrate(stack, batches, [name], progress=False)
        assert answer(stack, batches[0]["x"], plan=plan).isfinite().all()


def test_a_plan_of_another_width(stack) -> None:
    plan = accelpass.calibrate(stack, data(), ["awq"], progress=False)
    name = next(iter(plan.tensors))
    damaged = Plan(plan.settings, plan.fingerprint, {**plan.tensors, name: torch.ones(3)})
    with pytest.raises(Exception, match="factors for layers") as caught:
        answer(stack, data(1)[0]["x"], plan=damaged)
    assert PlanError.__name__ in repr(caught.value)


@pytest.mark.parametrize("name", ["gptq", "awq"])
def test_exported_with_what_was_learnt(stack, name, tmp_path) -> None:
    """The file is compared with torch, plan and all, by the export itself."""
    plan = accelpass.calibrate(stack, data(), [{"name": name, "group_size": 64}], progress=False)
    x = data(1, seed=9)[0]["x"]
    report = accelpass.export_onnx(stack, (x,), tmp_path / "model.onnx", plan=plan)
    assert report.difference is not None and report.difference < 1e-4
    assert report.weights_after < 0.25 * report.weights_before


@pytest.mark.parametrize("name", ["gptq", "awq", "hqq", "mixed_precision"])
def test_saved_and_loaded(name, tmp_path) -> None:
    torch.manual_seed(0)
    stack = Stack().eval()  # nothing else is derived of it
    x, entry = data(1, seed=9)[0]["x"], {"name": name, "group_size": 64}
    chosen = (
        {"passes": [entry]} if name == "hqq" else {"plan": accelpass.calibrate(stack, data(), [entry], progress=False)}
    )
    torch._dynamo.reset()
    fast = torch.compile(stack, backend="accelpass", options={"lowering": "eager", **chosen})
    with torch.no_grad():
        want = fast(x)
    accelpass.save(fast, tmp_path / "packed")
    torch._dynamo.reset()
    again = Stack().eval()
    again.load_state_dict(stack.state_dict())
    loaded = accelpass.load(again, tmp_path / "packed")
    with torch.no_grad():
        torch.testing.assert_close(loaded(x), want)
    if name == "gptq":  # its codes are the packed weights, and are in the file once
        codes = sum(p.numel() for p in stack.parameters() if p.dim() == 2) // 2
        written = (tmp_path / "packed" / "accelpass.safetensors").stat().st_size
        assert written < 1.6 * codes


@pytest.mark.parametrize("symmetric", [False, True])
def test_gptq_refuses_codes_of_other_options(stack, symmetric) -> None:
    """Typed options go before the plan's, whose codes are then not of their form."""
    entry = {"name": "gptq", "group_size": 64, "symmetric": symmetric}
    plan = accelpass.calibrate(stack, data(), [entry], progress=False)
    for other in ({"group_size": 32}, {"symmetric": not symmetric}):
        with pytest.raises(Exception, match="calibrate with the options that you use"):
            answer(stack, data(1)[0]["x"], plan=plan, passes=[{**entry, **other}])


def test_weights_of_one_input_with_settings_of_their_own() -> None:
    model = tiny_lm()
    sites = {"*.up_proj": {"group_size": 64}}
    plan = accelpass.calibrate(
        model, [{"ids": IDS}], [{"name": "gptq", "group_size": 32, "sites": sites}], progress=False
    )
    held = {key: t.shape[1] for key, t in plan.tensors.items() if key.endswith("/scale")}
    up, gate = (held[f"gptq/layers.0.{name}.weight/scale"] for name in ("up_proj", "gate_proj"))
    assert gate == 2 * up
    assert answer(model, IDS, plan=plan).isfinite().all()
