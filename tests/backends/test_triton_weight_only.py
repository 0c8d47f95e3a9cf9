"""int8 and int4 weight-only linears in Triton: every case of the two files beside this one.

Triton decides when it is imported whether kernels are interpreted, and another test in this process may have imported
it already. So each file of cases runs in a process of its own, with TRITON_INTERPRET set for one and not for the other.
"""

import ast
import os
import subprocess
import sys
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from pathlib import Path

import pytest

HERE = Path(__file__).parent
FILES = {"weight_only_interpreted": {"TRITON_INTERPRET": "1"}, "weight_only_compiled": {"TRITON_INTERPRET": "0"}}


def cases(slow: bool) -> list[tuple[str, str]]:
    """(file, test function) of every case that is, or is not, marked slow."""
    found = []
    for file in FILES:
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
        with self.log.open("w") as log:
            environment = {**os.environ, **FILES[file]}
            self.process = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)

    def verdicts(self, case: str) -> list[bool]:
        """One per parameter set of this case: did it pass?"""
        self.process.wait(timeout=3600)
        if not self.report.exists():
            pytest.fail(self.log.read_text())
        ran = list(ET.parse(self.report).iter("testcase"))
        return [len(item) == 0 for item in ran if item.attrib["name"].partition("[")[0] == case]


@pytest.fixture(scope="module")
def children(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Child]]:
    folder = tmp_path_factory.mktemp("triton")
    started = {file: Child(file, folder, "not slow") for file in FILES}
    yield started
    for child in started.values():
        child.process.kill()
        child.process.wait()


def hold(child: Child, case: str) -> None:
    verdicts = child.verdicts(case)
    assert verdicts, f"{case} did not run:\n{child.log.read_text()}"
    assert all(verdicts), child.log.read_text()


@pytest.mark.parametrize(("file", "case"), cases(slow=False))
def test_case(children: dict[str, Child], file: str, case: str) -> None:
    hold(children[file], case)


@pytest.mark.slow
@pytest.mark.parametrize(("file", "case"), cases(slow=True))
def test_slow_case(tmp_path: Path, file: str, case: str) -> None:
    hold(Child(file, tmp_path, "slow"), case)


def test_without_triton_the_extra_is_named() -> None:
    code = "import sys; sys.modules['triton'] = None; import accelpass.backends.triton.weight_only"
    got = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert got.returncode == 1
    assert "pip install 'accelpass[triton]'" in got.stderr.splitlines()[-1]
