"""int8 and int4 weights: packing against its definition, the sites, and the lowered forms against the ops."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from accelpass.backends import graphs_of
from accelpass.backends.compile import rewriting
from accelpass.backends.compile.lowering import lower
from accelpass.backends.kernels.cpu import linear as linear_cpu
from accelpass.ir.errors import OptionError
from accelpass.ir.linear import op as ops
from accelpass.ir.linear.formats import Int4, Int4Half, Int8
from accelpass.ir.linear.search import searched_grid
from accelpass.ir.linear.spec import LinearSpec
from accelpass.passes.core.base import Record
from accelpass.passes.core.options import parse
from accelpass.passes.core.registry import make
from tests.packing import dequantize_int4, dequantize_int8, pack_int4, pack_int8
from tests.small_models import Mlp, relative_error, tiny_lm
from tests.sweep import examples


def compiled(model, *passes, **options):
    return torch.compile(model, backend="accelpass", options={"lowering": "eager", "passes": list(passes), **options})


def records(model) -> dict[str, Record]:
    return {r.name: r for r in graphs_of(model)[-1].report.records}


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 9), st.integers(1, 40), st.integers(0, 2**31))
def test_int8_packing_is_within_half_a_step(out, width, seed):
    w = torch.randn(out, width, generator=torch.Generator().manual_seed(seed))
    q, scale = pack_int8(w)
    assert q.dtype == torch.int8
    error = (dequantize_int8(q, scale, torch.float32) - w).abs()
    assert (error <= scale[:, None] * 0.5001).all()
    assert (q.abs().amax(1) == 127).all(), "the largest weight of a row takes the whole range"


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 6), st.integers(1, 4), st.sampled_from([32, 64, 128]), st.booleans(), st.integers(0, 2**31))
def test_int4_packing_against_a_loop(out, groups, size, symmetric, seed):
    """The oracle unpacks byte by byte, as the layout is documented, and holds every weight to half a step."""
    w = torch.randn(out, groups * size, generator=torch.Generator().manual_seed(seed))
    q, scale, zero = (*pack_int4(w, size, symmetric), None)[:3]
    assert q.shape == (out, groups * size // 2)
    unpacked = torch.empty_like(w)
    half = size // 2
    for row in range(out):
        for group in range(groups):
            for j in range(half):
                byte = int(q[row, group * half + j])
                offset = 8 if zero is None else float(zero[row, group])
                unpacked[row, group * size + j] = ((byte & 15) - offset) * scale[row, group]
                unpacked[row, group * size + j + half] = ((byte >> 4) - offset) * scale[row, group]
    assert torch.allclose(dequantize_int4(q, scale, zero, size, torch.float32), unpacked)
    # Symmetric: 16 levels around the signed extreme; the far end of the other sign may be clipped by one step.
    steps = 1.001 if symmetric else 0.501
    assert ((unpacked - w).abs() <= scale.abs().repeat_interleave(size, 1) * steps + 1e-6).all()


def test_identity_settings_equal_the_dense_model():
    """Weights that already lie on the grid are packed without loss."""
    model = Mlp().eval()
    with torch.no_grad():
        for p in (model.gate_proj.weight, model.up_proj.weight, model.down_proj.weight):
            p.copy_(torch.randint(-8, 8, p.shape).float() * 0.25)
            p.view(p.shape[0], -1, 32)[..., 0] = -2.0  # each group holds its extreme, -8 steps
        x = torch.randn(3, 64)
        got = compiled(model, {"name": "int4_weights", "group_size": 32})(x)
        assert relative_error(got, model(x)) < 1e-6


@pytest.mark.parametrize("op", [ops.linear, ops.embedding, ops.matrix])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_int8_ops_pass_opcheck(op, dtype):
    packed, spec = Int8().pack(torch.randn(6, 32)), LinearSpec(Int8()).to_json()
    args = {
        ops.linear: (torch.randn(2, 3, 32, dtype=dtype), packed, torch.randn(6), spec),
        ops.embedding: (torch.tensor([[1, 5]]), packed, spec, dtype),
        ops.matrix: (packed, spec, dtype),
    }[op]
    torch.library.opcheck(op, args, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("op", [ops.linear, ops.embedding, ops.matrix])
@pytest.mark.parametrize("symmetric", [True, False])
def test_int4_ops_pass_opcheck(op, symmetric):
    weight = Int4(32, symmetric)
    packed, spec = weight.pack(torch.randn(6, 64)), LinearSpec(weight).to_json()
    args = {
        ops.linear: (torch.randn(2, 3, 64), packed, None, spec),
        ops.embedding: (torch.tensor([[1, 5]]), packed, spec, torch.float32),
        ops.matrix: (packed, spec, torch.float32),
    }[op]
    torch.library.opcheck(op, args, test_utils=("test_schema", "test_faketensor"))


def test_sites_and_their_names():
    model = tiny_lm()
    with torch.no_grad():
        compiled(model, "int8_weights")(torch.arange(4)[None])
    record = records(model)["int8_weights"]
    assert set(record.took) == {
        "embed", "lm_head",
        *(f"layers.{i}.{n}_proj" for i in range(2) for n in ("gate", "up", "down")),
    }  # fmt: skip
    assert not record.skipped
    assert record.took["layers.0.up_proj"].bytes_after == 96 * 64 + 4 * 96
    assert "shares the packed weight" in record.took["lm_head"].what
    fusion = records(model)["horizontal_fusion"]
    assert set(fusion.took) == {f"layers.{i}.{{gate_proj,up_proj}}" for i in range(2)}


def test_include_and_exclude():
    model = tiny_lm()
    with torch.no_grad():
        compiled(model, {"name": "int8_weights", "include": ["layers.*"], "exclude": ["down_proj"]})(
            torch.arange(4)[None]
        )
    record = records(model)["int8_weights"]
    assert set(record.took) == {f"layers.{i}.{n}_proj" for i in range(2) for n in ("gate", "up")}
    assert record.skipped["layers.1.down_proj"] == "named in exclude=['down_proj']"
    assert "lm_head" in record.skipped


def test_int8_for_the_head_and_int4_for_the_rest():
    """Two weight passes on one model: the first takes what it is told to, the second the rest."""
    model = tiny_lm()
    ids = torch.arange(4)[None]
    with torch.no_grad():
        passes = ({"name": "int8_weights", "include": ["lm_head", "embed"]}, {"name": "int4_weights", "group_size": 32})
        got = compiled(model, *passes)(ids)
        assert relative_error(got, model(ids)) < 0.3
    assert set(records(model)["int8_weights"].took) == {"embed", "lm_head"}
    assert len(records(model)["int4_weights"].took) == 6


def test_settings_for_each_site():
    model, ids = tiny_lm(), torch.arange(4)[None]
    sites = {"down_proj": {"group_size": 32}, "layers.1.down_proj": {"symmetric": False}}
    with torch.no_grad():
        assert relative_error(compiled(model, {"name": "int4_weights", "sites": sites})(ids), model(ids)) < 0.3
    bytes_of = {site: done.bytes_after for site, done in records(model)["int4_weights"].took.items()}
    weights = 64 * 96
    assert bytes_of["layers.0.up_proj"] == weights // 2 + 4 * weights // 64
    # 96 input channels fit groups of 32 alone
    assert bytes_of["layers.0.down_proj"] == weights // 2 + 4 * weights // 32
    assert bytes_of["layers.1.down_proj"] == weights // 2 + 2 * 4 * weights // 32, "a zero point for each group"


@pytest.mark.parametrize(
    ("sites", "says"),
    [
        ({"a": {"group": 32}}, "did you mean 'group_size'"),
        ({"a": {"group_size": 33}}, "group_size=33 is not supported"),
        ({"a": {"group_size": "x"}}, "it takes int"),
        ({"a": 3}, r"takes a dict of group_size, symmetric"),
        ({"a": {"include": ["b"]}}, "sets 'include'"),
    ],
)
def test_bad_settings_for_a_site(sites, says):
    with pytest.raises(OptionError, match=says):
        parse({"passes": [{"name": "int4_weights", "sites": sites}]})


class Conv1d(nn.Module):
    """GPT-2's linear: the weight is stored as (in, out)."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(64, 32))
        self.bias = nn.Parameter(torch.randn(32))

    def forward(self, x):
        return torch.addmm(self.bias, x.view(-1, 64), self.weight).view(*x.shape[:-1], 32)


