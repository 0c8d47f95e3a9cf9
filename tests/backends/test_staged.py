"""The linker of stages, by itself: places, what is let go, what is kept, and what does not fit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, fx

from accelpass.backends.staged.linker import Execution, Key, Place, link
from accelpass.backends.staged.stage import Code, Held, Stage, key_of, part_of
from accelpass.ir.core.graph import aten
from accelpass.ir.errors import PassError

ONE = torch.ones(2)
LAYOUT = ((2,), (1,), torch.float32, torch.device("cpu"), 0)


def stage(fn: Any, given: list[Any], made: list[str], **more: Any) -> Stage:
    names = [name for kind, name in given if kind == "value"]
    return Stage(fn, tuple(given), tuple(made), layouts=dict.fromkeys((*names, *made), LAYOUT), **more)


def add(*xs: Tensor) -> tuple[Tensor]:
    return (torch.stack(xs).sum(0),)


def chain() -> dict[Key, Stage]:
    return {
        (0, "full"): stage(add, [("argument", 0), ("held", Held(ONE))], ["a"]),
        (0, "kept"): stage(add, [("argument", 0), ("recalled", "old")], ["a"], keeps=(("old", ("value", "a")),)),
        (1, "full"): stage(add, [("value", "a"), ("derived", "w")], ["b"]),
    }


INPUTS = [("argument", 0), ("argument", 1), ("derived", "w")]


def test_any_row_of_variants_runs_on_one_list_of_places():
    made = link(chain(), [("value", "b"), ("literal", 7), ("argument", 1)], INPUTS)
    x, y, w = (torch.full((2,), float(n)) for n in (1, 2, 4))
    full = Execution(made, [x, y, w])
    full.run(made.stages[0, "full"])
    full.run(made.stages[1, "full"])
    b, seven, passed = full.results()
    assert b.tolist() == [6.0, 6.0] and seven == 7 and passed is y and full.kept == {}

    kept = Execution(made, [x, y, w], {"old": y}.__getitem__)
    kept.run(made.stages[0, "kept"])
    kept.run(made.stages[1, "full"])
    assert kept.results()[0].tolist() == [7.0, 7.0]
    assert kept.kept["old"].tolist() == [3.0, 3.0]


def test_what_no_later_stage_reads_is_let_go():
    made = link(chain(), [("value", "b")], INPUTS)
    (result,) = made.results
    assert isinstance(result, Place)
    run = Execution(made, [ONE, ONE, ONE], {"old": ONE}.__getitem__)
    run.run(made.stages[0, "kept"])
    assert run.values[made.place["recalled", "old"]] is None
    assert run.values[made.place["value", "a"]] is not None
    run.run(made.stages[1, "full"])
    assert run.values[made.place["value", "a"]] is None
    assert run.values[result.number] is not None


def test_a_value_that_nobody_recalls_is_told():
    made = link(chain(), [("value", "b")], INPUTS)
    with pytest.raises(PassError, match="'old' is read of an earlier call"):
        Execution(made, [ONE, ONE, ONE]).run(made.stages[0, "kept"])


def test_a_variant_that_does_not_make_what_is_read_is_refused():
    stages = chain()
    stages[0, "less"] = stage(add, [("argument", 0)], ["c"])
    with pytest.raises(PassError, match=r"do not fit together at a: .* is read, nothing is made"):
        link(stages, [("value", "b")], INPUTS)


@pytest.mark.parametrize(("shape", "strides", "fits"), [((2, 1), (1, 9), True), ((2, 2), (1, 9), False)])
def test_layouts_fit_but_for_strides_that_no_element_needs(shape: Any, strides: Any, fits: bool):
    tail = (torch.float32, torch.device("cpu"), 0)
    stages: dict[Key, Stage] = {
        (0, ()): Stage(add, (("argument", 0),), ("a",), layouts={"a": (shape, (1, 1), *tail)}),
        (1, ()): Stage(add, (("value", "a"),), ("b",), layouts={"a": (shape, strides, *tail)}),
    }
    if fits:
        link(stages, [("value", "b")], [("argument", 0)])
        return
    with pytest.raises(PassError, match="do not fit together at a"):
        link(stages, [("value", "b")], [("argument", 0)])


def nodes_of(*targets: Any) -> list[fx.Node]:
    """Calls in a row on one input."""
    graph = fx.Graph()
    made = [graph.placeholder("x")]
    mode = torch._subclasses.FakeTensorMode()
    for target in (None, *targets):
        if target is not None:
            made.append(graph.call_function(target, (made[-1],)))
        made[-1].meta["val"] = mode.from_tensor(torch.ones(2))
    graph.output(made[-1])
    return made[1:]


def test_a_stage_hands_on_what_others_read_and_equal_ones_share_code():
    nodes = nodes_of(aten.sin.default, aten.cos.default, aten.sin.default, aten.cos.default, aten.alias.default)
    first, second, last = part_of(nodes[:2]), part_of(nodes[2:4]), part_of(nodes[4:])
    assert first.made == [nodes[1]] and second.given == [nodes[1]]
    assert part_of(nodes[:2], frozenset({nodes[0].name})).made == nodes[:2]
    assert key_of(first) == key_of(second) != key_of(part_of(nodes[1:3]))
    compiled: list[fx.GraphModule] = []
    code = Code(lambda gm, given: compiled.append(gm) or gm.forward)  # type: ignore[func-returns-value]
    mode = nodes[0].meta["val"].fake_mode
    assert code.of(first, mode) is code.of(second, mode)
    x = torch.randn(2)
    assert code.of(last, mode)(x)[0].data_ptr() == x.data_ptr()
    assert compiled == [first.gm]  # what only hands on needs no compiler
