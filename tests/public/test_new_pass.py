"""``accelpass new-pass`` writes a package that installs, is found, and passes its own tests."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from accelpass.cli.commands import new_pass_command as command
from accelpass.cli.main import app

CHILD = """
import torch, accelpass
from accelpass.models_zoo.small import tiny_lm
from accelpass.passes.core.registry import package_of, registered

assert package_of(registered()["gate_threshold"]) == "accelpass-gate-threshold"
model, ids = tiny_lm(), torch.arange(6)[None]
with torch.no_grad():
    fast = accelpass.compile(model, [{"name": "gate_threshold", "threshold": 0.2}, "int8_weights"], lowering="eager")
    error = (fast(ids) - model(ids)).abs().max() / model(ids).abs().max()
assert 0 < error < 0.2, error
print(len(accelpass.explain(fast).passes["gate_threshold"].took), "sites taken")
"""


def new_pass(*words: object) -> Result:
    return CliRunner().invoke(app, ["new-pass", *map(str, words)])


def environment(site: Path) -> dict[str, str]:
    """This interpreter's packages, and before them those of ``site``."""
    path = os.pathsep.join(filter(None, (str(site), os.environ.get("PYTHONPATH"))))
    return {**os.environ, "PYTHONPATH": path, "PYTHONSAFEPATH": "1"}


def test_writes_a_package(tmp_path):
    folder = tmp_path / "pkg"
    done = new_pass("gate_threshold", "--directory", folder)
    assert done.exit_code == 0, done.output
    assert f"cd {folder}" in done.stdout and "python -m pytest" in done.stdout
    files = sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())
    assert files == [
        "README.md",
        "pyproject.toml",
        "src/accelpass_gate_threshold/__init__.py",
        "src/accelpass_gate_threshold/gate_threshold.py",
        "tests/test_gate_threshold.py",
    ]
    project = tomllib.loads((folder / "pyproject.toml").read_text())["project"]
    assert project["name"] == "accelpass-gate-threshold"
    assert project["entry-points"]["accelpass.passes"] == {
        "gate_threshold": "accelpass_gate_threshold.gate_threshold:GateThreshold"
    }
    for path in folder.rglob("*"):
        if path.is_file():
            assert "{{" not in path.read_text() and path.read_text().endswith("\n")
    for path in folder.rglob("*.py"):
        compile(path.read_text(), str(path), "exec")


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("Gate-Threshold", "'Gate-Threshold' is not a name for a pass; use lower-case letters, digits and _, with a letter first, for example gate_threshold"),
        ("2fast", "for example fast"),
        ("lambda", "'lambda' is not a name for a pass"),
        ("", "'' is not a name for a pass"),
        ("../up", "for example up"),
        ("int8_weights", "accelpass has a pass named 'int8_weights' already; choose another name"),
    ],
)  # fmt: skip
def test_names_that_cannot_be(tmp_path, monkeypatch, name, says):
    monkeypatch.chdir(tmp_path)
    done = new_pass(name)
    assert done.exit_code == 2
    assert says in done.stderr
    assert not list(tmp_path.iterdir())


def test_folders_that_cannot_be(tmp_path, monkeypatch):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("keep")
    (tmp_path / "file").write_text("")
    for folder, says in (("full", "is not empty"), ("file", "is a file")):
        done = new_pass("fine", "--directory", tmp_path / folder)
        assert done.exit_code == 2 and says in done.stderr
    assert [p.name for p in (tmp_path / "full").iterdir()] == ["mine.txt"]
    monkeypatch.setattr(command, "FILES", {**command.FILES, "mine/x" + "y" * 300: "init.py.j2"})
    done = new_pass("fine", "--directory", tmp_path / "half")
    assert done.exit_code == 1 and "File name too long" in done.stderr
    assert not (tmp_path / "half").exists()


@pytest.mark.slow
def test_the_package_installs_is_found_and_passes_its_tests(tmp_path):
    folder, site = tmp_path / "pkg", tmp_path / "site"
    assert new_pass("gate_threshold", "--directory", folder).exit_code == 0
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*install, "--target", site, folder], check=True)
    done = subprocess.run(
        [sys.executable, "-c", CHILD], env=environment(site), capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n")[0] == "2 sites taken"
    shown = subprocess.run(
        [sys.executable, "-c", "from accelpass.cli.main import main; main()", "passes"],
        env=environment(site), capture_output=True, text=True, cwd=tmp_path,
    )  # fmt: skip
    assert "gate_threshold  structure" in shown.stdout and "threshold=0.05" in shown.stdout
    tests = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--import-mode=append"]
    own = subprocess.run(tests, env=environment(site), capture_output=True, text=True, cwd=folder)
    assert own.returncode == 0, own.stdout
    assert "4 passed" in own.stdout
