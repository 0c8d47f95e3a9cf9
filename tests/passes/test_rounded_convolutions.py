"""Convolutions in W8A8 and W4A8 by ranges of a plan: against integers, and in a whole UNet shaped as SDXL's."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import accelpass
from accelpass.api.calibration.bit_search import MIXDQ, sqnr
from accelpass.passes.core.plan import Plan
from tests.passes.test_diffusion_rounding import compiled, static, symmetric
from tests.sweep import examples, sweep

Call = dict[str, Any]
CONVOLUTIONS = {nn.Conv1d: F.conv1d, nn.Conv2d: F.conv2d, nn.Conv3d: F.conv3d}


@settings(max_examples=examples(6), deadline=None)
@given(
    st.sampled_from([nn.Conv1d, nn.Conv2d, nn.Conv3d]), st.sampled_from([1, 2]), st.integers(1, 3), st.integers(1, 2),
    st.sampled_from([{"name": "int8_static", "convolutions": True}, {"name": "mixdq"}]), st.integers(0, 2**16),
)  # fmt: skip
def test_a_convolution_is_that_of_integers(
    kind: Any, groups: int, size: int, stride: int, given: Call, seed: int
) -> None:
    """Codes of the input in one step, codes of the kernel with a scale for each output channel, sums that are exact; padding is 0."""
    torch.manual_seed(seed)
    layer = kind(8 * groups, 6, size, stride=stride, padding=size // 2, groups=groups).eval()
    shape = [2, 8 * groups, *[5] * (layer.weight.dim() - 2)]
    data = [{"input": torch.randn(shape)} for _ in range(2)]
    plan = accelpass.calibrate(layer, data, [given], progress=False)
    x = 1.5 * torch.randn(shape)  # some of it is beyond the range, and clipped
    with torch.no_grad():
        got = compiled(layer, plan=plan)(x)
        step = max(float(d["input"].abs().max()) for d in data) / 127
        scale = layer.weight.flatten(1).abs().amax(1) / 127
        rows = scale.view(-1, *[1] * (layer.weight.dim() - 1))
        codes, kernel = (x / step).round().clamp(-128, 127), (layer.weight / rows).round()
        sums = CONVOLUTIONS[kind](codes.double(), kernel.double(), stride=stride, padding=size // 2, groups=groups)
        channels = [1, -1, *[1] * (layer.weight.dim() - 2)]
        want = (sums * step * scale.view(channels) + layer.bias.view(channels)).float()
    # A number on the edge of two codes may fall to either side.
    assert (got - want).abs().mean() <= 1e-3 * want.abs().mean()


# --- a UNet ---


def build() -> nn.Module:
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    return diffusers.UNet2DConditionModel(
        sample_size=8, block_out_channels=(16, 32), down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), layers_per_block=1, transformer_layers_per_block=(1, 1),
        attention_head_dim=(2, 4), cross_attention_dim=24, use_linear_projection=True, norm_num_groups=8,
        addition_embed_type="text_time", addition_time_embed_dim=8, projection_class_embeddings_input_dim=64,
    ).eval()  # fmt: skip


@pytest.fixture(scope="module")
def unet() -> nn.Module:
    return build()


def prompts(count: int, seed: int = 0) -> list[Call]:
    draw = torch.Generator().manual_seed(seed)
    made = []
    for _ in range(count):
        text = torch.randn(2, 7, 24, generator=draw)
        text[:, 0] = 60 * torch.linspace(-1, 1, 24)  # BOS: the same in all prompts, and far larger
        made.append(
            {
                "sample": torch.randn(2, 4, 8, 8, generator=draw),
                "timestep": torch.tensor(999),
                "encoder_hidden_states": text,
                "added_cond_kwargs": {
                    "text_embeds": torch.randn(2, 16, generator=draw),
                    "time_ids": torch.tensor([[8.0, 8, 0, 0, 8, 8]] * 2),
                },
            }
        )
    return made


DATA = prompts(2)
TEXT = ("attn2.to_k", "attn2.to_v")


def oracle(model: nn.Module, data: list[Call], bits: int) -> nn.Module:
    """The card's, by hooks on modules: ranges of the float model's inputs, then inputs and weights rounded."""
    most: dict[str, Tensor] = {}
    widths: dict[str, list[int]] = {}
    joined: dict[int, tuple[Tensor, list[int]]] = {}
    join = torch.cat

    def cat(parts: list[Tensor], dim: int = 0) -> Tensor:
        made = join(parts, dim)
        joined[id(made)] = made, [p.shape[1] for p in parts]  # kept, so that no other has its id
        return made

    sites = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)}
    sites = {n: m for n, m in sites.items() if bits == 8 or m.weight[0].numel() % 8 == 0}

    def watch(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            x = args[0][:, 1:] if name.endswith(TEXT) else args[0]
            short_cut = isinstance(module, nn.Conv2d) and module.kernel_size == (1, 1) and id(x) in joined
            widths[name] = joined[id(x)][1] if short_cut else [x.shape[1]]
            found = torch.stack([part.abs().amax() for part in x.split(widths[name], 1)])
            most[name] = torch.maximum(most.get(name, torch.zeros(())), found)

        return hook

    hooks = [m.register_forward_pre_hook(watch(n)) for n, m in sites.items()]
    with torch.no_grad(), mock.patch("torch.cat", cat):
        for call in data:
            model(**call)
    assert sum(len(w) > 1 for w in widths.values()) >= 2
    for hook in hooks:
        hook.remove()
    made = copy.deepcopy(model)
    for name in sites:
        module = made.get_submodule(name)
        w = module.weight.detach()
        plain = copy.deepcopy(module)
        columns = widths[name] if len(widths[name]) > 1 else w[0].numel()
        module.weight.data = join([symmetric(part, bits) for part in w.flatten(1).split(columns, 1)], 1).view_as(w)

        def enter(module: nn.Module, args: tuple[Tensor, ...], name: str = name) -> tuple[Tensor]:
            parts = args[0].split(widths[name], 1) if len(widths[name]) > 1 else args
            return (join([static(x, step) for x, step in zip(parts, most[name], strict=True)], 1),)

        def leave(module: nn.Module, args: Any, out: Tensor, plain: nn.Module = plain) -> Tensor:
            return torch.cat([plain(module.bos), out[:, 1:]], 1)

        def keep(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            module.bos = args[0][:, :1]

        if name.endswith(TEXT):
            module.register_forward_pre_hook(keep)
            module.register_forward_hook(leave)
        module.register_forward_pre_hook(enter)
    return made


@pytest.mark.parametrize("bits", sweep(8, 4))
@pytest.mark.slow
def test_a_whole_unet_is_the_cards_oracle(unet: nn.Module, bits: int) -> None:
    plan = accelpass.calibrate(unet, DATA, [{"name": "mixdq", "bits": bits}], progress=False)
    assert sum(key.endswith("/bos") for key in plan.tensors) == 2 * sum(
        "attn2.to_k" in n for n, _ in unet.named_modules()
    )
    fast, rounded, call = compiled(unet, plan=plan), oracle(unet, DATA, bits), prompts(1, seed=7)[0]
    with torch.no_grad():
        want, dense, got = rounded(**call).sample, unet(**call).sample, fast(**call).sample
    noise = (want - dense).norm()
    assert (got - want).norm() < 0.25 * noise and 0 < noise < (0.2 if bits == 8 else 0.7) * dense.norm()
    made = accelpass.explain(fast).passes["mixdq"]
    kinds = [type(unet.get_submodule(path)) for path in made.took if path in dict(unet.named_modules())]
    convolutions = [m for m in unet.modules() if isinstance(m, nn.Conv2d)]
    left = [path for path in made.skipped if isinstance(unet.get_submodule(path), nn.Conv2d)]
    assert kinds.count(nn.Conv2d) == len(convolutions) - len(left) and left == ([] if bits == 8 else ["conv_in"])
    before, after = (sum(getattr(d, f) for d in made.took.values()) for f in ("bytes_before", "bytes_after"))
    assert after < before * (0.3 if bits == 8 else 0.2)


class Both(nn.Module):
    """Convolutions, and a linear that reads pixels as tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.attn2, self.last = nn.Conv2d(8, 16, 3, padding=1), nn.Linear(16, 16), nn.Conv2d(16, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.attn2(self.first(x).movedim(1, -1))).movedim(-1, 1))