class Product(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(64, 32))

    def forward(self, x):
        return x @ self.weight


class Experts(nn.Module):
    """A stack of experts used one by one."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 32, 64))

    def forward(self, x):
        return sum(torch.nn.functional.linear(x, self.weight[i]) for i in range(3))


class BatchedExperts(nn.Module):
    """A stack of experts in one product, stored as (experts, in, out)."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 64, 32))

    def forward(self, x):
        return torch.bmm(x.reshape(1, -1, 64).expand(3, -1, -1), self.weight)


@pytest.mark.parametrize("kind", [Conv1d, Product, Experts, BatchedExperts])
@pytest.mark.parametrize("name", ["int8_weights", "int4_weights"])
def test_spellings_of_a_linear(kind, name):
    torch.manual_seed(0)
    model, x = kind().eval(), torch.randn(2, 5, 64)
    with torch.no_grad():
        got, want = compiled(model, name)(x), model(x)
        assert 0 < relative_error(got, want) < (0.02 if name == "int8_weights" else 0.25)
    assert records(model)[name].took


def test_a_weight_with_another_use_stays_float():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(64, 64))

        def forward(self, x):
            return torch.nn.functional.linear(x, self.weight) + self.weight.sum()

    model, x = Odd().eval(), torch.randn(2, 64)
    with torch.no_grad():
        assert relative_error(compiled(model, "int8_weights")(x), model(x)) < 1e-5
    (why,) = records(model)["int8_weights"].skipped.values()
    assert why == "1 other use(s) of the weight need its float form"


