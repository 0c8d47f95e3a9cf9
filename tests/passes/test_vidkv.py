"""VidKV's keys and values in packed bits against an eager oracle from its card; its bytes, spans, and what it refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import accelpass
from accelpass import KVCache
from accelpass.ir.errors import OptionError
from accelpass.ir.kv.banks import Floats
from accelpass.ir.kv.storage import Held
from accelpass.passes.kv_cache.storage.spectrum import SpectrumBlocks, SpectrumSpan, spectrum
from accelpass.passes.kv_cache.storage.token_groups import Signs, Ternary, TwoBits
from accelpass.passes.kv_cache.vidkv import VidKV
from tests.passes.kv_truth import Dense, Oracle, assisted_like_plain, attending, fed, mixed, probabilities
from tests.passes.test_kv_methods import CAPACITY, compiled, llama, tokens
from tests.passes.test_kv_storage import Layer
from tests.sweep import examples, sweep

# The card's formulas; scales as they are stored, in float16.


def half(x: Tensor) -> Tensor:
    return x.half().float()


def grp(x: Tensor, g: int) -> Tensor:
    return x.float().unflatten(2, (-1, g))


def q2(x: Tensor, g: int) -> Tensor:
    y = grp(x, g)
    lo = half(y.amin(3, True))
    a = half((y.amax(3, True) - lo) / 3)
    return (((y - lo) / a.clamp_min(1e-8)).round().clamp(0, 3) * a + lo).reshape(x.shape)


def q1(x: Tensor, g: int) -> Tensor:
    y = grp(x, g)
    return (torch.where(y >= 0, 1.0, -1.0) * half(y.abs().mean(3, True))).reshape(x.shape)


def q158(x: Tensor, g: int) -> Tensor:
    y = grp(x, g)
    m = half(y.abs().mean(3, True))
    return (y.sign() * (y.abs() >= 0.5 * m) * m).reshape(x.shape)


def hard_channels(k: Tensor, bits: float) -> Tensor:
    """Of one sequence ``(1, heads, tokens, d)``."""
    r = k.amax((0, 1, 2)) - k.amin((0, 1, 2))
    hard = torch.zeros(k.shape[-1], dtype=torch.bool)
    hard[r.topk(int(k.shape[-1] * (bits - 1))).indices] = True
    return hard


def vidkv_key(k: Tensor, hard: Tensor, g: int) -> Tensor:
    out = torch.empty_like(k, dtype=torch.float32)
    out[..., hard] = q2(k[..., hard], g)
    if (~hard).any():
        y = torch.fft.fft(k[..., ~hard].float(), dim=-1)
        x = torch.cat([y.real, y.imag], -1)
        x[x.abs() < 1e-5] = 0  # the imaginary parts that are none but for rounding
        n = x.shape[-1] // 2
        code = torch.where(grp(x, g) >= 0, 1.0, -1.0)
        code[..., n + n // 2 + 1 :] = -code[..., n + 1 : n + (n + 1) // 2].flip(
            -1
        )  # of a conjugate pair the first decides
        x = (code * half(grp(x, g).abs().mean(3, True))).reshape(x.shape)
        out[..., ~hard] = torch.fft.ifft(torch.complex(x[..., :n], x[..., n:]), dim=-1).real
    return out


class VidOracle(Oracle):
    """``whole``: which tokens of one sequence are rounded, given how many there were before; values by ``safe`` in two bits."""

    def __init__(self, bits: float, g: int, window: int, span: tuple[int, int] | None = None, values: Any = q158):
        super().__init__()
        self.bits, self.g, self.window, self.span, self.values = bits, g, window, span, values

    def attend(self, layer, q, k, v, scale, mask, index):
        past = k.shape[2] - q.shape[2]
        if "hard" not in layer:
            seen = k if self.span is None else k[:, :, slice(*self.span)]
            layer["hard"] = [hard_channels(k1, self.bits) for k1 in seen.split(1)]
            return mixed(probabilities(q, k, scale, mask), v)
        low, high = (0, past // self.window * self.window) if self.span is None else self.span
        keys, values = k.clone(), v.clone()
        if high > low:
            for b, hard in enumerate(layer["hard"]):
                keys[b, :, low:high] = vidkv_key(k[b : b + 1, :, low:high], hard, self.g)[0]
            values[:, :, low:high] = self.values(v[:, :, low:high], self.g)
        return mixed(probabilities(q, keys, scale, mask), values)


@settings(max_examples=examples(20), deadline=None)
@given(st.integers(1, 70), st.integers(0, 2**31))
def test_the_spectrum_is_the_fourier_transform(n, seed):
    x = torch.randn(3, n, generator=torch.Generator().manual_seed(seed))
    there, back = spectrum(n, x)
    y = torch.fft.fft(x.double())
    want = torch.cat([y.real[:, : n // 2 + 1], y.imag[:, 1 : (n + 1) // 2]], 1).float()
    assert there.shape == back.shape == (n, n), "as many numbers as there were"
    assert torch.allclose(x @ there, want, atol=1e-3)
    assert torch.allclose(x @ there @ back, x, atol=1e-4)


@settings(max_examples=examples(20), deadline=None)
@given(st.sampled_from([TwoBits, Signs, Ternary]), st.integers(1, 33), st.integers(1, 3), st.integers(0, 2**31))
def test_packed_numbers(kind, columns, groups, seed):
    """What is read is what the formula gives, from as few bytes as are promised; tokens that do not count change nothing."""
    x = torch.randn(2, 2, groups * 8, columns, generator=torch.Generator().manual_seed(seed))
    codec, oracle = kind(columns, 8), {TwoBits: q2, Signs: q1, Ternary: q158}[kind]
    made = codec.encode(x.unflatten(2, (-1, 8)))
    held: Held = {f"x.{n}": t.flatten(2, 3) if n == "codes" else t for n, t in made.items()}
    sizes = {s.name: s.shape for s in codec.states("x", 2, groups * 8)}
    assert {n: tuple(t.shape[1:]) for n, t in held.items()} == {n.removeprefix("kv."): s for n, s in sizes.items()}
    assert held["x.codes"].shape[-1] == -(-columns // {TwoBits: 4, Signs: 8, Ternary: 5}[kind])
    assert torch.allclose(codec.decode(held, "x"), oracle(x, 8), atol=1e-5)
    rows = torch.arange(8) < 5
    some, wild = x[:, :, :8].clone(), x[:, :, :8].clone()
    wild[:, :, ~rows] = 1000
    few = codec.encode(wild.unflatten(2, (1, -1)), rows[:, None])
    held = {f"x.{n}": t.flatten(2, 3) if n == "codes" else t for n, t in few.items()}
    want = {TwoBits: q2, Signs: q1, Ternary: q158}[kind](some[:, :, :5], 5)
    assert torch.allclose(codec.decode(held, "x")[:, :, :5], want, atol=1e-5), "tokens that do not count change nothing"


SHAPES = st.tuples(
    st.integers(1, 2), st.sampled_from([1, 2]), st.sampled_from([8, 16, 20]), st.integers(1, 40),
    st.lists(st.sampled_from([1, 1, 1, 5]), min_size=1, max_size=14), st.integers(0, 2**31),
)  # fmt: skip


@settings(max_examples=examples(12), deadline=None)
@given(SHAPES, st.sampled_from([1.25, 1.5, 2.0]), st.sampled_from([8, 16]))
def test_all_tokens(shape, bits, window):
    batch, groups, width, prompt, more, seed = shape
    layer = Layer(SpectrumBlocks(bits, 1.58, 4, window), Floats(), batch, groups, width, prompt + sum(more) + 3, seed)
    oracle, held = VidOracle(bits, 4, window), dict[str, Any]()
    for count in (prompt, *more):
        q, out = layer.feed(count)
        want = oracle.attend(held, q, layer.k, layer.v, layer.scale, None, 0)
        assert torch.allclose(out, want, atol=1e-3), f"after {layer.k.shape[2]} tokens"


@settings(max_examples=examples(10), deadline=None)
@given(SHAPES, st.integers(0, 7), st.integers(1, 3), st.sampled_from([1.58, 2.0]))
def test_a_span(shape, start, blocks, value_bits):
    batch, groups, width, after, more, seed = shape
    length = 4 * blocks
    store = SpectrumSpan(1.5, value_bits, 4, start=start, length=length)
    layer = Layer(store, Floats(), batch, groups, width, start + length + after + sum(more) + 3, seed)
    oracle, held = VidOracle(1.5, 4, 4, (start, start + length), q158 if value_bits < 2 else q2), dict[str, Any]()
    for count in (start + length + after, *more):
        q, out = layer.feed(count)
        want = oracle.attend(held, q, layer.k, layer.v, layer.scale, None, 0)
        assert torch.allclose(out, want, atol=1e-3)


def model_error(options: dict[str, Any], oracle: Oracle, pieces: list[Tensor], lowering: str = "eager") -> float:
    model = llama()
    torch._dynamo.reset()
    fast = compiled(model, {"name": "vidkv", **options}, lowering=lowering)
    got = fed(fast, KVCache(model, 96, len(pieces[0])), pieces)
    with attending(model, oracle) as dense:
        want = fed(model, dense, pieces)
    return float((got - want).abs().max() / want.abs().max())


@pytest.mark.parametrize("lowering", sweep("eager", "inductor"))
def test_in_a_model(lowering):
    """A sign of a number near 0 may fall to the other side when sums are taken in another order."""
    pieces = tokens(2, 21, *[1] * 5, 9, 1, 1)
    assert model_error({"block": 4, "window": 8}, VidOracle(1.5, 4, 8), pieces, lowering) < 5e-2


@pytest.mark.slow
def test_protected_tokens():
    """Those whose embedding agrees most with the text's have values in two bits."""
    pieces, model = tokens(1, 30, 1, 1), llama()
    x = model.model.embed_tokens(pieces[0])[0].detach()
    text = torch.cat([x[:3], x[23:]]).mean(0)
    best = set((x[3:19] @ text).topk(8).indices.tolist())
    order = sorted(best), [n for n in range(16) if n not in best]

    def values(v: Tensor, g: int) -> Tensor:
        out = torch.empty_like(v)
        out[:, :, order[0]], out[:, :, order[1]] = q2(v[:, :, order[0]], g), q158(v[:, :, order[1]], g)
        return out

    oracle = VidOracle(1.5, 8, 8, (3, 19), values)
    options = {"block": 8, "window": 8, "span": (3, 23), "protect": 0.6}
    assert model_error(options, oracle, pieces) < 5e-2
    assert model_error({**options, "protect": 1.0}, VidOracle(1.5, 8, 8, (3, 19), q2), pieces) < 5e-2


