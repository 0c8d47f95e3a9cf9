"""Cases that run the kernels of `kv_attention` in Triton's interpreter. `test_triton_kv_attention` runs this file.

The tolerance, per query head, against `decode_reference` in float64. A logit is off by `delta`: a sum of D products in
float32, and, where queries have 16 bits and keys are packed, one rounding of either operand to float16. An error of
delta in every logit multiplies each probability by at most exp(2 * delta), and moves the log-sum-exp by delta. The
output adds a rounding of the probabilities to the value's dtype, and of packed values to float16. `NOISE` stands for
the float32 roundings of exp, log, the running sum and the merge, of which there are a few per key.
"""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from accelpass.backends.kernels.triton import kv_attention_ops as ops
from accelpass.backends.kernels.triton.kv_attention import INTERPRETED
from accelpass.ir.kv.decode.attention import WANT, Decoded, PackedRows, Store, merge
from accelpass.ir.kv.decode.reference import decode_reference
from accelpass.ir.kv.rows import dequantize_rows, quantize_rows
from tests.backends.tolerance import within
from tests.sweep import examples

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
WIDTHS = (64, 80, 96, 128, 256)
BITS = (0, 2, 3, 4, 8)  # 0: float
quick = settings(max_examples=examples(5), deadline=None, derandomize=True, database=None)
HALF_EPS = 2.0**-11  # of float16
U = 2.0**-24


def store(x: Tensor, bits: int, group: int, dtype: torch.dtype) -> Store:
    return PackedRows(*quantize_rows(x, bits, group), bits) if bits else x.to(dtype)


