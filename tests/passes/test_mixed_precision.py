"""The integer program of mixed precision against every combination, and plans that follow it."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import accelpass
from accelpass.backends import graphs_of
from accelpass.ir.errors import OptionError, PassError
from accelpass.ir.linear.formats import Int3, Int4, Int8
from accelpass.passes.core.registry import make
from accelpass.passes.quantization import mixed_precision
from accelpass.passes.quantization.bases.allocation import least_cost
from accelpass.passes.quantization.bases.row_time import microseconds_of_row
from accelpass.passes.quantization.mixed_precision import CHOICES
from tests.passes.test_learnt_rounding import Stack, answer, data, moments_of
from tests.sweep import examples

pytest.importorskip("scipy")
CHOSEN = ("int3", "int4", "int8", "float")


@settings(max_examples=examples(15), deadline=None)
@given(st.integers(1, 4), st.integers(0, 2**16), st.floats(0.3, 1.0))
def test_no_combination_within_the_budget_costs_less(count: int, seed: int, share: float) -> None:
    rng = torch.Generator().manual_seed(seed)
    tables = {
        str(i): torch.stack([torch.rand(3, generator=rng), torch.randint(1, 9, (3,), generator=rng).float()]).double()
        for i in range(count)
    }
    least, most = (sum(float(getattr(t[1], end)()) for t in tables.values()) for end in ("min", "max"))
    room = least + share * (most - least)
    found = least_cost("mixed_precision", tables, room, 1)
    spent = lambda picks: sum(float(t[1, i]) for t, i in zip(tables.values(), picks, strict=True))  # noqa: E731
    cost = lambda picks: sum(float(t[0, i]) for t, i in zip(tables.values(), picks, strict=True))  # noqa: E731
    best = min(cost(p) for p in product(range(3), repeat=count) if spent(p) <= room + 1e-9)
    assert spent(found.values()) <= room + 1e-6 and cost(found.values()) <= best + 1e-6


def test_costs_are_the_changes_of_outputs_and_bits_count_scales() -> None:
    rng = torch.Generator().manual_seed(0)
    w, x = torch.randn(24, 64, generator=rng), torch.randn(90, 64, generator=rng)
    p = make({"name": "mixed_precision", "choices": list(CHOSEN), "group_size": 32})
    (kept,) = p.learn([w], moments_of(x))
    costs, bits, _ = kept.tensors["costs"]
    for place, form in enumerate((Int3(32), Int4(32), Int8())):
        packed = form.pack(w)
        change = x @ (form.unpack(packed, torch.float32) - w).t()
        assert float(costs[place]) == pytest.approx(float(change.pow(2).sum() / (x @ w.t()).pow(2).sum()), rel=1e-3)
        assert int(bits[place]) == 8 * sum(t.numel() * t.element_size() for t in packed)
    assert float(costs[3]) == 0 and int(bits[3]) == 32 * w.numel()


@pytest.fixture(scope="module")
def stack() -> Stack:
    torch.manual_seed(0)
    return Stack().eval()


def chosen(plan: accelpass.Plan) -> dict[str, str]:
    held = {k.split("/")[1]: CHOICES[int(t)] for k, t in plan.tensors.items() if k.endswith("/choice")}
    assert held
    return held


def test_a_plan_is_followed_and_within_its_budget(stack: Stack) -> None:
    made = {"name": "mixed_precision", "bits": 6.0, "choices": list(CHOSEN), "group_size": 32}
    plan = accelpass.calibrate(stack, data(), [made], progress=False)
    picked = chosen(plan)
    assert len(picked) == 4 and len(set(picked.values())) > 1, picked
    x = data(1, seed=5)[0]["x"]
    got = answer(stack, x, plan=plan)
    (record,) = [r for r in graphs_of(stack)[-1].report.records if r.name == "mixed_precision"]
    kept_float = {path for path, form in picked.items() if form == "float"}
    assert len(record.took) == 4 - len(kept_float)
    spent = sum(done.bytes_after for done in record.took.values()) + sum(
        4 * stack.get_parameter(path).numel() for path in kept_float
    )
    assert 8 * spent / sum(stack.get_parameter(path).numel() for path in picked) <= 6.0 + 1e-6
    twin = Stack().eval()
    twin.load_state_dict(stack.state_dict())
    forms = {"int3": Int3(32), "int4": Int4(32), "int8": Int8()}
    with torch.no_grad():
        for path, form in picked.items():
            weight = twin.get_parameter(path)
            if form != "float":
                weight.copy_(forms[form].unpack(forms[form].pack(weight), torch.float32))
        torch.testing.assert_close(got, twin(x), rtol=1e-4, atol=1e-4)


def test_with_room_for_all_nothing_changes(stack: Stack) -> None:
    made = {"name": "mixed_precision", "bits": 32.0, "choices": ["int4", "float"], "group_size": 32}
    plan = accelpass.calibrate(stack, data(), [made], progress=False)
    assert set(chosen(plan).values()) == {"float"}
    x = data(1, seed=5)[0]["x"]
    with torch.no_grad():
        torch.testing.assert_close(answer(stack, x, plan=plan), stack(x))


def test_a_budget_that_cannot_be_met_names_the_least(stack: Stack) -> None:
    made = {"name": "mixed_precision", "bits": 3.0, "choices": ["int4", "int8"], "group_size": 32}
    with pytest.raises(PassError, match=r"bits=3.00 cannot be met with these choices; the least is 5.00"):
        accelpass.calibrate(stack, data(), [made], progress=False)


@pytest.mark.parametrize(
    "wrong", [{"choices": ["int5"]}, {"choices": []}, {"bits": 0}, {"rest": "x"}, {"group_size": 7}]
)
def test_options_that_do_not_exist(wrong: dict[str, object]) -> None:
    with pytest.raises(OptionError, match=next(iter(wrong))):
        make({"name": "mixed_precision", **wrong})


def test_a_wide_budget_costs_less_than_a_narrow_one(stack: Stack) -> None:
    x: Tensor = data(1, seed=9)[0]["x"]
    with torch.no_grad():
        want = stack(x)
    far = []
    for bits in (4.2, 5.0, 9.0):
        plan = accelpass.calibrate(
            stack, data(), [{"name": "mixed_precision", "bits": bits, "group_size": 32}], progress=False
        )
        far.append(float((answer(stack, x, plan=plan) - want).norm()))
    assert far[0] > far[1] > far[2], far


def spent_bits(stack: Stack, picked: dict[str, str]) -> float:
    forms = {"int3": Int3(32), "int4": Int4(32), "int8": Int8()}
    bits = 0.0
    for path, form in picked.items():
        w = stack.get_parameter(path)
        packed = [w.detach()] if form == "float" else forms[form].pack(w.detach())
        bits += 8 * sum(t.numel() * t.element_size() for t in packed)
    return bits / sum(stack.get_parameter(path).numel() for path in picked)


def test_a_budget_of_change_gets_the_fewest_bits(stack: Stack) -> None:
    made = {"name": "mixed_precision", "choices": list(CHOSEN), "group_size": 32}
    plans = [accelpass.calibrate(stack, data(), [{**made, "change": c}], progress=False) for c in (1e-4, 1e-2, 10.0)]
    few = [spent_bits(stack, chosen(plan)) for plan in plans]
    assert few[0] > few[1] > few[2] and set(chosen(plans[2]).values()) == {"int3"}


def test_a_budget_of_time_is_of_what_was_measured(stack: Stack, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where int8 takes 10 us and int3 30 (its unpacking), fewer bits are no gain."""
    took = {"int3": 30.0, "int4": 20.0, "int8": 10.0, "float": 40.0}
    monkeypatch.setattr(mixed_precision, "microseconds_of_row", lambda form, *sizes: took[form])
    made = {"name": "mixed_precision", "choices": list(CHOSEN), "group_size": 32}
    at = lambda us: chosen(accelpass.calibrate(stack, data(), [{**made, "microseconds": us}], progress=False))  # noqa: E731
    assert set(at(40.0).values()) == {"int8"}
    assert sorted(at(70.0).values()) == ["float", "int8", "int8", "int8"]
    with pytest.raises(PassError, match=r"microseconds=39\.00 cannot be met with these choices; the least is 40\.00"):
        at(39.0)


@pytest.mark.slow
def test_time_is_measured() -> None:
    assert 0 < microseconds_of_row("int8", 64, 64, 64) < 1e5


@pytest.mark.parametrize("given", [{"change": 0.0}, {"microseconds": -1.0}, {"change": 0.1, "microseconds": 5.0}])
def test_budgets_that_are_none(given: dict[str, float]) -> None:
    with pytest.raises(OptionError):
        make({"name": "mixed_precision", **given})
