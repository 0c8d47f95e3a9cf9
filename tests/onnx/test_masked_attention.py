"""Attention that passes cut down is the standard's operator with their mask, and the file says what it cannot save."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import accelpass
from tests.onnx.files import far, ran
from tests.public.conftest import tiny_llama

PBS = {"name": "pbs_attn", "block": 8, "segment": 16, "threshold": 0.5}
WINDOW = {"name": "sink_window", "density": 0.5, "block": 8, "sinks": 8}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("passes", "opset", "operators"),
    [
        ([WINDOW], 23, {"Attention": 2, "Softmax": 0}),
        pytest.param([PBS], 23, {"Attention": 2}, marks=pytest.mark.slow),
        pytest.param([WINDOW], 22, {"Attention": 0, "Softmax": 2}, marks=pytest.mark.slow),
    ],
)
def test_a_prompt_of_any_length(tmp_path: Path, passes: list[Any], opset: int, operators: dict[str, int]) -> None:
    model = tiny_llama()
    example = {"input_ids": torch.arange(40)[None] % 60, "use_cache": False}
    report = accelpass.export_onnx(
        model, (), tmp_path / "m.onnx", passes, kwargs=example, dynamic_shapes={"input_ids": {1: "tokens"}}, opset=opset
    )
    assert {name: report.files[0].operators.get(name, 0) for name in operators} == operators
    assert any("2 attentions are computed in full and masked" in note for note in report.notes)
    ids = torch.randint(0, 60, (1, 57), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        want = accelpass.compile(model, passes, lowering="eager")(input_ids=ids, use_cache=False).logits
        dense = model(input_ids=ids, use_cache=False).logits
    got = ran(report.path, {"input_ids": ids})[0]
    assert far(got, want) < 1e-4 < far(got, dense)