@pytest.mark.slow
@pytest.mark.parametrize("options", sweep({"span": (2, 14), "protect": 0.3}, {}))
def test_padding_is_in_no_group(options):
    model, pieces = llama(), tokens(2, 22, 1, 1, 1)
    padding = torch.ones(2, 22, dtype=torch.long)
    padding[0, :4] = 0
    torch._dynamo.reset()
    fast = compiled(model, {"name": "vidkv", "block": 4, "window": 8, **options})
    got = fed(fast, KVCache(model, CAPACITY, 2), pieces, padding)[:, 0]
    alone = [pieces[0][:1, 4:], *(p[:1] for p in pieces[1:])]
    want = fed(fast, KVCache(model, CAPACITY, 1), alone)[:, 0]
    if "span" in options:
        assert torch.allclose(got, want, atol=1e-2)
    else:  # groups begin where the cache does, so that other tokens share one
        wild = torch.where(padding == 0, (pieces[0] + 7) % 90, pieces[0])
        again = fed(fast, KVCache(model, CAPACITY, 2), [wild, *pieces[1:]], padding)[:, 0]
        assert torch.allclose(got, again, atol=1e-5), "what stands in the padding changes nothing"


def test_equals_dense_within_the_window():
    assert model_error({"window": 1 << 20}, Dense(), tokens(2, 15, 1, 1, 8, 1, 1)) < 1e-5