def test_rows_of_a_weight_that_its_own_linear_multiplies_are_another_use():
    """The table is indexed, not looked up by ``embedding``; what was indexed leads to the linear as its input, not its weight."""

    class Indexed(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(64, 64))

        def forward(self, ids):
            return torch.nn.functional.linear(self.weight[ids], self.weight)

    model, ids = Indexed().eval(), torch.randint(64, (2, 5))
    with torch.no_grad():
        assert relative_error(compiled(model, "int8_weights")(ids), model(ids)) < 1e-5
    assert list(records(model)["int8_weights"].skipped.values()) == ["1 other use(s) of the weight need its float form"]


def test_a_weight_without_entries_is_left():
    model, x = nn.Sequential(nn.Linear(8, 0), nn.Linear(0, 64), nn.Linear(64, 64)).eval(), torch.randn(2, 8)
    with torch.no_grad():
        assert compiled(model, "int8_weights")(x).shape == (2, 64)
    assert list(records(model)["int8_weights"].skipped.values()) == ["the weight has no entries"] * 2


def test_a_convolution_is_named_and_left():
    model = nn.Sequential(nn.Conv2d(3, 8, 4, stride=4)).eval()
    with torch.no_grad():
        compiled(model, "int8_weights")(torch.randn(1, 3, 8, 8))
    assert "a patch_conv keeps its float weight" in records(model)["int8_weights"].skipped.values()


def test_bytes_of_the_packed_forms():
    """int4 in groups of 64 with float32 scales: 1/8 of float32 and one scale for 64 weights, 0.1406 in all."""
    model = tiny_lm()
    with torch.no_grad():
        compiled(model, {"name": "int4_weights", "group_size": 64, "include": ["gate_proj"]})(torch.arange(4)[None])
    for done in records(model)["int4_weights"].took.values():
        assert done.bytes_after / done.bytes_before == (0.5 + 4 / 64) / 4


