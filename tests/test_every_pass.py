"""Every registered pass follows the weights of the call, and its graphs compile with Inductor to what they compute eagerly.

The reference is the same pass compiled anew for a model that had these weights from the start.
"""

from __future__ import annotations

import copy
import threading
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from accelpass.passes.core.registry import registered
from accelpass.passes.quantization.bases.weight_only import WeightOnly
from accelpass.passes.structure import cpu_gemv
from accelpass.testing.subjects import subject
from accelpass.testing.trial import Trial, difference, fresh, run, took
from tests.pass_settings import setting
from tests.sweep import quick

OURS = sorted(name for name, kind in registered().items() if kind.__module__.startswith("accelpass."))
ONE_OF_EACH_FAMILY = ("cpu_gemv", "delta_cache", "int8_weights", "lazyllm", "pbs_attn", "tidaldecode")


@pytest.fixture(autouse=True)
def _slow_blas(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """`cpu_gemv` takes what a measurement of the machine says; here it says that the BLAS is the slower one."""
    if request.node.callspec.params["name"] == "cpu_gemv":
        monkeypatch.setattr(cpu_gemv, "blas_and_stream_seconds", lambda *size: (1.0, 0.0))


class Tried:
    """One pass on the model that it is for."""

    def __init__(self, name: str, **more: Any) -> None:
        self.trial: Trial = setting(name).trial(name, **more)
        self.subject = subject(setting(name).models[0])
        self.tolerance = setting(name).tolerance

    def compiled(self, model: nn.Module) -> Any:
        return self.trial.compile(model, [self.trial.made()])

    def run(self, fast: Any, model: nn.Module) -> list[Tensor]:
        return run(self.subject, fast, model)

    def alone(self, model: nn.Module) -> list[Tensor]:
        """What a copy of the model gives, compiled anew."""
        fresh()
        twin = copy.deepcopy(model)
        made = self.run(self.compiled(twin), twin)
        fresh()
        return made

    def check(self, got: list[Tensor], want: list[Tensor], what: str) -> None:
        assert difference(got, want) <= self.tolerance, what


@pytest.mark.parametrize("name", quick(OURS, *ONE_OF_EACH_FAMILY, "h2o", "gptq", "tome", "fastv", "eep"))
def test_weights_are_those_of_the_call(name):
    tried = Tried(name)
    first, second = tried.subject.build(0), tried.subject.build(1)
    values = [[weight.detach().clone() for weight in model.parameters()] for model in (first, second)]
    wants = [tried.alone(model) for model in (first, second)]
    assert difference(*wants) > 0.01

    fast, other = tried.compiled(first), tried.compiled(second)
    tried.check(tried.run(fast, first), wants[0], "alone")
    assert took(first, name)
    tried.check(tried.run(other, second), wants[1], "another instance of the class")
    tried.check(tried.run(fast, first), wants[0], "the first one again")
    in_threads(tried, (fast, other), (first, second), wants)
    with torch.no_grad():
        first.load_state_dict(second.state_dict())
        tried.check(tried.run(fast, first), wants[1], "weights loaded")
        for weight, value in zip(first.parameters(), values[0], strict=True):
            weight.copy_(value)
        tried.check(tried.run(fast, first), wants[0], "written in place")
        for weight, value in zip(first.parameters(), values[1], strict=True):
            weight.data.copy_(value)
        tried.check(tried.run(fast, first), wants[1], "written through .data")
        swap(first, values[0])
        tried.check(tried.run(fast, first), wants[0], "parameters swapped")
    twin = copy.deepcopy(fast)
    tried.check(tried.run(twin, twin._orig_mod), wants[0], "a deep copy of the compiled model")


def swap(model: nn.Module, values: list[Tensor]) -> None:
    """Other Parameter objects with these values; a weight that stands in two places stays one."""
    new = {id(old): nn.Parameter(v.clone()) for old, v in zip(model.parameters(), values, strict=True)}
    for part in model.modules():
        for name, old in part._parameters.items():
            if old is not None:
                part._parameters[name] = new[id(old)]


def in_threads(tried: Tried, fasts: Any, models: Any, wants: list[list[Tensor]]) -> None:
    """Two models of one class, each in a thread of its own, give what each gives alone."""
    made: dict[int, list[Tensor]] = {}
    threads = [
        threading.Thread(target=lambda n=n: made.__setitem__(n, tried.run(fasts[n], models[n]))) for n in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number, want in enumerate(wants):
        tried.check(made.get(number, []), want, f"model {number} in a thread")


@pytest.mark.slow
@pytest.mark.slow
@pytest.mark.parametrize("name", quick(OURS, *ONE_OF_EACH_FAMILY))
def test_inductor_gives_what_the_graph_gives(name):
    """One model for each pass, compiled: the sweep over models and sizes is slower, and elsewhere."""
    tried, compiled = Tried(name), Tried(name, lowering="inductor")
    model = tried.subject.build(0)
    want = tried.alone(model)
    got = compiled.run(compiled.compiled(model), model)
    assert took(model, name)
    # Many rows of a packed weight are multiplied in bfloat16 where the CPU does so in hardware.
    assert difference(got, want) <= (2e-2 if issubclass(registered()[name], WeightOnly) else 1e-3), name
