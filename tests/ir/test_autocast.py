"""Autocast regions become casts: the same numbers and dtypes as eager, and operators that passes recognise."""

import gc

import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import accelpass
from accelpass.backends import compiled_graphs
from accelpass.ir.analyses.structure.linear import linears
from accelpass.ir.core.capture import from_export
from tests.sweep import examples

EAGER = {"lowering": "eager"}
OPERATIONS = {
    "linear": lambda m, x: m.up(x),
    "matmul": lambda m, x: x @ m.up.weight.t(),
    "einsum": lambda m, x: torch.einsum("bi,oi->bo", x, m.up.weight),
    "conv": lambda m, x: F.conv1d(x.unsqueeze(1), m.kernel),
    "softmax": lambda m, x: x.softmax(-1),
    "norm": lambda m, x: F.layer_norm(x, x.shape[-1:]) + x.norm(dim=-1, keepdim=True),
    "cumsum": lambda m, x: x.cumsum(-1),
    "promoted": lambda m, x: torch.cat([m.up(x), x], -1),
    "parts": lambda m, x: torch.stack(m.up(x).chunk(2, -1)),
    "sdpa": lambda m, x: F.scaled_dot_product_attention(*[m.up(x).reshape(1, 2, -1, 8)] * 3),
    "attention": lambda m, x: m.attention(x[None], x[None], x[None], need_weights=True)[0],
    "in place": lambda m, x: m.up(x).add_(1.0).mul_(x.mean()),
    "lstm cell": lambda m, x: m.cell(x)[0],
    "loss": lambda m, x: F.cosine_similarity(x, x.roll(1, 0)),
}


class Model(nn.Module):
    """One operation in a stack of autocast regions: (device, dtype, enabled) each."""

    def __init__(self, operation: str, regions: list[tuple[str, torch.dtype, bool]]) -> None:
        super().__init__()
        self.up, self.kernel = nn.Linear(16, 16), nn.Parameter(torch.randn(3, 1, 4))
        self.attention, self.cell = nn.MultiheadAttention(16, 2), nn.LSTMCell(16, 16)
        self.operation, self.regions = operation, regions

    def forward(self, x):
        return self.within(x, self.regions), x * 2

    def within(self, x, regions):
        if not regions:
            return OPERATIONS[self.operation](self, x)
        device, dtype, enabled = regions[0]
        with torch.autocast(device, dtype, enabled):
            return self.within(x, regions[1:])


def same(got, want):
    assert [t.dtype for t in got] == [t.dtype for t in want]
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=2**-7, atol=2**-7)  # an ulp of bfloat16, where sums are ordered otherwise


region = st.tuples(st.just("cpu"), st.sampled_from([torch.bfloat16, torch.float16]), st.booleans())


@settings(max_examples=examples(15), deadline=None)
@given(st.sampled_from(sorted(OPERATIONS)), st.lists(region, max_size=3), st.booleans(), st.integers(0, 2**16))
def test_regions(operation, regions, around, seed):
    torch._dynamo.reset()
    gc.collect()
    torch.manual_seed(seed)
    model, x = Model(operation, regions).eval(), torch.randn(4, 16)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=around):
        want = model(x)
        fast = torch.compile(model, backend="accelpass", options=EAGER)
        got, again = fast(x), fast(x)
    same(got, want)
    same(again, want)
    assert not {g.report.note for g in compiled_graphs()} - {""}


def test_passes_see_plain_operators():
    """Under autocast a weight is read through a cast; it is packed all the same, and the output keeps autocast's dtype."""
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 64)).eval(), torch.randn(3, 64)
    fast = torch.compile(model, backend="accelpass", options={**EAGER, "passes": ["int8_weights"]})
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        want, got = model(x), fast(x)
    assert got.dtype == want.dtype == torch.bfloat16
    assert accelpass.explain(fast).passes["int8_weights"].took.keys() == {"0", "2"}
    assert (got - want).norm() / want.norm() < 0.03
    with torch.no_grad():
        assert fast(x).dtype == torch.float32  # a graph of its own


def test_the_state_outside_is_left_alone():
    fast = torch.compile(nn.Linear(8, 8).eval(), backend="accelpass", options=EAGER)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        fast(torch.randn(2, 8))
        assert torch.is_autocast_enabled("cpu")
        assert torch.get_autocast_dtype("cpu") == torch.bfloat16
    assert not torch.is_autocast_enabled("cpu")


def test_control_flow_in_a_region_compiles_as_it_is():
    class Branch(nn.Module):
        def __init__(self):
            super().__init__()
            self.up = nn.Linear(8, 8)

        def forward(self, x):
            with torch.autocast("cpu", torch.bfloat16):
                return torch.cond(x.sum() > 0, lambda t: self.up(t), lambda t: self.up(-t), (x,))

    model, x = Branch().eval(), torch.randn(2, 8)
    fast = torch.compile(model, backend="accelpass", options=EAGER)
    with torch.no_grad():
        want, got = model(x), fast(x)
    assert got.dtype == want.dtype
    torch.testing.assert_close(got, want)
    assert "inside an autocast region" in accelpass.explain(fast).notes[0]


def test_regions_of_an_exported_program():
    torch.manual_seed(0)
    regions = [("cpu", torch.bfloat16, True), ("cpu", torch.bfloat16, False), ("cpu", torch.bfloat16, True)]
    model, x = Model("linear", regions).eval(), torch.randn(4, 16)
    with torch.no_grad():
        want = model(x)
        program = from_export(torch.export.export(model, (x,)))
        got = program.gm(x)
    same(got, want)
    assert [s.path for s in linears(program)] == ["up"]
    assert not [n for n in program.graph.nodes if "autocast" in str(n.target)]
