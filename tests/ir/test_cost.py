"""The cost model against counts done by hand, with symbolic sizes, and against torch's own counter."""

from __future__ import annotations

import pytest
import sympy
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from accelpass.backends import graphs_of
from accelpass.ir import attention
from accelpass.ir.analyses.structure.cost import at_compiled_sizes, costs, total, weight_bytes
from accelpass.ir.attention import Band, BlockList, SinksAndWindow
from accelpass.ir.attention.spec.op import selection
from accelpass.ir.attention.spec.selected import selected_pairs
from accelpass.ir.core.capture import from_dynamo
from accelpass.ir.core.program import Program
from tests.small_models import Mlp


def captured(model: nn.Module, *args, dynamic: bool | None = None) -> Program:
    kept = []

    def keep(gm, inputs):
        kept.append(from_dynamo(gm, inputs))
        return gm.forward

    with torch.no_grad():
        torch.compile(model, backend=keep, dynamic=dynamic)(*args)
    return kept[0]


class Attend(nn.Module):
    def __init__(self, is_causal=False):
        super().__init__()
        self.is_causal = is_causal

    def forward(self, q, k, v):
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=self.is_causal, scale=0.25)


def test_flops_of_an_mlp_are_exact_and_agree_with_torch():
    model, x = Mlp().eval(), torch.randn(5, 64)
    program = captured(model, x)
    by_hand = 3 * 2 * 5 * 64 * 96
    assert total(program).flops == by_hand
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(x)
    assert counter.get_total_flops() == by_hand
    assert weight_bytes(program) == 4 * (3 * 64 * 96 + 64)


def test_flops_are_expressions_in_symbolic_sizes():
    program = captured(Mlp().eval(), torch.randn(7, 64), dynamic=True)
    flops = total(program).flops
    (rows,) = flops.free_symbols
    assert sympy.simplify(flops - 3 * 2 * rows * 64 * 96) == 0
    assert at_compiled_sizes(program, flops) == 3 * 2 * 7 * 64 * 96


def test_attention_costs_the_same_as_a_semantic_node():
    q, k, v = torch.randn(2, 4, 6, 16), torch.randn(2, 4, 9, 16), torch.randn(2, 4, 9, 16)
    program = captured(Attend(), q, k, v)
    before = total(program).flops
    assert before == 4 * 2 * 4 * 6 * 9 * 16
    attention.insert(program)
    assert total(program).flops == before


def test_bytes_of_a_linear():
    program = captured(nn.Linear(8, 4, bias=False).eval(), torch.randn(3, 8))
    (cost,) = (c for c in program.analysis(costs).values() if c.flops)
    assert (cost.read, cost.written, cost.state) == (4 * (8 * 4 + 3 * 8), 4 * 12, 0)


def test_report_counts_flops_and_bytes():
    model = Mlp().eval()
    with torch.no_grad():
        torch.compile(model, backend="accelpass", options={"lowering": "eager", "passes": ["int8_weights"]})(
            torch.randn(2, 64)
        )
    report = graphs_of(model)[0].report
    assert report.before.flops == report.after.flops == 3 * 2 * 2 * 64 * 96
    assert report.after.weight_bytes < 0.3 * report.before.weight_bytes


SELECTIONS = [
    Band(0),
    Band(3),
    Band(100),
    SinksAndWindow(2, 3),
    SinksAndWindow(0, 1),
    SinksAndWindow(50, 60),
    BlockList(4, ((0, 0), (0, 2), (1, 1), (1, 1))),
    BlockList(4, (((0, 0),), ((0, 0), (1, 2)), (), ((1, 0),)), per_head=True),
]


@pytest.mark.parametrize("select", SELECTIONS)
def test_an_attention_costs_the_pairs_that_are_selected(select):
    q, k, v = torch.randn(2, 4, 6, 16), torch.randn(2, 4, 9, 16), torch.randn(2, 4, 9, 8)
    program = captured(Attend(), q, k, v)
    (record,) = attention.insert(program)
    attention.set_spec(record.node, attention.spec_of(record.node).edited(by="a test", select=select))
    program.changed()
    mask = selection(select, 6, 9, 3, q).expand(4, 6, 9)
    assert total(program).flops == 2 * 2 * int(mask.sum()) * (16 + 8)


@pytest.mark.parametrize("select", SELECTIONS)
def test_under_a_causal_cut_it_costs_its_share_of_the_causal_pairs(select):
    q, k, v = (torch.randn(2, 4, 9, 16) for _ in range(3))
    program = captured(Attend(is_causal=True), q, k, v)
    (record,) = attention.insert(program)
    dense = total(program).flops
    attention.set_spec(record.node, attention.spec_of(record.node).edited(by="a test", select=select))
    program.changed()
    seen = torch.ones(9, 9, dtype=torch.bool).tril()
    share = int((selection(select, 9, 9, 0, q).expand(4, 9, 9) & seen).sum()) / int(4 * seen.sum())
    assert total(program).flops / dense == pytest.approx(share)


@settings(max_examples=60, deadline=None)
@given(
    select=st.sampled_from(SELECTIONS),
    rows=st.integers(5, 8),
    columns=st.integers(9, 12),
    causal=st.booleans(),
)
def test_selected_pairs_are_those_of_the_mask(select, rows, columns, causal):
    mask = selection(select, rows, columns, 0 if causal else columns - rows, torch.empty(0)).expand(4, -1, -1)
    if causal:
        mask = mask.tril()
    assert selected_pairs(select, 4, rows, columns, causal) == int(mask.sum())


def test_a_symbolic_attention_costs_all_pairs():
    program = captured(Attend(), *(torch.randn(2, 4, 6, 16) for _ in range(3)), dynamic=True)
    (record,) = attention.insert(program)
    before = total(program).flops
    attention.set_spec(record.node, attention.spec_of(record.node).edited(by="a test", select=Band(1)))
    program.changed()
    assert total(program).flops == before
