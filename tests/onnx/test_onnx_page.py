"""docs/onnx.md: its Python runs, its commands exist, and its table is that of the results."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from accelpass.cli.main import app
from accelpass.passes.core.registry import registered
from benchmarks import onnx_export, onnx_steps

PAGE = onnx_export.PAGE.read_text()


@pytest.mark.slow
def test_python_blocks_run(tmp_path: Path) -> None:
    blocks = re.findall(r"```python\n(.*?)```", PAGE, re.S)
    blocks = [block for block in blocks if "digits" not in block]
    assert len(blocks) == 2
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(blocks)], cwd=tmp_path, capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stderr
    assert "int8_weights: 37 sites taken" in done.stdout and (tmp_path / "minilm.onnx").is_file()


def test_options_exist() -> None:
    known = CliRunner().invoke(app, ["export", "--help"], env={"COLUMNS": "200"}).stdout
    for command in re.findall(r"^accelpass export (.*)$", PAGE, re.M):
        assert all(word in known for word in command.split() if word.startswith("-"))


def test_the_table_is_that_of_the_results(tmp_path: Path) -> None:
    found = json.loads(onnx_export.RESULTS.read_text())
    steps = json.loads(onnx_steps.RESULTS.read_text())
    assert {row["pass"] for row in (*found["rows"], *steps["rows"])} >= set(registered())
    page = tmp_path / "onnx.md"
    page.write_text(PAGE)
    onnx_export.write_table(found, page)
    onnx_steps.write_table(steps, page)
    assert page.read_text() == PAGE
    for row in found["rows"]:
        rounded = row.get("activations") == "int8" or row["pass"] in (
            "int8_dynamic",
            "int8_static",
            "mixdq",
            "vidit_q",
            "smoothquant",
        )
        assert (row["difference"] < 1e-4) != rounded if row["exported"] else row["why"]
