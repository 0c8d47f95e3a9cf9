"""Order, exclusion, verification and state, on passes made for the purpose."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch

from accelpass.api.stateful import reset, state
from accelpass.ir.core.graph import aten, call
from accelpass.ir.core.state import StateSpec
from accelpass.ir.errors import OptionError
from accelpass.passes.core.base import Done, Pass
from accelpass.passes.core.manager import ordered
from tests.small_models import Mlp


@dataclass(frozen=True)
class First(Pass):
    name: ClassVar[str] = "first"
    phase: ClassVar[str] = "cache"
    summary: ClassVar[str] = "for tests"
    exact: ClassVar[bool] = True


@dataclass(frozen=True)
class Second(First):
    name: ClassVar[str] = "second"
    after: ClassVar[tuple[str, ...]] = ("first",)


@dataclass(frozen=True)
class Early(First):
    name: ClassVar[str] = "zz_early"
    phase: ClassVar[str] = "structure"


@dataclass(frozen=True)
class Circular(First):
    name: ClassVar[str] = "circular"
    after: ClassVar[tuple[str, ...]] = ("second",)
    before: ClassVar[tuple[str, ...]] = ("first",)


@dataclass(frozen=True)
class Jealous(First):
    name: ClassVar[str] = "jealous"
    excludes: ClassVar[dict[str, str]] = {"first": "both own the cache"}


@dataclass(frozen=True)
class Counter(First):
    """Adds a number of calls, which it remembers, to the output of the last linear."""

    name: ClassVar[str] = "counter"

    def apply(self, program, record):
        nodes = list(program.graph.find_nodes(op="call_function", target=aten.linear.default))
        last = nodes[-1]
        spec = StateSpec("counter.calls", (1,), torch.float32, "sequence")
        calls = program.tensors.state(last.args[1], spec)
        with program.graph.inserting_after(last):
            step = call(program.graph, last, aten.add_.Scalar, calls, 1.0)
        with program.graph.inserting_after(step):
            new = call(program.graph, last, aten.add.Tensor, last, step)
        last.replace_all_uses_with(new, delete_user_cb=lambda user: user is not new)
        record.take("last", Done("counted"))


@dataclass(frozen=True)
class Breaker(First):
    """Changes the shape of the output, which no pass may."""

    name: ClassVar[str] = "breaker"

    def apply(self, program, record):
        (output,) = program.graph.find_nodes(op="output")
        node = output.args[0][0]
        with program.graph.inserting_before(output):
            new = call(program.graph, node, aten.unsqueeze.default, node, 0)
        output.args = ((new,),)
        record.take("output", Done("broken"))


@dataclass(frozen=True)
class Raiser(First):
    name: ClassVar[str] = "raiser"

    def apply(self, program, record):
        raise IndexError("seven")


def test_order_comes_from_phases_and_constraints():
    assert [p.name for p in ordered([Second(), First(), Early()])] == ["zz_early", "first", "second"]


def test_a_circle_names_its_passes():
    with pytest.raises(OptionError, match="circular"):
        ordered([First(), Second(), Circular()])


def test_exclusion_names_both_and_the_reason():
    with pytest.raises(OptionError, match="jealous cannot be used with first: both own the cache"):
        ordered([First(), Jealous()])


def compiled(model, *passes):
    return torch.compile(model, backend="accelpass", options={"lowering": "eager", "passes": list(passes)})


def test_a_pass_that_breaks_the_graph_is_named():
    with (
        torch.no_grad(),
        pytest.raises(Exception, match="after breaker: broken rule: shapes and dtypes of the outputs"),
    ):
        compiled(Mlp().eval(), Breaker())(torch.randn(2, 64))


def test_a_pass_that_raises_is_named():
    with torch.no_grad(), pytest.raises(Exception, match="the pass 'raiser' failed: IndexError: seven"):
        compiled(Mlp().eval(), Raiser())(torch.randn(2, 64))


@pytest.mark.parametrize("lowering", ["eager", "inductor"])
def test_state_is_kept_shared_listed_and_reset(lowering):
    model, x = Mlp().eval(), torch.zeros(2, 64)
    fast = torch.compile(model, backend="accelpass", options={"lowering": lowering, "passes": [Counter()]})
    with torch.no_grad():
        base = model(x)
        for number in (1, 2, 3):
            assert torch.allclose(fast(x) - base, torch.full_like(base, number), atol=1e-5)
        longer = torch.zeros(5, 64)  # another graph of the same model continues the count
        assert torch.allclose(fast(longer) - model(longer), torch.full((5, 64), 4.0), atol=1e-5)
        (buffer,) = state(fast)
        assert (buffer.name, buffer.owner, buffer.bytes, buffer.lifetime) == (
            "counter.calls",
            "down_proj.weight",
            4,
            "sequence",
        )
        reset(fast)
        assert torch.allclose(fast(x) - base, torch.ones_like(base), atol=1e-5)


def test_state_of_two_instances_is_apart():
    one, two, x = Mlp().eval(), Mlp().eval(), torch.zeros(2, 64)
    fast_one, fast_two = compiled(one, Counter()), compiled(two, Counter())
    with torch.no_grad():
        fast_one(x), fast_one(x)
        assert torch.allclose(fast_two(x) - two(x), torch.ones(2, 64), atol=1e-5)
