"""The pattern language: captures, commuting operands, optional nodes, spellings, and the reasons when nothing fits."""

from __future__ import annotations

import torch
from torch import fx
from torch.fx.experimental.proxy_tensor import make_fx

from accelpass.ir.core.graph import aten
from accelpass.ir.core.patterns import Any, Capture, Const, Match, Maybe, OneOf, Op, WhyNot, match, search


def last(f, *args) -> fx.Node:
    """The node that makes the result."""
    gm = make_fx(f, pre_dispatch=True)(*args)
    (output,) = gm.graph.find_nodes(op="output")
    return output.args[0]


X, Y = torch.ones(2, 3), torch.ones(2, 3)
SILU = OneOf(Op(aten.silu, Any("x")), Op(aten.mul, Any("x"), Op(aten.sigmoid, Any("x")), commutes=True))
GATED = Op(aten.mul, Capture("act", SILU), Any("up"), commutes=True)


def test_captures_are_nodes():
    node = last(lambda x, y: torch.nn.functional.silu(x) * y, X, Y)
    found = match(GATED, node)
    assert isinstance(found, Match)
    assert [found[n].name for n in ("x", "act", "up")] == ["x_1", "silu", "y_1"]
    assert {n.name for n in found.nodes} == {"mul", "silu"}


def test_operands_in_either_order():
    assert match(GATED, last(lambda x, y: y * torch.nn.functional.silu(x), X, Y))


def test_another_spelling():
    found = match(GATED, last(lambda x, y: (torch.sigmoid(x) * x) * y, X, Y))
    assert isinstance(found, Match)
    assert found["x"].name == "x_1"


def test_one_name_is_one_thing():
    found = match(Op(aten.mul, Any("x"), Op(aten.sigmoid, Any("x"))), last(lambda x, y: x * torch.sigmoid(y), X, Y))
    assert isinstance(found, WhyNot)
    assert found.why == "mul: sigmoid: x is y_1 (placeholder) here and x_1 (placeholder) elsewhere"


def test_a_node_that_may_be_there():
    pattern = Op(aten.relu, Maybe((aten.to, aten.clone), Op(aten.neg, Any("x"))))
    assert match(pattern, last(lambda x: torch.relu(-x), X))
    found = match(pattern, last(lambda x: torch.relu((-x).to(torch.float64).clone()), X))
    assert isinstance(found, Match)
    assert len(found.nodes) == 4


def test_constants_and_types():
    scaled = Op(aten.mul, Any("x"), Const(0.125))
    assert match(scaled, last(lambda x: x * 0.125, X))
    assert match(scaled, last(lambda x: x * 0.5, X)).why == "mul: 0.5 is not 0.125"
    typed = Op(aten.mul, Any("x"), Any("c", (int, float)))
    assert match(typed, last(lambda x: x * 3, X))["c"] == 3
    assert "it should be a int or float" in match(typed, last(lambda x, y: x * y, X, Y)).why


def test_a_condition_refuses_in_words():
    def wide(node):
        return (
            None if node.meta["val"].shape[-1] % 4 == 0 else f"width {node.meta['val'].shape[-1]} is no multiple of 4"
        )

    found = match(Op(aten.relu, Any("x", fx.Node, wide)), last(torch.relu, X))
    assert found.why == "relu: x: width 3 is no multiple of 4"


def test_values_that_others_see():
    def f(x):
        y = -x
        return torch.relu(y) + y

    gm = make_fx(f, pre_dispatch=True)(X)
    (relu,) = gm.graph.find_nodes(op="call_function", target=aten.relu.default)
    assert match(Op(aten.relu, Op(aten.neg, Any("x"))), relu)
    assert match(Op(aten.relu, Op(aten.neg, Any("x"), users=1)), relu).why == (
        "relu: neg has 2 users; at most 1 may see it"
    )


def test_search_gives_matches_and_near_misses():
    def f(x, y):
        return torch.nn.functional.silu(x) * y, torch.tanh(x) * y, torch.nn.functional.silu(y) * x

    gm = make_fx(f, pre_dispatch=True)(X, Y)
    found = search(GATED, gm.graph)
    assert [m.root.name for m in found.matches] == ["mul", "mul_2"]
    (miss,) = found.near_misses
    assert miss.why.startswith("mul_1: ")
