"""The semantic linear: its spec as text, what each part of it means, and formats that only a test knows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from accelpass.backends import graphs_of
from accelpass.ir.core.derived import Recipe
from accelpass.ir.core.graph import shape
from accelpass.ir.linear import lower as lowering
from accelpass.ir.linear.formats import Int4, Int8
from accelpass.ir.linear.op import LINEAR, linear, linear_spec
from accelpass.ir.linear.spec import Expert, LinearSpec, WeightFormat
from accelpass.passes.core.base import Done, Pass
from accelpass.passes.quantization.bases.weight_only import WeightOnly
from accelpass.passes.quantization.int8_dynamic import Int8PerToken
from tests.small_models import relative_error

ALL = [
    LinearSpec(Int8()),
    LinearSpec(Int4(32, False), low_rank=3),
    LinearSpec(Int8(), Int8PerToken(), Expert(2), 16),
]


@pytest.mark.parametrize("spec", ALL)
def test_a_spec_is_its_text(spec):
    assert LinearSpec.from_json(spec.to_json()) == spec


def test_a_spec_in_words():
    assert [s.shown() for s in ALL] == [
        "int8",
        "int4(group_size=32, symmetric=False), rank 3",
        "int8 x int8_per_token, expert(2), rank 16",
    ]


WEIGHTS = st.sampled_from([Int8(), Int4(32), Int4(32, False)])


@settings(max_examples=25, deadline=None)
@given(
    WEIGHTS, st.booleans(), st.integers(0, 5), st.sampled_from([(), (1,), (2, 3)]), st.booleans(), st.integers(0, 99)
)
def test_every_part_against_its_definition(weight, rounds, rank, lead, biased, seed):
    """W is one of a stack; x is rounded for the product with it alone."""
    r = torch.Generator().manual_seed(seed)
    x, stack = torch.randn(*lead, 64, generator=r), torch.randn(3, 5, 64, generator=r)
    a, b = torch.randn(rank, 64, generator=r), torch.randn(5, rank, generator=r)
    bias = torch.randn(5, generator=r) if biased else None
    spec = LinearSpec(weight, Int8PerToken() if rounds else None, Expert(1), rank)
    packed = weight.pack(stack)
    y = linear(x, [*packed, *([a, b] if rank else [])], bias, spec.to_json())
    seen = x
    if rounds:
        codes, scale = Int8PerToken().encode(x)
        seen = codes * scale
    want = F.linear(seen, weight.unpack([p[1] for p in packed], torch.float32)) + F.linear(F.linear(x, a), b)
    assert torch.allclose(y, want if bias is None else want + bias, atol=1e-4)


@dataclass(frozen=True)
class Halves(WeightFormat):
    """Rounded to halves: nothing lowers it."""

    part: ClassVar[str] = "test_halves"

    @property
    def operands(self) -> tuple[str, ...]:
        return ("doubled",)

    def pack(self, w: Tensor) -> tuple[Tensor, ...]:
        return ((2 * w.float()).round().to(torch.int16),)

    def unpack(self, packed: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
        return (packed[0].float() / 2).to(dtype)

    def width(self, packed: Sequence[Tensor]) -> int:
        return packed[0].shape[-1]


@dataclass(frozen=True)
class HalfWeights(WeightOnly):
    name: ClassVar[str] = "test_half_weights"
    summary: ClassVar[str] = "weights rounded to halves"

    @property
    def spec(self) -> LinearSpec:
        return LinearSpec(Halves())


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(16, 32)
        self.gate, self.up = nn.Linear(32, 8), nn.Linear(32, 12)
        self.experts = nn.Parameter(torch.randn(2, 32, 4))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids)
        joined = torch.cat([self.gate(x), self.up(x)], -1)
        return torch.cat([joined, F.linear(x, self.table.weight), torch.bmm(x, self.experts)], -1)


@pytest.mark.parametrize("how", ["eager", "aten"])
def test_a_format_without_a_lowering_is_traced(how):
    """Linears, a look-up, a tied head and experts, fused where two read one input."""
    torch.manual_seed(0)
    model, ids = Tied().eval(), torch.arange(10).view(2, 5)
    with torch.no_grad():
        for weight in (model.table.weight, model.gate.weight, model.up.weight, model.experts):
            weight.copy_((2 * weight).round() / 2)  # on its grid nothing is lost
        passes = [HalfWeights(), "horizontal_fusion"]
        fast = torch.compile(model, backend="accelpass", options={"passes": passes, "lowering": how})
        assert relative_error(fast(ids), model(ids)) < 1e-6
    records = {r.name: r for r in graphs_of(model)[-1].report.records}
    halves = records["test_half_weights"]
    assert set(halves.took) == {"table", "table #2", "gate", "up", "experts"} and not halves.skipped
    assert len(records["horizontal_fusion"].took) == 1


def test_one_lowering_for_a_format_and_device():
    with pytest.raises(ValueError, match="'int8' has a lowering for 'cpu' already"):
        lowering.register_lowering(Int8, "cpu", lowering.TRACED)


@dataclass(frozen=True)
class AddResidual(Pass):
    """Gives each packed linear a residual branch: a quarter of the sum of its input."""

    name: ClassVar[str] = "test_add_residual"
    phase: ClassVar[str] = "fusion"
    summary: ClassVar[str] = "for a test"

    def apply(self, program, record):
        for node in program.graph.find_nodes(op="call_function", target=LINEAR):
            spec, width = linear_spec(node), shape(node.args[0])[-1]
            recipe = Recipe(("test_add_residual", width), partial(residual_of, width))
            residual = program.tensors.derive([node.args[1][1]], recipe, ["a", "b"])
            text = LinearSpec(spec.weight, spec.activation, spec.by, width).to_json()
            node.args = (node.args[0], [*node.args[1], *residual], node.args[2], text)
            record.take(node.name, Done("residual"))


def residual_of(width: int, scale: Tensor) -> tuple[Tensor, Tensor]:
    return torch.eye(width), torch.full((len(scale), width), 0.25)


@pytest.mark.parametrize("rows", [1, 3, 20])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_residual_and_rounded_inputs_are_lowered(rows, dtype):
    torch.manual_seed(0)
    model, x = nn.Linear(64, 8).eval().to(dtype), torch.randn(2, rows, 64).to(dtype)
    outs = []
    for how in ("eager", "aten"):
        torch._dynamo.reset()
        options = {"passes": ["int8_dynamic", AddResidual()], "lowering": how}
        with torch.no_grad():
            outs.append(torch.compile(model, backend="accelpass", options=options, dynamic=False)(x))
    dense = model(x).float() + 0.25 * x.float().sum(-1, keepdim=True)
    assert outs[0].dtype == outs[1].dtype == dtype
    assert relative_error(outs[0], dense.detach()) < 0.03
    assert relative_error(outs[1], outs[0]) < (1e-5 if dtype == torch.float32 else 1e-2)
