"""Block-sparse attention in Triton: every case of two files beside this one. `triton_children` says why."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.backends.triton_children import Child, cases, started

FILES = ("block_sparse_interpreted", "block_sparse_compiled")


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