def test_debug_mode_measures_each_pass(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELPASS_DEBUG", str(tmp_path))
    model = tiny_lm()
    with torch.no_grad():
        compiled(model, "int8_weights", debug=True)(torch.arange(4)[None])
    made = records(model)
    assert 0 < made["int8_weights"].difference < 0.05
    assert made["horizontal_fusion"].difference < 1e-5
    assert len(list(tmp_path.rglob("*int8_weights*.py"))) == 2


@pytest.mark.parametrize("passes", [["int8_weights"], ["int4_weights"], ["cpu_gemv"]])
def test_linears_in_a_row(passes):
    """The input of the second is the output of the first, which the pass has replaced by then."""
    torch.manual_seed(0)
    model, x = nn.Sequential(*(nn.Linear(64, 64) for _ in range(3))).eval(), torch.randn(1, 64)
    with torch.no_grad():
        assert relative_error(compiled(model, *passes)(x), model(x)) < 0.3


@pytest.mark.parametrize(("outputs", "rows", "sums"), [(200, 1, 4), (200, 2, 2), (202, 1, 1), (20, 1, 1)])
def test_a_large_matrix_times_a_row_is_several_sums(outputs, rows, sums, monkeypatch):
    """One that is small, whose outputs do not divide, or that several rows multiply is as many sums as there are rows."""
    torch.manual_seed(0)
    monkeypatch.setattr(linear_cpu, "LARGE", 20 * 96)
    lowered = []
    monkeypatch.setattr(rewriting, "lower", lambda program: (lower(program), lowered.append(str(program.graph))))
    model, x = nn.Linear(96, outputs).eval(), torch.randn(rows, 96)
    read = dequantize_int8(*pack_int8(model.weight.detach()), torch.float32)
    with torch.no_grad():
        got = compiled(model, "int8_weights", lowering="aten")(x)
        assert relative_error(got, nn.functional.linear(x, read, model.bias)) < 1e-5
    assert lowered[-1].count("aten.sum") == sums


@pytest.mark.slow
@pytest.mark.parametrize("bits", [8, 4])
def test_a_large_matrix_is_expanded_in_parts(bits, monkeypatch):
    """Many rows, three parts of 64 outputs and one of 8; with one row fewer the matrix is streamed."""
    torch.manual_seed(0)
    monkeypatch.setattr(linear_cpu, "PART", 64 * 96 * linear_cpu.matmul_dtype(torch.zeros(1)).itemsize)
    lowered = []
    monkeypatch.setattr(rewriting, "lower", lambda program: (lower(program), lowered.append(str(program.graph))))
    model = nn.Linear(96, 200).eval()
    weight, rows = model.weight.detach(), linear_cpu.GEMV_ROWS[bits] + 1
    if bits == 8:
        packed, read = {"name": "int8_weights"}, dequantize_int8(*pack_int8(weight), torch.float32)
    else:
        packed = {"name": "int4_weights", "group_size": 32, "symmetric": False}
        read = dequantize_int4(*pack_int4(weight, 32, False), 32, torch.float32)
    fast = torch.compile(model, backend="accelpass", options={"passes": [packed]}, dynamic=False)
    with torch.no_grad():
        for count, parts in ((rows, 4), (rows - 1, 0)):
            x = torch.randn(count, 96)
            assert relative_error(fast(x), nn.functional.linear(x, read, model.bias)) < 0.01
            assert lowered[-1].count("aten.linear") == parts


@pytest.mark.parametrize("lowering", ["eager", "aten"])
@pytest.mark.parametrize(
    "passes", [["int8_weights"], ["int4_weights"], ["int8_weights", "horizontal_fusion"], ["cpu_gemv"]]
)
def test_no_rows(passes, lowering):
    """A batch of nothing, as the first call and as a later one of sizes that are symbolic by then."""
    torch.manual_seed(0)
    model = Gated().eval()
    for first in ((5, 64), (0, 64), (2, 0, 64), (0, 3, 64)):
        torch._dynamo.reset()
        fast = compiled(model, *passes, lowering=lowering)
        for size in (first, (0, 64), (3, 64), (9, 64), (0, 64)):
            x = torch.randn(size)
            with torch.no_grad():
                got, want = fast(x), model(x)
            assert got.shape == want.shape and (not want.numel() or relative_error(got, want) < 0.2)


class Gated(nn.Module):
    """Two linears of one input, which are fused."""

    def __init__(self):
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(64, 96), nn.Linear(64, 96), nn.Linear(96, 64, bias=False)

    def forward(self, x):
        return self.down(torch.relu(self.gate(x)) * self.up(x))


@pytest.mark.parametrize("bits", [8, 4])
def test_no_rows_compiled(bits):
    model, x = nn.Linear(64, 32).eval(), torch.randn(0, 64)
    fast = compiled(model, f"int{bits}_weights", lowering="inductor")
    with torch.no_grad():
        assert fast(x).shape == (0, 32)
        assert relative_error(fast(torch.ones(3, 64)), model(torch.ones(3, 64))) < 0.2


@settings(max_examples=examples(10), deadline=None)
@given(st.sampled_from([32, 64]), st.booleans(), st.integers(0, 2**16))
def test_a_searched_grid_never_loses_more(group, symmetric, seed):
    w = torch.randn(6, 128, generator=torch.Generator().manual_seed(seed)).pow(3)  # a few are large
    w[0], w[1, :group] = 0, 0.5
    form = Int4(group, symmetric)
    grouped = form.grouped(w)
    lost = []
    for scale, zero in (form.grid(grouped), searched_grid(form, grouped)):
        there = form.meant(form.codes(grouped, scale, zero), scale, zero)
        assert there.isfinite().all()
        lost.append((there - grouped).abs().pow(2.4).sum(-1))
    assert (lost[1] <= lost[0] * (1 + 1e-5)).all() and lost[1].sum() < lost[0].sum()


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("rows", [1, 9])
def test_scales_of_half_the_size(symmetric, rows):
    """The same by its definition and lowered; scales are rounded before codes are found for them."""
    torch.manual_seed(0)
    layer, x = nn.Linear(128, 24).eval(), torch.randn(rows, 128)
    p = {"name": "int4_weights", "group_size": 32, "symmetric": symmetric, "scales": "float16"}
    form = Int4Half(32, symmetric)
    packed = form.pack(layer.weight.detach())
    assert {t.dtype for t in packed[1:]} == {torch.float16}
    there = form.unpack(packed, torch.float32)
    step = packed[1].float().abs().amax()
    assert (there - layer.weight).abs().max() <= step * (1.01 if symmetric else 0.51) + 1e-6
    want = torch.nn.functional.linear(x, there, layer.bias)
    for lowering in ("eager", "aten"):
        torch._dynamo.reset()
        with torch.no_grad():
            got = torch.compile(layer, backend="accelpass", options={"lowering": lowering, "passes": [p]})(x)
        torch.testing.assert_close(got, want, rtol=2e-2, atol=2e-2 if rows > 4 else 1e-5)


def test_int4_weights_with_a_search():
    torch.manual_seed(0)
    layer = nn.Linear(64, 32).eval()
    p = {"name": "int4_weights", "group_size": 32, "search": True}
    form = Int4(32)
    scale, zero = searched_grid(form, form.grouped(layer.weight.detach()))
    there = form.meant(form.codes(form.grouped(layer.weight.detach()), scale, zero), scale, zero).flatten(-2)
    x = torch.randn(3, 64)
    with torch.no_grad():
        got = torch.compile(layer, backend="accelpass", options={"lowering": "eager", "passes": [p]})(x)
        torch.testing.assert_close(got, torch.nn.functional.linear(x, there, layer.bias), rtol=1e-4, atol=1e-5)
    with pytest.raises(OptionError, match="a fit of its own"):
        make({"name": "hqq", "search": True})
