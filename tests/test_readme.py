"""The README's commands exist and its Python runs as written."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_python_blocks_run(tmp_path):
    blocks = re.findall(r"```python\n(.*?)```", README, re.S)
    assert len(blocks) == 2
    # A reader goes on where the block before ended.
    code = "\n".join(blocks)
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stderr
    for said in (" Paris", "int8_weights", "KVCache(30 layers"):
        assert said in done.stdout


@pytest.mark.slow
def test_python_of_the_diffusion_page_runs(tmp_path):
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "diffusion.md").read_text(), re.S)
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    assert "ditfastattn" in done.stdout and "4 steps of 10 layers" in done.stdout
    assert (tmp_path / "steps.json").exists()


@pytest.mark.slow
def test_diffusion_commands_run(tmp_path):
    commands = re.findall(r"^accelpass (?:search-steps|sample) .*$", README, re.M)
    assert len(commands) == 2
    for command in commands:
        code = f"import sys; sys.argv = {command.split()!r}; from accelpass.cli.main import main; main()"
        done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=900)
        assert done.returncode == 0, done.stderr
    assert "PSNR against the plain images" in done.stdout
    assert (tmp_path / "sample.png").exists()


def test_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"`?make ([a-z-]+)", README):
        assert re.search(rf"^{target}:", makefile, re.M), target


def test_backend_needs_no_import_of_ours():
    code = (
        "import torch; m = torch.nn.Linear(8, 8).eval()\n"
        "f = torch.compile(m, backend='accelpass', options={'lowering': 'eager'})\n"
        "x = torch.ones(2, 8)\n"
        "with torch.no_grad(): print(torch.allclose(f(x), m(x)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.stdout.strip() == "True", done.stderr
