"""Kernels of convolutions as packed weights: against the convolution of the unpacked kernel, in models that see and that denoise."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import accelpass
from accelpass.backends import graphs_of
from accelpass.ir.linear.spec import WeightFormat
from accelpass.passes.core.base import Record
from accelpass.passes.quantization.weight_format import FORMATS, format_named
from tests.small_models import relative_error
from tests.sweep import examples, sweep

INT8 = {"name": "int8_weights", "convolutions": True}
INT4 = {"name": "int4_weights", "group_size": 32, "convolutions": True}


def compiled(model: Any, *passes: Any, lowering: str = "eager") -> Any:
    torch._dynamo.reset()
    return torch.compile(model, backend="accelpass", options={"lowering": lowering, "passes": list(passes)})


def record(model: Any) -> Record:
    return graphs_of(model)[-1].report.records[0]


def rounded(form: WeightFormat, kernel: Tensor) -> Tensor:
    """The oracle: what a kernel is after it was packed as the matrix (out, everything else)."""
    return form.unpack(form.pack(kernel.flatten(1)), kernel.dtype).view_as(kernel)


def round_model(model: nn.Module, form: WeightFormat, kinds: tuple[type, ...]) -> None:
    for module in model.modules():
        if isinstance(module, kinds) and isinstance(form.check(module.weight[0].numel()), accelpass.passes.Take):
            module.weight.data = rounded(form, module.weight.data)


@settings(max_examples=examples(8), deadline=None)
@given(
    st.sampled_from([nn.Conv1d, nn.Conv2d, nn.Conv3d]),
    st.sampled_from([1, 2]),
    st.integers(1, 3),
    st.integers(1, 2),
    st.sampled_from(FORMATS),
    st.integers(0, 2**31),
)
def test_any_convolution_is_that_of_the_unpacked_kernel(kind, groups, size, stride, name, seed):
    torch.manual_seed(seed)
    form = format_named(name, 32)
    model = kind(32 * groups, 6, size, stride=stride, padding=size // 2, groups=groups).eval()
    dims = {nn.Conv1d: 1, nn.Conv2d: 2, nn.Conv3d: 3}[kind]
    x = torch.randn(2, 32 * groups, *[5] * dims)
    call = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}[dims]
    want = call(x, rounded(form, model.weight), model.bias, stride, size // 2, 1, groups)
    with torch.no_grad():
        got = compiled(model, {"name": "weight_format", "format": name, "group_size": 32, "convolutions": True})(x)
    assert relative_error(got, want) < 1e-5
    assert len(record(model).took) == 1


def test_convolutions_keep_their_kernels_unless_asked_for():
    model, x = nn.Sequential(nn.Conv2d(32, 8, 3), nn.Conv2d(8, 8, 1)).eval(), torch.randn(1, 32, 5, 5)
    with torch.no_grad():
        assert torch.equal(compiled(model, "int8_weights")(x), model(x))
    assert record(model).took == {}
    assert "a pointwise_conv keeps its float weight" in record(model).skipped.values()


def test_a_kernel_that_no_group_divides_is_left():
    model, x = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 2)).eval(), torch.randn(1, 3, 8, 8)
    with torch.no_grad():
        compiled(model, INT4)(x)
    assert list(record(model).took) == ["1"]
    assert "27" in record(model).skipped["0"] and "32" in record(model).skipped["0"]


def test_a_kernel_that_is_a_matrix_elsewhere_is_left():
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv1d(8, 8, 1)
            self.table = nn.Embedding(8, 8)
            self.weight = nn.Parameter(torch.randn(8, 8, 1))

        def forward(self, x: Tensor) -> Tensor:
            return F.conv1d(x, self.weight) + self.weight.sum()

    model = Shared().eval()
    with torch.no_grad():
        compiled(model, INT8)(torch.randn(1, 8, 4))
    assert list(record(model).skipped.values()) == ["1 other use(s) of the weight need its float form"]


def test_a_swapped_kernel_is_packed_anew():
    model, x = nn.Sequential(nn.Conv2d(8, 4, 3)).eval(), torch.randn(1, 8, 5, 5)
    fast, form = compiled(model, INT8), format_named("int8", 32)
    with torch.no_grad():
        for _ in range(2):
            want = F.conv2d(x, rounded(form, model[0].weight), model[0].bias)
            assert relative_error(fast(x), want) < 1e-5
            model[0].weight.copy_(torch.randn_like(model[0].weight))


@pytest.mark.slow
def test_compiled_code_reads_the_packed_kernel():
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Conv2d(32, 8, 3), nn.ReLU()).eval(), torch.randn(1, 32, 6, 6)
    want = F.relu(F.conv2d(x, rounded(format_named("int4", 32), model[0].weight), model[0].bias))
    with torch.no_grad():
        assert relative_error(compiled(model, INT4, lowering="inductor")(x), want) < 1e-5


def vit() -> tuple[nn.Module, tuple[Tensor, ...]]:
    from transformers import ViTConfig, ViTModel

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    model = ViTModel(ViTConfig(**sizes, image_size=16, patch_size=8), add_pooling_layer=False).eval()
    return model, (torch.randn(1, 3, 16, 16),)


def unet() -> tuple[nn.Module, tuple[Tensor, ...]]:
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    model = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(32, 32),
        layers_per_block=1,
        norm_num_groups=8,
        cross_attention_dim=32,
        attention_head_dim=8,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    ).eval()
    return model, (torch.randn(1, 4, 8, 8), torch.tensor(3), torch.randn(1, 5, 32))


def first(output: Any) -> Tensor:
    return output[0]


@pytest.mark.parametrize(
    ("build", "chosen", "lowering"),
    sweep((vit, INT8, "eager"), (unet, INT4, "aten"), (vit, INT4, "eager"), (vit, INT8, "inductor")),
)
def test_models_that_see_and_denoise(build: Any, chosen: dict[str, Any], lowering: str):
    model, given = build()
    form = format_named("int8" if chosen is INT8 else "int4", 32)
    with torch.no_grad():
        got = first(compiled(model, chosen, lowering=lowering)(*given, return_dict=False))
    did = record(model)
    kernels = {n for n, m in model.named_modules() if isinstance(m, nn.Conv1d | nn.Conv2d)}
    fit = {n for n in kernels if chosen is INT8 or not model.get_submodule(n).weight[0].numel() % 32}
    assert fit and fit <= did.took.keys() and kernels - fit <= did.skipped.keys()
    before = sum(done.bytes_before for name, done in did.took.items() if name in fit)
    after = sum(done.bytes_after for name, done in did.took.items() if name in fit)
    assert after < before * (0.26 if chosen is INT8 else 0.16)  # of float32, scales counted
    round_model(model, form, (nn.Linear, nn.Conv1d, nn.Conv2d))
    with torch.no_grad():
        want = first(model(*given, return_dict=False))
    # Linears of many rows are lowered to bfloat16 products where the CPU has them.
    assert relative_error(got, want) < (1e-4 if lowering == "eager" else 1e-2)


@pytest.mark.parametrize("chosen", [INT8, INT4], ids=["int8", "int4"])
def test_a_file_stores_the_packed_kernels(chosen: dict[str, Any], tmp_path: Path):
    import onnx

    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 32, 4, stride=4), nn.ReLU(), nn.Conv2d(32, 64, 3, padding=1), nn.ReLU())
    model = nn.Sequential(model, nn.Conv2d(64, 64, 3, padding=1)).eval()
    x = torch.randn(1, 3, 16, 16)
    report = accelpass.export_onnx(model, (x,), tmp_path / "m.onnx", [chosen], opset=21)
    plain = accelpass.export_onnx(model, (x,), tmp_path / "plain.onnx", [], opset=21)
    taken = 3 if chosen is INT8 else 2  # 48 entries of a patch are no whole groups of 32
    assert report.took() == {chosen["name"]: taken}
    assert report.difference is not None and report.difference < 1e-4
    assert report.bytes < plain.bytes * (0.3 if chosen is INT8 else 0.25)
    operators = [n.op_type for n in onnx.load(tmp_path / "m.onnx").graph.node]
    assert operators.count("DequantizeLinear") == taken and operators.count("Conv") == 3