@pytest.fixture(scope="module")
def both() -> Both:
    torch.manual_seed(0)
    return Both().eval()


X = torch.randn(2, 8, 6, 6, generator=torch.Generator().manual_seed(0))


def test_linears_alone(both: Both) -> None:
    given = {"name": "mixdq", "convolutions": False}
    plan = accelpass.calibrate(both, [{"x": X}], [given], progress=False)
    assert list(plan.tensors) == ["mixdq/attn2.weight/range"]
    fast = compiled(both, plan=plan)
    with torch.no_grad():
        fast(X)
    assert list(accelpass.explain(fast).passes["mixdq"].took) == ["attn2"]


def test_bits_of_both_by_sensitivity(both: Both) -> None:
    """The integer program over linears and convolutions, and its result as the pass's option."""
    found = accelpass.search_bits(both, lambda m: m(X), 6.0, groups=MIXDQ, progress=False)
    assert found.groups == {"first": "quality", "attn2": "content", "last": "quality"}
    assert set(found.bits.values()) == {4, 8} and found.average <= 6.02
    sizes = {n: both.get_submodule(n).weight.numel() for n in found.bits}
    assert found.average == pytest.approx(sum(found.bits[n] * s for n, s in sizes.items()) / sum(sizes.values()))
    with torch.no_grad():
        alone, want = copy.deepcopy(both), both(X)
        w = alone.first.weight
        w.copy_(symmetric(w.flatten(1), 4).view_as(w))
        assert found.scores["first"][0] == pytest.approx(sqnr(alone(X), want), rel=1e-5)
        plan = accelpass.calibrate(both, [{"x": X}], [{"name": "mixdq", "sites": found.sites}], progress=False)
        fast = compiled(both, plan=plan)
        assert 0 < (fast(X) - want).norm() < 0.3 * want.norm()
    took = accelpass.explain(fast).passes["mixdq"].took
    assert all(("int_rows" in took[path].what) is (bits == 4) for path, bits in found.bits.items())


