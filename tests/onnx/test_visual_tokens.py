"""A file of a model that sees holds the choice of visual tokens: ONNX Runtime gives what the compiled model gives."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import torch

import accelpass
from accelpass.models_zoo import small
from tests.passes.vision_truth import compiled
from tests.small_models import relative_error

PASSES: dict[str, dict[str, Any]] = {"fastv": {"layer": 1}, "hired": {"keep": 0.5}, "visionzip": {"keep": 0.5}}


@pytest.mark.parametrize("name", PASSES)
def test_a_file_chooses_as_the_compiled_model(name: str, tmp_path: Path):
    model = small.seeing()
    ids = torch.randint(16, small.VOCABULARY, (1, 22), generator=torch.Generator().manual_seed(0))
    ids[:, 2:18] = small.IMAGE
    pixels = torch.randn(1, 3, 24, 24, generator=torch.Generator().manual_seed(1))
    alone = {"use_cache": False, "logits_to_keep": 1}
    chosen = {"name": name, **PASSES[name]}
    report = accelpass.export_onnx(model, (ids, pixels), tmp_path / "m.onnx", [chosen], kwargs=alone)
    assert report.took() == {name: 1}
    session = onnxruntime.InferenceSession(str(tmp_path / "m.onnx"), providers=["CPUExecutionProvider"])
    names = [i.name for i in session.get_inputs()]
    given = dict(zip(names, (ids.numpy(), pixels.numpy()), strict=True))
    (got,) = session.run(None, given)
    with torch.no_grad():
        want, dense = compiled(model, [chosen])(ids, pixels, **alone).logits, model(ids, pixels, **alone).logits
    assert relative_error(torch.from_numpy(got), want) < 1e-4
    assert relative_error(want, dense) > 1e-4