def case(
    seed: int,
    *,
    dtype: torch.dtype = torch.float32,
    batch: int = 1,
    kv_heads: int = 2,
    ratio: int = 2,
    slots: int = 40,
    width: int = 64,
    out_width: int = 64,
    bits: tuple[int, int] = (0, 0),
    groups: tuple[int, int] = (16, 16),
    rows: int | None = None,
    valid: bool = False,
    bias: int = 0,
) -> dict[str, Any]:
    """Arguments of `kv_decode`. bias: how many heads it has, 0 for none."""
    r = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=r)

    found: dict[str, Any] = {
        "q": normal(batch, kv_heads * ratio, width).to(dtype),
        "k": store(normal(batch, kv_heads, slots, width), bits[0], groups[0], dtype),
        "v": store(normal(batch, kv_heads, slots, out_width) + 0.5, bits[1], groups[1], dtype),
        "scale": width**-0.5,
    }
    if rows is not None:
        found["rows"] = torch.randint(-slots // 4 - 1, slots + 2, (batch, kv_heads, rows), generator=r)
    if valid:
        found["valid"] = torch.rand(batch, kv_heads, slots, generator=r) < 0.7
    if bias:
        found["bias"] = normal(batch, bias, slots).masked_fill(
            torch.rand(batch, bias, slots, generator=r) < 0.2, -torch.inf
        )
    return found


def magnitude(x: Store) -> Tensor:
    """Of the terms that a row is the sum of, float64 (B, Hkv, N, D)."""
    if isinstance(x, Tensor):
        return x.double().abs()
    steps, lows = (part.double().abs().repeat_interleave(x.group, -1) for part in (x.step, x.low))
    return steps * (2**x.bits - 1) + lows


def check(arguments: dict[str, Any], splits: int | None = None, dtype: torch.dtype | None = torch.float32) -> Decoded:
    """Hold every result of the kernels to the reference."""
    q, k, v, scale, bias = (arguments.get(name) for name in ("q", "k", "v", "scale", "bias"))
    rows, valid = arguments.get("rows"), arguments.get("valid")
    got = Decoded(*ops.launch(q, k, v, scale, rows, valid, bias, True, True, dtype, splits))
    exact = {**arguments, "q": q.double()}
    expected = decode_reference(**exact, want=WANT)
    # The same weights over magnitudes of values, and the largest sum of magnitudes that any logit has.
    spread = decode_reference(**{**exact, "v": magnitude(v)}).out
    heads = q.shape[1] // magnitude(k).shape[1]
    queries = q.double().abs().unflatten(1, (-1, heads))
    terms = (queries @ magnitude(k).mT * scale).flatten(1, 2)
    if bias is not None:
        added = bias.double().abs().masked_fill(bias.isinf(), 0.0)
        terms = terms + added.repeat_interleave(q.shape[1] // bias.shape[1], 1)
    entries = got.logits.shape[2]
    largest = terms.amax(-1) if terms.shape[-1] else terms.new_zeros(terms.shape[:2])
    halves = q.dtype != torch.float32
    packed_k, packed_v = isinstance(k, PackedRows), isinstance(v, PackedRows)
    delta = largest * ((2.5 * HALF_EPS if halves and packed_k else 0.0) + (q.shape[2] + 16) * U) + 2.0**-20
    noise = (entries + 32) * U
    tilt = torch.expm1(2 * delta + noise)
    rounded = 0.0
    if halves:
        rounded = torch.finfo(v.dtype).eps if not packed_v else 2.5 * HALF_EPS  # a whole eps: the interpreter truncates
    eps = torch.finfo(got.out.dtype).eps
    bound = (tilt + rounded + noise).unsqueeze(-1) * spread + eps * expected.out.abs() + 1e-6
    within(got.out, expected.out, bound)
    within(got.lse, expected.lse, delta + noise + 4 * U * expected.lse.abs())
    per_group = delta.unflatten(1, (-1, heads)).sum(2, keepdim=True)
    within(got.logits, expected.logits, per_group.expand_as(expected.logits))
    tilts = tilt.unflatten(1, (-1, heads)).amax(2, keepdim=True)
    within(got.mass, expected.mass, tilts * expected.mass + heads * 2.0**-40)
    assert got.out.dtype == (dtype or q.dtype)
    return got


def test_the_interpreter_is_in_effect():
    assert INTERPRETED, "run test_triton_kv_attention, which sets TRITON_INTERPRET=1"


@quick
@given(st.data())
def test_everything_at_once(data):
    draw = data.draw
    batch, kv_heads, ratio = (draw(st.integers(1, 2)), draw(st.integers(1, 2)), draw(st.integers(1, 8)))
    width, out_width = draw(st.sampled_from(WIDTHS)), draw(st.sampled_from(WIDTHS))
    divisors = [[g for g in (8, 16, 20, 32, 48, 64, 128) if w % g == 0] for w in (width, out_width)]
    arguments = case(
        draw(st.integers(0, 2**31)),
        dtype=draw(st.sampled_from(DTYPES)),
        batch=batch,
        kv_heads=kv_heads,
        ratio=ratio,
        slots=draw(st.integers(0, 70)),
        width=width,
        out_width=out_width,
        bits=(draw(st.sampled_from(BITS)), draw(st.sampled_from(BITS))),
        groups=(draw(st.sampled_from(divisors[0])), draw(st.sampled_from(divisors[1]))),
        rows=draw(st.none() | st.integers(0, 60)),
        valid=draw(st.booleans()),
        bias=draw(st.sampled_from((0, 1, kv_heads, kv_heads * ratio))),
    )
    check(arguments, draw(st.sampled_from((None, 1, 2, 3))), draw(st.sampled_from((None, torch.float32))))


@pytest.mark.parametrize(
    ("dtype", "width"), [*((torch.bfloat16, width) for width in WIDTHS), (torch.float32, 80), (torch.float32, 128)]
)
@pytest.mark.parametrize("bits", BITS)
def test_every_width_and_format(width, bits, dtype):
    check(case(width, dtype=dtype, kv_heads=1, ratio=3, slots=11, width=width, out_width=width, bits=(bits, bits)))


@pytest.mark.parametrize(
    ("dtype", "ratio"),
    [*((torch.float16, ratio) for ratio in (*range(1, 9), 20)), (torch.float32, 1), (torch.float32, 3)],
)
def test_every_number_of_heads_per_key(ratio, dtype):
    heads = 2 * ratio
    check(case(ratio, dtype=dtype, ratio=ratio, slots=37, bits=(4, 2), valid=True, bias=heads), splits=2)


@pytest.mark.parametrize("width", [16, 80])
@pytest.mark.parametrize("bits", BITS[1:])
@pytest.mark.parametrize("dtype", DTYPES[:2])
def test_a_single_key_gives_its_value_bit_for_bit(bits, width, dtype):
    """Halves up to 132 are exact in float16 and float32, in which packed rows are multiplied: no tolerance at all."""
    arguments = case(bits, dtype=dtype, slots=9, width=width, out_width=width, bits=(bits, bits), groups=(8, 8))
    arguments["dtype"] = torch.float32
    for part in (arguments["k"], arguments["v"]):
        part.step.fill_(0.5)
        part.low.copy_(torch.randint(-4, 5, part.low.shape))
    expected = decode_reference(**arguments, rows=torch.full((1, 2, 1), 5))
    got = ops.kv_decode(**arguments, rows=torch.tensor([-1, 5, 9, -3]).expand(1, 2, 4))
    assert torch.equal(got.out, expected.out)
    valid = torch.arange(9).eq(5).expand(1, 2, 9)
    assert torch.equal(ops.kv_decode(**arguments, valid=valid).out, expected.out)


def test_channels_are_where_the_row_format_puts_them():
    """Written with loops, unlike the reference: the logit of a query of one channel is that channel of the key."""
    codes = torch.randint(0, 256, (1, 1, 3, 80 * 3 // 8), dtype=torch.uint8)
    step, low = torch.ones(1, 1, 3, 5, dtype=torch.float16), torch.zeros(1, 1, 3, 5, dtype=torch.float16)
    keys = PackedRows(codes, step, low, 3)
    values = torch.zeros(1, 1, 3, 16)
    for channel in range(0, 80, 7):
        q = torch.zeros(1, 1, 80)
        q[..., channel] = 1.0
        logits = ops.kv_decode(q, keys, values, scale=1.0, want=("logits",)).logits
        for n in range(3):
            two, one = int(codes[0, 0, n, channel % 20]), int(codes[0, 0, n, 20 + channel % 10])
            code = (two >> (2 * (channel // 20)) & 3) + 4 * (one >> (channel // 10) & 1)
            assert logits[0, 0, n] == code


@pytest.mark.parametrize("dtype", DTYPES)
def test_slots_without_a_key_may_hold_anything(dtype):
    arguments = case(3, dtype=dtype, slots=35, valid=True)
    expected = ops.kv_decode(**arguments, want=WANT)
    for name in ("k", "v"):
        arguments[name] = arguments[name].masked_fill(~arguments["valid"].unsqueeze(-1), torch.nan)
    for a, b in zip(ops.kv_decode(**arguments, want=WANT), expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("splits", [1, 3])
def test_no_key_at_all(splits):
    """In one head of a sequence; then nowhere, by validity, by bias, by rows, by length."""
    arguments = case(4, batch=2, slots=40, valid=True)
    arguments["valid"][1, 0] = False
    got = check(arguments, splits)
    assert not got.out[1, :2].any() and got.out[1, 2:].any()
    for nothing in (
        case(4, slots=40) | {"valid": torch.zeros(1, 2, 40, dtype=torch.bool)},
        case(4, slots=40) | {"bias": torch.full((1, 1, 40), -torch.inf)},
        case(4, slots=40) | {"rows": torch.full((1, 2, 40), -1)},
        case(4, slots=40, rows=0),
        case(4, slots=0),
    ):
        got = check(nothing, splits)
        assert not got.out.any() and not got.mass.any() and (got.lse == -torch.inf).all()


def test_no_sequences():
    arguments = case(5, batch=2)
    empty = {name: x[:0] if isinstance(x, Tensor) else x for name, x in arguments.items()}
    assert [x.shape[0] for x in ops.kv_decode(**empty, want=WANT)] == [0] * 4


def test_large_logits_and_long_rows_of_equal_ones():
    """exp would overflow without the running maximum; a float16 probability of one key in many would lose its bits."""
    arguments = case(6, dtype=torch.float16, slots=60)
    check(arguments | {"bias": torch.linspace(-3e4, 3e4, 60).expand(1, 1, 60)}, 2)
    arguments["q"].zero_()
    bias = torch.full((1, 1, 60), -11.0)  # beside one key of probability 1, those of exp(-11), subnormal in float16
    bias[..., 0] = 0.0
    got = check(arguments | {"bias": bias}, 1)
    expected = decode_reference(**{**arguments, "q": arguments["q"].double(), "bias": bias}).out
    assert (got.out - expected).abs().max() < 2.0**-11 * 60 * math.exp(-11) * 4 + 1e-5


def test_more_splits_than_are_merged_at_once():
    """Logits that grow along the splits, so that each block of them outweighs what was merged before."""
    check(
        case(15, kv_heads=1, ratio=1, slots=16 * 40, bias=1) | {"bias": torch.linspace(0, 60, 640).expand(1, 1, 640)},
        40,
    )


def test_bf16_queries_beyond_float16():
    arguments = case(7, dtype=torch.bfloat16, bits=(8, 8))
    arguments["q"] *= 2.0**20
    arguments["scale"] *= 2.0**-20
    check(arguments)


def test_stores_and_masks_are_read_where_they_lie():
    """The beginning of a longer cache, slots before heads, and masks that broadcast, against copies of the same."""
    whole = case(8, batch=2, slots=50, bits=(4, 0))
    k, v = whole["k"], whole["v"].transpose(1, 2).contiguous().transpose(1, 2)
    low = k.low.transpose(1, 2).contiguous().transpose(1, 2)
    short = PackedRows(*(part[:, :, :33] for part in (k.codes, k.step, low)), 4)
    masks = {
        "valid": torch.rand(2, 1, 66)[:, :, ::2].gt(0.3).expand(2, 2, 33),
        "bias": torch.randn(1, 2, 33).expand(2, 2, 33),
    }
    got = ops.kv_decode(whole["q"], short, v[:, :, :33], scale=1.0, want=WANT, **masks)
    copied = {name: mask.contiguous() for name, mask in masks.items()}
    copy = PackedRows(*(part.contiguous() for part in short[:3]), 4)
    expected = ops.kv_decode(whole["q"], copy, v[:, :, :33].contiguous(), scale=1.0, want=WANT, **copied)
    for a, b in zip(got, expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_listed_rows_are_the_rows_themselves(dtype):
    arguments = case(9, slots=48, bits=(3, 8))
    rows = torch.stack([torch.randperm(48)[:20] for _ in range(2)]).unsqueeze(0)
    got = ops.kv_decode(**arguments, rows=rows.to(dtype), want=WANT)
    for name in ("k", "v"):
        at = [part.gather(2, rows.unsqueeze(-1).expand(1, 2, 20, part.shape[-1])) for part in arguments[name][:3]]
        arguments[name] = PackedRows(*at, arguments[name].bits)
    for a, b in zip(got, ops.kv_decode(**arguments, want=WANT), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("k_dtype", DTYPES)
@pytest.mark.parametrize("v_dtype", DTYPES)
def test_stores_of_another_dtype(k_dtype, v_dtype):
    for q_dtype in DTYPES[:2]:
        arguments = case(10, dtype=q_dtype, slots=20)
        check(arguments | {"k": arguments["k"].to(k_dtype), "v": arguments["v"].to(v_dtype)})


@pytest.mark.parametrize("q_dtype", [torch.float32, torch.bfloat16])
def test_parts_of_two_tiers_merge_into_the_whole(q_dtype):
    """Recent rows in 8 bits and old ones in 2, as one attention; then with a tier that has no key yet."""
    high, low = (
        case(11, dtype=q_dtype, slots=20, bits=(8, 8)),
        case(12, dtype=q_dtype, slots=45, bits=(2, 2), valid=True),
    )
    low["q"] = high["q"]
    both = {"q": high["q"].double(), "scale": high["scale"]}
    for name in ("k", "v"):
        rows = [decode_rows(tier[name]) for tier in (high, low)]
        both[name] = torch.cat(rows, 2)
    both["valid"] = torch.cat([torch.ones(1, 2, 20, dtype=torch.bool), low["valid"]], 2)
    expected = decode_reference(**both, want=("lse",))
    parts = [ops.kv_decode(**tier, want=("lse",), dtype=torch.float32)[:2] for tier in (high, low)]
    out, lse = merge(parts)
    bound = 1e-5 if q_dtype == torch.float32 else 1e-2
    torch.testing.assert_close(out.double(), expected.out, rtol=0, atol=bound)
    torch.testing.assert_close(lse.double(), expected.lse, rtol=0, atol=bound)
    nothing = ops.kv_decode(
        **low | {"valid": torch.zeros(1, 2, 45, dtype=torch.bool)}, want=("lse",), dtype=torch.float32
    )
    out, lse = merge([nothing[:2], parts[0]])
    torch.testing.assert_close(out, parts[0][0], rtol=0, atol=0)
    torch.testing.assert_close(lse, parts[0][1], rtol=1e-6, atol=0)
    out, lse = merge([nothing[:2]] * 2)
    assert not out.any() and (lse == -torch.inf).all()


def decode_rows(x: PackedRows) -> Tensor:
    return dequantize_rows(x.codes, x.step, x.low, x.bits, x.group).double()


def test_only_what_is_wanted_is_given():
    arguments = case(13)
    for want in ((), ("lse",), ("mass",), ("logits", "lse")):
        got = ops.kv_decode(**arguments, want=want)
        assert {name for name in WANT if getattr(got, name) is not None} == set(want)
        assert torch.equal(got.out, ops.kv_decode(**arguments, want=WANT).out)
    with pytest.raises(ValueError, match="want='scores' is not a result; use 'lse', 'logits', 'mass'"):
        ops.kv_decode(**arguments, want=("scores",))


def test_opcheck():
    parts = ("test_schema", "test_faketensor")  # the others trace Triton calls, which an interpreted kernel is not
    op = torch.ops.accelpass.kv_decode_triton
    a = case(14, dtype=torch.bfloat16, bits=(4, 0), rows=12, valid=True, bias=1)
    given = (a["q"], *a["k"], a["v"], None, None, 0, a["scale"], a["rows"], a["valid"], a["bias"])
    torch.library.opcheck(op, (*given, True, True, torch.float32), test_utils=parts)
    torch.library.opcheck(op, given[:10], test_utils=parts)
