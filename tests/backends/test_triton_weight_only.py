"""int8 and int4 weight-only linears in Triton: every case of two files beside this one. `triton_children` says why."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.backends.triton_children import Child, cases, started

FILES = ("weight_only_interpreted", "weight_only_compiled")


@pytest.fixture(scope="module")
def children(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Child]]:
    with started(FILES, tmp_path_factory.mktemp("triton")) as running:
        yield running


@pytest.mark.parametrize(("file", "case"), cases(FILES, slow=False))
def test_case(children: dict[str, Child], file: str, case: str) -> None:
    children[file].hold(case)


@pytest.mark.slow
@pytest.mark.parametrize(("file", "case"), cases(FILES, slow=True))
def test_slow_case(tmp_path: Path, file: str, case: str) -> None:
    Child(file, tmp_path, "slow").hold(case)


def test_without_triton_the_extra_is_named() -> None:
    code = "import sys; sys.modules['triton'] = None; import accelpass.backends.triton.weight_only"
    got = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert got.returncode == 1
    assert "pip install 'accelpass[triton]'" in got.stderr.splitlines()[-1]
