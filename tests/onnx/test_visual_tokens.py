"""A file of a model that sees holds the choice of visual tokens: ONNX Runtime gives what the compiled model gives."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import torch

import accelpass
from accelpass import KVCache
from accelpass.models_zoo import small
from tests.passes.vision_truth import compiled
from tests.small_models import relative_error

PASSES: dict[str, dict[str, Any]] = {
    "fastv": {"layer": 1},
    "flowcut": {"keep": 0.5},
    "flowcut_text": {"layer": 1},
    "hired": {"keep": 0.5},
    "stc": {"keep": 0.5},
    "visionzip": {"keep": 0.5},
    "yopo": {"layer": 1, "window": 0},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", PASSES)
def test_a_file_chooses_as_the_compiled_model(name: str, tmp_path: Path):
    model = small.seeing()
    ids = torch.randint(16, small.VOCABULARY, (1, 22), generator=torch.Generator().manual_seed(0))
    ids[:, 2:18] = small.IMAGE
    pixels = torch.randn(1, 3, 24, 24, generator=torch.Generator().manual_seed(1))
    alone = {"use_cache": False, "logits_to_keep": 1}
    chosen = {"name": name, **PASSES[name]}
    report = accelpass.export_onnx(model, (ids, pixels), tmp_path / "m.onnx", [chosen], kwargs=alone)
    assert report.took() == {name: 2 if name == "yopo" else 1}  # yopo also leaves the image out of late layers
    session = onnxruntime.InferenceSession(str(tmp_path / "m.onnx"), providers=["CPUExecutionProvider"])
    names = [i.name for i in session.get_inputs()]
    given = dict(zip(names, (ids.numpy(), pixels.numpy()), strict=True))
    (got,) = session.run(None, given)
    with torch.no_grad():
        want, dense = compiled(model, [chosen])(ids, pixels, **alone).logits, model(ids, pixels, **alone).logits
    assert relative_error(torch.from_numpy(got), want) < 1e-4
    assert relative_error(want, dense) > 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("name", ["hired", "visionzip"])
def test_images_that_are_kept_whole_are_followed_by_the_models_own_steps(name: str, tmp_path: Path):
    model = small.seeing()
    ids = torch.randint(16, small.VOCABULARY, (1, 22), generator=torch.Generator().manual_seed(0))
    ids[:, 2:18] = small.IMAGE
    pixels = torch.randn(1, 3, 24, 24, generator=torch.Generator().manual_seed(1))
    held = {"past_key_values": KVCache(model, 30), "logits_to_keep": 1}
    chosen, decode = [{"name": name, "keep": 1.0}], {"input_ids": ids[:, :1], "pixel_values": None}
    report = accelpass.export_onnx(model, (ids, pixels), tmp_path / "m.onnx", chosen, kwargs=held, decode=decode)
    assert not any(report.took().values()) and report.difference is not None and report.difference < 1e-4
    (later,) = [r for n, records in report.records.items() if "decode" in n for r in records]
    assert later.name == name and "the prompt was left whole" in later.skipped["later tokens"]