@pytest.mark.slow
def test_the_bytes_are_few():
    """Codes of 1.5 and 1.6 bits, and float16 scales of each channel and 32 tokens: 0.5 + 0.25 x 2 + 0.5 bits more on average."""
    model = llama(head_dim=80, hidden=80)
    torch._dynamo.reset()
    cache = KVCache(model, 1024, 1)
    fed(compiled(model, {"name": "vidkv", "window": 32}), cache, tokens(1, 60, 1))
    codes = {n.removeprefix("kv."): t for _, n, t in cache.buffers()}
    rows = 2 * 1024 * 80
    held = sum(t.numel() for n, t in codes.items() if n.endswith(".codes"))
    assert held == rows * (1.5 + 1.6) / 8
    assert cache.nbytes() < cache.dense_nbytes() * (1.5 + 1.6 + 16 / 32 * 2.5 + 2) / 64 * 1.02
    assert all(t.dtype in (torch.uint8, torch.float16, torch.int16, torch.int64, torch.float32) for t in codes.values())


@pytest.mark.slow
@pytest.mark.parametrize("options", [{"span": (1, 17)}, {}])
def test_two_prompts_and_an_assistant(options):
    model = llama()
    passes = [{"name": "vidkv", "block": 8, "window": 8, **options}]
    assert assisted_like_plain(model, passes=passes)


@pytest.mark.slow
def test_a_span_that_is_not_whole_groups():
    model = llama()
    torch._dynamo.reset()
    fast = compiled(model, {"name": "vidkv", "block": 8, "window": 8, "span": (2, 21)})
    fed(fast, KVCache(model, CAPACITY), tokens(1, 30, 1))
    assert "3 fill no group of 8 and stay as they are" in str(accelpass.explain(fast))


def test_a_prompt_that_ends_within_its_span():
    model = llama()
    torch._dynamo.reset()
    fast = compiled(model, {"name": "vidkv", "block": 8, "window": 8, "span": (2, 18)})
    with pytest.raises(Exception, match="ends before its visual span"):
        fed(fast, KVCache(model, CAPACITY), tokens(1, 12))


def test_a_span_beyond_the_cache():
    model = llama()
    with pytest.raises(Exception, match="room for"):
        fed(compiled(model, {"name": "vidkv", "span": (20, 84)}), KVCache(model, CAPACITY), tokens(1, 12))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"bits": 1.0}, "above 1"),
        ({"bits": 3.0}, "at most 2"),
        ({"value_bits": 4.0}, "1.58 or 2"),
        ({"window": 100}, "a multiple of block=32"),
        ({"block": 0}, "1 or more"),
        ({"span": (5, 30)}, "32 tokens or more"),
        ({"span": (-3, 60)}, "32 tokens or more"),
        ({"protect": 0.2}, "0 without span"),
        ({"span": (0, 64), "protect": 1.5}, "between 0 and 1"),
    ],
)
def test_options_out_of_range(options, said):
    with pytest.raises(OptionError, match=said):
        VidKV(**options)
