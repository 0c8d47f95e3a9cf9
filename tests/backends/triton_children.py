"""Files of cases about Triton kernels, each run by pytest in a process of its own.

Triton decides when it is imported whether kernels are interpreted, and another test in this process may have imported
it already. So a file runs in a child process, with TRITON_INTERPRET set as the file's name says: `*_interpreted` runs
kernels in Triton's interpreter, `*_compiled` looks at them as a GPU would get them.
"""

import ast
import os
import subprocess
import sys
import xml.etree.ElementTree as ET
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent


def cases(files: Sequence[str], slow: bool) -> list[tuple[str, str]]:
    """(file, test function) of every case that is, or is not, marked slow."""
    found = []
    for file in files:
        for item in ast.parse((HERE / f"{file}.py").read_text()).body:
            if isinstance(item, ast.FunctionDef) and item.name.startswith("test_"):
                marked = any("mark.slow" in ast.unparse(decorator) for decorator in item.decorator_list)
                found += [(file, item.name)] if marked == slow else []
    return found


class Child:
    """A pytest process over one file of cases, and its verdicts once it has ended."""

    def __init__(self, file: str, folder: Path, select: str) -> None:
        self.report = folder / f"{file}.xml"
        self.log = folder / f"{file}.log"
        command = [sys.executable, "-m", "pytest", str(HERE / f"{file}.py"), f"--junitxml={self.report}"]
        command += ["-m", select, "-p", "no:cacheprovider", "-p", "no:xdist"]
        environment = {**os.environ, "TRITON_INTERPRET": "1" if file.endswith("_interpreted") else "0"}
        with self.log.open("w") as log:
            self.process = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)

    def verdicts(self, case: str) -> list[bool]:
        """One per parameter set of this case: did it pass?"""
        self.process.wait(timeout=3600)
        if not self.report.exists():
            pytest.fail(self.log.read_text())
        ran = list(ET.parse(self.report).iter("testcase"))
        return [len(item) == 0 for item in ran if item.attrib["name"].partition("[")[0] == case]

    def hold(self, case: str) -> None:
        verdicts = self.verdicts(case)
        assert verdicts, f"{case} did not run:\n{self.log.read_text()}"
        assert all(verdicts), self.log.read_text()


@contextmanager
def started(files: Sequence[str], folder: Path) -> Iterator[dict[str, Child]]:
    """A child per file over its cases that are not slow; none outlives the block."""
    children = {file: Child(file, folder, "not slow") for file in files}
    try:
        yield children
    finally:
        for child in children.values():
            child.process.kill()
            child.process.wait()


def suite(*files: str) -> tuple[Any, Any, Any]:
    """The fixture ``children``, ``test_case`` and ``test_slow_case`` of a test file over the cases of ``files``."""

    @pytest.fixture(scope="module")
    def children(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Child]]:
        with started(files, tmp_path_factory.mktemp("triton")) as running:
            yield running

    @pytest.mark.parametrize(("file", "case"), cases(files, slow=False))
    def test_case(children: dict[str, Child], file: str, case: str) -> None:
        children[file].hold(case)

    @pytest.mark.slow
    @pytest.mark.parametrize(("file", "case"), cases(files, slow=True))
    def test_slow_case(tmp_path: Path, file: str, case: str) -> None:
        Child(file, tmp_path, "slow").hold(case)

    return children, test_case, test_slow_case
