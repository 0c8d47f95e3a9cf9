"""``activations="qdq"``: codes and ranges of a file against numpy, in all graphs of a model, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx.numpy_helper import to_array
from torch import nn

import accelpass
from accelpass.backends.export.errors import ExportError
from tests.onnx.files import ran
from tests.packing import pack_int8
from tests.small_models import tiny_lm


def layer() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(32, 64).eval()


def batches(count: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(6, 32, generator=generator) * (1 + n) for n in range(count)]


def export(path: Path, model: nn.Module, x: torch.Tensor, **options: Any) -> Any:
    given = {"passes": ["int8_weights"], "activations": "qdq", **options}
    return accelpass.export_onnx(model, (x,), path / "m.onnx", **given)


def rounding(path: Path) -> list[tuple[float, int]]:
    """Scale and zero point of each QuantizeLinear of a file."""
    graph = onnx.load(path).graph
    held = {t.name: to_array(t) for t in graph.initializer}
    held |= {n.output[0]: to_array(n.attribute[0].t) for n in graph.node if n.op_type == "Constant"}
    nodes = [n for n in graph.node if n.op_type == "QuantizeLinear"]
    return [(float(held[n.input[1]]), int(held[n.input[2]])) for n in nodes]


def test_a_layer_equals_integers_times_scales(tmp_path: Path) -> None:
    """In the range of all calls, 0 among it; numbers beyond it are cut off."""
    model, (x, *calls) = layer(), batches(3)
    report = export(tmp_path, model, x, calibration=[{"input": c} for c in calls], dynamic_shapes={"input": {0: "n"}})
    seen = torch.cat([x, *calls])
    scale = float(seen.max() - seen.min()) / 255
    zero = round(-float(seen.min()) / scale)
    ((stored_scale, stored_zero),) = rounding(report.path)
    assert abs(stored_scale / scale - 1) < 1e-6 and stored_zero == zero
    q, scales = pack_int8(model.weight.detach())
    given = torch.cat([3 * t for t in calls])
    codes = np.clip(np.rint(given.numpy() / np.float32(scale)) + zero, 0, 255).astype(np.int64)
    want = (codes - zero) @ q.numpy().astype(np.int64).T * (scale * scales.numpy()) + model.bias.detach().numpy()
    got = ran(report.path, {"input": given})[0].numpy()
    assert np.abs(got - want).max() < 1e-4 * np.abs(want).max()
    assert report.difference < 1e-5
    assert "1 linears are rounded to 8 bits, in ranges of the example call and 2 more" in report.notes[0]


def test_what_several_linears_read_is_rounded_once(tmp_path: Path) -> None:
    report = export(tmp_path, tiny_lm(), torch.arange(10).view(2, 5))
    linears = sum("proj" in name or name == "lm_head" for name in report.records["m.onnx"][0].took)
    assert linears == 7 and len(rounding(report.path)) == 5  # gate and up read the same
    assert "little to go by: give calibration calls" in " ".join(report.notes)


@pytest.mark.slow
def test_a_prompts_ranges_serve_the_decoding_step(tmp_path: Path) -> None:
    from tests.public.conftest import tiny_llama

    model = tiny_llama()
    cache = accelpass.KVCache(model, capacity=32)
    kwargs = {"input_ids": torch.arange(8)[None], "past_key_values": cache}
    report = accelpass.export_onnx(
        model, (), tmp_path / "m.onnx", ["int8_weights"], kwargs=kwargs, activations="qdq", verify=False,
        calibration=[{"input_ids": torch.arange(8, 16)[None]}],
    )  # fmt: skip
    prompt, decode = (rounding(f.path) for f in report.files)
    assert prompt and sorted(prompt) == sorted(decode)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"contrib": True}, "leave out contrib"),
        ({"passes": []}, "add passes=\\['int8_weights'\\]"),
        ({"passes": [{"name": "int4_weights", "group_size": 32}]}, "is for int8 weights, and int4_weights packed some"),
        ({"calibration": [{"input": torch.ones(6, 31)}]}, "calibration\\[0\\] does not fit the graph"),
        ({"calibration": [{"x": torch.ones(6, 32)}]}, "do not fit Linear.forward"),
        ({"calibration": [{"input": torch.ones(6, 32)}], "activations": "float32"}, "are for activations='qdq'"),
        ({"activations": "int4"}, "use 'float32' or 'int8' or 'qdq'"),
    ],
)
def test_refused(tmp_path: Path, options: dict[str, Any], says: str) -> None:
    with pytest.raises(ExportError, match=says):
        export(tmp_path, layer(), batches(1)[0], **options)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_step_without_linears_has_none_to_round(tmp_path: Path) -> None:
    from accelpass.models_zoo import digits

    call = {
        "hidden_states": torch.randn(2, 1, 32, 32, generator=torch.Generator().manual_seed(0)),
        "timestep": torch.full((2,), 500),
        "class_labels": torch.tensor([3, 1000]),
    }
    passes = ["int8_weights", {"name": "delta_cache", "start": 1, "interval": 3}]
    report = accelpass.export_onnx(
        digits.transformer(), (), tmp_path / "d.onnx", passes, kwargs=call, steps=4, activations="qdq"
    )
    counts = [file.operators.get("QuantizeLinear", 0) for file in report.files]
    assert counts[0] > 20 and 0 <= min(counts) < counts[0]
