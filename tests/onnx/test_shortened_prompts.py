"""A prompt that a pass shortens is one graph: what ONNX Runtime makes of its file is what the model makes of the chosen tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from torch import Tensor

import accelpass
from accelpass import KVCache
from tests.passes.gemfilter_truth import KEEP, LAYER, built, chosen, prompt_of
from tests.passes.lazy_oracle import LazyOracle
from tests.passes.test_lazyllm import ids as ids_of
from tests.passes.test_lazyllm import llama

GEMFILTER = {"name": "gemfilter", "keep": KEEP, "layer": LAYER}
ALONE = {"use_cache": False, "logits_to_keep": 1}


def session(path: Path) -> Any:
    return onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])


@torch.no_grad()
def of_chosen(model: Any, ids: Tensor) -> np.ndarray:
    return model(ids.gather(1, chosen(model, ids)), **ALONE).logits.numpy()


@pytest.mark.slow
@pytest.mark.parametrize("lengths", [(20,), (20, 33)], ids=["of one length", "of any length"])
def test_gemfilter(tmp_path: Path, lengths: tuple[int, ...]) -> None:
    model = built()
    dynamic = {"input_ids": {1: "tokens"}} if len(lengths) > 1 else None
    report = accelpass.export_onnx(
        model, (prompt_of(1, 20),), tmp_path / "m.onnx", [GEMFILTER], kwargs=ALONE, dynamic_shapes=dynamic
    )
    assert report.took() == {"gemfilter": 1} and report.difference is not None and report.difference < 1e-4
    loaded = session(tmp_path / "m.onnx")
    for tokens in lengths:
        ids = prompt_of(1, tokens, seed=tokens)
        (got,) = loaded.run(None, {"input_ids": ids.numpy()})
        np.testing.assert_allclose(got, of_chosen(model, ids), atol=1e-4, rtol=1e-4)


@pytest.mark.slow
def test_gemfilter_with_a_cache_goes_on_behind_the_chosen_tokens(tmp_path: Path) -> None:
    model, ids = built(), prompt_of(1, 20)
    kwargs = {"past_key_values": KVCache(model, 30), "logits_to_keep": 1}
    report = accelpass.export_onnx(model, (ids,), tmp_path / "m.onnx", [GEMFILTER], kwargs=kwargs)
    assert report.difference is not None and report.difference < 1e-4  # of the prompt and of tokens after it
    decode = next(f for f in report.files if "decode" in f.path.name)
    assert "past.0.tokens.dropped" in decode.inputs


@pytest.mark.slow
def test_a_prompt_that_is_left_whole_is_followed_by_the_models_own_steps(tmp_path: Path) -> None:
    model, ids = built(), prompt_of(1, 20)
    kwargs = {"past_key_values": KVCache(model, 30), "logits_to_keep": 1}
    long = {**GEMFILTER, "keep": 20}
    report = accelpass.export_onnx(model, (ids,), tmp_path / "m.onnx", [long], kwargs=kwargs)
    assert not any(report.took().values()) and report.difference is not None and report.difference < 1e-4
    ((aside,),) = [r for name, r in report.records.items() if "decode" in name]
    assert aside.name == "gemfilter" and "the prompt was left whole" in aside.skipped["later tokens"]
    assert "at most 20 tokens is read as it is" in aside.skipped["later tokens"]
    assert not any("dropped" in name for f in report.files for name in f.inputs)
    kwargs["past_key_values"] = KVCache(model, 30)
    plain = accelpass.export_onnx(model, (ids,), tmp_path / "plain.onnx", [], kwargs=kwargs)
    assert [f.inputs for f in report.files] == [f.inputs for f in plain.files]


@pytest.mark.slow
@pytest.mark.parametrize("lengths", [(20,), (20, 27)], ids=["of one length", "of any length"])
def test_lazyllm(tmp_path: Path, lengths: tuple[int, ...]) -> None:
    model, keep = llama(), {0: 0.6, 2: 0.5}
    lazy = {"name": "lazyllm", "keep": list(keep.values()), "layers": list(keep)}
    dynamic = {"input_ids": {1: "tokens"}} if len(lengths) > 1 else None
    report = accelpass.export_onnx(
        model, (ids_of(20),), tmp_path / "m.onnx", [lazy], kwargs={"use_cache": False}, dynamic_shapes=dynamic
    )
    assert report.took() == {"lazyllm": 3} and report.difference is not None and report.difference < 1e-4
    loaded = session(tmp_path / "m.onnx")
    for tokens in lengths:
        ids = ids_of(tokens, seed=tokens)
        (got,) = loaded.run(None, {"input_ids": ids.numpy()})
        with torch.no_grad():
            want = LazyOracle(model, keep).step(ids[0]).numpy()
        assert got.shape[:2] == (1, tokens)
        np.testing.assert_allclose(got[0, -1], want, atol=1e-4, rtol=1e-4)