def test_exported(tmp_path: Path) -> None:
    """Pairs of QuantizeLinear and DequantizeLinear in front of Conv, in the ranges of the plan."""
    pytest.importorskip("onnxruntime")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(8, 16, 3, padding=1), nn.SiLU(), nn.Conv2d(16, 8, 1, stride=2)).eval()
    x = torch.randn(2, 8, 6, 6)
    plan = accelpass.calibrate(model, [{"input": x}], ["mixdq"], progress=False)
    report = accelpass.export_onnx(model, (x,), tmp_path / "m.onnx", plan=plan)
    operators = report.files[0].operators
    assert operators["QuantizeLinear"] == 2 and operators["Conv"] == 2
    assert report.weights_after < 0.4 * report.weights_before and report.difference < 0.05


def test_without_data_a_convolution_stays_as_it_is() -> None:
    torch.manual_seed(0)
    layer, x = nn.Conv2d(8, 4, 3), torch.randn(1, 8, 5, 5)
    for fast in (compiled(layer, passes=["mixdq"]), compiled(layer, plan=Plan.of(layer, ["mixdq"], {}))):
        with torch.no_grad():
            assert torch.equal(fast(x), layer(x))
        skipped = accelpass.explain(fast).passes["mixdq"].skipped
        assert any("no data told the range of this convolution's input" in why for why in skipped.values())


def test_data_that_are_not_finite() -> None:
    x = torch.full((1, 8, 5, 5), torch.nan)
    with pytest.raises(accelpass.AccelpassError, match="are not finite"):
        accelpass.calibrate(nn.Conv2d(8, 4, 3), [{"input": x}], ["mixdq"], progress=False)
