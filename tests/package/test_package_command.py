"""``accelpass package``: what it prints and writes, and its mistakes; and the page on packages."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner, Result

import accelpass
from accelpass.cli.commands.package_command import told
from accelpass.cli.main import app
from benchmarks import package as benchmark
from tests.package.conftest import Packaged
from tests.public.conftest import folder

assert folder  # a fixture: a tiny model's folder


@pytest.fixture
def cli() -> Callable[..., Result]:
    return lambda *words: CliRunner().invoke(app, ["package", *(str(w) for w in words)])


@pytest.mark.slow
def test_a_decoder_as_json(cli: Callable[..., Result], folder: Path, tmp_path: Path) -> None:
    target = tmp_path / "m.pt2"
    done = cli(folder, "--passes", "int8_weights", "--cache", 64, "--batch", 2, "-o", target, "--json")
    assert done.exit_code == 0, done.output
    about = json.loads(done.stdout)
    assert set(about["records"]) == {"prompt", "decode"} and about["bytes"] == target.stat().st_size
    assert "Compiling the graph 'decode'" in done.stderr
    package = accelpass.open(target)
    assert (package.about.capacity, package.about.batch) == (64, 2)
    assert package.generate(torch.tensor([[40, 50, 60]]), 5).shape == (1, 8)


def test_what_is_printed(decoder: Packaged, capsys: pytest.CaptureFixture[str]) -> None:
    told(decoder.report)
    shown = capsys.readouterr().out
    for said in ("int8_weights (prompt)", "int8_weights (decode)", str(decoder.path), "weights: ", "torch differ by"):
        assert said in shown


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["smollm2-135m", "-o", "m.onnx"], "m.onnx does not end in .pt2; type: m.onnx.pt2"),
        (["smollm2-135m", "-o", "/nowhere/m.pt2"], "there is no folder /nowhere; make it first"),
        (["smollm2-135", "-o", "m.pt2"], "did you mean 'smollm2-135m'"),
        (["smollm2-135m", "-o", "m.pt2", "--passes", "int9_weights"], "did you mean 'int8_weights'"),
        (["minilm-l6", "-o", "m.pt2", "--passes", "delta_cache"], "the model takes no latents"),
    ],
)
def test_mistakes(
    cli: Callable[..., Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list, said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    done = cli(*words)
    assert done.exit_code in (1, 2) and said in " ".join(done.stderr.split())
    assert not list(tmp_path.iterdir())


def test_the_table_of_the_page_is_that_of_the_results(tmp_path: Path) -> None:
    page = tmp_path / "packages.md"
    page.write_text(benchmark.PAGE.read_text())
    benchmark.write_table(json.loads(benchmark.RESULTS.read_text()), page)
    assert page.read_text() == benchmark.PAGE.read_text()
