"""Inputs and outputs keep their names and count, files are compared on values that were not traced, and state goes in and out."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import BertConfig, BertModel

import accelpass
from accelpass import ExportError
from accelpass.backends.export.functional import Functional
from accelpass.backends.onnx import runtime
from accelpass.backends.onnx.examples import others
from tests.onnx.counting import Counting
from tests.onnx.files import far
from tests.passes.test_kv_methods import llama


def exported(model: nn.Module, args: tuple[Any, ...], folder: Path, *passes: Any, **kwargs: Any) -> Any:
    path = folder / "m.onnx"
    accelpass.export_onnx(model.eval(), args, path, list(passes), kwargs=kwargs)
    return runtime.session(path)


def names(loaded: Any) -> tuple[list[str], list[str]]:
    return [i.name for i in loaded.get_inputs()], [o.name for o in loaded.get_outputs()]


class Two(nn.Module):
    """Reads two tensors, and a third not at all."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, query: Tensor, key: Tensor, unused: Tensor | None = None) -> Tensor:
        return self.a(query) - 2 * self.b(key)


@pytest.mark.parametrize("view", [lambda t: t, lambda t: t.view(t.shape), lambda t: t.detach()])
def test_one_tensor_for_two_inputs(tmp_path: Path, view: Any) -> None:
    model, same = Two(), torch.randn(3, 8)
    loaded = exported(model, (same, view(same), same), tmp_path)
    assert names(loaded) == (["query", "key", "unused"], ["output"])
    given = {"query": torch.randn(3, 8), "key": torch.randn(3, 8), "unused": same}
    (got,) = runtime.run(loaded, given)
    assert far(got, model(given["query"], given["key"]).detach()) < 1e-5


def test_a_weight_as_input(tmp_path: Path) -> None:
    model = Two()
    loaded = exported(model, (torch.randn(8, 8), model.a.weight), tmp_path)
    given = {"query": torch.randn(8, 8), "key": torch.randn(8, 8)}
    (got,) = runtime.run(loaded, given)
    assert far(got, model(given["query"], given["key"]).detach()) < 1e-5


class Returns(nn.Module):
    """Returns an input, one tensor twice, a weight twice, a part, a constant, and what is called as an input is."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(8, 8)

    def forward(self, x: Tensor, mask: Tensor) -> dict[str, Any]:
        y = self.a(x).relu()
        kept = {"mask": mask, "first": y, "second": y, "none": None, "part": y[:, :4], "bias": self.a.bias}
        return {**kept, "again": self.a.bias, "ones": torch.ones(2), "x": y + 1, "same": x}


@pytest.mark.parametrize("passes", [(), ("int8_weights",)])
def test_outputs_that_are_inputs_weights_or_each_other(tmp_path: Path, passes: tuple[str, ...]) -> None:
    model = Returns()
    loaded = exported(model, (torch.randn(3, 8), torch.ones(3).bool()), tmp_path, *passes)
    called = ["output.mask", "first", "second", "part", "bias", "again", "ones", "output.x", "same"]
    assert names(loaded) == (["x", "mask"], called)
    given = {"x": torch.randn(3, 8), "mask": torch.tensor([True, False, True])}
    with torch.no_grad():
        want = [t for t in model(**given).values() if t is not None]
    for mine, its in zip(runtime.run(loaded, given), want, strict=True):
        assert mine.shape == its.shape and far(mine, its) < 0.02  # int8


def test_hidden_states_of_a_bert(tmp_path: Path) -> None:
    """Its last hidden state is returned twice, under two names."""
    sizes = {"hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64, "vocab_size": 50}
    model = BertModel(BertConfig(num_hidden_layers=2, output_hidden_states=True, **sizes)).eval()
    ids = torch.randint(0, 50, (2, 7))
    loaded = exported(model, (), tmp_path, "int8_weights", input_ids=ids, attention_mask=torch.ones_like(ids))
    assert names(loaded)[1] == ["last_hidden_state", "pooler_output", *(f"hidden_states.{i}" for i in range(3))]
    made = dict(
        zip(
            names(loaded)[1],
            runtime.run(loaded, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}),
            strict=True,
        )
    )
    assert torch.equal(made["last_hidden_state"], made["hidden_states.2"])
    assert not torch.equal(made["hidden_states.1"], made["hidden_states.2"])


def graph(function: Any, inputs: Mapping[str, Tensor]) -> Functional:
    return Functional(torch.fx.symbolic_trace(function), dict(inputs), ["output"], [])  # type: ignore[arg-type]


def test_a_file_is_compared_on_other_values() -> None:
    example = {
        "ids": torch.tensor([[4, 7, 2, 2]]),
        "more": torch.tensor([[4, 7, 2, 2]]),
        "ends": torch.tensor([0, 5, 20, 30]),
        "mask": torch.ones(2, 6).long(),
        "bias": torch.tensor([[0.0, -torch.inf, 3.0]]),
        "x": torch.zeros(3, 3),
        "past.0.keys": torch.zeros(2),
    }
    gm = torch.fx.GraphModule({}, torch.fx.Graph())
    nodes = [gm.graph.placeholder(f"a{i}") for i in range(len(example))]
    gm.graph.output([nodes[0]])
    gm.recompile()
    made, note = others(Functional(gm, example, ["output"], []), {"past.0.keys": None})
    assert not note and list(made) == list(example)
    assert all(not torch.equal(made[n], example[n]) for n in example if n != "past.0.keys")
    assert torch.equal(made["past.0.keys"], example["past.0.keys"])
    assert not torch.equal(made["ids"], made["more"]), "each input has its own"
    assert made["ids"].min() >= 2 and made["ids"].max() <= 7, "numbers of the same range"
    assert made["ends"].tolist() == sorted(made["ends"].tolist()) and made["ends"][-1] == 30
    assert made["mask"][:, 0].all() and (made["mask"].sum(1) == 5).all(), "a row is never masked altogether"
    assert (made["bias"] == 0).tolist() == [[True, False, False]] and made["bias"][0, 1] == -torch.inf


def test_values_that_a_model_does_not_take() -> None:
    """Only sorted unlike ``ids`` would fit: integers stay the example's, and the report says so."""

    class Picky(nn.Module):
        def forward(self, ids: Tensor, x: Tensor) -> list[Tensor]:
            torch._assert_async((ids == torch.tensor([5, 3, 1])).all())
            return [x]

    example = {"ids": torch.tensor([5, 3, 1]), "x": torch.ones(3)}
    made, note = others(graph(Picky(), example), {})
    assert torch.equal(made["ids"], example["ids"]) and not torch.equal(made["x"], example["x"])
    assert note == "compared on the example's ids, as other values do not fit the model"


