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

from accelpass.passes.registry import registered
from accelpass.testing.subjects import subject
from accelpass.testing.trial import Trial, difference, fresh, run, took
from tests.pass_settings import setting

OURS = sorted(name for name, kind in registered().items() if kind.__module__.startswith("accelpass."))


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


@pytest.mark.parametrize("name", OURS)
def test_weights_are_those_of_the_call(name):
    tried = Tried(name)
    first, second = tried.subject.build(0), tried.subject.build(1)
    moved, swapped = copy.deepcopy(second), copy.deepcopy(second)
    with torch.no_grad():
        torch.manual_seed(0)
        for weight in moved.parameters():
            weight.add_(0.1 * torch.randn_like(weight) * weight.std(correction=0))
        for weight in swapped.parameters():
            weight.mul_(1.1)
    wants = {id(m): tried.alone(m) for m in (first, second, moved, swapped)}
    assert difference(wants[id(first)], wants[id(second)]) > 0.01

    fast, other = tried.compiled(first), tried.compiled(second)
    tried.check(tried.run(fast, first), wants[id(first)], "alone")
    assert took(first, name)
    tried.check(tried.run(other, second), wants[id(second)], "another instance of the class")
    tried.check(tried.run(fast, first), wants[id(first)], "the first one again")
    with torch.no_grad():
        first.load_state_dict(second.state_dict())
        tried.check(tried.run(fast, first), wants[id(second)], "weights loaded")
        for weight, new in zip(first.parameters(), moved.parameters(), strict=True):
            weight.copy_(new)
        tried.check(tried.run(fast, first), wants[id(moved)], "written in place")
        for weight, new in zip(first.parameters(), second.parameters(), strict=True):
            weight.data.copy_(new)
        tried.check(tried.run(fast, first), wants[id(second)], "written through .data")
        new = dict(swapped.named_parameters())
        for part_name, part in first.named_modules():
            for own in list(part._parameters):
                if part._parameters[own] is not None:
                    path = f"{part_name}.{own}".lstrip(".")
                    if path in new:
                        setattr(part, own, nn.Parameter(new[path].detach().clone(), requires_grad=False))
        if getattr(first.config, "tie_word_embeddings", False) if hasattr(first, "config") else hasattr(first, "tie"):
            first.tie_weights()
    if sum(1 for _ in first.parameters()) == sum(1 for _ in second.parameters()):
        tried.check(tried.run(fast, first), wants[id(swapped)], "parameters swapped")
    twin = copy.deepcopy(fast)
    tried.check(tried.run(twin, twin._orig_mod), tried.run(fast, first), "a deep copy of the compiled model")


@pytest.mark.parametrize("name", OURS)
def test_two_threads(name):
    """Two models of one class, each in a thread of its own, give what each gives alone."""
    tried = Tried(name)
    models = [tried.subject.build(seed) for seed in (0, 1)]
    fasts = [tried.compiled(model) for model in models]
    wants = [tried.run(fast, model) for fast, model in zip(fasts, models, strict=True)]
    made: dict[int, list[Tensor]] = {}

    def work(number: int) -> None:
        made[number] = tried.run(fasts[number], models[number])

    threads = [threading.Thread(target=work, args=(number,)) for number in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number in (0, 1):
        tried.check(made.get(number, []), wants[number], f"model {number} in a thread")


@pytest.mark.parametrize("name", OURS)
def test_inductor_gives_what_the_graph_gives(name):
    """One model for each pass, compiled: the sweep over models and sizes is slower, and elsewhere."""
    tried, compiled = Tried(name), Tried(name, lowering="inductor")
    model = tried.subject.build(0)
    want = tried.alone(model)
    got = compiled.run(compiled.compiled(model), model)
    assert took(model, name)
    assert difference(got, want) <= max(tried.tolerance, 1e-3), name
