"""Random programs, a hundred in the whole sweep; those that failed once; and that the comparison sees what it is there to see."""

from __future__ import annotations

import contextlib
import gc
import io
import runpy
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fuzz import found
from tests.fuzz.__main__ import measure
from tests.fuzz.grammar import program
from tests.fuzz.judge import difference, judge, run
from tests.fuzz.program import Class, Line, Program, Region
from tests.fuzz.shrink import shrunk
from tests.sweep import sweep

SEED = 7_000_000
PARTS = 10
FOUND = sorted(found.FOLDER.glob("*.py"))


@pytest.fixture(autouse=True)
def _collections() -> Iterator[None]:
    yield
    gc.unfreeze()
    gc.enable()


@pytest.mark.parametrize("part", sweep(*range(PARTS), fast=1))
def test_random_programs(part: int) -> None:
    first = SEED + part * 100 // PARTS
    tally = measure(range(first, first + 100 // PARTS), frozenset())
    assert not tally.wrong, tally.wrong
    assert tally.counts["same"] >= 100 // PARTS


@pytest.mark.parametrize("path", FOUND, ids=lambda path: path.stem)
def test_what_failed_once(path: Path) -> None:
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        runpy.run_path(str(path))
    assert said.getvalue().splitlines()[-1] == "PASS", said.getvalue()


def _of(*lines: str, returns: str, setup: tuple[str, ...] = ()) -> Program:
    made = Class("Model", tuple(map(Line, setup)), ("x",), tuple(map(Line, lines)), returns)
    return Program(3, (made,), (("x", "torch.randn(b, t, 8)"),), ((2, 5, 3),))


def test_a_program_is_the_same_each_time_and_can_be_read() -> None:
    one, two = program(5), program(5)
    assert one == two and one.source() == two.source()
    assert "def forward(self, x" in one.source()
    kinds = {type(s) for seed in range(60) for s in program(seed).model.body}
    assert kinds == {Line, Region}


@pytest.mark.parametrize(
    ("wanted", "other", "why"),
    [
        (_of(returns="x * 2"), _of(returns="x * 2.01"), "differs by"),
        (_of(returns="x"), _of(returns="x.clone()"), "is input 0 and -1"),
        (_of(returns="x * 1"), _of(returns="(x * 1).double()"), "float64"),
        (_of(returns="x * 1"), _of(returns="(x * 1)[0]"), "(5, 8)"),
        (_of(returns="x * 1"), _of("y = x * 1", "x.add_(1)", returns="y"), "input 0"),
        (_of(returns="x * 1"), _of(returns="(x * 1,)"), "is built otherwise"),
        (_of(returns="x / 0"), _of(returns="x * 0"), "NaN or infinity"),
        (_of(returns="x * 1"), _of(returns="x.reshape(3, -1)"), "raises"),
    ],
)
def test_the_comparison_sees(wanted: Program, other: Program, why: str) -> None:
    one, two = wanted.build(), other.build()
    assert why in difference(run(wanted, one, one), run(other, two, two), 1e-5)
    assert not difference(run(wanted, one, one), run(wanted, one, one), 0.0)


def test_state_is_compared() -> None:
    setup = ('self.register_buffer("n", torch.zeros(3))',)
    one, two = (_of(line, returns="x * 1", setup=setup) for line in ("self.n.add_(1)", "self.n.add_(2)"))
    a, b = one.build(), two.build()
    assert difference(run(one, a, a), run(two, b, b), 1e-5).startswith("state 0")


def test_a_failure_is_shrunk_and_saved(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from accelpass.backends.compile import compiler
    from accelpass.ir.core.graph import aten
    from tests.fuzz import judge as judging

    def broken(gm, inputs, *, options=None, mode=None):  # type: ignore[no-untyped-def]
        made = compiler.backend(gm, inputs, options=options)
        for node in made.fn.graph.find_nodes(op="call_function", target=aten.relu.default) if made.binder else ():
            node.target = aten.neg.default
        made.fn.recompile()
        return made

    import torch

    monkeypatch.setattr(
        judging, "compiled", lambda p, m, o: torch.compile(m, backend=lambda gm, i: broken(gm, i, options=o))
    )
    made = _of(
        "v1 = self.a(x)",
        "v2 = v1 + x",
        "v3 = torch.relu(v2)",
        "v4 = v3 * 2",
        returns="v4",
        setup=("self.a = nn.Linear(8, 8)",),
    )
    (verdict,) = judge(made, [{"lowering": "eager"}])
    assert verdict.status == "wrong" and "differs by" in verdict.why
    from tests.fuzz.shrink import kind_of

    small, options = shrunk((made, {"lowering": "eager"}), kind_of(verdict.why))
    assert [s.source() for s in small.model.body] == ["v3 = torch.relu(x)"] and small.model.returns == "v3"
    assert not small.model.setup
    monkeypatch.setattr(found, "FOLDER", tmp_path)
    path = found.save(small, options, verdict)
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        runpy.run_path(str(path))
    assert said.getvalue() == "PASS\n", "the library itself is right about it"
