"""``accelpass export``: what it prints and writes, and its mistakes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
from typer.testing import CliRunner, Result

from accelpass.cli.main import app
from tests.onnx.files import dtypes
from tests.public.conftest import folder

assert folder  # a fixture: a tiny model's folder


@pytest.fixture
def cli() -> Callable[..., Result]:
    return lambda *words: CliRunner().invoke(app, ["export", *(str(w) for w in words)])


@pytest.mark.slow
def test_a_file(cli: Callable[..., Result], folder: Path, tmp_path: Path) -> None:
    target = tmp_path / "m.onnx"
    done = cli(folder, "--passes", "int8_weights", "-o", target)
    assert done.exit_code == 0, done.output
    assert "INT8" in dtypes(target)
    for said in ("int8_weights   9             0", f"{target}", "weights: ", "x less); opset 23", "differ by"):
        assert said in done.stdout
    assert "Translating the graph" in done.stderr and "Comparing ONNX Runtime with torch" in done.stderr


@pytest.mark.slow
def test_a_decoder_as_json(cli: Callable[..., Result], folder: Path, tmp_path: Path) -> None:
    done = cli(folder, "--passes", "int8_weights,h2o:budget=0.5", "--cache", 64, "-o", tmp_path / "m.onnx", "--json")
    assert done.exit_code == 0, done.output
    about = json.loads(done.stdout)
    assert [Path(f["path"]).name for f in about["files"]] == ["m.prompt.onnx", "m.decode.onnx"]
    assert json.loads((tmp_path / "m.json").read_text())["capacity"] == 64
    assert about["manifest"] == str(tmp_path / "m.json") and about["difference"] < 1e-4
    h2o = [r for r in about["records"]["m.decode.onnx"] if r["name"] == "h2o"]
    assert list(h2o[0]["took"]) == ["model.layers.0.self_attn"]


@pytest.mark.slow
def test_a_pipelines_transformer(cli: Callable[..., Result], tmp_path: Path) -> None:
    """Called as the pipeline calls it: two images and their halves without a class."""
    done = cli("digits-dit", "--ask", 3, "--ask", 7, "--no-verify", "-o", tmp_path / "d.onnx", "--json")
    assert done.exit_code == 0, done.output
    (file,) = json.loads(done.stdout)["files"]
    assert file["inputs"][0] == "hidden_states"
    (latents, *_) = onnx.load(tmp_path / "d.onnx").graph.input
    assert [d.dim_value for d in latents.type.tensor_type.shape.dim] == [4, 1, 32, 32]


@pytest.mark.slow
def test_a_pipelines_steps(cli: Callable[..., Result], tmp_path: Path) -> None:
    wanted = ("--passes", "delta_cache:start=2,interval=2", "--steps", 6, "--ask", 3, "--ask", 7)
    done = cli("digits-dit", *wanted, "-o", tmp_path / "d.onnx", "--json")
    assert done.exit_code == 0, done.output
    about = json.loads(done.stdout)
    assert [Path(f["path"]).name for f in about["files"]] == ["d.0.onnx", "d.1.onnx", "d.2.onnx"]
    manifest = json.loads((tmp_path / "d.json").read_text())
    assert len(manifest["steps"]) == 6 and about["difference"] < 1e-4


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["smollm2-135m", "-o", "m.bin"], "m.bin does not end in .onnx; type: m.bin.onnx"),
        (["smollm2-135m", "-o", "/nowhere/m.onnx"], "there is no folder /nowhere; make it first"),
        (["smollm2-135", "-o", "m.onnx"], "did you mean 'smollm2-135m'"),
        (["smollm2-135m", "-o", "m.onnx", "--passes", "int9_weights"], "did you mean 'int8_weights'"),
        (["smollm2-135m", "-o", "m.onnx", "--opset", "9"], "opset=9 is not supported; use 18 to 23"),
        (["digits-dit", "-o", "m.onnx", "--cache", "64"], "this model makes images; leave --cache out"),
        (["digits-dit", "-o", "m.onnx", "--ask", "eleven"], "digits-dit draws the digits 0 to 9"),
        (["smollm2-135m", "-o", "m.onnx", "--texts", "none.txt"], "there is no such file"),
        (["smollm2-135m", "-o", "m.onnx", "--activations", "qdq", "--contrib"], "leave out contrib"),
    ],
)
def test_mistakes(
    cli: Callable[..., Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list, said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    done = cli(*words)
    assert done.exit_code in (1, 2) and said in " ".join(done.stderr.split())
    assert not list(tmp_path.iterdir())
