"""A fault of ours in what nobody asked for costs a model its speed at most; in what was asked for it is a named error."""

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch import nn

import accelpass
from accelpass.backends.compile import rewriting
from accelpass.ir.errors import PassError
from accelpass.passes.core import options, registry
from accelpass.passes.core.base import Pass
from accelpass.passes.structure.cpu_gemv import CpuGemv

MODEL = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8)).eval()
X = torch.randn(3, 8)


@dataclass(frozen=True)
class Broken(Pass):
    """Fails after it has half rewritten the graph."""

    name: ClassVar[str] = "broken"
    phase: ClassVar[str] = "weights"
    summary: ClassVar[str] = "fails"
    exact: ClassVar[bool] = True

    def apply(self, program, record):
        next(n for n in program.graph.nodes if n.op == "call_function").args = ()
        raise IndexError("no such site")


@pytest.fixture(autouse=True)
def _broken(monkeypatch):
    known = {**registry.registered(), "broken": Broken}
    for module in (registry, options):
        monkeypatch.setattr(module, "registered", lambda: known)


def test_a_default_pass_that_fails_is_left_out(monkeypatch):
    monkeypatch.setattr(options, "DEFAULTS", (*options.DEFAULTS, "broken"))
    fast = torch.compile(MODEL, backend="accelpass", options={"lowering": "eager"})
    with torch.no_grad(), pytest.warns(UserWarning, match=r"broken.*no such site.*Please report"):
        got = fast(X)
    torch.testing.assert_close(got, MODEL(X))
    report = accelpass.explain(fast)
    assert "compiled without broken, which failed" in report.notes[0]
    assert "cpu_gemv" in report.passes and "broken" not in report.passes


def test_a_pass_that_was_asked_for_is_an_error():
    fast = torch.compile(MODEL, backend="accelpass", options={"lowering": "eager", "passes": ["broken"]})
    with (
        torch.no_grad(),
        pytest.raises(Exception, match="the pass 'broken' failed: IndexError: no such site") as raised,
    ):
        fast(X)
    assert "PassError" in str(raised.value) or isinstance(raised.value, PassError)


def test_a_default_pass_that_breaks_the_graph_is_left_out(monkeypatch):
    def apply(self, program, record):
        (output,) = program.graph.find_nodes(op="output")
        output.args = ((),)

    monkeypatch.setattr(CpuGemv, "apply", apply)
    fast = torch.compile(MODEL, backend="accelpass", options={"lowering": "eager"})
    with torch.no_grad(), pytest.warns(UserWarning, match="the outputs stay"):
        got = fast(X)
    torch.testing.assert_close(got, MODEL(X))


def test_a_fault_behind_the_passes_compiles_the_graph_as_it_is(monkeypatch):
    def lower(program, chosen):
        raise KeyError("an operator")

    monkeypatch.setattr(rewriting, "lowered", lower)
    fast = torch.compile(MODEL, backend="accelpass", options={"lowering": "eager"})
    with torch.no_grad(), pytest.warns(UserWarning, match="compiled without passes: KeyError"):
        got = fast(X)
    torch.testing.assert_close(got, MODEL(X))
    assert "compiled without passes: KeyError" in accelpass.explain(fast).notes[0]
    torch._dynamo.reset()
    fast = torch.compile(MODEL, backend="accelpass", options={"lowering": "eager", "passes": ["int8_weights"]})
    with torch.no_grad(), pytest.raises(Exception, match="compiling with int8_weights failed: KeyError"):
        fast(X)


def test_an_analysis_that_fails_is_a_note(monkeypatch):
    from accelpass.ir import attention

    def detect(program):
        raise ZeroDivisionError("heads")

    monkeypatch.setattr(attention, "detect", detect)
    fast = torch.compile(MODEL, backend="accelpass", options={"lowering": "eager"})
    with torch.no_grad():
        torch.testing.assert_close(fast(X), MODEL(X))
    assert "attention not counted: ZeroDivisionError: heads" in " ".join(accelpass.explain(fast).notes)