@pytest.mark.parametrize("passes", [(), ("int8_weights",)])
def test_float16_is_allowed_its_rounding(tmp_path: Path, passes: tuple[str, ...]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 64)).half().eval()
    report = accelpass.export_onnx(model, (torch.randn(4, 64).half(),), tmp_path / "m.onnx", list(passes))
    assert report.difference is not None and report.difference < 8 * torch.finfo(torch.float16).eps
    assert runtime.tolerance_of(torch.float32) == runtime.TOLERANCE < runtime.tolerance_of(torch.float16)
    got, want = torch.tensor([1.0]).half(), torch.tensor([1.1]).half()
    with pytest.raises(ExportError, match=r"y differs by 9.1e-02 of its largest value .* and 7.8e-03 is allowed"):
        runtime.difference(["y"], [got], [want], runtime.tolerance_of(torch.float16))


def test_what_onnx_runtime_says_is_shown_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Linear(8, 8).bfloat16().eval()
    with pytest.raises(ExportError, match=r"does not load m.onnx: .*NOT_IMPLEMENTED.*node.*export model.float\(\)"):
        accelpass.export_onnx(model, (torch.ones(1, 8).bfloat16(),), tmp_path / "m.onnx")

    def fails(*given: Any, **options: Any) -> None:
        raise RuntimeError("long " * 300 + "the cause")

    monkeypatch.setattr("onnxruntime.InferenceSession", fails)
    with pytest.raises(ExportError, match=r"long the cause. Try another opset than 23 .opset=21, say."):
        accelpass.export_onnx(nn.Linear(8, 8).eval(), (torch.ones(1, 8),), tmp_path / "m.onnx")


def test_state_that_lives_with_a_weight(tmp_path: Path) -> None:
    model, x = nn.Sequential(nn.Linear(8, 8)).eval(), torch.randn(2, 8)
    report = accelpass.export_onnx(model, (x,), tmp_path / "m.onnx", [Counting()])
    loaded = runtime.session(tmp_path / "m.onnx")
    assert names(loaded) == (["input", "past.0.weight.calls"], ["output", "present.0.weight.calls"])
    assert report.manifest == tmp_path / "m.json"
    (state,) = json.loads(report.manifest.read_text())["state"]
    named = {"past": "past.0.weight.calls", "present": "present.0.weight.calls"}
    assert state == named | {"shape": [1], "dtype": "float32", "fill": 0.0, "lifetime": "model"}
    past = torch.zeros(1)
    for number in (1, 2, 3):
        got, past = runtime.run(loaded, {"input": x, "past.0.weight.calls": past})
        assert far(got, model(x).detach() + number) < 1e-5


class Keeps(nn.Module):
    """A decoder that keeps its cache itself."""

    def __init__(self) -> None:
        super().__init__()
        self.lm = llama(layers=1)
        self.cache = accelpass.KVCache(self.lm, capacity=8)

    def forward(self, ids: Tensor) -> Tensor:
        return self.lm(ids, past_key_values=self.cache).logits


class Moves(nn.Module):
    """Writes to a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(2))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale.mul_(0.5)


@pytest.mark.parametrize("passes", [(), ("h2o",)])
def test_a_cache_that_the_model_keeps(tmp_path: Path, passes: tuple[str, ...]) -> None:
    said = r"keeps a KVCache as its attribute cache, .*past_key_values=cache"
    with pytest.raises(ExportError, match=said):
        accelpass.export_onnx(Keeps().eval(), (torch.arange(5)[None],), tmp_path / "m.onnx", list(passes))


def test_a_parameter_that_is_written_to(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="the model writes to scale, which a file cannot"):
        accelpass.export_onnx(Moves().eval(), (torch.ones(2),), tmp_path / "m.onnx")
