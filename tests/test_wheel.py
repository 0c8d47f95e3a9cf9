"""The built wheel holds everything: it is installed where no checkout is in reach, and compiles a model there."""

from __future__ import annotations

import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent
SMOKE = ROOT / "tests" / "smoke.py"


def test_wheel_works_without_the_checkout(tmp_path: Path) -> None:
    build = [sys.executable, "-m", "pip", "wheel", "--verbose", "--no-deps", "--no-build-isolation"]
    made = subprocess.run([*build, "--wheel-dir", tmp_path, ROOT], check=True, capture_output=True, text=True)
    # Of the build's own kind alone: what distutils says of byte code depends on the environment.
    assert "Warning" not in made.stdout + made.stderr
    (wheel,) = tmp_path.glob("accelpass-*.whl")
    venv.create(tmp_path / "venv", with_pip=False)
    site = Path(sysconfig.get_path("purelib", vars={"base": str(tmp_path / "venv")}))
    install = [sys.executable, "-m", "pip", "--python", tmp_path / "venv", "install", "--quiet", "--no-deps", wheel]
    subprocess.run(install, check=True)
    # torch and the rest come from here. A path in a .pth file brings packages, not the .pth files beside them, so the
    # checkout that is installed here as editable stays out of reach.
    (site / "borrowed.pth").write_text(str(Path(torch.__file__).parent.parent))
    python = tmp_path / "venv" / "bin" / "python"
    done = subprocess.run([python, SMOKE], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[-1].startswith(str(tmp_path / "venv"))


def test_an_editable_install_warns_of_nothing(tmp_path: Path) -> None:
    code = f"from setuptools.build_meta import build_editable; build_editable({str(tmp_path)!r})"
    made = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert list(tmp_path.glob("accelpass-*.whl"))
    assert "Warning" not in made.stderr and "InformationOnly" not in made.stderr
