"""The C++ example builds against the installed torch and decodes as the package does in Python."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
import torch

import accelpass
from tests.package.conftest import Packaged
from tests.package.decoding import prompts

SOURCE = Path(__file__).parent.parent.parent / "examples" / "package_cpp"


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("cmake") is None, reason="cmake is not installed")
def test_the_example_decodes(decoder: Packaged, tmp_path: Path) -> None:
    where = ["-S", SOURCE, "-B", tmp_path, f"-DCMAKE_PREFIX_PATH={torch.utils.cmake_prefix_path}"]
    subprocess.run(["cmake", *where], check=True, capture_output=True, text=True)
    subprocess.run(["cmake", "--build", tmp_path], check=True, capture_output=True, text=True)
    ids = prompts(1, 5)
    command = [tmp_path / "decode", decoder.path, "8", *map(str, ids[0].tolist())]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    want = accelpass.open(decoder.path).generate(ids, 8, eos_token_id=[])[0, 5:].tolist()
    assert [int(word) for word in done.stdout.split()] == want
