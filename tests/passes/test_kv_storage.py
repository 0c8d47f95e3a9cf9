"""Storages of the KV methods, run as they are on random keys and values, against their eager oracles."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from accelpass.ir.attention import AttentionSpec, Step, attend
from accelpass.ir.inductor_private import contracts_by_name
from accelpass.ir.kv.banks import Floats, Quantized, RowFormat
from accelpass.ir.kv.rotated import Rotated, hadamard
from accelpass.ir.kv.rows import BITS, dequantize_rows, quantize_rows, row_bytes, to_half_precision
from accelpass.ir.kv.storage import KERNELS, Layout, New, Query, Storage
from accelpass.passes.kv_cache.kv_window import SinksAndNewest
from accelpass.passes.kv_cache.mikv import Tiers
from accelpass.passes.kv_cache.storage.heavy_hitters import HeavyHitters
from tests.passes import kv_truth

MASKED = (Step("keep", extra=0, value="-inf"), Step("safe_softmax"))
SHAPES = st.tuples(
    st.integers(1, 2), st.sampled_from([1, 2, 3, 8]), st.sampled_from([8, 16, 64, 80, 96]), st.integers(1, 40),
    st.lists(st.sampled_from([1, 1, 1, 1, 5]), min_size=1, max_size=12), st.integers(0, 2**31),
)  # fmt: skip


class Layer:
    """One layer of a cache, without a model: its buffers, and the stream of queries, keys and values so far."""

    def __init__(
        self, storage: Storage, format: RowFormat, batch: int, groups: int, width: int, capacity: int, seed: int
    ):
        self.storage, self.format, self.groups = storage, format, groups
        self.layout = Layout(2, groups, width, width, torch.float32, capacity)
        self.scale = width**-0.5
        self.random = torch.Generator().manual_seed(seed)
        self.batch, self.count = batch, torch.zeros(batch, dtype=torch.int64)
        specs = storage.states(self.layout, format)
        self.held = {s.name.removeprefix("kv."): s.start(self.count) for s in specs}
        self.k = self.v = torch.zeros(batch, 2, 0, width)

    def feed(self, tokens: int) -> tuple[Any, torch.Tensor]:
        """Store ``tokens`` more; returns the queries and the storage's output."""
        q = torch.randn(self.batch, 2 * self.groups, tokens, self.layout.width, generator=self.random) * 2
        k, v = (torch.randn(self.batch, 2, tokens, self.layout.width, generator=self.random) for _ in "kv")
        self.k, self.v = torch.cat([self.k, k], 2), torch.cat([self.v, v], 2)
        before = int(self.count[0])
        new = New(q, k, v, self.count, {})
        p = kv_truth.probabilities(q, self.k, self.scale, None)
        if before == 0:
            spec = AttentionSpec(groups=self.groups, scale=self.scale, causal=True, statistics=self.storage.wants)
            _, new.statistics = attend(q, k, v, [], spec)
            self.storage.fill(self.held, new, self.layout, self.format)
            out = kv_truth.mixed(p, self.v)
        else:
            rows = torch.arange(before, before + tokens)[:, None]
            mask = (torch.arange(self.layout.capacity)[None] <= rows)[None, None]
            spec = AttentionSpec(groups=self.groups, scale=self.scale, steps=MASKED, bias="causal")
            query = Query(q, [mask], spec, self.layout)
            out = self.storage.extend(self.held, new, query, self.layout, self.format)
        self.count += tokens
        return q, out


def follows(layer: Layer, oracle: Any, counts: Iterable[int]) -> None:
    """Whether a layer that evicts attends as its oracle does, and keeps the same tokens, call by call."""
    remembered: dict[str, Any] = {}
    for count in counts:
        q, out = layer.feed(count)
        want = oracle.attend(remembered, q, layer.k, layer.v, layer.scale, None, 0)
        positions = layer.held["positions"]
        for b in range(positions.shape[0]):
            for h in range(positions.shape[1]):
                stored = sorted(positions[b, h][positions[b, h] >= 0].tolist())
                assert stored == remembered["alive"][b, h].nonzero()[:, 0].tolist(), f"after {layer.k.shape[2]} tokens"
        assert torch.allclose(out, want, atol=2e-4)


def against(storage: Storage, oracle: kv_truth.Oracle, shape: Any, format: RowFormat | None = None) -> None:
    batch, groups, width, prompt, more, seed = shape
    layer = Layer(storage, format or Floats(), batch, groups, width, prompt + sum(more) + 3, seed)
    remembered: dict[str, Any] = {}
    for tokens in (prompt, *more):
        q, out = layer.feed(tokens)
        want = oracle.attend(remembered, q, layer.k, layer.v, layer.scale, None, 0)
        assert torch.allclose(out, want, atol=2e-4), f"after {layer.k.shape[2]} tokens"
        positions = layer.held["positions"]
        assert int((positions >= 0).sum(-1).max()) <= remembered["limit"], "never more than the budget"
        for b in range(batch):
            for h in range(2):
                stored = sorted(positions[b, h][positions[b, h] >= 0].tolist())
                assert stored == remembered["alive"][b, h].nonzero()[:, 0].tolist()
                if 5 not in more:  # a larger budget later does not bring back what was evicted
                    newest = range(max(0, layer.k.shape[2] - remembered["recent"]), layer.k.shape[2])
                    assert set(newest) <= set(stored), "the newest tokens are kept"


