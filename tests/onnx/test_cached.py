"""A decoder with its cache as two files: what goes from call to call, and the same tokens as torch's loop."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

import accelpass
from tests.passes.test_kv_methods import CAPACITY, compiled, llama, tokens

PASSES: dict[str, list[Any]] = {
    "nothing": [],
    "h2o": [{"name": "h2o", "budget": 0.4}],
    "kv_quant": ["kv_quant"],
    "a2sf": [{"name": "a2sf", "budget": 0.4, "window": 4, "kernel": 3}],
    "keyformer": [{"name": "keyformer", "budget": 0.4}],
    "zipvl": [{"name": "zipvl", "threshold": 0.6, "newest": 4, "last": 4}],
    "h2o, adaptive heads": [{"name": "h2o", "budget": 0.4, "heads": "adaptive", "positions": "cache"}],
    "kv_window": [{"name": "kv_window", "budget": 0.4}],
    "mikv 4": [{"name": "mikv", "budget": 0.4, "bits": 4}],
    "mikv 3": [{"name": "mikv", "budget": 0.4, "bits": 3}],
    "tidaldecode": [{"name": "tidaldecode", "budget": 6, "first": 0, "reselect": 1}],
    "tokenselect": [{"name": "tokenselect", "budget": 5, "sinks": 2, "newest": 3, "reuse": 0.5}],
    "cskv": [{"name": "cskv", "window": 4}],
    "compresskv": [{"name": "compresskv", "tokens": 9, "window": 3, "ranking": (3, 0)}],
    "vidkv": [{"name": "vidkv", "block": 4, "window": 8}],
    "vidkv, a span": [{"name": "vidkv", "block": 4, "window": 8, "span": (1, 9), "protect": 0.5}],
    "sink_window": [{"name": "sink_window", "sinks": 4, "block": 4, "reserve": 8}],
    "pbs_attn": [{"name": "pbs_attn", "block": 4, "segment": 8}],
    "int8 and h2o": ["int8_weights", {"name": "h2o", "budget": 0.4}],
    "int4 and kv_quant": [{"name": "int4_weights", "group_size": 32, "exclude": ["o_proj", "qkv"]}, "kv_quant"],
}


@pytest.fixture(scope="module")
def example() -> ModuleType:
    """examples/onnx_generate.py, which is no package."""
    path = Path(__file__).parents[2] / "examples" / "onnx_generate.py"
    spec = importlib.util.spec_from_file_location("onnx_generate", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["onnx_generate"] = module
    spec.loader.exec_module(module)
    return module


def exported(model: Any, path: Path, passes: list[Any], dynamic: bool = True, **options: Any) -> Any:
    kwargs = {"input_ids": tokens(1, 12)[0], "past_key_values": accelpass.KVCache(model, CAPACITY)}
    shapes = {"input_ids": {1: "tokens"}} if dynamic else None
    return accelpass.export_onnx(model, (), path, passes, kwargs=kwargs, dynamic_shapes=shapes, **options)


@torch.no_grad()
def of_torch(model: Any, passes: list[Any], prompt: list[int], count: int) -> list[int]:
    fast, cache = compiled(model, *passes), accelpass.KVCache(model, CAPACITY)
    current, answer = torch.tensor([prompt]), list[int]()
    for _ in range(count):
        answer.append(int(fast(current, past_key_values=cache).logits[0, -1].argmax()))
        current = torch.tensor([answer[-1:]])
    return answer


def unoptimised() -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    return options


@pytest.mark.slow
def test_packed_rows_go_from_call_to_call(tmp_path: Path, example: ModuleType) -> None:
    model, passes = llama(layers=1), PASSES["kv_quant"]
    report = exported(model, tmp_path / "m.onnx", passes, dynamic=False, verify=False)
    names = ["m.decode.onnx", "m.json", "m.onnx.data", "m.prompt.onnx"]
    assert sorted(p.name for p in tmp_path.iterdir()) == names and report.manifest == tmp_path / "m.json"
    prompt, decode = report.files
    assert prompt.inputs == ("input_ids",) and "past.0.keys.codes" in decode.inputs
    assert [o.replace("present", "past") for o in decode.outputs[1:]] == [n for n in decode.inputs if n != "input_ids"]
    about = json.loads(report.manifest.read_text())
    state = {s["past"]: s for s in about["state"]}
    # Two codes a byte: 16 channels of 2 heads in 8 bytes a row.
    assert state["past.0.keys.codes"] | {"present": ""} == {
        "past": "past.0.keys.codes", "present": "", "shape": [1, 2, CAPACITY, 8], "dtype": "uint8", "fill": 0
    }  # fmt: skip
    assert about["capacity"] == CAPACITY and about["passes"] == [{"name": "kv_quant", "sites": 1}]

    decoder = example.Decoder(report.manifest, unoptimised())
    ids = tokens(1, 12, seed=3)[0]
    got = example.generate(decoder, ids[0].tolist(), 6)
    assert got == of_torch(model, passes, ids[0].tolist(), 6)
    # The same integers: what torch has stored after as many tokens.
    fast, cache = compiled(model, *passes), accelpass.KVCache(model, CAPACITY)
    with torch.no_grad():
        for piece in (ids, *(torch.tensor([[t]]) for t in got[:-1])):
            fast(piece, past_key_values=cache)
    for _, name, held in cache.buffers():
        mine = decoder.past[f"past.0.{name.removeprefix('kv.')}"]
        same = (
            np.array_equal(mine, held.numpy()) if held.dtype == torch.uint8 else np.allclose(mine, held.numpy(), 1e-3)
        )
        assert same, name
    with pytest.raises(ValueError, match="do not fit into the capacity of 48"):
        decoder(np.zeros((1, 40), dtype=np.int64))


@pytest.mark.slow
@pytest.mark.parametrize("name", PASSES)
def test_the_same_tokens_as_torch(tmp_path: Path, example: ModuleType, name: str) -> None:
    model = llama(hidden=64)
    report = exported(model, tmp_path / "m.onnx", PASSES[name])
    # pbs_attn is for prompts; the cache itself is as it was.
    assert all(count == 2 for who, count in report.took().items() if who not in ("int8_weights", "int4_weights"))
    decoder = example.Decoder(report.manifest, unoptimised())
    for length in (12, 21):
        prompt = tokens(1, length, seed=length)[0][0].tolist()
        assert example.generate(decoder, prompt, 8) == of_torch(model, PASSES[name], prompt, 8)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["early_exit", "skip_layers"])
def test_what_the_host_would_choose_is_left_out_and_said(name: str, tmp_path: Path) -> None:
    given = {"name": name, "least": 1} if name == "skip_layers" else name
    report = exported(llama(), tmp_path / "model.onnx", [given], dynamic=False)
    for records in report.records.values():
        (record,) = (r for r in records if r.name == name)
        assert not record.took and "the host chooses at each call" in record.skipped["model"]


@pytest.mark.slow
def test_layers_left_out_for_good(tmp_path: Path, example: ModuleType) -> None:
    model, passes = llama(hidden=64), [{"name": "skip_layers", "layers": [1]}]
    report = exported(model, tmp_path / "m.onnx", passes)
    assert report.took() == {"skip_layers": 1}
    prompt = tokens(1, 9)[0][0].tolist()
    assert example.generate(example.Decoder(report.manifest, unoptimised()), prompt, 8) == of_torch(
        model, passes, prompt, 8
    )