@settings(max_examples=30, deadline=None)
@given(SHAPES, st.sampled_from([0.2, 0.5, 0.9, 1.0]), st.sampled_from([0.25, 0.5, 1.0]))
def test_h2o(shape, budget, recent):
    heavy, newest = budget * (1 - recent), budget * recent
    oracle = kv_truth.H2O(heavy, newest)
    if budget == 1.0:
        oracle = kv_truth.H2O(1e6, newest)
    against(HeavyHitters(heavy, newest), oracle, shape)


@settings(max_examples=20, deadline=None)
@given(SHAPES, st.integers(1, 30), st.integers(1, 9), st.booleans())
def test_h2o_of_a_number_of_tokens(shape, heavy, newest, mean):
    """Prompts that are shorter than it, and longer; a cache that is. Compared by sums and by means."""
    against(HeavyHitters(heavy, newest, mean=mean), kv_truth.H2O(heavy, newest, mean=mean), shape)


@settings(max_examples=30, deadline=None)
@given(SHAPES, st.sampled_from([0.2, 0.5]), st.sampled_from([2, 3, 4]))
def test_mikv(shape, budget, bits):
    against(Tiers(budget / 2, budget / 2, bits), kv_truth.MiKV(budget / 2, budget / 2, bits), shape)


@settings(max_examples=15, deadline=None)
@given(SHAPES, st.sampled_from([0.2, 0.5]))
def test_mikv_forgets_nothing(shape, budget):
    batch, groups, width, prompt, more, seed = shape
    layer = Layer(Tiers(budget / 2, budget / 2, 4), Floats(), batch, groups, width, prompt + sum(more) + 3, seed)
    before = None
    for tokens in (prompt, *more):
        layer.feed(tokens)
        kept, low = layer.held["positions"], layer.held["is_retained"]
        here = torch.zeros_like(low).scatter(-1, kept.long().clamp_min(0), kept >= 0)
        here[..., 0] = (kept == 0).any(-1)
        assert not (here & low).any(), "no token is in both tiers"
        assert ((here | low).sum(-1) == layer.k.shape[2]).all(), "no token is in none"
        assert before is None or (low | ~before).all(), "demotion is for good"
        before = low.clone()


@settings(max_examples=20, deadline=None)
@given(SHAPES, st.sampled_from([0.3, 0.6, 4, 12]), st.integers(0, 3))
def test_window_keeps_sinks_and_newest(shape, budget, sinks):
    batch, groups, width, prompt, more, seed = shape
    layer = Layer(SinksAndNewest(sinks, budget), Floats(), batch, groups, width, prompt + sum(more) + 3, seed)
    limit = 0
    for index, tokens in enumerate((prompt, *more)):
        layer.feed(tokens)
        total = layer.k.shape[2]
        if index == 0 or tokens > 1:
            limit = max(sinks + 1, int(budget * total + 1e-9)) if isinstance(budget, float) else budget
        positions = layer.held["positions"][0, 0]
        stored = set(positions[positions >= 0].tolist())
        if len(stored) == limit:
            assert set(range(min(sinks, total))) <= stored and set(range(total - (limit - sinks), total)) <= stored
        assert len(stored) <= limit


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(BITS),
    st.sampled_from([64, 80, 96, 128, 256]),
    st.integers(1, 5),
    st.floats(1e-3, 1e3),
    st.integers(0, 2**31),
)
def test_rows(bits, width, rows, size, seed):
    x = torch.randn(2, 3, rows, width, generator=torch.Generator().manual_seed(seed)) * size
    codes, step, low = quantize_rows(x, bits, width // 2)
    assert codes.shape[-1] == row_bytes(width, bits) and codes.dtype == torch.uint8
    back = dequantize_rows(codes, step, low, bits, width // 2)
    assert torch.allclose(back, kv_truth.quant_rows(x, bits, width // 2), atol=1e-6 * size)


def of_all_sizes(n: int = 4096) -> torch.Tensor:
    """Floats from below float16's smallest to above its largest."""
    draw = torch.Generator().manual_seed(0)
    powers = torch.randint(-9, 6, (n,), generator=draw)
    return torch.cat([torch.randn(n, generator=draw) * 10.0**powers, torch.tensor([0.0, 65504.0, -65519.0, 1e35])])


def as_stored(x: torch.Tensor) -> torch.Tensor:
    return x.half().float().clamp(-65504.0, 65504.0)


def test_steps_are_rounded_as_they_are_stored():
    x = of_all_sizes()
    assert torch.equal(to_half_precision(x), as_stored(x))


@pytest.mark.slow
@pytest.mark.parametrize("rows", [1, 3, 200])
def test_compilers_that_contract_round_alike(rows):
    """Products and sums that become one operation must not undo the rounding, whatever the loop: rows would depend on the call's size."""
    name, x = contracts_by_name(), of_all_sizes()
    chosen = {name: "fast"} if name else {}
    torch._dynamo.reset()
    rounded = torch.compile(to_half_precision, dynamic=False, options=chosen)
    encoded = torch.compile(lambda y: quantize_rows(y, 4, 8), dynamic=False, options=chosen)
    assert torch.equal(rounded(x[-17 * rows :]), as_stored(x[-17 * rows :]))
    y = torch.randn(1, 2, rows, 16, generator=torch.Generator().manual_seed(rows))
    for made, want in zip(encoded(y), quantize_rows(y, 4, 8), strict=True):
        assert torch.equal(made, want)


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from([None, *BITS]), st.sampled_from([64, 80, 96, 128, 256]), st.integers(1, 8), st.integers(1, 9),
    st.integers(0, 2**31),
)  # fmt: skip
def test_products_with_stored_rows(bits, width, groups, rows, seed):
    random = torch.Generator().manual_seed(seed)
    format: RowFormat = Floats() if bits is None else Quantized(bits)
    x = torch.randn(2, 3, rows, width, generator=random)
    q, weights = (torch.randn(2, 3, groups, n, generator=random) for n in (width, rows))
    stored = format.encode(x)
    whole = format.decode(stored, torch.float32)
    assert torch.allclose(format.scores(q, stored), q @ whole.transpose(-1, -2), atol=1e-3)
    assert torch.allclose(format.mixed(weights, stored), weights @ whole, atol=1e-3)


@settings(max_examples=20, deadline=None)
@given(
    st.sampled_from(BITS), st.sampled_from([8, 64, 128]), st.integers(1, 4), st.integers(1, 9), st.integers(0, 2**31)
)
def test_products_with_turned_rows(bits, width, groups, rows, seed):
    """Against a Hadamard matrix by its definition, and rounding of the turned rows."""
    random = torch.Generator().manual_seed(seed)
    matrix = torch.ones(1, 1)
    while len(matrix) < width:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    matrix = matrix / width**0.5
    x = torch.randn(2, 3, rows, width, generator=random)
    assert torch.allclose(hadamard(x), x @ matrix, atol=1e-4) and torch.allclose(hadamard(hadamard(x)), x, atol=1e-4)
    format = Rotated(bits)
    stored = format.encode(x)
    held = kv_truth.quant_rows(x @ matrix, bits, width // 2)
    whole = format.decode(stored, torch.float32)
    # Of the turned rows, where a code is one number; turned back it is a whole row.
    assert float(((whole @ matrix - held).abs() > 1e-3).float().mean()) < 0.05, "but for codes beside a half"
    q, weights = (torch.randn(2, 3, groups, n, generator=random) for n in (width, rows))
    assert torch.allclose(format.scores(q, stored), q @ whole.transpose(-1, -2), atol=2e-3)
    assert torch.allclose(format.mixed(weights, stored), weights @ whole, atol=2e-3)


def test_turning_makes_outlier_channels_cost_less():
    x = torch.randn(1, 2, 200, 64, generator=torch.Generator().manual_seed(0))
    x[..., 5] *= 30
    lost = [float((f.decode(f.encode(x), torch.float32) - x).pow(2).mean()) for f in (Quantized(3), Rotated(3))]
    assert lost[1] < 0.5 * lost[0]


@pytest.mark.parametrize("storage", [HeavyHitters(0.2, 0.2), Tiers(0.2, 0.2, 2)], ids=["h2o", "mikv"])
def test_the_kernel_in_place_of_loops(storage, monkeypatch):
    """The composition around the CUDA kernel, with the kernel's reference in its place."""
    from accelpass.backends.kernels.cuda import kv_decode
    from accelpass.ir.kv.decode.reference import decode_reference

    stand_in = SimpleNamespace(kv_decode=decode_reference)
    monkeypatch.setitem(sys.modules, "accelpass.backends.kernels.triton.kv_attention_ops", stand_in)
    layers = [Layer(storage, Floats(), 2, 3, 64, 40, 7) for _ in range(2)]
    for tokens in (20, 1, 1, 1):
        _, want = layers[0].feed(tokens)
        with monkeypatch.context() as here:
            here.setitem(KERNELS, "cpu", kv_decode.attend_with_kernel)
            _, got = layers[1].feed(tokens)
        assert torch.allclose(got, want, atol=1e-5)
        assert torch.equal(layers[0].held["positions"], layers[1].held["positions"])


def test_a_method_from_elsewhere():
    """The benchmark's own pass, as a third party would write one: given as an object, and never above its budget."""
    from accelpass import KVCache
    from benchmarks.random_eviction import RandomEviction
    from tests.passes.test_kv_methods import compiled, llama, tokens

    model = llama()
    cache = KVCache(model, 40)
    kv_truth.fed(compiled(model, RandomEviction(budget=0.25)), cache, tokens(1, 24, 1, 1))
    positions = [t for _, name, t in cache.buffers() if name == "kv.positions"]
    assert positions and all(int((t >= 0).sum(-1).max()) <= 6 for t in positions)
